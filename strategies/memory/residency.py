"""What a rank holds of a model that is shared out over ranks: the bytes that take the place of the whole model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Turn:
    """Bytes that come and go while one block runs, beside its activations.

    Attributes:
        forward: gathered weights, in its forward.
        backward: gathered weights, in its backward; the block's whole gradients are counted with its backward itself.
        reduced: for a moment after its backward: whole gradients and the buffers in which they are summed over ranks.
        kept: gradients that stay, of a step that began without any.
    """

    forward: int = 0
    backward: int = 0
    reduced: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Residency:
    """Bytes of one rank in a training step, whatever one process alone would hold.

    Attributes:
        parts: before the step, by name: weights, fp32 weights, gradients, optimizer state, teacher, buckets.
        turns: of every block, by its name.
        forward: from the start of the student's forward on: gathered weights outside of the blocks.
        backward: from the loss on, the same and buckets.
        teacher: gathered while the teacher is asked.
        tail: what the head's gradients become when backward comes to the blocks: bytes that stay of them.
        rest: gradients that stay of what is outside of the blocks, when backward is done.
        end: for a moment at the end of backward.
        update: in the optimizer's step, on top of `parts` and all gradients.
    """

    parts: Mapping[str, int] = field(default_factory=dict)
    turns: Mapping[str, Turn] = field(default_factory=dict)
    forward: int = 0
    backward: int = 0
    teacher: int = 0
    tail: int = 0
    rest: int = 0
    end: int = 0
    update: int = 0

    @property
    def state(self) -> int:
        """Bytes that are there before a step begins."""
        return sum(self.parts.values())
