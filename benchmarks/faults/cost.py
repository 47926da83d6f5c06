"""What checkpoints cost: the quickstart's student with one every few steps, in the background and not, and without.

    python -m benchmarks.faults.cost --json FILE [--rounds 7] [--steps 60] [--every 10]

Each round trains the same steps in the three ways, in an order that turns. Measured is the time from the end of one
step to the end of another, saves and all that the background does meanwhile included; the ratio to the round's run
without checkpoints is the cost at `--every`. A checkpoint's own seconds follow from it, and so does the cost at the
quickstart's own `training.checkpoint_every`. The teacher has random weights: they change no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.rematerialization.frontier import machine
from trainer.data.dataset import prepare_text
from trainer.distributed.launch import start
from trainer.experiment.experiment import Experiment
from trainer.experiment.load import read_experiment
from trainer.models.build import quiet_libraries
from trainer.preparation import Launched, prepare
from trainer.run.folder import RunFolder
from trainer.training.loop import TrainLoop

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NEVER, FIRST = 10**6, 10  # steps between the checkpoints of a run without; the step from whose end on time is taken
WAYS = {"none": ("training.background_saves=false", f"training.checkpoint_every={NEVER}"),
        "background": ("training.background_saves=true",), "foreground": ("training.background_saves=false",)}


def asked(room: Path, name: str, options: argparse.Namespace, own: tuple[str, ...]) -> Experiment:
    """The quickstart for a few steps, without what is not training."""
    return read_experiment(CONFIG, [
        "teacher.train=null", f"teacher.path={room / 'teacher'}", "data.tokenizer.train_vocabulary=null",
        f"training.steps={options.steps}",
        f"training.evaluate_every={NEVER}", f"training.checkpoint_every={options.every}", f"run.folder={room / name}",
        f"run.cache={room / 'cache'}", *own]).experiment


def make_teacher(room: Path) -> None:
    """The quickstart's teacher before it has learned anything, with its tokenizer."""
    experiment = read_experiment(CONFIG, [f"run.cache={room / 'cache'}"]).experiment
    tokenizer = prepare_text(experiment).tokenizer
    config = AutoConfig.for_model(**experiment.teacher.architecture, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(room / "teacher")
    tokenizer.save_pretrained(room / "teacher")


def seconds_of(experiment: Experiment, steps: int) -> float:
    """Seconds of a step, the mean over the steps after the first ones and before the last."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    how = Launched(*start(experiment))
    trainer = prepare(experiment, experiment, RunFolder(experiment.folder), how, prepare_text(experiment))
    moments = ends_of_steps(trainer)
    trainer.train()
    trainer.release()
    return (moments[steps - 2] - moments[FIRST - 2]) / (steps - FIRST)


def ends_of_steps(trainer: TrainLoop) -> list[float]:
    """Filled, as training goes on, with the moment at which each step is logged, before what is saved after it."""
    moments: list[float] = []
    plain = trainer._log

    def log(*arguments) -> None:
        plain(*arguments)
        moments.append(time.perf_counter())

    trainer._log = log
    return moments


def measured(room: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step in each way, round by round."""
    quiet_libraries()
    make_teacher(room)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(-1, options.rounds):  # the first warms up
        order = list(WAYS)[number % 3:] + list(WAYS)[:number % 3]
        for name in order:
            seconds = seconds_of(asked(room, f"{name}{number}", options, WAYS[name]), options.steps)
            if number >= 0:
                found[name].append(seconds)
    return found


def summary(found: dict[str, list[float]], every: int, own: int) -> dict[str, dict[str, float]]:
    """Median ratios to a step without checkpoints, at `every` steps and at the quickstart's `own`, by way of saving."""
    result = {}
    for name in ("background", "foreground"):
        more = [seconds / plain - 1 for seconds, plain in zip(found[name], found["none"], strict=True)]
        cost = statistics.median(more)
        result[name] = {"ratio": 1 + cost, "ratio_at_own": 1 + cost * every / own,
                        "seconds_per_save": cost * every * statistics.median(found["none"]),
                        "lowest": 1 + min(more), "highest": 1 + max(more)}
    return result


def table(found: dict) -> str:
    """The result as Markdown."""
    lines = [f"| checkpoints | step time, one every {found['every']} steps (rounds) | a save | step time, one every "
             f"{found['own']} as in the quickstart |", "|---|---:|---:|---:|"]
    for name, one in found["summary"].items():
        lines.append(f"| in the {name} | x{one['ratio']:.4f} ({one['lowest']:.3f} to {one['highest']:.3f}) | "
                     f"{one['seconds_per_save'] * 1e3:.0f} ms | x{one['ratio_at_own']:.4f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    own = read_experiment(CONFIG, []).experiment.training.checkpoint_every
    with tempfile.TemporaryDirectory() as room:
        found = measured(Path(room), options)
    result = {"machine": machine("cpu"), "steps": options.steps, "every": options.every, "own": own, "seconds": found,
              "summary": summary(found, options.every, own)}
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
