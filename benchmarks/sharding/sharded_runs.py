"""Trains several experiments one after another in the same processes, and writes what came of each.

    accelerate launch ... benchmarks/sharding/sharded_runs.py RUNS.json

RUNS.json: [{"name": .., "file": experiment, "overrides": [..]}], and where it is wanted "until": step to end at,
"fp16": true, which DeepSpeed has on no CPU by itself, "poison": [kind, step] on process 1, "kill": [step, processes],
"masked": [process, micro-batch] that has no target at any step, "begins": true, which has each process write the fp32
weights that it holds before the first step, as NAME-begins-RANK.safetensors with keys of name@first element,
"peer": the optimizer of another library, by its full name, in place of ours. The first process writes NAME.json beside
it: losses, gradient norms, loss scales, memory, and what each process decided, and the fp32 weights of ours as
NAME.safetensors.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from strategies.common.cpu_products import fp32_products  # noqa: E402
from strategies.common.shards import local, local_of  # noqa: E402
from trainer import checkpoints  # noqa: E402
from trainer.experiment.load import read_experiment  # noqa: E402
from trainer.run.metrics import read_lines  # noqa: E402
from trainer.student.weight_digests import digests_in_training, digests_of, first_difference  # noqa: E402

PEERS_LR = 1e-2
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


def poison(trainer, kind: str, step: int) -> None:
    """Make the losses of a step NaN, with their gradient, or infinite beside a finite gradient."""
    plain = trainer._loss

    def loss(batch):
        found, terms = plain(batch)
        if trainer.state.step + 1 != step:
            return found, terms
        return (found * float("nan"), terms) if kind == "nan" else (found + float("inf"), terms)

    trainer._loss = loss


def remembered(trainer) -> list[dict]:
    """Filled, as training goes on, with what this process does: whether it takes a step, its loss scale, its rows."""
    steps: list[dict] = []
    rows: list[int] = []
    update, plain = trainer._update, trainer._loss

    def loss(batch):
        rows.extend(batch["row"].tolist())
        return plain(batch)

    def remembering(loss_finite):
        norm = update(loss_finite)
        steps.append({"nonfinite": trainer.state.nonfinite, "skipped": trainer.precision.skipped,
                      "scale": trainer.precision.loss_scale, "rows": list(rows)})
        rows.clear()
        return norm

    trainer._update, trainer._loss = remembering, loss
    return steps


def kill(trainer, step: int) -> None:
    """As kill -9 does, when a step's gradients are there and its weights are not."""
    update = trainer._update

    def killing(loss_finite):
        if trainer.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(loss_finite)

    trainer._update = killing


def mask(trainer, number: int) -> None:
    """Take all targets from one micro-batch of every step."""
    plain = trainer._batches

    def without_targets():
        for count, batch in enumerate(plain()):
            if count % trainer.plan.accumulation == number:
                batch = {**batch, "targets": torch.full_like(batch["targets"], -100)}
            yield batch

    trainer._batches = without_targets


def begins(trainer, file: Path) -> None:
    """Write the fp32 weights that this process holds, and assert that what forward runs on is these, rounded."""
    parts = {f"{piece.name}@{piece.start}": piece.of(local_of(tensor)).clone()
             for tensor, layout in trainer.engine.tensors() for piece in layout.pieces if piece.numel}
    save_file(parts, file)
    run_on = [getattr(parameter, "ds_tensor", parameter) for parameter in trainer.unwrapped.parameters()]
    before = [local(tensor).clone() for tensor in run_on]
    trainer.engine.refresh()
    assert all(torch.equal(old, local(new)) for old, new in zip(before, run_on, strict=True))


def one(run: dict, folder: Path) -> None:
    """Train one experiment, and write what came of it."""
    from trainer.data.dataset import prepare_text
    from trainer.distributed.launch import start
    from trainer.early_checks import check_early
    from trainer.models.build import quiet_libraries
    from trainer.preparation import Launched, prepare
    from trainer.run.folder import RunFolder

    fresh()
    quiet_libraries()
    experiment = read_experiment(run["file"], run["overrides"]).experiment
    how = Launched(*start(experiment))
    accelerator = how.accelerator
    check_early(experiment, how.topology, how.plans)
    if run.get("fp16"):
        allow_fp16()
    with accelerator.main_process_first():
        text = prepare_text(experiment)
    trainer = prepare(experiment, experiment, RunFolder(experiment.folder), how, text)
    if run.get("begins"):
        begins(trainer, folder / f"{run['name']}-begins-{accelerator.process_index}.safetensors")
    if run.get("until"):
        trainer.steps = run["until"]
    if run.get("poison") and accelerator.process_index == 1:
        poison(trainer, *run["poison"])
    if run.get("masked") and accelerator.process_index == run["masked"][0]:
        mask(trainer, run["masked"][1])
    steps = remembered(trainer)
    if run.get("kill") and accelerator.process_index in run["kill"][1]:
        kill(trainer, run["kill"][0])
    trainer.train()
    every = gather_object([steps])
    dtypes = {str(tensor.dtype) for tensor, _ in trainer.engine.tensors()}
    digests = digests_in_training(trainer.engine, accelerator.device, trainer.frozen_digests)
    if accelerator.is_main_process:
        lines = read_lines(trainer.folder.metrics)
        steps = [line for line in lines if "loss" in line]
        found = {name: [line[name] for line in steps] for name in ("step", "loss", "gradient_norm", "loss_scale",
                                                                  "skipped")}
        found["decisions"] = [[{name: step[name] for name in ("nonfinite", "skipped", "scale")} for step in own]
                              for own in every]
        found["rows"] = [sorted(sum((step["rows"] for step in own), [])) for own in zip(*every, strict=True)]
        found["dtypes"] = sorted(dtypes)
        found["digests"] = digests
        found["memory"] = [line["memory"] for line in lines if "memory" in line][-1:]
        found["held_out"] = [line["held_out"]["bits_per_byte"] for line in lines if "held_out" in line]
        found["kinds"] = sorted({type(module).__name__ for module in (trainer.student, trainer.engine)})
        newest = checkpoints.latest(trainer.folder.checkpoints)
        if newest is not None:
            found["made again otherwise"] = first_difference(digests, digests_of(trainer.whole()))
            saved = checkpoints.Saved(newest, json.loads((newest / "state.json").read_text())["shapes"])
            save_file({name: saved.read("model", name, checkpoints.Piece(name, shape, 0, torch.Size(shape).numel()))
                       for name, shape in saved.shapes.items()}, folder / f"{run['name']}.safetensors")
        (folder / f"{run['name']}.json").write_text(json.dumps(found))
    trainer.release()
    accelerator.wait_for_everyone()


def with_peer(run: dict, folder: Path) -> None:
    """Train with the optimizer of another library; what it does not survive is written down instead."""
    from trainer.experiment.nodes import Optimizer
    from trainer.training.saving import Saver

    module, _, name = run["peer"].rpartition(".")
    own, save, theirs = Optimizer.build, Saver.save, getattr(import_module(module), name)
    Optimizer.build = lambda self, model: theirs(model.parameters(), lr=PEERS_LR)
    Saver.save = lambda self, state: None  # checkpoints know ours
    try:
        one(run, folder)
    except Exception as error:  # on every rank alike
        said = str(error).splitlines()[0].partition(". ")[0][:120]
        (folder / f"{run['name']}.json").write_text(json.dumps({"error": said}))
    finally:
        Optimizer.build, Saver.save = own, save


def main(file: Path) -> None:
    """Run all of them, with the same matrix products on one process as on several."""
    with fp32_products(torch.device("cpu"), faster=False):
        for run in json.loads(file.read_text()):
            (with_peer if run.get("peer") else one)(run, file.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
