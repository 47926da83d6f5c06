"""SmoothQuant: move activation outliers into the weights that they are multiplied with."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from strategies.common.blockwise_calibration import Batch, BlockwiseCalibrator, collect

SMALLEST = 1e-5  # smallest factor


def smooth(model: nn.Module, batches: Sequence[Batch], alpha: float = 0.5, layers: Collection[str] | None = None,
           device: torch.device | str | None = None) -> list[str]:
    """Divide norms' outputs by factors and multiply the weights of the layers that read them by the same, in place.

    The model's outputs stay the same up to rounding, and its activations become easier to quantize. Which layers read a
    norm's output is found by running the model. A norm that something else reads too, such as a router or a residual
    sum, is left unchanged, with a warning.

    Args:
        model: a transformer in full precision.
        batches: calibration rows, each the model's keyword arguments.
        alpha: how much of the quantization difficulty moves from activations to weights, 0 to 1 (Xiao et al. 2023,
            section 4).
        layers: names of the layers to be quantized, one of which has to read a norm; None for any.
        device: where blocks run; see `BlockwiseCalibrator`.

    Returns:
        Names of the norms.

    Raises:
        ValueError: alpha is not between 0 and 1, no norm can be smoothed, or a norm multiplies neither by its weight
            nor by 1 + weight.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is how much of the difficulty moves to the weights: 0 to 1, not {alpha}")
    walk, tied, done = BlockwiseCalibrator(model, batches, device), shared_weights(model), []
    with closing(walk.parts()) as parts:
        for modules in parts:
            done += _smooth_block(walk, modules, alpha, tied, layers) if walk.within else []
    if not done:
        raise ValueError(f"{type(model).__name__} has no norm that linear layers of its block alone read, so nothing "
                         "can be smoothed: leave `smooth` out, and take activations that are dynamic")
    return done


def shared_weights(model: nn.Module) -> set[int]:
    """Ids of weights that several modules share."""
    counts = Counter(id(module.weight) for _, module in model.named_modules()
                     if isinstance(getattr(module, "weight", None), nn.Parameter))
    return {key for key, count in counts.items() if count > 1}


def factors(inputs: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (Xiao et al. 2023, eq. 4); 1 for a channel that is always zero.

    Args:
        inputs: (inputs,) largest magnitude of each channel.
        weights: (outputs, inputs) of all layers that read them.
        alpha: 0 to 1.
    """
    largest = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    found = (inputs.float() ** alpha / largest ** (1 - alpha)).clamp(min=SMALLEST)
    return torch.where((inputs == 0) | (largest == 0), torch.ones_like(found), found)


# ---- one part of a walk

@dataclass
class _Norm:
    """A norm and the layers that read it.

    Attributes:
        module: the norm.
        call: its arguments in one batch.
        output: its output.
        readers: linear layers that take its output directly, by name.
    """

    module: nn.Module
    call: tuple[tuple, dict[str, Any]]
    output: torch.Tensor
    readers: dict[str, nn.Linear] = field(default_factory=dict)

    @property
    def own(self) -> list[nn.Parameter]:
        """Its weight, and its bias if it has one."""
        bias = getattr(self.module, "bias", None)
        return [self.module.weight] if bias is None else [self.module.weight, bias]

    @property
    def read(self) -> list[nn.Parameter]:
        """Weights of the readers."""
        return [reader.weight for reader in self.readers.values()]


@torch.no_grad()
def _smooth_block(walk: BlockwiseCalibrator, modules: dict[str, nn.Module], alpha: float, tied: set[int],
                  wanted: Collection[str] | None) -> list[str]:
    """Smooth the norms of the walk's current block and return their names."""
    norms = {}
    for name, norm in _norms(walk, modules).items():
        if not norm.readers or wanted is not None and not any(reader in wanted for reader in norm.readers):
            continue
        if any(id(weight) in tied for weight in norm.own + norm.read) or not _only_readers(walk, norm):
            warnings.warn(f"{name} is not smoothed: not only {', '.join(norm.readers)} read it", stacklevel=2)
        else:
            norms[name] = norm, _offset(name, norm)
    first = {next(iter(norm.readers)): norm for norm, _ in norms.values()}
    seen = collect(walk, {name: norm.readers[name] for name, norm in first.items()}) if first else {}
    for norm, offset in norms.values():
        _fold(norm, offset, factors(seen[next(iter(norm.readers))].largest, norm.read, alpha))
    return list(norms)


def _fold(norm: _Norm, offset: float, factor: torch.Tensor) -> None:
    """Divide a norm by factors (inputs,) and multiply its readers by what it was actually divided by after rounding.

    Where 1 + weight is near zero, the weight is near -1, and in 16 bits few bits are left for the difference.
    """
    weight = norm.module.weight
    before = weight.float() + offset
    stored = (before / factor - offset).to(weight.dtype)
    factor = before / (stored.float() + offset)
    kept = ~factor.isfinite() | (factor <= 0)  # multipliers that are zero or would become zero
    factor = factor.masked_fill(kept, 1.0)
    weight.copy_(torch.where(kept, weight, stored))
    for bias in norm.own[1:]:
        bias.copy_(bias.float() / factor)
    for reader in norm.read:
        reader.copy_(reader.float() * factor)


def _norms(walk: BlockwiseCalibrator, modules: dict[str, nn.Module]) -> dict[str, _Norm]:
    """Modules with one weight per channel and the layers that read them, found by running one batch."""
    found: dict[str, _Norm] = {}

    def gave(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.shape[-1] == len(module.weight):
            found[name] = _Norm(module, (args, kwargs), output)

    def reads(name: str, module: nn.Linear, args: tuple) -> None:
        for norm in found.values():
            if norm.output is args[0]:
                norm.readers[name] = module

    with ExitStack() as stack:
        for name, module in modules.items():
            if isinstance(module, nn.Linear):
                stack.enter_context(module.register_forward_pre_hook(partial(reads, name)))
            elif isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1:
                stack.enter_context(module.register_forward_hook(partial(gave, name), with_kwargs=True))
        walk.run(1)
    return found


def _only_readers(walk: BlockwiseCalibrator, norm: _Norm) -> bool:
    """Whether only the readers use the norm's output.

    That is so if the block's output stays the same when the norm's output is divided by factors and its readers
    multiply by them. The factors are powers of two, which are exact in any dtype.
    """
    before, kept = walk.forward(0), [weight.clone() for weight in norm.read]
    factor = torch.ones_like(norm.module.weight)
    factor[::2], factor[1::3] = 2.0, 0.5
    for weight in norm.read:
        weight.mul_(factor)
    with norm.module.register_forward_hook(lambda module, args, output: output / factor):
        after = walk.forward(0)
    for weight, value in zip(norm.read, kept, strict=True):
        weight.copy_(value)
    rounding = 4 * torch.finfo(before.dtype).eps * before.abs().flatten(0, -2).amax(0)
    return bool(((after - before).abs() <= rounding).all())


def _offset(name: str, norm: _Norm) -> float:
    """0 for a norm that multiplies by its weight, 1 for one that multiplies by 1 + weight, found by trying.

    Without bias, twice the multiplier has to give exactly twice the output.
    """
    kept = [parameter.clone() for parameter in norm.own]
    args, kwargs = norm.call
    outputs = []
    for value in (0.0, 1.0, 2.0):
        for parameter, filled in zip(norm.own, (value, 0.0), strict=False):
            parameter.fill_(filled)
        outputs.append(norm.module(*args, **kwargs))
    for parameter, value in zip(norm.own, kept, strict=True):
        parameter.copy_(value)
    zero, one, two = outputs
    for offset, once, twice in ((0.0, one, two), (1.0, zero, one)):
        if once.any() and torch.equal(2 * once, twice):
            return offset
    raise ValueError(f"{name} cannot be smoothed: this {type(norm.module).__name__} multiplies neither by its weight "
                     "nor by 1 + weight; leave `smooth` out")
