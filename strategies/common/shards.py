"""What a rank holds of a parameter: the vocabulary that sharding engines, optimizers and checkpoints share.

An engine may hand an optimizer a tensor that is a rank's part of one parameter (FSDP2), or of many parameters laid end
to end (ZeRO). Mathematics that looks at a whole layer has to know which. `layout_of` tells it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_LAYOUT = "_limbeck_layout"


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` (exclusive) of a parameter in row-major order, as one rank holds them.

    Attributes:
        name: of the parameter in its model.
        shape: of the whole parameter.
        start, stop: equal where this rank holds nothing of it.
        offset: where in the rank's flattened tensor the elements begin.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int = 0

    @property
    def numel(self) -> int:
        """Elements that this rank holds."""
        return self.stop - self.start

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The piece's elements, a view, in a flattened tensor laid out like the rank's."""
        return flat[self.offset:self.offset + self.numel]


@dataclass(frozen=True)
class Layout:
    """The parameters that a tensor consists of.

    Attributes:
        pieces: every parameter in the same order on every rank, also those of which a rank holds nothing.
        group: ranks whose pieces make up whole parameters; None where this rank holds them whole.
    """

    pieces: tuple[Piece, ...]
    group: dist.ProcessGroup | None = None


def lay_out(tensor: torch.Tensor, layout: Layout) -> None:
    """Say what a tensor consists of."""
    setattr(tensor, _LAYOUT, layout)


def layout_of(tensor: torch.Tensor) -> Layout:
    """What a tensor consists of: as it was said, or as a DTensor knows, or else it is one whole parameter.

    Raises:
        ValueError: a DTensor that is sharded otherwise than in contiguous parts over one group of ranks.
    """
    known = getattr(tensor, _LAYOUT, None)
    if known is not None:
        return known
    if not isinstance(tensor, DTensor):
        return Layout((Piece("", tuple(tensor.shape), 0, tensor.numel()),))
    return dtensor_layout(tensor)


def dtensor_layout(tensor: DTensor, name: str = "") -> Layout:
    """The layout of a DTensor that is sharded by rows (FSDP2) or not at all."""
    mesh, placements = tensor.device_mesh, tensor.placements
    shape = tuple(tensor.shape)
    if all(placement.is_replicate() for placement in placements):
        return Layout((Piece(name, shape, 0, tensor.numel()),))
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(f"parameters sharded as {placements} are not in contiguous parts over one group of ranks")
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    row = tensor.numel() // shape[0] if shape[0] else 0
    start = min(offset[0], shape[0]) * row
    return Layout((Piece(name, shape, start, start + local[0] * row),), mesh.get_group())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a tensor, in its shape; shares memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a tensor, flattened; a view.

    Raises:
        ValueError: its elements are not in row-major order.
    """
    own = local(tensor)
    if not own.is_contiguous():
        raise ValueError(f"a parameter of shape {tuple(tensor.shape)} has strides {own.stride()}: make it contiguous")
    return own.view(-1)


def add_over(group: dist.ProcessGroup | None, tensors: Sequence[torch.Tensor]) -> None:
    """Sum tensors of one dtype over the ranks of a group, in place, in one call."""
    if group is None or not tensors:
        return
    together = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if together.device.type == "cpu" and dist.get_backend(group) == "nccl":  # offloaded, while ranks exchange on GPUs
        together = together.cuda()
    dist.all_reduce(together, group=group)
    for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def total_numel(pieces: Iterable[Piece]) -> int:
    """Elements that a rank holds of all pieces."""
    return sum(piece.numel for piece in pieces)
