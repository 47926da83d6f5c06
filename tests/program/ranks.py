"""Launched by tests: trains several experiments one after another in the same processes, and writes what came of each.

    accelerate launch ... tests/program/ranks.py RUNS.json

RUNS.json: [{"name": .., "file": experiment, "overrides": [..], "steps": N or null, "fp16": bool}]. The first process
writes NAME.json beside it: losses, gradient norms, loss scales, and the fp32 weights as NAME.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from trainer import checkpoints  # noqa: E402
from trainer.experiment.reading import read_experiment  # noqa: E402
from trainer.metrics import read_lines  # noqa: E402

ON_CPU = os.environ.get("ACCELERATE_USE_CPU", "")


def fresh() -> None:
    """As if no Accelerator had been made yet."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for variable in [name for name in os.environ if name.startswith("ACCELERATE_USE_DEEPSPEED")]:
        del os.environ[variable]
    if ON_CPU:
        os.environ["ACCELERATE_USE_CPU"] = ON_CPU


def allow_fp16() -> None:
    """DeepSpeed thinks that CPUs have no fp16; torch computes it, slowly."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def poison(trainer, kind: str) -> None:
    """Make every loss NaN, with its gradient, or infinite beside a finite gradient."""
    plain = trainer._loss

    def loss(batch):
        found, terms = plain(batch)
        return (found * float("nan"), terms) if kind == "nan" else (found + float("inf"), terms)

    trainer._loss = loss


def remembered(trainer) -> list[tuple[float, float]]:
    """Filled, as training goes on, with what this process decides: whether a step is taken, and the loss scale."""
    decisions: list[tuple[float, float]] = []
    update = trainer._update

    def remembering(loss_finite):
        norm = update(loss_finite)
        decisions.append((float(trainer.nonfinite), trainer.precision.loss_scale))
        return norm

    trainer._update = remembering
    return decisions


def one(run: dict, folder: Path) -> None:
    """Train one experiment, and write what came of it."""
    from trainer.data.dataset import prepare_text
    from trainer.engines import start
    from trainer.folder import RunFolder
    from trainer.models import quiet_libraries
    from trainer.run import check_early, prepare

    fresh()
    quiet_libraries()
    experiment = read_experiment(run["file"], run["overrides"]).experiment
    accelerator = start(experiment)
    check_early(experiment, accelerator.num_processes)
    if run.get("fp16"):
        allow_fp16()
    with accelerator.main_process_first():
        text = prepare_text(experiment)
    trainer = prepare(experiment, experiment, RunFolder(experiment.folder), accelerator, text)
    if run.get("until"):
        trainer.steps = run["until"]
    if run.get("poison") and accelerator.process_index == 1:
        poison(trainer, run["poison"])
    decisions = remembered(trainer)
    trainer.train()
    decisions = accelerator.gather(torch.tensor(decisions)[None]).tolist()
    if accelerator.is_main_process:
        lines = read_lines(trainer.folder.metrics)
        steps = [line for line in lines if "loss" in line]
        found = {name: [line[name] for line in steps] for name in ("step", "loss", "gradient_norm", "loss_scale",
                                                                  "skipped")}
        found["decisions"] = decisions
        found["memory"] = [line["memory"] for line in lines if "memory" in line][-1:]
        found["held_out"] = [line["held_out"]["bits_per_byte"] for line in lines if "held_out" in line]
        found["kinds"] = sorted({type(module).__name__ for module in (trainer.student, trainer.engine)})
        newest = checkpoints.latest(trainer.folder.checkpoints)
        saved = checkpoints.Saved(newest, json.loads((newest / "state.json").read_text())["shapes"])
        save_file({name: saved.read("model", name, checkpoints.Piece(name, shape, 0, torch.Size(shape).numel()))
                   for name, shape in saved.shapes.items()}, folder / f"{run['name']}.safetensors")
        (folder / f"{run['name']}.json").write_text(json.dumps(found))
    trainer.release()
    accelerator.wait_for_everyone()


def main() -> None:
    """Run all of them."""
    file = Path(sys.argv[1])
    for run in json.loads(file.read_text()):
        one(run, file.parent)


if __name__ == "__main__":
    main()
