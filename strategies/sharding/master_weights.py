"""Keep fp32 copies of what DeepSpeed rounds: a rank's part of the trained parameters, and all frozen ones.

DeepSpeed first casts a model to half precision and makes the fp32 weights that it updates (the master weights of
Micikevicius et al. 2018, section 3.1) from the result, so training would begin with every weight off by up to half a
bf16 step. Frozen parameters it keeps in half precision only. So both are copied before, and restored afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from strategies.common.frozen_base import base_names
from strategies.common.shards import Layout, Piece, local_of
from strategies.sharding.zero_partitions import cuts


class OwnPart:
    """A rank's part of the trained weights, copied in fp32, on the model's device.

    Args:
        groups: the optimizer's groups, of whole parameters.
        names: parameter names, by id.
        stage: ZeRO stage, which decides how parameters are partitioned.
        rank: this rank.
        ranks: number of ranks.
    """

    def __init__(self, groups: Iterable[Sequence[nn.Parameter]], names: Mapping[int, str], stage: int, rank: int,
                 ranks: int) -> None:
        self._parts: dict[str, tuple[int, torch.Tensor]] = {}
        for group in groups:
            for parameter, (start, stop) in zip(group, cuts(group, stage, rank, ranks), strict=True):
                part = parameter.detach().reshape(-1)[start:stop].to(torch.float32, copy=True)
                self._parts[names[id(parameter)]] = start, part

    def put_back(self, tensor: torch.Tensor, layout: Layout) -> None:
        """Write the part into an engine's tensor, and free it."""
        flat = local_of(tensor)
        for piece in layout.pieces:
            start, part = self._parts.pop(piece.name)
            assert piece.numel == part.numel() and (piece.start == start or not piece.numel), (
                f"DeepSpeed holds {piece.start} to {piece.stop} of {piece.name}, and {start} on were kept")
            piece.of(flat).copy_(part)


def clear_padding(tensor: torch.Tensor, layout: Layout) -> None:
    """Zero an engine's tensor outside its pieces, where DeepSpeed leaves uninitialized memory."""
    flat, end = local_of(tensor), 0
    for piece in sorted(layout.pieces, key=lambda piece: piece.offset):
        if piece.numel:
            flat[end:piece.offset].zero_()
            end = piece.offset + piece.numel
    flat[end:].zero_()


class Frozen:
    """The frozen parameters in fp32, whole on every rank, on the model's device.

    Of a base beneath adapters, which has files of its own, no copies are kept.

    Args:
        model: the whole model.
        rank: this rank.
        apart: whether to keep copies; if not, the engine leaves them as they are, and those are used.
    """

    def __init__(self, model: nn.Module, rank: int, apart: bool = True) -> None:
        self._rank, left = rank, base_names(model) if apart else frozenset()
        self._kept = [(parameter, parameter.detach().to(torch.float32, copy=True) if apart else parameter,
                       Layout((Piece(name, tuple(parameter.shape), 0, parameter.numel()),)))
                      for name, parameter in model.named_parameters()
                      if not parameter.requires_grad and name not in left]

    def tensors(self) -> list[tuple[torch.Tensor, Layout]]:
        """See `Engine`."""
        return [(kept, layout) for _, kept, layout in self._kept]

    def refresh(self) -> None:
        """Round them again into the weights that the forward uses."""
        for parameter, kept, _ in self._kept:
            if kept is parameter:
                continue
            if not hasattr(parameter, "ds_tensor"):
                parameter.data.copy_(kept)
                continue
            part, begin = parameter.ds_tensor, self._rank * parameter.partition_numel()
            own = kept.reshape(-1)[begin:begin + part.numel()]
            part.data.view(-1)[:own.numel()].copy_(own)
