"""What a rank holds of a sharded model: resident shards, and buffers of all-gathers and gradient reductions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModuleTraffic:
    """Transient bytes for a part of a model, besides its activations and the full gradients of its backward.

    Attributes:
        modules: names of the part's modules, in the order in which they are called.
        forward: all-gathered weights while it runs.
        arriving: added to these briefly before it runs: buffers of the part that ran before it.
        stays: whether gathered weights are kept until its backward.
        backward: all-gathered weights while its backward runs.
        buffers: buffers in which gradients of the part that ran before it are reduced, while its backward runs.
        fetched: added briefly before its backward: the buffer in which gathered weights arrive.
        reduced: added to its full gradients briefly after its backward: the buffers in which they are reduced.
        kept: bytes of gradients that remain from the end of its backward on.
        pending: full gradients, of this part and others, that wait for a full bucket after its backward.
        lasts: whether weights gathered for its backward remain until all of backward is done.
        drops: whether its full gradients are freed after its backward; else they remain to the end of backward.
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
    """A bucket in which gradients wait to be reduced over ranks, until the next one does not fit.

    Attributes:
        size: capacity in elements.
        content: number of elements that wait.
        largest: most elements reduced at once since `begin`.
    """

    def __init__(self, size: int) -> None:
        self.size, self.content, self.largest = size, 0, 0

    def begin(self) -> None:
        """Reset `largest`."""
        self.largest = 0

    def holds(self, count: int) -> bool:
        """Whether a gradient of `count` elements goes into the bucket, rather than being reduced by itself."""
        return count <= self.size

    def add(self, count: int) -> int:
        """Add a gradient of `count` elements; return how many elements are reduced now, to make room or by itself."""
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
    """Bytes that one rank holds in a training step, in place of those of a single process.

    A turn is a part of the model that is gathered or reduced by itself (`ModuleTraffic`). A captured module is one that
    torch.compile has turned into a graph, which rematerialization can plan.

    Attributes:
        parts: before the step, by name: weights, fp32 weights, gradients, optimizer state, teacher, buckets.
        turns: the parts of the model that are gathered or reduced by themselves.
        blocks: if weights are gathered for use, names of the modules that are gathered as a whole, inside which modules
            may be captured; None if all weights are always there.
        forward: weights that stay gathered for all of forward and backward.
        backward: buffers that exist from the first gradient to the end of backward.
        at_once: whether a full gradient moves to a bucket as soon as it is computed.
        bucket: capacity of that bucket in elements.
        grown: bytes of gradients that a rank holds, all at once, from the first time that the bucket is emptied.
        emptied: bytes per element, briefly each time the bucket is emptied; gradients reduced by themselves take none.
        teacher: weights that are gathered while the teacher runs.
        asking: added to these briefly, before there are any activations.
        head: weights of the teacher's head, gathered while the student's head runs, which is where the loss is taken.
        landed: the buffer in which forward's last weights arrived, which remains to the end of forward, including the
            head.
        turning: weights gathered from the start of backward to the backward of the last turn, if the head is in no
            turn.
        turned: added to these briefly, at the start of backward.
        trailing: the buffer in which the first turn's gradients are reduced, which remains until backward is done.
        rest: remaining gradients of modules that are in no turn, once backward is done.
        end: added to their full gradients briefly at that time.
        update: added to everything that remains while the optimizer steps.
        gradients: most bytes of gradients.
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
