"""Where the units of a cut lie in a model's tensors: spaces of units, and the sites that belong to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

from strategies.pruning.structured.config_steps import Step
from strategies.pruning.structured.meta_shapes import tensor_shapes

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
OUTPUT = re.compile(r"(o|o_proj|out|out_proj|out_lin|dense|c_proj|proj|wo|to_out)$", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """A dimension of a tensor, each of whose indices belongs to a unit.

    Attributes:
        name: of the tensor, in the state dict.
        dim: the dimension.
        owner: (size of the dimension,) number of the unit that each index belongs to.
        part: index into dimension 0 that this site is confined to, for tensors that stack experts; None for all.
    """

    name: str
    dim: int
    owner: torch.Tensor
    part: int | None = None


@dataclass
class Space:
    """Units of which some remain, chosen by their scores.

    Attributes:
        label: what the units are, and the block they are in: `mlp model.layers.0`.
        units: how many there are.
        choose: from scores (units,) to a mask (units,) of those that remain.
        sites: where they are.
    """

    label: str
    units: int
    choose: Callable[[torch.Tensor], torch.Tensor]
    sites: list[Site] = field(default_factory=list)


Owners = list[tuple[str, torch.Tensor]]  # the unit of each index, by what it belongs to, such as `mlp`
Layouts = Mapping[str, int]  # for a kind of tensor that may be laid out in several ways, the way to take


def best(count: int, sets: int = 1) -> Callable[[torch.Tensor], torch.Tensor]:
    """Keep the units with the highest scores, the same number in each of some equal sets; the first of equal ones."""
    def choose(scores: torch.Tensor) -> torch.Tensor:
        ordered = scores.view(sets, -1).argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros(sets, len(scores) // sets, dtype=torch.bool)
        return kept.scatter_(1, ordered[:, :count // sets], True).flatten()

    return choose


def best_heads(heads: int, groups: int, left: int, shared: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Keep the best groups of query heads, and in each as many of its best heads.

    Units are the `heads` query heads, head h in group h // (heads // groups), and after them the `groups` key-value
    heads. A group's score is its own and those of its heads.
    """
    def choose(scores: torch.Tensor) -> torch.Tensor:
        own = scores[:heads].view(groups, -1)
        groups_kept = best(shared)(own.sum(1) + scores[heads:])
        kept = torch.stack([best(left // shared)(one) for one in own]) & groups_kept[:, None]
        return torch.cat([kept.flatten(), groups_kept])

    return choose


def pattern(name: str) -> str:
    """A tensor's module without the numbers in its name: what all blocks have alike."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0])


def block_of(name: str) -> str:
    """The block that a tensor is in, by the first number in its name; empty outside of blocks."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else ""


def changed_dims(before: PretrainedConfig, after: PretrainedConfig) -> dict[str, list[tuple[int, int, int]]]:
    """(dimension, size before, size after) of each tensor whose shape changes.

    Raises:
        ValueError: tensors appear or go.
    """
    theirs, ours = tensor_shapes(before), tensor_shapes(after)
    other = sorted(theirs.keys() ^ ours.keys())
    if other or any(len(theirs[name]) != len(ours[name]) for name in theirs.keys() & ours.keys()):
        raise ValueError(f"the cut of a {before.model_type} model would have other tensors: {', '.join(other[:3])}")
    return {name: found for name in theirs.keys() & ours.keys() if (found := [
        (dim, old, new) for dim, (old, new) in enumerate(zip(theirs[name], ours[name], strict=True)) if old != new])}


def find_spaces(before: PretrainedConfig, step: Step, layouts: Layouts) -> list[Space]:
    """The spaces of a step, from the dimensions that change with the configuration.

    Args:
        layouts: see `ambiguous`; empty for the first way of each.

    Raises:
        ValueError: a dimension changes in a way that is no selection of units.
    """
    spaces: dict[str, Space] = {}
    shapes = tensor_shapes(before)
    stacks = {name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) == 3}  # modules of all experts
    for name, dims in changed_dims(before, step.config).items():
        for dim, old, new in dims:
            ways = owners(before, step, name, dim, old, new)
            what, owner = ways[min(layouts.get(pattern(name), 0), len(ways) - 1)]
            stacked = what == "mlp" and name.rpartition(".")[0] in stacks
            for part in range(shapes[name][0]) if stacked else (None,):
                label = what if what == "width" else f"{what} {block_of(name)}".rstrip()
                label += "" if part is None else f" expert {part}"
                space = spaces.setdefault(label, _space(label, what, step))
                space.sites.append(Site(name, dim, owner, part))
    return list(spaces.values())


def _space(label: str, what: str, step: Step) -> Space:
    if what == "heads":
        heads, groups = step.before["heads"], step.before["kv_heads"]
        choose = best_heads(heads, groups, step.after["heads"], step.after["kv_heads"])
        return Space(label, heads + groups, choose)
    return Space(label, step.before[what], best(step.after[what], step.sets))


def ambiguous(before: PretrainedConfig, step: Step) -> dict[str, int]:
    """Kinds of tensors that may be laid out in several ways, and in how many."""
    found: dict[str, int] = {}
    for name, dims in changed_dims(before, step.config).items():
        for dim, old, new in dims:
            many = len(owners(before, step, name, dim, old, new))
            if many > 1:
                found[pattern(name)] = max(many, found.get(pattern(name), 0))
    return found


def owners(before: PretrainedConfig, step: Step, name: str, dim: int, old: int, new: int) -> Owners:
    """The ways in which the indices of a changed dimension can belong to units, the usual one first.

    Raises:
        ValueError: there is none.
    """
    what = step.kind if step.kind != "heads+width" else _heads_or_width(name, dim)
    found = _of_heads(step, old, new) if what == "heads" else _of_channels(
        step.before[what], step.after[what], old, new)
    if not found:
        raise ValueError(f"{what}: {name} of a {before.model_type} model has {old} entries and would have {new}, which "
                         f"is no selection of units")
    return [(what, owner) for owner in found]


def _heads_or_width(name: str, dim: int) -> str:
    """What a dimension belongs to in models whose heads make up their width: each is as large as the other.

    Linear layers within attention read heads if they are its output, and write heads otherwise. Conv1D of GPT-2 has
    its outputs last.
    """
    module, _, leaf = name.rpartition(".")
    path, _, own = module.rpartition(".")
    if not ATTENTION.search(path) or "norm" in module.lower():
        return "width"
    transposed = own.startswith("c_")
    reads = dim == (0 if transposed else 1) and leaf == "weight"
    return "heads" if reads == bool(OUTPUT.match(own)) else "width"


def _of_channels(count: int, kept: int, old: int, new: int) -> list[torch.Tensor]:
    """Units of one index each: once, or several times, one after another or interleaved."""
    if old % count or old // count * kept != new:
        return []
    index = torch.arange(old)
    return [index] if old == count else [index % count, index // (old // count)]


def _of_heads(step: Step, old: int, new: int) -> list[torch.Tensor]:
    """Units are query heads and, numbered after them, key-value heads; see `best_heads`."""
    heads, groups = step.before["heads"], step.before["kv_heads"]
    left, shared = step.after["heads"], step.after["kv_heads"]
    queries, keys = torch.arange(heads), heads + torch.arange(groups)
    found: list[torch.Tensor] = []
    for units, count, kept in ((queries, heads, left), (keys, groups, shared)):
        if old % count == 0 and old // count * kept == new:
            size = old // count
            fused = [units.repeat_interleave(size // parts).repeat(parts) for parts in (3, 2) if size % parts == 0]
            found += [units.repeat_interleave(size), *(fused if count == heads == groups else [])]
    both, remain = heads + 2 * groups, left + 2 * shared
    if old % both == 0 and old // both * remain == new:  # queries, keys and values of grouped-query attention, fused
        in_groups = torch.cat([torch.cat([one, key.repeat(2)]) for one, key in zip(
            queries.view(groups, -1), keys[:, None], strict=True)])
        found += [units.repeat_interleave(old // both) for units in (torch.cat([queries, keys, keys]), in_groups)]
    return _distinct(found)


def _distinct(found: list[torch.Tensor]) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    for one in found:
        if not any(torch.equal(one, other) for other in kept):
            kept.append(one)
    return kept
