"""What a run saves of a moment, how it ends on one, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

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
    """Writes checkpoints of a training's state and its engine, and reads them back, on each process.

    Args:
        folder: of the run.
        settings: how many are kept, and whether they are committed behind training.
        engine: holds weights and optimizer.
        ranks: that all take part.
        say: shows a line; on the first process.
    """

    def __init__(self, folder: RunFolder, settings: Training, engine: Engine, ranks: RankGroup,
                 say: Callable[[str], None]) -> None:
        self.folder, self.engine, self.ranks = folder.checkpoints, engine, ranks
        self.checkpoints = checkpoints.Checkpoints(
            folder.checkpoints, settings.keep_checkpoints, rank=ranks.index, ranks=ranks.topology.ranks,
            gather=ranks.gather_objects, background=settings.background_saves, say=say,
            beside=[folder.metrics])  # of which a checkpoint's steps must not be missing after a power cut

    @property
    def last(self) -> Path | None:
        """The checkpoint to go on from, as far as the first process knows."""
        return self.checkpoints.last

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of this moment; with `training.background_saves` it is committed behind the next steps.

        One that cannot be written is said, and training goes on with the one before it.

        Raises:
            RunFailed: weights are not finite, which an update may make of finite ones; no checkpoint is made of them.
        """
        self.ranks.at(f"the checkpoint of step {state.step}")
        if self.ranks.total((~weights_finite(self.engine)).long().to(self.ranks.device)):
            good = f"and those in {self.folder} are good" if checkpoints.listed(self.folder) else \
                "nor was there one yet"
            raise RunFailed(f"weights are not finite at step {state.step}, though loss and gradient were in every step "
                            f"that was taken: no checkpoint is made of them, {good}.\n"
                            "  -> lower optimizer.lr; then start the same command again, or another run")
        self.checkpoints.save(state.step, self.engine, {
            **state.state_dict(), "engine": self.engine.scale_state(), "processes": self.ranks.topology.ranks})

    def finish(self, seconds: float | None = None) -> None:
        """Wait until the last checkpoint is committed or given up; of other processes only their threads are needed."""
        self.checkpoints.finish(seconds)

    def stop(self, state: TrainState, name: str) -> NoReturn:
        """Save this moment, and end as all processes have agreed to; `name` is the experiment's."""
        every = self.ranks.gather_objects([signals.asked()])
        process, signal = next((process, signal) for process, signal in enumerate(every) if signal is not None)
        if state.step:
            self.save(state)
        self.finish()
        self.ranks.accelerator.wait_for_everyone()
        with suppress(OSError):  # of a full disk
            for tracker in self.ranks.accelerator.trackers:
                tracker.finish()
        saved = max((one.name for one in self.folder.glob("step-*")), default=None)
        raise Stopped(name, state.step, signal, process, saved)

    def resume(self, state: TrainState) -> None:
        """Go on from the newest checkpoint that is good, if there is one.

        Raises:
            RunFailed: it is as it was written, and of another model or version.
        """
        newest = self.checkpoints.newest_good()
        if newest is None:
            return
        found = wrong = None
        try:
            found = checkpoints.load(newest, self.engine, self.ranks.index)
        except checkpoints.Unreadable as error:
            wrong = str(error)
        self._check(newest, wrong)
        self.engine.refresh()
        state.load_state_dict(found)
        self.engine.load_scale_state(found["engine"], state.precision.loss_scale)

    def _check(self, checkpoint: Path, wrong: str | None) -> None:
        """Raise `RunFailed` on every process where one of them cannot use a checkpoint that is as it was written."""
        wrong = next(filter(None, self.ranks.gather_objects([wrong])), None)
        if wrong is not None:
            before = [path.name for path in checkpoints.listed(self.folder) if path.name < checkpoint.name]
            raise RunFailed(f"the checkpoint {checkpoint} cannot be gone on from: {wrong}.\n"
                            "  -> start again with the model and the version that wrote it; or move that folder away: "
                            "the run then goes on from "
                            + (f"{before[-1]}, the checkpoint before it" if before else "its beginning"))
