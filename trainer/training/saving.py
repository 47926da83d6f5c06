"""Saves training checkpoints, stops a run at one, and resumes from the newest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from strategies.common.running_statistics import RunningStatistics
from strategies.sharding.engine import Engine
from trainer import checkpoints
from trainer.distributed import signals
from trainer.distributed.rank_group import RankGroup
from trainer.errors import RunFailed, Stopped
from trainer.experiment.nodes import Training
from trainer.run.folder import RunFolder
from trainer.training.nonfinite import weights_finite
from trainer.training.train_state import TrainState


class Saver:
    """Writes and loads checkpoints of the training state and the engine, on every process.

    Args:
        folder: the run's folder.
        settings: how many checkpoints to keep, and whether to commit them in the background.
        engine: holds weights and optimizer.
        ranks: the processes of the run, all of which take part.
        say: prints a line on the first process.
        base: on the first process, the SHA-256 of the frozen base beneath the student's adapters, which is not saved;
            None without one.
    """

    def __init__(self, folder: RunFolder, settings: Training, engine: Engine, ranks: RankGroup,
                 say: Callable[[str], None], base: str | None = None) -> None:
        self.folder, self.settings, self.engine, self.ranks = folder.checkpoints, settings, engine, ranks
        self.run, self.say = folder, say
        self._base = {} if base is None else {"base": base}
        self.checkpoints = checkpoints.Checkpoints(
            folder.checkpoints, settings.keep_checkpoints, rank=ranks.index, ranks=ranks.topology.ranks,
            gather=ranks.gather_objects, background=settings.background_saves, say=say,
            # Synced with each checkpoint: after a power cut, metrics must not lack steps that a checkpoint has.
            beside=[folder.metrics])

    @property
    def last(self) -> Path | None:
        """The checkpoint to resume from, as far as the first process knows."""
        return self.checkpoints.last

    def save(self, state: TrainState) -> None:
        """Write a checkpoint now. With `training.background_saves` it is committed during the next steps.

        If it cannot be written, a message says so, and training continues with the previous one.

        Raises:
            RunFailed: weights are not finite, which can happen in an update whose loss and gradient were; no checkpoint
                is written.
        """
        self.ranks.at(f"the checkpoint of step {state.step}")
        if self.ranks.total((~weights_finite(self.engine)).long().to(self.ranks.device)):
            good = f"and those in {self.folder} are good" if checkpoints.listed(self.folder) else \
                "nor was there one yet"
            raise RunFailed(f"weights are not finite at step {state.step}, though loss and gradient were in every step "
                            f"that was taken: no checkpoint is made of them, {good}.\n"
                            "  -> lower optimizer.lr; then start the same command again, or another run")
        RunningStatistics(self.engine.student).average(self.ranks.total, self.ranks.topology.ranks)
        self.checkpoints.save(state.step, self.engine, {
            **state.state_dict(), "engine": self.engine.scale_state(), "processes": self.ranks.topology.ranks,
            **self._base})

    def finish(self, seconds: float | None = None) -> None:
        """Wait until the last checkpoint is committed or abandoned.

        Needs only the background threads of the other processes, not their main threads.
        """
        self.checkpoints.finish(seconds)

    def stop(self, state: TrainState, name: str) -> NoReturn:
        """Save a checkpoint and end the run, as all processes have agreed to do.

        Args:
            name: the experiment's name.
        """
        every = self.ranks.gather_objects([signals.asked()])
        process, signal = next((process, signal) for process, signal in enumerate(every) if signal is not None)
        if state.step:
            self.save(state)
        self.finish()
        self.ranks.accelerator.wait_for_everyone()
        with suppress(OSError):  # such as a full disk
            for tracker in self.ranks.accelerator.trackers:
                tracker.finish()
        saved = max((one.name for one in self.folder.glob("step-*")), default=None)
        raise Stopped(name, state.step, signal, process, saved)

    def resume(self, state: TrainState) -> None:
        """Resume from the newest intact checkpoint, if there is one.

        Raises:
            RunFailed: the checkpoint is intact, but was written by another model or version.
        """
        newest = self.checkpoints.newest_good()
        if newest is None:
            return
        found = wrong = None
        try:
            found = checkpoints.load(newest, self.engine, self.ranks.index)
            if self._base and found.get("base") != self._base["base"]:
                wrong = "the base beneath its adapters had other weights than student.path or the teacher has now"
        except checkpoints.Unreadable as error:
            wrong = str(error)
        self._check(newest, wrong)
        self.engine.refresh()
        state.load_state_dict(found, self.settings.batch_size)
        self.engine.load_scale_state(found["engine"], state.precision.loss_scale)

    def take_best(self, state: TrainState) -> int:
        """Give the engine the weights to export, and return their step: the last, or that of the best evaluation.

        With `training.keep_best`, the main process says and records which it is. A collective call.

        Raises:
            RunFailed: the best checkpoint is not as it was written.
        """
        if state.best is None:
            return state.step
        exported = self._load_best(state)
        if self.ranks.main:
            self.say(state.best.outcome(exported, state.step))
            state.best.record(self.run.best, exported, state.step)
        return exported

    def _load_best(self, state: TrainState) -> int:
        """Load the weights of the best evaluation's checkpoint into the engine; returns its step. A collective call.

        Where none is kept, as without a finite evaluation, the weights stay those of the last step.

        Raises:
            RunFailed: the checkpoint is not as it was written.
        """
        best = self.ranks.gather_objects([self._best_kept(state) if self.ranks.main else None])[0]
        if best is None or best.name == checkpoints.NAME.format(state.step):
            return state.step
        wrong = self._agreed(checkpoints.wrong_with(best, self.ranks.index, self.ranks.topology.ranks))
        if wrong is None:
            try:
                found = checkpoints.load(best, self.engine, self.ranks.index)
            except checkpoints.Unreadable as error:
                wrong = str(error)
        if (wrong := self._agreed(wrong)) is not None:
            raise RunFailed(f"the checkpoint {best}, of the best evaluation, cannot be exported: {wrong}.\n"
                            "  -> put that folder back from a copy; or run the experiment again, in another run.folder")
        self.engine.refresh()
        return found["step"]

    def _best_kept(self, state: TrainState) -> Path | None:
        """The checkpoint of the best evaluation, or of the best before it where that could not be written.

        The state knows of an evaluation after the last step, which a run that was stopped during it made up for.
        """
        own = None if state.best is None or state.best.step is None else \
            self.folder / checkpoints.NAME.format(state.best.step)
        return own if own is not None and own.is_dir() else checkpoints.best_kept(self.folder)

    def _agreed(self, wrong: str | None) -> str | None:
        """What is wrong on the first process where something is."""
        return next(filter(None, self.ranks.gather_objects([wrong])), None)

    def _check(self, checkpoint: Path, wrong: str | None) -> None:
        """Raise `RunFailed` on every process if one of them cannot load an intact checkpoint."""
        if (wrong := self._agreed(wrong)) is not None:
            before = [path.name for path in checkpoints.listed(self.folder) if path.name < checkpoint.name]
            raise RunFailed(f"the checkpoint {checkpoint} cannot be gone on from: {wrong}.\n"
                            "  -> start again with the model and the version that wrote it; or move that folder away: "
                            "the run then goes on from "
                            + (f"{before[-1]}, the checkpoint before it" if before else "its beginning"))
