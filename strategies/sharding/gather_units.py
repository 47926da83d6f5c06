"""The units in which a sharded model's weights are gathered: its blocks, its input embedding, and its tail."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Units:
    """Modules that are gathered together, by name; all other parameters form one more unit, the root.

    Attributes:
        blocks: the repeated blocks, in order.
        first: the input embedding; None if its weight is also the head's, which then belongs to the root.
        tail: what follows the blocks, last norm and output head; empty if the head shares the embedding's weight.
        ends: input embedding, last norm and output head, as far as they exist, whatever weights they share.
    """

    blocks: tuple[str, ...]
    first: str | None
    tail: tuple[str, ...]
    ends: tuple[str, ...] = ()


def units_of(model: nn.Module) -> Units:
    """The units of a model; a model without repeated blocks is a single unit, the root.

    Blocks are the children of module lists that are not inside other such lists and that hold at least two modules of
    the same class, or one module.
    """
    blocks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and _alike(module):
            blocks += [f"{name}.{number}" if name else str(number) for number in range(len(module))]
    first, head = (_called(model, getattr(model, f"get_{which}_embeddings", None)) for which in ("input", "output"))
    if first is None or head is None or not blocks:
        return Units(tuple(blocks), None, ())
    tail = (*_last_norm(model, blocks, head), head)
    if model.get_submodule(first).weight is model.get_submodule(head).weight:
        return Units(tuple(blocks), None, (), (first, *tail))
    return Units(tuple(blocks), first, tail, (first, *tail))


def sharing_blocks(model: nn.Module) -> tuple[str, str] | None:
    """Two blocks that share a parameter, which no engine gathers as often as both need it; None if there are none."""
    first: dict[int, str] = {}
    for name in units_of(model).blocks:
        for parameter in model.get_submodule(name).parameters():
            if first.setdefault(id(parameter), name) != name:
                return first[id(parameter)], name
    return None


def _alike(modules: nn.ModuleList) -> bool:
    return len({type(module) for module in modules}) < len(modules) or len(modules) == 1


def _called(model: nn.Module, get: object) -> str | None:
    """Name of an embedding module that the model itself returns."""
    try:
        wanted = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None
    found = [name for name, module in model.named_modules() if module is wanted]
    return found[0] if wanted is not None and found and hasattr(wanted, "weight") else None


def _last_norm(model: nn.Module, blocks: list[str], head: str) -> list[str]:
    """The norm defined after the list of blocks, in the same parent."""
    parent, _, listed = blocks[0].rpartition(".")[0].rpartition(".")
    names = [name for name, _ in model.get_submodule(parent).named_children()]
    for name in reversed(names[names.index(listed) + 1:]):
        full = f"{parent}.{name}" if parent else name
        if "norm" in type(model.get_submodule(full)).__name__.lower() and full != head:
            return [full]
    return []
