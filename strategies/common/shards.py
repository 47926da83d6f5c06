"""Describe which part of a parameter a rank holds, in terms shared by sharding engines, optimizers and checkpoints.

A sharding engine may pass an optimizer a tensor that is a rank's shard of one parameter (FSDP2), or of many parameters
concatenated (ZeRO). Computations over a whole layer need to know which; `layout_of` returns it.
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
        start, stop: range of elements; equal if this rank holds none.
        offset: index of the first element in the rank's flattened tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements that this rank holds."""
        return self.stop - self.start

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """A view of the piece's elements in a flattened tensor with the rank's layout."""
        if self.offset == 0 and self.numel == flat.numel():
            return flat
        return flat[self.offset:self.offset + self.numel]


@dataclass(frozen=True)
class Layout:
    """The pieces of parameters that a tensor consists of.

    Attributes:
        pieces: one for every parameter, in the same order on every rank, including those of which a rank holds nothing.
        group: ranks whose pieces together make up whole parameters; None if this rank holds them whole.
    """

    pieces: tuple[Piece, ...]
    group: dist.ProcessGroup | None = None


def lay_out(tensor: torch.Tensor, layout: Layout) -> None:
    """Set the layout of a tensor, which `layout_of` then returns."""
    setattr(tensor, _LAYOUT, layout)


def layout_of(tensor: torch.Tensor) -> Layout:
    """The layout of a tensor: the one set by `lay_out`, or that of a DTensor; any other tensor is a whole parameter.

    Raises:
        ValueError: a DTensor that is not sharded into contiguous parts over a single group of ranks.
    """
    known = getattr(tensor, _LAYOUT, None)
    if known is not None:
        return known
    if not isinstance(tensor, DTensor):
        return Layout((Piece("", tuple(tensor.shape), 0, tensor.numel()),))
    return dtensor_layout(tensor)


def dtensor_layout(tensor: DTensor, name: str = "") -> Layout:
    """The layout of a DTensor that is sharded along its first dimension (FSDP2) or not at all."""
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
    """The rank's shard of a tensor, in its own shape; it shares memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """A flattened view of the rank's shard of a tensor.

    Raises:
        ValueError: its elements are not in row-major order.
    """
    own = local(tensor)
    if not own.is_contiguous():
        raise ValueError(f"a parameter of shape {tuple(tensor.shape)} has strides {own.stride()}: make it contiguous")
    return own.view(-1)


def add_over(group: dist.ProcessGroup | None, tensors: Sequence[torch.Tensor]) -> None:
    """All-reduce tensors of one dtype over the ranks of a group, in place, with a single call."""
    if group is None or not tensors or dist.get_world_size(group) == 1:
        return
    together = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if together.device.type == "cpu" and dist.get_backend(group) == "nccl":  # offloaded, but NCCL needs GPU tensors
        together = together.cuda()
    dist.all_reduce(together, group=group)
    for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def total_numel(pieces: Iterable[Piece]) -> int:
    """Number of elements that a rank holds in all pieces."""
    return sum(piece.numel for piece in pieces)
