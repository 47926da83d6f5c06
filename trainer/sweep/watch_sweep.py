"""`limbeck watch` of a sweep: how far it is, what its runs are doing, and what they have found."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import UserError
from trainer.run.watch import NARROW, WIDE, Watch
from trainer.sweep.run_sweep import progress_of
from trainer.sweep.sweep_record import RunRecord, SweepFolder, SweepRecord
from trainer.sweep.sweep_table import number

ORDER = ("running", "failed", "stopped", "finished", "waiting")  # in which runs are shown


class WatchSweep:
    """Looks at a sweep again and again; see `Watch`.

    Args:
        path: folder of the sweep.
    """

    def __init__(self, path: Path) -> None:
        self.folder = SweepFolder(path)
        self._looks: dict[str, Watch] = {}

    def frame(self, columns: int, rows: int = 50) -> tuple[list[str], int | None]:
        """What is to be seen now, as lines of text, and the exit code if the sweep does not go on."""
        record = self.folder.read()
        said, code, running = progress_of(self.folder, record)
        lines = [f"{record.name}  {said}"]
        for run in sorted(record.runs, key=lambda run: ORDER.index(run.state)):
            lines += self._lines(run, record, columns)
        shown = lines if len(lines) <= rows - 2 else [*lines[:rows - 3], f"and {len(lines) - rows + 3:,} more lines"]
        return [line[:max(NARROW, min(columns, WIDE))] for line in shown], None if running else code

    def _lines(self, run: RunRecord, record: SweepRecord, columns: int) -> list[str]:
        """What is said of a run: of one that goes on, the first lines of its own frame."""
        if run.state == "finished":
            return [f"  {run.title}: {record.metric} {number(run.figures[record.metric])}"]
        if run.state == "running":
            try:
                looks = self._looks.setdefault(run.title, Watch(self.folder.run(run).path))
                return [f"  {run.title}:", *(f"    {line}" for line in looks.frame(columns - 4, 0)[0][:3])]
            except UserError:  # it has not made its folder yet
                return [f"  {run.title}: starting"]
        return [f"  {run.title}: {run.state}" + (f": {run.said.splitlines()[0]}" if run.said else "")]
