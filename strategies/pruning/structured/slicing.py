"""Removes units from tensors: the smaller model with what remains, and the whole one with the rest set to zero."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig

from strategies.common.generation_settings import copy_generation_settings
from strategies.pruning.structured.product_watch import WeightReads
from strategies.pruning.structured.unit_spaces import Site, Space

Kept = Sequence[torch.Tensor]  # for each space, a mask (units,) of those that remain


def empty_model(model: nn.Module, config: PretrainedConfig) -> nn.Module:
    """A model of the same class for another configuration, its parameters on the meta device."""
    config = copy.deepcopy(config)
    with init_empty_weights(include_buffers=False):
        made = type(model)._from_config(config, dtype=next(model.parameters()).dtype,
                                        attn_implementation=getattr(model.config, "_attn_implementation", None))
    return made


def sites_by_name(spaces: Sequence[Space], kept: Kept) -> dict[str, list[tuple[Site, torch.Tensor]]]:
    """For each tensor its sites, and the indices (remaining,) that are kept of each, in rising order."""
    found: dict[str, list[tuple[Site, torch.Tensor]]] = defaultdict(list)
    for space, mask in zip(spaces, kept, strict=True):
        for site in space.sites:
            found[site.name].append((site, mask[site.owner].nonzero().flatten()))
    return found


@torch.no_grad()
def sliced(tensor: torch.Tensor, sites: Sequence[tuple[Site, torch.Tensor]]) -> torch.Tensor:
    """The remaining part of a tensor."""
    for site, index in sites:
        if site.part is None:
            tensor = tensor.index_select(site.dim, index.to(tensor.device))
    stacked = [(site, index) for site, index in sites if site.part is not None]
    if not stacked:
        return tensor
    return torch.stack([tensor[site.part].index_select(site.dim - 1, index.to(tensor.device))
                        for site, index in sorted(stacked, key=lambda one: one[0].part or 0)])


@torch.no_grad()
def set_to_zero(model: nn.Module, spaces: Sequence[Space], kept: Kept, value: float = 0.0) -> None:
    """Set every weight of the units that go to zero, in place."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for space, mask in zip(spaces, kept, strict=True):
        for site in space.sites:
            gone = (~mask[site.owner]).nonzero().flatten().to(tensors[site.name].device)
            whole = tensors[site.name]
            (whole if site.part is None else whole[site.part]).index_fill_(
                site.dim - (site.part is not None), gone, value)


def move_weights(model: nn.Module, cut: nn.Module, spaces: Sequence[Space], kept: Kept) -> None:
    """Fill the smaller model with what remains of the whole one, which is empty afterwards.

    Tensors are taken one after another, so that memory never holds more than the whole model and one tensor.
    """
    sites = sites_by_name(spaces, kept)
    made: dict[int, torch.Tensor] = {}  # of tied weights, which have several names
    owned = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    state: dict[str, torch.Tensor] = {}
    for name in list(model.state_dict()):  # its tensors would hold the weights that are replaced
        whole = owned[name]
        if id(whole) not in made:
            made[id(whole)] = sliced(whole.data, sites[name]) if name in sites else whole.data
            whole.data = whole.data.new_empty(0)
        state[name] = made[id(whole)]
    cut.load_state_dict(state, assign=True)
    cut.tie_weights()
    cut.to(next(cut.parameters()).device)
    copy_generation_settings(model, cut)
    cut.train(model.training)
    for (name, weight), before in zip(cut.named_parameters(), [True] * len(owned), strict=False):
        weight.requires_grad_(before and name in owned and owned[name].requires_grad)


@contextmanager
def norms_over_kept(model: nn.Module, cut: nn.Module, spaces: Sequence[Space], kept: Kept) -> Iterator[None]:
    """Within the context, norms over units are taken over those that remain; the others come out as zeros.

    BatchNorm has statistics of each channel, and stays as it is.
    """
    owned = dict(model.named_parameters(remove_duplicate=False))
    sites = sites_by_name(spaces, kept)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            weight = f"{name}.weight"
            if weight not in sites or owned[weight].ndim != 1 or isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            smaller = copy.deepcopy(cut.get_submodule(name))
            for leaf, parameter in module.named_parameters(recurse=False):
                setattr(smaller, leaf, nn.Parameter(sliced(parameter.detach(), sites[f"{name}.{leaf}"])))
            stack.enter_context(_forward(module, _over(smaller, sites[weight][0][1])))
        yield


def _over(norm: nn.Module, kept: torch.Tensor) -> Any:
    def forward(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        index = kept.to(values.device)
        found = norm(values.index_select(-1, index), *args, **kwargs)
        return torch.zeros_like(values, dtype=found.dtype).index_copy_(-1, index, found)

    return forward


@contextmanager
def _forward(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def experts_left_out(model: nn.Module, spaces: Sequence[Space], kept: Kept) -> Iterator[None]:
    """Within the context, routers give the experts that go a score of minus infinity, and so do biases of routers."""
    gone: Mapping[str, torch.Tensor] = {
        site.name: ~mask for space, mask in zip(spaces, kept, strict=True) for site in space.sites}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    lowest = float("-inf")

    def see(name: str, part: int | None, dim: int, inputs: torch.Tensor, output: torch.Tensor) -> Any:
        if name not in gone or part is not None or tensors[name].ndim != 2:
            return None
        return output.masked_fill(gone[name].to(output.device), lowest)

    with torch.no_grad():
        for name, mask in gone.items():
            if tensors[name].ndim == 1:
                tensors[name].masked_fill_(mask.to(tensors[name].device), lowest)
    with WeightReads(model, see):
        yield
