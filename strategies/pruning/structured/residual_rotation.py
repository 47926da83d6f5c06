"""Turns a model's residual stream to its principal components, so that its first channels carry the most of it.

The idea of SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024), with one rotation for all blocks: the cut model then has
a plain configuration and class, and no matrices on its residual connections.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from strategies.common.blockwise_calibration import Batch
from strategies.pruning.structured.calibration_rows import counted, inputs_of, only_counted
from strategies.pruning.structured.unit_spaces import Site, Space

EQUAL = 1e-4  # largest difference of a norm from an RMS norm, over its largest output


def norms_of(model: nn.Module, space: Space) -> dict[str, nn.Module]:
    """The RMS norms over the residual stream, by name.

    Raises:
        ValueError: a norm over it is of another kind.
    """
    weights = dict(model.named_parameters())
    found: dict[str, nn.Module] = {}
    for site in space.sites:
        name, _, leaf = site.name.rpartition(".")
        if leaf == "weight" and site.name in weights and weights[site.name].ndim == 1:
            found[name] = model.get_submodule(name)
            if not _is_rms(found[name], model.config.rms_norm_eps):
                raise ValueError(f"width_by: rotation needs RMS norms, and {name} is a {type(found[name]).__name__}; "
                                 "use selection")
    return found


@torch.no_grad()
def _is_rms(norm: nn.Module, epsilon: float) -> bool:
    weight: torch.Tensor = norm.weight
    values = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    expected = weight * values * (values.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    given = norm(values)
    return isinstance(given, torch.Tensor) and bool(
        (given - expected).abs().max() <= EQUAL * expected.abs().max()) and not hasattr(norm, "bias")


@torch.no_grad()
def principal_components(model: nn.Module, norms: dict[str, nn.Module], batches: Sequence[Batch]
                         ) -> tuple[torch.Tensor, torch.Tensor]:
    """The directions of the residual stream, (width, width) orthogonal in float64, and the share of it in each.

    Column i is the direction with the i-th most of the stream.

    The stream is taken where norms read it, each token scaled to the same length as there, and summed over all norms
    and all tokens that count.
    """
    width = len(next(iter(norms.values())).weight)
    moment = torch.zeros(width, width, dtype=torch.float64)
    mask: list[torch.Tensor | None] = [None]

    def hook(module: nn.Module, args: tuple) -> None:
        rows = nn.functional.normalize(only_counted(args[0].reshape(-1, width), mask[0]).float(), dim=-1)
        moment.add_((rows.T @ rows).double().cpu())

    with ExitStack() as stack:
        for norm in norms.values():
            stack.enter_context(norm.register_forward_pre_hook(hook))
        for batch in batches:
            mask[0] = counted(batch)
            model(**inputs_of(batch))
    values, vectors = torch.linalg.eigh(moment)
    if not values.isfinite().all():
        raise ValueError("what enters the norms on the calibration rows is not finite")
    return vectors.flip(-1), (values / values.sum()).flip(-1)


@torch.no_grad()
def rotate(model: nn.Module, space: Space, norms: dict[str, nn.Module], basis: torch.Tensor, batch: Batch) -> None:
    """Fold norms into what reads them and rotate the residual stream, in place; the model computes the same as before.

    A weight that reads the stream becomes W diag(norm) Q, one that writes it Q^T W. A tied head is untied, because only
    the head has the last norm folded in.

    Raises:
        ValueError: something reads the stream without a norm before it, so that it cannot be rotated.
    """
    _untie(model)
    readers = _readers(model, space, norms, batch)
    weights = dict(model.named_parameters())
    for site in space.sites:
        if site.name.rpartition(".")[0] in norms:
            continue
        weight = weights[site.name]
        scale = norms[readers[site.name]].weight.double() if site.name in readers else None
        weight.copy_(_turned(weight, site, basis.to(weight.device), scale))
    for norm in norms.values():
        norm.weight.fill_(1.0)


def _turned(weight: torch.Tensor, site: Site, basis: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    values = weight.double().transpose(site.dim, -1)
    values = (values if scale is None else values * scale) @ basis
    return values.transpose(site.dim, -1).to(weight.dtype)


def _untie(model: nn.Module) -> None:
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is inputs.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


@torch.no_grad()
def _readers(model: nn.Module, space: Space, norms: dict[str, nn.Module], batch: Batch) -> dict[str, str]:
    """For each weight that reads the residual stream, the norm before it, whose output is the memory that it reads."""
    sites = {site.name: site for site in space.sites}
    made: list[tuple[torch.Tensor, str]] = []
    found: dict[str, str] = {}

    def wrote(name: str, output: torch.Tensor) -> None:
        made.append((output, name))

    def read(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        values = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)), None)
        for leaf, weight in module.named_parameters(recurse=False):
            site = sites.get(f"{name}.{leaf}")
            if site is None or values is None or leaf.endswith("bias") or isinstance(module, nn.Embedding):
                continue
            before = next((norm for output, norm in made if output.data_ptr() == values.data_ptr()), None)
            if before is not None and site.dim == _input_dim(module, weight):
                found[site.name] = before

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in norms:
                stack.enter_context(module.register_forward_hook(lambda _, __, output, name=name: wrote(name, output)))
            elif any(module.named_parameters(recurse=False)):
                stack.enter_context(module.register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: read(name, module, args, kwargs), with_kwargs=True))
        model(**inputs_of(batch))
    _check_readers(model, sites, found)
    return found


def _input_dim(module: nn.Module, weight: torch.Tensor) -> int:
    return 1 if getattr(module, "is_transposed", False) and weight.ndim == 3 else weight.ndim - 1


def _check_readers(model: nn.Module, sites: dict[str, Site], found: dict[str, str]) -> None:
    for name, site in sites.items():
        module, weight = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        reads = weight.ndim > 1 and not name.endswith("bias") and not isinstance(module, nn.Embedding) and \
            site.dim == _input_dim(module, weight)
        if reads and name not in found:
            raise ValueError(f"width_by: {name} reads the residual stream without a norm before it, so that no "
                             "rotation leaves the model as it is; use selection")
