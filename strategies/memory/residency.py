"""What a rank holds of a model that is shared out over ranks: the bytes that take the place of the whole model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModuleTraffic:
    """Bytes that come and go with a part of a model, beside its activations and the gradients that backward makes.

    Attributes:
        modules: names of the part, in the order in which they are called.
        forward: gathered weights, while it runs.
        arriving: for a moment before that, on top: buffers of what ran before it.
        stays: whether what is gathered stays until its backward.
        backward: gathered weights, while its backward runs.
        buffers: buffers in which gradients of what ran before it are summed, while its backward runs.
        fetched: for a moment before that, on top: the buffer that they come in.
        reduced: for a moment after its backward, on top of its whole gradients: buffers in which they are summed.
        kept: bytes of gradients that stay from the end of its backward on.
        pending: whole gradients, of this part and others, that wait for a full bucket after its backward.
        lasts: whether what is gathered for its backward is there until all of backward is done.
        drops: whether its whole gradients go after its backward; else they stay to the end of backward.
    """

    modules: tuple[str, ...]
    forward: int = 0
    arriving: int = 0
    stays: bool = False
    backward: int = 0
    buffers: int = 0
    fetched: int = 0
    reduced: int = 0
    kept: int = 0
    pending: int = 0
    lasts: bool = False
    drops: bool = True


class Bucket:
    """Gradients waiting to be summed over ranks until no more fit.

    Attributes:
        size: elements that fit.
        content: elements that wait.
        largest: most elements summed at once since `begin`.
    """

    def __init__(self, size: int) -> None:
        self.size, self.content, self.largest = size, 0, 0

    def begin(self) -> None:
        """Forget what has been summed."""
        self.largest = 0

    def holds(self, count: int) -> bool:
        """Whether a gradient of so many elements would go into it, and is not summed by itself."""
        return count <= self.size

    def add(self, count: int) -> int:
        """Put a gradient of so many elements in; returns how many are summed now, to make room or by itself."""
        summed = 0
        if self.content + count > self.size:
            summed, self.content = self.content, 0
        if not self.holds(count):
            summed = max(summed, count)
        else:
            self.content += count
        self.largest = max(self.largest, summed)
        return summed


@dataclass(frozen=True)
class Residency:
    """Bytes of one rank in a training step, whatever one process alone would hold.

    Attributes:
        parts: before the step, by name: weights, fp32 weights, gradients, optimizer state, teacher, buckets.
        turns: of the model's parts that are gathered or summed by themselves.
        blocks: names of what is gathered as a whole, and may be captured inside, where weights are gathered when they
            are used; None where they are always there.
        forward: gathered for all of forward and backward.
        backward: buffers that are there from the first gradient to the end of backward.
        at_once: whether a whole gradient goes as soon as it is made, into a bucket.
        bucket: elements of that bucket.
        grown: bytes of gradients that a rank holds from when the bucket is emptied for the first time, all at once.
        emptied: bytes for each element, for a moment whenever it is emptied; what is summed by itself takes none.
        teacher: gathered while the teacher is asked.
        asking: for a moment then, on top, before there are any activations.
        head: of the teacher's weights, gathered while the student's head runs, which is where the loss is taken.
        landed: the buffer in which forward's last weights came, which stays until forward has ended, the head with it.
        turning: gathered from when the loss turns back until the last turn's backward, where the head is in no turn.
        turned: for a moment before that, on top.
        trailing: the buffer in which the first turn's gradients are summed, which stays until backward is done.
        rest: gradients that stay of what is in no turn, once backward is done.
        end: for a moment then, on top of their whole gradients.
        update: while the optimizer steps, on top of all that stays.
        gradients: bytes of gradients at their most.
    """

    parts: Mapping[str, int] = field(default_factory=dict)
    turns: tuple[ModuleTraffic, ...] = ()
    blocks: tuple[str, ...] | None = None
    forward: int = 0
    backward: int = 0
    at_once: bool = False
    bucket: int = 0
    grown: int = 0
    emptied: int = 0
    teacher: int = 0
    asking: int = 0
    head: int = 0
    landed: int = 0
    turning: int = 0
    turned: int = 0
    trailing: int = 0
    rest: int = 0
    end: int = 0
    update: int = 0
    gradients: int = 0
