"""The tiled loss: logits of one tile of positions at a time, turned into values and gradients before the next tile.

A loss over N positions and V tokens can be computed from the logits of a few rows at a time, since softmax normalizes
each row by itself. The gradient with respect to a row's logits is known as soon as its loss is. So the forward adds it
at once to the gradients of hidden states and head, which are all that is saved for backward: N x width and V x width
numbers, none of size N x V. The matrix products are those of the naive loss, and none is recomputed. On a CPU, a tile
is processed in blocks of rows that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from strategies.common.planned_device import kind_of, stands_for_gpu
from strategies.distillation.losses.fused_rows import applies, on_tile
from strategies.distillation.losses.heads import Head, products_of, slabs
from strategies.distillation.losses.logit_blocks import Taught, Terms
from strategies.distillation.losses.teacher_targets import (
    HiddenTargets,
    LogitTargets,
    SampledTargets,
    SharedVocabulary,
    Targets,
    TopTargets,
)

IGNORED = -100  # target of a position without a loss: prompt, padding, last token of a document
TILE = {"cpu": 288 * 2**20, "cuda": 2**30}  # bytes of a tile's logits, of student and teacher together
ROWS = {"cpu": 256}  # most rows of a tile: larger ones are no faster, and few target tokens may not fill them
BLOCK = 2**20  # bytes of logits in a block on a CPU


@dataclass(frozen=True)
class HeadCall:
    """Arguments of a loss other than the student's tensors.

    Attributes:
        terms: the weighted terms of the loss.
        head: the student's, detached; None if the loss is given logits.
        targets: (positions,) tokens or `IGNORED`.
        teacher_targets: tensors of shape (positions, ...); None without a teacher.
        common: the columns of the logits that are compared; None for all.
        asked: (positions,) True where there are teacher targets; None for all.
        tile: bytes of logits at a time; None for the device's default.
        learned: (n,) positions that have a target, if known.
        accumulate: dtype in which logits, sums and gradients are computed.
    """

    terms: Terms
    head: Head | None
    targets: torch.Tensor
    teacher_targets: Targets | None
    common: SharedVocabulary | None
    asked: torch.Tensor | None
    tile: int | None
    learned: torch.Tensor | None = None
    accumulate: torch.dtype = torch.float32


def loss_mask(targets: torch.Tensor) -> torch.Tensor:
    """Positions that have a target; all of them on fake tensors, which plan a step: that case takes the most memory."""
    if isinstance(targets, FakeTensor):
        return torch.arange(targets.numel(), device=targets.device)
    return torch.argwhere(targets != IGNORED)[:, 0]


def tile_rows(positions: int, vocabularies: int, device: str, tile: int | None = None, itemsize: int = 4) -> int:
    """Number of positions in a tile.

    Args:
        positions: number of positions that have a target.
        vocabularies: size of the student's vocabulary, plus the teacher's if its logits are computed too.
        device: type of the device, "cpu" or "cuda".
        tile: bytes of logits at a time; None for the device's default.
        itemsize: bytes of a logit in the dtype of the computation.
    """
    fitting = (tile or TILE.get(device, TILE["cpu"])) // (itemsize * vocabularies)
    return max(1, min(positions, fitting, ROWS.get(device, fitting)))


class TiledLoss(torch.autograd.Function):
    """(loss, values of the terms) from hidden states (positions, width), a head's weight and bias, and a `HeadCall`."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: HeadCall
                ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden.device
        compute = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        wide = torch.promote_types(call.accumulate, hidden.dtype)
        wanted = ctx.needs_input_grad
        by_hidden = torch.zeros(hidden.shape, dtype=wide, device=device) if wanted[0] else None
        by_weight = torch.zeros(weight.shape, dtype=wide, device=device) if wanted[1] else None
        by_bias = torch.zeros(weight.shape[0], dtype=wide, device=device) if wanted[2] else None
        head = _computed(call.head, compute) if hidden.is_cuda else call.head
        values = torch.zeros(len(call.terms.names), dtype=wide, device=device)
        with products_of(compute, device):
            for rows, products, teacher_targets, spare in _tiles(call, head, hidden, compute, wide):
                values += _on_tile(call, head, products, rows, teacher_targets, any(wanted))
                if by_hidden is not None:
                    by_hidden[rows] = _times(products, head.weight, compute, spare).to(wide)
                if by_weight is not None:
                    _add_outer(by_weight, products, hidden[rows], compute)
                if by_bias is not None:
                    by_bias += products.sum(0)
        ctx.gradients, ctx.dtypes = [by_hidden, by_weight, by_bias], (hidden.dtype, weight.dtype,
                                                                         None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(values)
        return _weighted(call.terms, values), values

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of a tiled loss is handed out once: call backward once, or take the loss "
                               "again")
        scaled = [None if one is None else one.mul_(upstream) for one in ctx.gradients]
        ctx.gradients = None
        return *(None if one is None else one.to(dtype) for one, dtype in zip(scaled, ctx.dtypes, strict=True)), None


class LogitLoss(torch.autograd.Function):
    """(loss, values of the terms) from logits (positions, vocabulary) that exist already, and a `HeadCall`."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, call: HeadCall) -> tuple[torch.Tensor, torch.Tensor]:
        wide, gradient = torch.promote_types(call.accumulate, logits.dtype), ctx.needs_input_grad[0]
        by = torch.zeros(logits.shape, dtype=wide, device=logits.device) if gradient else None
        values = torch.zeros(len(call.terms.names), dtype=wide, device=logits.device)
        plain = Head(logits.new_empty(0, 0))
        with products_of(wide, logits.device):
            for rows, products, teacher_targets, _ in _tiles(call, plain, logits, logits.dtype, wide):
                values += _on_tile(call, plain, products, rows, teacher_targets, gradient)
                if by is not None:
                    by[rows] = products
        ctx.gradient, ctx.dtype = by, logits.dtype
        ctx.mark_non_differentiable(values)
        return _weighted(call.terms, values), values

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (upstream * ctx.gradient).to(ctx.dtype), None


def _weighted(terms: Terms, values: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([terms.weights[name] for name in terms.names], dtype=values.dtype)
    return (values * weights.to(values.device, non_blocking=True)).sum()


def _tiles(call: HeadCall, head: Head, given: torch.Tensor, compute: torch.dtype, wide: torch.dtype
           ) -> Iterator[tuple[torch.Tensor, torch.Tensor, Taught, torch.Tensor]]:
    """Yield for each tile its rows, the student's products, the teacher's targets, and the buffer of teacher logits.

    All buffers are reused from tile to tile.
    """
    whole = call.head is None
    vocabulary = given.shape[-1] if whole else head.vocabulary
    said = call.teacher_targets
    if given.is_cuda and isinstance(said, HiddenTargets):
        said = HiddenTargets(said.hidden.to(compute), _computed(said.head, compute))
    theirs = said.head.vocabulary if isinstance(said, HiddenTargets) else (
        said.logits.shape[-1] if isinstance(said, LogitTargets) else 0)
    kept = loss_mask(call.targets) if call.learned is None else call.learned
    size = tile_rows(len(kept), vocabulary + theirs, kind_of(given), call.tile, wide.itemsize)
    mine = torch.empty(size, vocabulary, dtype=wide, device=given.device)
    other = torch.empty(size, theirs, dtype=wide, device=given.device)
    for rows in kept.split(size)[:1 if isinstance(given, FakeTensor) else None]:
        products = mine[:len(rows)]
        if whole:
            products.copy_(given[rows])
        else:
            head.fill(products, given[rows].to(compute))
        spare = other[:len(rows)]
        yield rows, products, _taught_on(said, rows, spare), spare


def _computed(head: Head, compute: torch.dtype) -> Head:
    """The head converted to the dtype of its products, once for all tiles."""
    return replace(head, weight=head.weight.to(compute))


def _taught_on(teacher_targets: Targets | None, rows: torch.Tensor, out: torch.Tensor) -> Taught:
    """Teacher targets of some rows; if these are logits, they are written to `out`."""
    if isinstance(teacher_targets, HiddenTargets):
        return teacher_targets.head.shape(teacher_targets.head.fill(out, teacher_targets.hidden[rows]))
    if isinstance(teacher_targets, LogitTargets):
        return out.copy_(teacher_targets.logits[rows])
    return None if teacher_targets is None else _part(teacher_targets, rows)


def _part(teacher_targets: SampledTargets | TopTargets, rows: torch.Tensor | slice) -> SampledTargets | TopTargets:
    return replace(
        teacher_targets,
        **{
            field.name: getattr(teacher_targets, field.name)[rows]
            for field in fields(teacher_targets)
            if field.name != "temperature"
        },
    )


def _on_tile(
    call: HeadCall, head: Head, products: torch.Tensor, rows: torch.Tensor, teacher_targets: Taught, gradient: bool
) -> torch.Tensor:
    """Values of the terms over a tile, whose products are overwritten with gradients, block by block."""
    whole = call.common is None
    if applies(products, call.terms, teacher_targets, whole):
        said = teacher_targets if isinstance(teacher_targets, torch.Tensor) and call.terms.divergences else None
        return on_tile(call.terms, products, head, call.targets[rows], said,
                       None if call.asked is None else call.asked[rows], gradient)
    fitting = len(rows) if stands_for_gpu(products) else max(1, BLOCK // (products.element_size() * products.shape[1]))
    targets = call.targets[rows]
    asked = None if call.asked is None else call.asked[rows]
    values = products.new_zeros(len(call.terms.names))
    for begin in range(0, len(rows), fitting)[:1 if isinstance(products, FakeTensor) else None]:
        part = slice(begin, begin + fitting)
        said = (
            teacher_targets[part]
            if isinstance(teacher_targets, torch.Tensor)
            else None
            if teacher_targets is None
            else _part(teacher_targets, part)
        )
        values += call.terms.on_block(products[part], head, targets[part], said, call.common,
                                      None if asked is None else asked[part], gradient)
    return values


def _times(gradient: torch.Tensor, weight: torch.Tensor, compute: torch.dtype, spare: torch.Tensor) -> torch.Tensor:
    """The product of (rows, vocabulary) and (vocabulary, width), accumulated in the gradient's dtype.

    With bf16 weights on a CPU, the result is rounded to bf16 after summing, as the gradient of bf16 hidden states is
    anyway; that product is three times as fast. `spare` is a buffer (rows, any) of the gradient's dtype.
    """
    if gradient.is_cuda and weight.element_size() == 2:
        return torch.mm(gradient.to(compute), weight, out_dtype=gradient.dtype)
    if weight.dtype is torch.bfloat16 is compute:
        room = spare.view(compute).flatten()[:gradient.numel()]  # contiguous: with strided rows, mm read beyond them
        return (room.view_as(gradient).copy_(gradient) if len(room) == gradient.numel() else gradient.to(compute)
                ) @ weight
    total: torch.Tensor | None = None
    for part, wide in slabs(weight, gradient.dtype):
        total = gradient[:, part] @ wide if total is None else total.addmm_(gradient[:, part], wide)
    return total


def _add_outer(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor, compute: torch.dtype) -> None:
    """Add gradient^T hidden to `total` (vocabulary, width)."""
    if gradient.is_cuda and compute.itemsize == 2:
        total += torch.mm(gradient.to(compute).T, hidden.to(compute), out_dtype=total.dtype)
    else:
        total.addmm_(gradient.T, hidden.to(total.dtype))
