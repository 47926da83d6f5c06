"""Scores of units: how much of what a model computes goes through each, so that those with the least are cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from strategies.common.blockwise_calibration import Batch
from strategies.pruning.structured.calibration_rows import counted, inputs_of, only_counted
from strategies.pruning.structured.product_watch import WeightReads
from strategies.pruning.structured.unit_spaces import Site, Space

Importance = Literal["activations", "gradient", "magnitude"]
Loss = Callable[[nn.Module, Batch], torch.Tensor]
Key = tuple[str, int | None, int]


def unit_scores(model: nn.Module, spaces: Sequence[Space], batches: Sequence[Batch], importance: Importance,
                loss: Loss | None) -> list[torch.Tensor]:
    """Scores of the units of each space, (units,) in float64.

    With `activations`, the L2 norm of what enters the weights that read a unit, over all tokens that count
    (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2, with one L2 norm for their mean over rows of L2 norms).
    With `gradient`, the sum of |w| |dL/dw| over the weights of a unit and over batches (first-order Taylor, Molchanov
    et al. 2019, arXiv 1906.10771, without their square). With `magnitude`, the L2 norm of its weights.

    Raises:
        ValueError: a unit is never read, scores are not finite, or `gradient` has no loss.
    """
    if importance == "activations":
        sums = _input_squares(model, spaces, batches)
    elif importance == "gradient":
        sums = _gradients(model, spaces, batches, loss)
    else:
        tensors = dict(model.named_parameters())
        sums = {_key(site): _along(tensors[site.name].detach().square(), site)
                for space in spaces for site in space.sites if site.name in tensors}
    found = [_of_units(space, sums) for space in spaces]
    for space, scores in zip(spaces, found, strict=True):
        if scores is None or not scores.isfinite().all():
            raise ValueError(f"{space.label}: " + ("nothing reads these units" if scores is None else
                                                   "scores on the calibration rows are not finite"))
    return [scores if importance == "gradient" else scores.sqrt() for scores in found if scores is not None]


def _key(site: Site) -> Key:
    return site.name, site.part, site.dim


def _along(values: torch.Tensor, site: Site) -> torch.Tensor:
    """Sum over all dimensions but the site's."""
    values, dim = (values, site.dim) if site.part is None else (values[site.part], site.dim - 1)
    return values.transpose(0, dim).flatten(1).sum(1, dtype=torch.float64) if values.ndim > 1 else values.double()


def _of_units(space: Space, sums: Mapping[Key, torch.Tensor]) -> torch.Tensor | None:
    """Sum what was measured at each index over the indices of each unit."""
    scores, found = torch.zeros(space.units, dtype=torch.float64), False
    for site in space.sites:
        measured = sums.get(_key(site))
        if measured is not None:
            found = True
            scores.index_add_(0, site.owner, measured.to("cpu", torch.float64))
    return scores if found else None


@torch.no_grad()
def _input_squares(model: nn.Module, spaces: Sequence[Space], batches: Sequence[Batch]) -> dict[Key, torch.Tensor]:
    """Sums of squares of what enters each weight, by its channel; zeros for experts that no token was routed to."""
    wanted = {_key(site) for space in spaces for site in space.sites}
    sums: dict[Key, torch.Tensor] = {}
    mask: list[torch.Tensor | None] = [None]

    def see(name: str, part: int | None, dim: int, inputs: torch.Tensor, output: Any) -> None:
        if (name, part, dim) not in wanted:
            if (name, None, dim) not in wanted:
                return
            part = None
        rows = inputs.transpose(1, -1) if inputs.ndim == 4 else inputs
        rows = only_counted(rows.reshape(-1, rows.shape[-1]).float(), mask[0])
        key = (name, part, dim)
        sums[key] = sums.get(key, 0) + rows.square().sum(0).double()

    with experts_in_turn(model), padding_hidden_from_experts(model, mask), WeightReads(model, see):
        for batch in batches:
            mask[0] = counted(batch)
            model(**inputs_of(batch))
    read = {(name, dim) for name, _, dim in sums}
    for space in spaces:
        for site in space.sites:
            if (site.name, site.dim) in read:
                sums.setdefault(_key(site), torch.zeros(len(site.owner), dtype=torch.float64))
    return sums


def _gradients(model: nn.Module, spaces: Sequence[Space], batches: Sequence[Batch], loss: Loss | None
               ) -> dict[Key, torch.Tensor]:
    """Sums of |w| |dL/dw| by the index along each site; each gradient is dropped as soon as it is whole."""
    if loss is None:
        raise ValueError("importance 'gradient' needs a loss")
    by_name: dict[str, list[Site]] = defaultdict(list)
    for space in spaces:
        for site in space.sites:
            by_name[site.name].append(site)
    sums: dict[Key, torch.Tensor] = {}

    def whole(name: str, weight: torch.Tensor) -> None:
        product = weight.detach().mul(weight.grad).abs_()
        weight.grad = None
        for site in by_name[name]:
            sums[_key(site)] = sums.get(_key(site), 0) + _along(product, site)

    with _trained(model, by_name) as weights, ExitStack() as stack:
        for name, weight in weights.items():
            stack.callback(weight.register_post_accumulate_grad_hook(partial(whole, name)).remove)
        for batch in batches:
            loss(model, batch).backward()
    return sums


@contextmanager
def _trained(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Within the context, these weights alone require gradients, and have none yet."""
    before = {weight: (weight.requires_grad, weight.grad) for weight in model.parameters()}
    found = {name: weight for name, weight in model.named_parameters() if name in names}
    try:
        for weight in before:
            weight.requires_grad_(False).grad = None
        for weight in found.values():
            weight.requires_grad_(True)
        yield found
    finally:
        for weight, (needed, gradient) in before.items():
            weight.requires_grad_(needed).grad = gradient


@torch.no_grad()
def routed_weights(model: nn.Module, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """(experts,) sums of the weights with which tokens are routed to each expert, by the name of the experts' module.

    Raises:
        ValueError: experts are called in another way than transformers calls them.
    """
    sums: dict[str, torch.Tensor] = {}
    mask: list[torch.Tensor | None] = [None]

    def hook(name: str, module: nn.Module, args: tuple) -> None:
        if len(args) != 3:
            raise ValueError(f"experts: {name} is not called with indices and weights")
        index, weights = (only_counted(one, mask[0]) for one in args[1:])
        count = next(one.shape[0] for one in module.parameters(recurse=False) if one.ndim == 3)
        if weights.shape != index.shape:  # a weight for every expert, most of them 0
            weights = weights.gather(-1, index)
        sums.setdefault(name, torch.zeros(count, dtype=torch.float64)).index_add_(
            0, index.flatten().cpu(), weights.flatten().cpu().double())

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if holds_experts(module):
                stack.enter_context(module.register_forward_pre_hook(
                    lambda module, args, name=name: hook(name, module, args)))
        for batch in batches:
            mask[0] = counted(batch)
            model(**inputs_of(batch))
    return sums


def holds_experts(module: nn.Module) -> bool:
    """Whether a transformers module holds all experts of a block, in weights (experts, ..., ...)."""
    return hasattr(module, "is_transposed") and any(one.ndim == 3 for one in module.parameters(recurse=False))


@contextmanager
def experts_in_turn(model: nn.Module) -> Iterator[None]:
    """Within the context, experts run one after another, each multiplying with its own weights."""
    before = model.get_experts_implementation() if any(holds_experts(one) for one in model.modules()) else None
    if before is None:
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def padding_hidden_from_experts(model: nn.Module, mask: list[torch.Tensor | None]) -> Iterator[None]:
    """Within the context, padding enters experts as zeros: they see tokens without a place in their row."""
    def hook(module: nn.Module, args: tuple) -> tuple | None:
        if mask[0] is None or len(mask[0]) != len(args[0]):
            return None
        return (args[0] * mask[0][:, None].to(args[0]), *args[1:])

    with ExitStack() as stack:
        for module in model.modules():
            if holds_experts(module):
                stack.enter_context(module.register_forward_pre_hook(hook))
        yield
