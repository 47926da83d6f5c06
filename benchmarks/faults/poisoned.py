"""train.py with a fault in its numbers: `poisoned.py WHAT --config FILE [key=value ...]`.

WHAT is `sample:ROW`, whose loss is NaN whenever it is read; `loss:STEP:RANK` or `gradient:STEP:RANK`, NaN in one step
of one rank, the other's being finite; or `from:STEP`, NaN losses from a step on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.cli import train  # noqa: E402
from trainer.training.loop import TrainLoop  # noqa: E402


class NaNGradient(torch.autograd.Function):
    """A number with a gradient that is NaN."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        """The number as it is."""
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        """NaN."""
        return gradient * torch.nan


def poison(what: str) -> None:
    """Put the fault into the loop."""
    kind, *numbers = what.split(":")
    place = [int(number) for number in numbers]
    plain = TrainLoop._loss

    def loss(self: TrainLoop, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        found, terms = plain(self, batch)
        step = self.state.step + 1
        here = {"sample": lambda: place[0] in batch["row"].tolist(), "from": lambda: step >= place[0]}.get(
            kind, lambda: place == [step, self.accelerator.process_index])()
        if not here:
            return found, terms
        return (NaNGradient.apply(found) if kind == "gradient" else found * torch.nan), terms

    TrainLoop._loss = loss


if __name__ == "__main__":
    poison(sys.argv[1])
    sys.exit(train(sys.argv[2:]))
