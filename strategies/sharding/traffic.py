"""What an engine sends over the network in a training step, unit by unit, from shapes alone.

The order and the sizes were determined from traces of two real ranks; the ZeRO paper counts 2 Ψ for stages 1 and 2 and
3 Ψ for stage 3 (Rajbhandari et al. 2020, section 7). What the engines do beyond that: DeepSpeed's stages 1 and 2 reduce
gradients by all-reduce, which sends twice as much as a reduce-scatter, and FSDP2 reduces 16-bit gradients in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from strategies.sharding.gather_units import units_of
from strategies.sharding.network import Kind, sent
from strategies.sharding.rank_residency import (
    FP32,
    ShardingSetup,
    gathered_bytes,
    order_of,
    outside_units,
    padded_elements,
    parameters_in,
)
from strategies.sharding.zero_partitions import aligned, equal_part


@dataclass(frozen=True)
class UnitTraffic:
    """Bytes for one unit of a model, each the whole of a collective.

    Attributes:
        modules: names of its modules in the order in which they are called; empty for what is in no other unit.
        gathers: all-gathered before its forward.
        regathers: all-gathered before its backward.
        reduces: gradients that are reduced after its backward.
    """

    modules: tuple[str, ...]
    gathers: int = 0
    regathers: int = 0
    reduces: int = 0


@dataclass(frozen=True)
class Traffic:
    """What is sent in a step, besides a few numbers.

    Attributes:
        units: of the student, in the order of its forward; what is in no other unit comes first.
        teacher: those of a sharded teacher, which only gathers.
        reduction: the collective that reduces gradients.
        bucket: bytes of gradients that are reduced at once; 0 if each unit's are reduced by themselves.
        each: whether gradients are reduced after each micro-batch, rather than the step's last.
        at_end: whether they are reduced after backward, rather than during it.
        overlaps: whether collectives run beside computation.
        stray: all-gathered without use, after each micro-batch but the first.
        updated: all-gathered after the update.
    """

    units: tuple[UnitTraffic, ...]
    teacher: tuple[UnitTraffic, ...] = ()
    reduction: Kind = "reduce-scatter"
    bucket: int = 0
    each: bool = True
    at_end: bool = False
    overlaps: bool = True
    stray: int = 0
    updated: int = 0

    def totals(self, micro_batches: int) -> dict[Kind, int]:
        """Bytes of a step by kind of collective."""
        gathers = sum(unit.gathers + unit.regathers for unit in (*self.teacher, *self.units))
        reduces = sum(unit.reduces for unit in self.units) * (micro_batches if self.each else 1)
        found: dict[Kind, int] = {"all-gather": micro_batches * gathers + (micro_batches - 1) * self.stray
                                  + self.updated}
        found[self.reduction] = reduces
        return found

    def sent(self, micro_batches: int, ranks: int) -> float:
        """Bytes that each rank sends in a step."""
        return sum(sent(kind, count, ranks) for kind, count in self.totals(micro_batches).items())


def traffic_of(model: nn.Module, groups: Sequence[Sequence[nn.Parameter]], setup: ShardingSetup, *,
               ddp_bucket: int = 25 * 2**20, teacher: nn.Module | None = None,
               teacher_setup: ShardingSetup | None = None) -> Traffic:
    """What an engine sends for a model.

    Args:
        model: the whole model, of which only shapes are used.
        groups: the parameters of each of the optimizer's groups.
        setup: how the model is sharded.
        ddp_bucket: bytes of a bucket of DDP.
        teacher: sharded with the student, by rows, if that is; None without one.
        teacher_setup: `setup` with the dtype in which its weights are gathered; None for `setup`.
    """
    if setup.engine == "fsdp2":
        found = _fsdp2(model, setup)
    elif setup.engine == "zero":
        found = _zero3(model, setup) if setup.stage == 3 else _zero12(model, groups, setup)
    else:
        found = _ddp(model, ddp_bucket)
    if teacher is None or setup.engine not in ("fsdp2", "zero"):
        return found
    return replace(found, teacher=_teacher(teacher, teacher_setup or setup))


def whole_units(model: nn.Module) -> list[tuple[str, ...]]:
    """The units of a model by name, in the order of its forward; the first is what is in no other."""
    return [(), *(tuple(names) for names in order_of(units_of(model)))]


def _ddp(model: nn.Module, bucket: int) -> Traffic:
    """All-reduce of whole gradients, in the step's last micro-batch, bucket by bucket (Li et al. 2020)."""
    outside = outside_units(model, units_of(model))
    units = [UnitTraffic(names, reduces=FP32 * _trained(parameters_in(model, names) if names else outside))
             for names in whole_units(model)]
    return Traffic(tuple(units), reduction="all-reduce", bucket=bucket, each=False)


def _fsdp2(model: nn.Module, setup: ShardingSetup) -> Traffic:
    """FSDP2 gathers the unit before the last backward's once more than it needs, if there was a micro-batch before."""
    units, sums = units_of(model), FP32 if setup.half else setup.compute.itemsize
    found = []
    for names in whole_units(model):
        own = parameters_in(model, names) if names else outside_units(model, units)
        count = gathered_bytes(own, setup)
        stays = not names or setup.stage == 2 or names == units.tail
        found.append(UnitTraffic(names, count, 0 if stays else count, sums * padded_elements(own, setup.ranks, True)))
    return Traffic(tuple(found), stray=found[-1].gathers if units.tail else 0)


def _zero12(model: nn.Module, groups: Sequence[Sequence[nn.Parameter]], setup: ShardingSetup) -> Traffic:
    """Stages 1 and 2 all-reduce gradients through one bucket, and gather updated weights."""
    size, outside = setup.compute.itemsize, outside_units(model, units_of(model))
    units = [UnitTraffic(names, reduces=size * _trained(parameters_in(model, names) if names else outside))
             for names in whole_units(model)]
    return Traffic(tuple(units), reduction="all-reduce", bucket=size * setup.bucket, each=setup.stage == 2,
                   at_end=setup.stage == 1, overlaps=False,
                   updated=size * sum(aligned(group, setup.ranks) for group in groups))


def _zero3(model: nn.Module, setup: ShardingSetup) -> Traffic:
    """Stage 3 gathers blocks as a whole and other modules by themselves; the loss takes an untied head's weight twice.

    The loss makes the head's gradient in its forward, so that its weight is not gathered for backward.
    """
    units, size = units_of(model), setup.compute.itemsize

    def unit(modules: tuple[str, ...], own: Sequence[nn.Parameter], again: bool = True, reduces: bool = True
             ) -> UnitTraffic:
        count = size * setup.ranks * sum(equal_part(parameter, setup.ranks) for parameter in own)
        return UnitTraffic(modules, count, count if again else 0, size * _trained(own) if reduces else 0)

    def of(name: str, **how: bool) -> UnitTraffic:
        return unit((name,), parameters_in(model, [name]), **how)

    tied, ended = not units.tail, {id(parameter) for parameter in parameters_in(model, units.ends)}
    rest = unit((), [one for one in outside_units(model, units) if id(one) not in ended])
    if units.ends and not tied:
        rest = replace(rest, gathers=rest.gathers + of(units.ends[-1]).gathers)
    return Traffic((rest, *(of(name, again=not tied) for name in units.ends[:1]), *map(of, units.blocks),
                    *map(of, units.ends[1:-1]),
                    *(of(name, again=False, reduces=not tied) for name in units.ends[1:][-1:])), overlaps=False)


def _teacher(teacher: nn.Module, setup: ShardingSetup) -> tuple[UnitTraffic, ...]:
    units = units_of(teacher)
    return tuple(UnitTraffic(names, gathered_bytes(
        parameters_in(teacher, names) if names else outside_units(teacher, units), setup))
        for names in whole_units(teacher))


def _trained(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
