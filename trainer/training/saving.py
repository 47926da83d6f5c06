"""What a run saves of a moment, how it ends on one, and how it goes on from there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from accelerate.utils import gather_object

from trainer import checkpoints
from trainer.distributed import signals
from trainer.errors import RunFailed, Stopped
from trainer.run.metrics import console
from trainer.training.nonfinite import weights_finite

if TYPE_CHECKING:  # pragma: no cover - names for the reader, not for the interpreter
    from trainer.training.loop import Trainer


def checkpoints_of(trainer: Trainer) -> checkpoints.Checkpoints:
    """What writes and finds the checkpoints of a run, on each of its processes."""
    name, main, training = trainer.experiment.name, trainer.accelerator.is_main_process, trainer.experiment.training
    return checkpoints.Checkpoints(
        trainer.folder.checkpoints, training.keep_checkpoints, rank=trainer.accelerator.process_index,
        ranks=trainer.accelerator.num_processes, gather=gather_object, background=training.background_saves,
        say=(lambda text: console.print(f"{name}  {text}")) if main else (lambda _: None),
        beside=[trainer.folder.metrics])  # of which a checkpoint's steps must not be missing after a power cut


def save(trainer: Trainer) -> None:
    """Write a checkpoint of this moment; with `training.background_saves` it is committed behind the next steps.

    One that cannot be written is said, and training goes on with the one before it.

    Raises:
        RunFailed: weights are not finite, which an update may make of finite ones; no checkpoint is made of them.
    """
    trainer.watch.at(f"the checkpoint of step {trainer.step}")
    if trainer.total((~weights_finite(trainer.engine)).long().to(trainer.accelerator.device)):
        folder = trainer.folder.checkpoints
        good = f"and those in {folder} are good" if checkpoints.listed(folder) else "nor was there one yet"
        raise RunFailed(f"weights are not finite at step {trainer.step}, though loss and gradient were in every step "
                        f"that was taken: no checkpoint is made of them, {good}.\n"
                        "  -> lower optimizer.lr; then start the same command again, or another run")
    trainer.checkpoints.save(trainer.step, trainer.engine, {
        "precision": trainer.precision.state_dict(), "engine": trainer.engine.scale_state(),
        "nonfinite": trainer.nonfinite, "empty_steps": trainer.empty_steps,
        "processes": trainer.accelerator.num_processes})


def stop(trainer: Trainer) -> NoReturn:
    """Save this moment, and end as all processes have agreed to."""
    every = gather_object([signals.asked()])
    process, signal = next((process, signal) for process, signal in enumerate(every) if signal is not None)
    if trainer.step:
        save(trainer)
    trainer.finish_saving()
    trainer.accelerator.wait_for_everyone()
    with suppress(OSError):  # of a full disk
        for tracker in trainer.accelerator.trackers:
            tracker.finish()
    saved = max((one.name for one in trainer.folder.checkpoints.glob("step-*")), default=None)
    raise Stopped(trainer.experiment.name, trainer.step, signal, process, saved)


def resume(trainer: Trainer) -> None:
    """Go on from the newest checkpoint that is good, if there is one.

    Raises:
        RunFailed: it is as it was written, and of another model or version.
    """
    newest = trainer.checkpoints.newest_good()
    if newest is None:
        return
    state = wrong = None
    try:
        state = checkpoints.load(newest, trainer.engine, trainer.accelerator.process_index)
    except checkpoints.Unreadable as error:
        wrong = str(error)
    _check(trainer, newest, wrong)
    trainer.engine.refresh()
    trainer.precision.load_state_dict(state["precision"])
    trainer.engine.load_scale_state(state["engine"], trainer.precision.loss_scale)
    trainer.step, trainer.empty_steps = state["step"], state.get("empty_steps", 0)
    trainer.nonfinite = 0  # a restart is a new chance for a step that was not finite


def _check(trainer: Trainer, checkpoint: Path, wrong: str | None) -> None:
    """Raise `RunFailed` on every process where one of them cannot use a checkpoint that is as it was written."""
    wrong = next(filter(None, gather_object([wrong])), None)
    if wrong is not None:
        before = [path.name for path in checkpoints.listed(trainer.folder.checkpoints) if path.name < checkpoint.name]
        raise RunFailed(f"the checkpoint {checkpoint} cannot be gone on from: {wrong}.\n"
                        "  -> start again with the model and the version that wrote it; or move that folder away: "
                        "the run then goes on from "
                        + (f"{before[-1]}, the checkpoint before it" if before else "its beginning"))
