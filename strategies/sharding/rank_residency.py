"""Predict from shapes alone the bytes that a rank holds and exchanges in a training step, for every engine.

Model states follow Rajbhandari et al. 2020 (section 3.1 and figure 1), plus what the engines add: padding, buffers in
which weights are gathered and gradients reduced, and copies. Numbers are for the rank that holds the most. The order in
which an engine does things was determined from traces of its steps, operation by operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from strategies.common.frozen_base import has_adapters
from strategies.common.shards import Layout, Piece, lay_out
from strategies.memory.ledger import parameter_bytes
from strategies.memory.residency import Bucket, ModuleTraffic, Residency
from strategies.sharding.gather_units import Units, units_of
from strategies.sharding.zero_partitions import aligned, cuts, equal_part

SHARDED = ("fsdp2", "zero")  # engines in which a rank holds parts of weights
FP32, FP64 = 4, 8


@dataclass(frozen=True)
class ShardingSetup:
    """How a student is sharded.

    Attributes:
        engine: none, ddp, fsdp2 or zero.
        ranks: number of ranks.
        stage: ZeRO stage; for FSDP2, 2 or 3.
        compute: dtype of forward and backward.
        accumulates: whether gradients of several micro-batches are accumulated.
        bucket: elements of ZeRO's communication bucket.
        ahead: elements that ZeRO's stage 3 may gather ahead of their use.
        offload_parameters, offload_optimizer: what is kept on the CPU, if training is on another device.
        gloo: whether the collectives use gloo, which reduces in a copy.
        in_backward: whether weights are updated as soon as their gradients are reduced, which are then freed.
    """

    engine: str
    ranks: int
    stage: int = 3
    compute: torch.dtype = torch.float32
    accumulates: bool = False
    bucket: int = 0
    ahead: int = 0
    offload_parameters: bool = False
    offload_optimizer: bool = False
    gloo: bool = True
    in_backward: bool = False

    @property
    def half(self) -> bool:
        """Whether weights are computed with in another dtype than they are updated in."""
        return self.compute is not torch.float32


def stand_ins(groups: Sequence[dict], setup: ShardingSetup, known: bool = True) -> list[list[torch.Tensor]]:
    """Tensors like those that the engine puts in place of a whole model's parameters, for every optimizer group.

    They are made on the same device and in the same mode as the whole ones (fake under FakeTensorMode); if `known`,
    their layouts are recorded.
    """
    made = []
    for group in groups:
        whole = group["params"]
        if setup.engine == "zero":
            made.append([_flat_part(whole, setup)])
        elif setup.engine == "fsdp2":
            made.append([_rows(parameter, setup.ranks, known) for parameter in whole])
        else:
            made.append(list(whole))
    return made


def _flat_part(parameters: Sequence[torch.Tensor], setup: ShardingSetup) -> torch.Tensor:
    pieces, offset = [], 0
    if setup.stage == 3:
        for parameter in parameters:
            part = equal_part(parameter, setup.ranks)
            pieces.append(Piece("", tuple(parameter.shape), 0, part, offset))
            offset += part
    else:
        size = aligned(parameters, setup.ranks) // setup.ranks
        for parameter in parameters:
            part = min(parameter.numel(), size - offset)
            pieces.append(Piece("", tuple(parameter.shape), 0, part, offset))
            offset += part
        offset = size
    flat = nn.Parameter(torch.empty(offset, dtype=torch.float32, device=parameters[0].device))
    lay_out(flat, Layout(tuple(pieces)))
    return flat


def _rows(parameter: torch.Tensor, ranks: int, known: bool) -> torch.Tensor:
    """The first rank's rows of a parameter, as FSDP2 shards it."""
    shape = _row_shape(parameter, ranks)
    part = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=parameter.device))
    if known:
        lay_out(part, Layout((Piece("", tuple(parameter.shape), 0, math.prod(shape)),)))
    return part


def residency(model: nn.Module, groups: Sequence[Sequence[torch.Tensor]], setup: ShardingSetup, *, optimizer_state: int,
              update: int, teacher: nn.Module | None = None, teacher_compute: torch.dtype | None = None) -> Residency:
    """What the first rank holds during a training step.

    Args:
        model: the whole model, of which only shapes are used.
        groups: the parameters of each of the optimizer's groups.
        setup: how the model is sharded.
        optimizer_state: bytes of the optimizer's state for the rank's part.
        update: peak temporary bytes of the optimizer's step on that part.
        teacher: sharded with the student if that is; None without one.
        teacher_compute: dtype in which a sharded teacher's weights are gathered, if not their own.
    """
    make = {"fsdp2": _fsdp2, "zero": _zero3 if setup.stage == 3 else _zero12}.get(setup.engine, _whole)
    found = make(model, groups, setup, optimizer_state, update)
    if teacher is None:
        return found
    held, gathered, asking, head = _teacher(teacher, setup, teacher_compute)
    return replace(found, parts={**found.parts, "teacher": held}, teacher=gathered, asking=asking, head=head)


# ---- whole on every rank

def _whole(model: nn.Module, groups: Sequence[Sequence[torch.Tensor]], setup: ShardingSetup, state: int, update: int
           ) -> Residency:
    """One process, or DDP, whose gradients are in its buckets from the first step on."""
    weights = parameter_bytes(model)
    return Residency({"weights": weights, "buffers": _buffers(model), "gradients": parameter_bytes(model, trained=True),
                      "optimizer state": state}, update=update, gradients=parameter_bytes(model, trained=True))


# ---- FSDP2

def _fsdp2(model: nn.Module, groups: Sequence[Sequence[torch.Tensor]], setup: ShardingSetup, state: int, update: int
           ) -> Residency:
    """FSDP2's residency.

    It gathers into one buffer and copies out of it, so that a unit is resident twice for a while. In the backward it
    prefetches one unit ahead, and reduces a unit's gradients in a buffer that stays until the next unit's.
    """
    units, size = units_of(model), setup.compute.itemsize
    sums = FP32 if setup.half else size
    outside, order = outside_units(model, units), order_of(units)
    own = sum(local_rows(parameter, setup.ranks) * parameter.element_size() for parameter in model.parameters())
    trained = padded_elements(model.parameters(), setup.ranks, True) // setup.ranks
    counts = [gathered_bytes(parameters_in(model, names), setup) for names in order]  # in bytes
    summed = [padded_elements(parameters_in(model, names), setup.ranks, True) for names in order]
    root, root_summed = gathered_bytes(outside, setup), padded_elements(outside, setup.ranks, True)
    fetched = [0 if setup.stage == 2 or units.tail and index == len(order) - 1 else count
               for index, count in enumerate(counts)]  # each unit's, in backward
    turns = []
    for index, (names, count) in enumerate(zip(order, counts, strict=True)):
        following = summed[index + 1] if index + 1 < len(counts) else 0
        stays, before = not fetched[index], fetched[index - 1] if index else 0
        forward, most = count * (1 if stays else 2), count + max(count, _arriving(count, setup))
        turns.append(ModuleTraffic(
            tuple(names), forward=forward, stays=stays,
            arriving=(counts[index - 1] if index else root) + most - forward,
            backward=count + before, buffers=sums * following,
            fetched=max(0, fetched[index] - before, _arriving(counts[index - 1], setup) if before else 0),
            # the previous buffer is freed before gradients are put into a new one
            reduced=max(0, _summing(model, names, setup, names[0] in units.ends) - sums * following),
            kept=0 if setup.accumulates or setup.in_backward else FP32 * summed[index] // setup.ranks))
    parts = {"weights": own, "buffers": _buffers(model), "optimizer state": state}
    trailing = sums * summed[0] if counts else 0
    if setup.accumulates:  # the last reduction's buffer stays
        last = sums * root_summed or trailing
        parts |= {"gradients": FP32 * trained, "buckets": last}
    if setup.accumulates and turns:
        turns[-1] = replace(turns[-1], kept=-last, reduced=max(0, turns[-1].reduced - last))
    stay = not setup.accumulates and not setup.in_backward
    if setup.offload_parameters:  # weights, gradients and state are on the CPU; gradients go there once reduced
        parts = {"buffers": parts["buffers"]}
        turns = [replace(turn, kept=0) for turn in turns]
        trained, stay, update = 0, False, 0
    return Residency(parts, tuple(turns), units.blocks, forward=root, update=0 if setup.in_backward else update,
                     gradients=FP32 * (max([root_summed, *summed]) // setup.ranks if setup.in_backward else trained
                                       ) if trained else 0,
                     rest=FP32 * root_summed // setup.ranks if stay else 0,
                     landed=counts[-1] if counts else root, trailing=trailing,
                     end=max(0, _summing(model, (), setup)),
                     turning=0 if units.tail or not counts else fetched[-1],
                     turned=0 if units.tail or not counts else _arriving(counts[-1], setup))


def _arriving(count: int, setup: ShardingSetup) -> int:
    """Temporary bytes while a unit of `count` bytes is gathered into its buffer: gloo's own, and the rank's part, cast.
    """
    return count * setup.gloo + (count // setup.ranks if setup.half else 0)


def gathered_bytes(parameters: Iterable[nn.Parameter], setup: ShardingSetup) -> int:
    """Bytes of parameters when gathered, with padding: in the dtype that is computed with, or else their own."""
    return sum(setup.ranks * local_rows(parameter, setup.ranks) * (
        setup.compute.itemsize if setup.half else parameter.element_size()) for parameter in parameters)


def _summing(model: nn.Module, names: Sequence[str], setup: ShardingSetup, held: bool = False) -> int:
    """Peak bytes that reducing a unit's gradients adds to its weights and whole gradients, which are freed meanwhile.

    First the weights are freed. Then the gradients are copied side by side into a buffer (if that casts without a
    kernel of its own, through a copy of the largest one) and are freed, unless autograd still holds them (`held`: those
    of an embedding or a head). Then the rank's part of the sum is added, and gloo's copy. Without names the unit is the
    root.
    """
    parameters = parameters_in(model, names) if names else outside_units(model, units_of(model))
    whole, count = gathered_bytes(parameters, setup), padded_elements(parameters, setup.ranks, True)
    size, sums = setup.compute.itemsize, FP32 if setup.half else setup.compute.itemsize
    copied = size * max((parameter.numel() for parameter in parameters), default=0) if setup.half and setup.gloo else 0
    summing = sums * count * (2 if setup.gloo else 1) + FP32 * count // setup.ranks
    return max(sums * count + copied, summing - (0 if held else size * count)) - whole


def padded_elements(parameters: Iterable[nn.Parameter], ranks: int, trained: bool = False) -> int:
    """Elements of all parameters, or only the trained ones, summed over ranks with padding."""
    return ranks * sum(local_rows(parameter, ranks) for parameter in parameters
                       if parameter.requires_grad or not trained)


def local_rows(parameter: torch.Tensor, ranks: int) -> int:
    """Elements of a parameter that the first rank holds, sharded by rows as in FSDP2."""
    return math.prod(_row_shape(parameter, ranks))


def _row_shape(parameter: torch.Tensor, ranks: int) -> tuple[int, ...]:
    return (-(-parameter.shape[0] // ranks), *parameter.shape[1:]) if parameter.ndim else (1,)


# ---- ZeRO

def _zero12(model: nn.Module, groups: Sequence[Sequence[torch.Tensor]], setup: ShardingSetup, state: int, update: int
            ) -> Residency:
    """Residency of ZeRO's stages 1 and 2.

    Weights are whole and flat; fp32 weights, optimizer state and, in stage 2, gradients are in parts. There is one
    bucket during the backward.
    """
    size = setup.compute.itemsize
    whole = sum(aligned(group, setup.ranks) for group in groups)
    part = whole // setup.ranks
    frozen = _frozen(model)
    parts = {"weights": size * (whole + _numel(frozen)), "buffers": _buffers(model),
             "fp32 weights": FP32 * _kept(model) if setup.gloo and setup.half else 0}  # with a GPU: on the CPU
    if not setup.offload_optimizer:
        parts |= {"fp32 weights": parts["fp32 weights"] + (FP32 * part if setup.half else 0), "optimizer state": state}
    compact = setup.half and setup.accumulates and setup.stage == 2  # accumulated in fp32, in its own buffer
    grown = FP32 * part if compact else size * _most_overlapping(groups, setup)
    if setup.offload_optimizer:  # gradients go to the CPU through a buffer as large as the largest of them
        parts["buckets"] = size * max(parameter.numel() for parameter in model.parameters())
        grown = update = 0
    if setup.accumulates:
        parts |= {"gradients": grown if setup.stage == 2 else size * whole,
                  "buckets": parts.get("buckets", 0) + size * setup.bucket}
    largest = max((aligned(group, setup.ranks) // setup.ranks for group in groups), default=0)
    update += 0 if compact or setup.offload_optimizer else (FP32 + size if setup.half else FP32) * largest
    bucket = 0 if setup.accumulates else size * setup.bucket  # from a step's first gradient on
    if not setup.offload_optimizer:
        update = max(update, *(_norm(groups, setup, rank) + (0 if compact else size * sum(
            _overlapping(group, rank, setup.ranks) for group in groups) - grown) for rank in range(setup.ranks)))
    if setup.stage == 1:  # after the backward, gradients go through the bucket one after another
        before = parts["gradients"] + parts["buckets"] if setup.accumulates else 0  # freed then
        return Residency(parts, backward=bucket, rest=grown - before, at_once=setup.accumulates,
                         end=grown - size * _first_filling(groups, setup.bucket), update=update,
                         gradients=size * whole)
    return Residency(parts, backward=bucket, at_once=True, bucket=setup.bucket, grown=0 if compact else grown,
                     emptied=size if setup.gloo else 0, update=update, gradients=grown)


def _norm(groups: Sequence[Sequence[torch.Tensor]], setup: ShardingSetup, rank: int) -> int:
    """Bytes of a rank's largest piece of a gradient in fp64, in which DeepSpeed computes norms."""
    return FP64 * max((stop - start for group in groups
                       for start, stop in cuts(group, setup.stage, rank, setup.ranks)), default=0)


def _first_filling(groups: Sequence[Sequence[torch.Tensor]], size: int) -> int:
    """Elements in a bucket of a given size when it is first emptied."""
    bucket = Bucket(size)
    for parameter in (parameter for group in groups for parameter in group):
        summed = bucket.add(parameter.numel())
        if summed:
            return summed
    return bucket.content


def _most_overlapping(groups: Sequence[Sequence[torch.Tensor]], setup: ShardingSetup) -> int:
    """Total elements of the parameters of which a rank holds any part; their gradients have a buffer.

    In stage 1 the first rank has the highest peak, because its gradients are copied before others have been freed. In
    stage 2 it is the last rank, whose gradients are made while activations are resident, or one that holds more.
    """
    ranks = range(setup.ranks)
    return max(sum(_overlapping(group, rank, setup.ranks) for group in groups)
               for rank in (ranks if setup.stage == 2 else ranks[:1]))


def _overlapping(group: Sequence[torch.Tensor], rank: int, ranks: int) -> int:
    size = aligned(group, ranks) // ranks
    begin, end, offset, total = rank * size, (rank + 1) * size, 0, 0
    for parameter in group:
        if offset < end and offset + parameter.numel() > begin:
            total += parameter.numel()
        offset += parameter.numel()
    return total


def _zero3(model: nn.Module, groups: Sequence[Sequence[torch.Tensor]], setup: ShardingSetup, state: int, update: int
           ) -> Residency:
    """Residency of ZeRO's stage 3.

    Weights, gradients and optimizer state are in parts; the bucket and a flat buffer of gradients are always resident.
    Blocks are gathered as a whole, every other module by itself.
    """
    units, size = units_of(model), setup.compute.itemsize
    parts_of = [sum(equal_part(parameter, setup.ranks) for parameter in group) for group in groups]
    part = sum(parts_of)
    sums = FP32 if setup.half and setup.accumulates else size
    frozen = _frozen(model)
    parts = {"buckets": size * setup.bucket, "buffers": _buffers(model),
             "fp32 weights": FP32 * _kept(model) if setup.gloo else 0}
    if not setup.offload_parameters:
        parts["weights"] = size * (part + sum(equal_part(parameter, setup.ranks) for parameter in frozen))
    if not setup.offload_optimizer:
        parts |= {"fp32 weights": parts["fp32 weights"] + (FP32 * part if setup.half else 0), "gradients": sums * part,
                  "optimizer state": state}
    turns, bucket, end = [], Bucket(setup.bucket), 0
    for name in reversed((*units.ends[:1], *units.blocks, *units.ends[1:])):
        own = parameters_in(model, [name])
        count = sum(equal_part(parameter, setup.ranks) * setup.ranks for parameter in own)
        ahead, waits = min(setup.ahead, count), not units.tail and name in units.ends  # tied: complete at the end
        bucket.begin()
        trained = [parameter for parameter in own if parameter.requires_grad]
        for parameter in trained:
            if not (waits and parameter.ndim > 1):
                bucket.add(parameter.numel())
            elif setup.gloo and parameter.numel() > setup.bucket:  # reduced by itself
                end = size * parameter.numel()
        staged = size * count if setup.gloo else 0  # gloo gathers via a copy
        head = name in units.ends[-1:]
        again = not waits or head  # a tied head's weights are still gathered for the embedding
        alone = waits or any(not bucket.holds(parameter.numel()) for parameter in trained)  # else via the bucket
        turns.append(
            ModuleTraffic(
                (name,),
                forward=size * (count + ahead),
                arriving=staged,
                fetched=staged if again else 0,
                backward=size * (count + ahead) if again else 0,
                lasts=head and alone,
                reduced=max(0, size * (2 * bucket.largest - count)),
                pending=size * bucket.content,
                drops=not waits,
            )
        )
    if not setup.offload_optimizer:
        update = max(update + FP32 * max(parts_of, default=0), _norm(groups, setup, 0))
    return Residency(parts, tuple(turns), units.blocks, gradients=parts.get("gradients", 0),
                     end=end, update=0 if setup.offload_optimizer else update)


# ---- teacher and helpers

def _teacher(teacher: nn.Module, setup: ShardingSetup, compute: torch.dtype | None) -> tuple[int, int, int, int]:
    """Bytes of a teacher on the first rank: held, gathered, added while a unit arrives, and gathered for its head."""
    if setup.engine not in SHARDED:
        return parameter_bytes(teacher), 0, 0, 0
    units, ranks = units_of(teacher), setup.ranks

    def bytes_of(parameters: Iterable[nn.Parameter], times: int) -> int:
        return sum(local_rows(parameter, ranks) * times * (
            parameter.element_size() if compute is None or times == 1 else compute.itemsize)
            for parameter in parameters)

    def arriving(count: int) -> int:  # the buffer, and the copy out of it
        return count + max(count, count * setup.gloo + (0 if compute is None else count // ranks))

    root = bytes_of(outside_units(teacher, units), ranks)
    counts = [bytes_of(parameters_in(teacher, names), ranks) for names in order_of(units)]
    most = max([arriving(root), *(root + before + arriving(count) for before, count in pairwise([root, *counts]))])
    gathered = root + 2 * max(counts, default=0)
    head = bytes_of(parameters_in(teacher, units.tail[-1:]), ranks) if units.tail else root
    return bytes_of(teacher.parameters(), 1), gathered, max(0, most - gathered), head


def order_of(units: Units) -> list[list[str]]:
    """Units in the order in which they run."""
    return [*([[units.first]] if units.first else []), *([name] for name in units.blocks),
            *([list(units.tail)] if units.tail else [])]


def outside_units(model: nn.Module, units: Units) -> list[nn.Parameter]:
    """Parameters of the root: in no block, nor in `first` or `tail`."""
    inside = {id(parameter) for names in order_of(units) for parameter in parameters_in(model, names)}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def parameters_in(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """Parameters of the named modules of a model, in order."""
    return [parameter for name in names for parameter in model.get_submodule(name).parameters()]


def _frozen(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if not parameter.requires_grad]


def _kept(model: nn.Module) -> int:
    """Elements of the frozen parameters that a rank has copies of: all but those of a base beneath adapters."""
    return 0 if has_adapters(model) else _numel(_frozen(model))


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _buffers(model: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
