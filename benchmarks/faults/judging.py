"""What became of a run that something happened to, and the table of it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.contenders import Contender
from benchmarks.faults.processes import Started

PATHS = re.compile(r"/\S*?/(?=site-packages/|run\d|checkpoint)")  # of the machine, which tell nobody anything
PATIENCE = 900.0  # seconds after which a start that should end hangs


@dataclass
class Row:
    """A fault, and what came of it.

    Attributes:
        system: what it was done to.
        how: the processes it was done to, and how they were started.
        tries: how often it was done.
        resumed: started again with the same command, it went on from a checkpoint, where one was there, and finished.
        bitwise: so many of the tries ended with the weights, optimizer state and losses of the run never stopped;
            None where they need not be, as with another number of processes.
        unrecoverable: so many did not go on, though they had a checkpoint, or ended with weights that are not finite.
        lost: most steps that had been logged and were done again.
        remarks: what else was found.
        failures: of each try that failed, what was done and what was said.
    """

    fault: str
    system: str
    how: str
    tries: int = 0
    resumed: int = 0
    bitwise: int | None = 0
    unrecoverable: int = 0
    lost: int = 0
    remarks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def fails(self, what: str, said: str = "") -> None:
        """Remember a try that failed."""
        told = PATHS.sub("", " / ".join(said.strip().splitlines()[-3:]))[-400:]
        self.failures.append(f"{what}: {told}" if said else what)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class End:
    """Where the run never stopped came to: tensors of its last checkpoint, and the losses of its steps."""

    tensors: dict[str, torch.Tensor]
    losses: dict[int, Any]

    @classmethod
    def of(cls, contender: Contender, folder: Path) -> End:
        """Of a finished run."""
        return cls(contender.tensors(folder), contender.losses(folder))

    def equals(self, other: End) -> bool:
        """To the last bit."""
        return self.losses == other.losses and self.tensors.keys() == other.tensors.keys() and all(
            torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())

    @property
    def finite(self) -> bool:
        """Whether every number is."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors.values() if tensor.is_floating_point())


def undisturbed(contender: Contender, folder: Path, **how: Any) -> End:
    """Train without a fault."""
    started = contender.start(folder, **how)
    if started.wait(PATIENCE) != 0:
        raise RuntimeError(f"{contender.name} does not run at all:\n{started.text()[-3000:]}")
    return End.of(contender, folder)


def gone_on(row: Row, contender: Contender, folder: Path, end: End | None, what: str, done: int, *options: str,
            had: bool = True, **how: Any) -> Started:
    """Start a run again after a fault, and count in `row` what comes of it.

    Args:
        end: that of the run never stopped, for what has to be the same to the last bit.
        what: was done, for people.
        done: the last step logged before.
        had: whether there was a checkpoint that it has to go on from.
    """
    started = contender.start(folder, *options, **how)
    code = started.wait(PATIENCE)
    began = started.began
    row.tries += 1
    if code != 0 or (had and began == 0):
        row.unrecoverable += 1
        row.fails(f"{what}: started again it " + ("hung" if code is None else f"ended with {code}" if code else
                                                  "began from nothing"), started.text())
        return started
    row.resumed += 1
    row.lost = max(row.lost, done - began if began is not None else 0)
    judge_end(row, contender, folder, end, what)
    return started


def judge_end(row: Row, contender: Contender, folder: Path, end: End | None, what: str, tries: int = 1) -> None:
    """Count whether a finished run ended as the one never stopped."""
    found = End.of(contender, folder)
    if not found.finite:
        row.unrecoverable += tries
        row.resumed -= tries
        row.fails(f"{what}: finished with weights that are not finite")
    if end is not None and found.equals(end):
        row.bitwise += tries
    elif end is not None:
        row.fails(f"{what}: finished, but not as the run never stopped")


def table(found: dict[str, Any]) -> str:
    """Rows as Markdown."""
    lines = ["| fault | done to | tries | resumed | bitwise | unrecoverable | most steps done twice | |",
             "|---|---|---:|---:|---:|---:|---:|---|"]
    for row in found["rows"]:
        bitwise = "" if row["bitwise"] is None else row["bitwise"]
        lines.append(f"| {row['fault']} | {row['system']}; {row['how']} | {row['tries']} | {row['resumed']} | {bitwise}"
                     f" | {row['unrecoverable']} | {row['lost']} | {'; '.join(row['remarks'])} |")
    return "\n".join(lines)
