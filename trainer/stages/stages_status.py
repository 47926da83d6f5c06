"""How an experiment in stages is doing, from its folder alone."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.run.folder import RunFolder
from trainer.run.run_status import AGAIN_LATER, how_it_ended, status
from trainer.run.watch import Watch
from trainer.stages.stage_record import StagesFolder


def stages_status(path: Path) -> tuple[str, int]:
    """How far the stages are in words, and an exit code: 0 if all are finished, 75 if stopped by a signal, else 1.

    Raises:
        UserError: the record is not as it was written.
    """
    folder = StagesFolder(path)
    done = [stage["label"] for stage in folder.read()["stages"]]
    if folder.finished:
        return f"{path}: all {len(done)} stages finished, see {folder.report}", 0
    finished = f"{len(done)} stages finished" if done else "no stage finished yet"
    if (end := how_it_ended(RunFolder(path))) is not None:  # the note is of the command, and so in the folder of all
        return f"{path}: {finished}; {end['said']}", AGAIN_LATER if end["code"] == AGAIN_LATER else 1
    if (run := present_run(path)) == path:
        return f"{path}: {finished}", 1
    said, code = status(run)
    return f"{path}: {finished}; {said}", AGAIN_LATER if code == AGAIN_LATER else 1


def present_run(path: Path) -> Path:
    """The run folder of the stage, or round, that runs or ran last; the path itself if none has begun."""
    def number(one: Path) -> int:
        return int(re.search(r"\d+", one.name).group())

    stages = sorted((one for one in path.iterdir() if re.fullmatch(r"\d+-[a-z]+", one.name)), key=number)
    if not stages:
        return path
    rounds = sorted(stages[-1].glob("round-*"), key=number)
    last = rounds[-1] if rounds else stages[-1]
    return last if RunFolder(last).experiment.exists() or (last / ".status.json").exists() else path


class WatchStages:
    """Looks at the stage that runs or ran last, again and again; see `Watch`.

    Args:
        path: the folder of all stages.
    """

    def __init__(self, path: Path) -> None:
        self.folder = StagesFolder(path)
        self._looks: dict[Path, Watch] = {}

    def frame(self, columns: int, rows: int = 50) -> tuple[list[str], int | None]:
        """See `Watch.frame`; a finished stage is no end while there is another one."""
        run = present_run(self.folder.path)
        if run not in self._looks:
            self._looks[run] = Watch(run)
        lines, code = self._looks[run].frame(columns, rows)
        if code is not None and how_it_ended(RunFolder(self.folder.path)) is not None:
            said, code = stages_status(self.folder.path)
            return [*said.splitlines()[:1], *lines[1:]], code
        return lines, None if code == 0 and not self.folder.finished else code
