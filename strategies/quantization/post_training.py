"""Post-training quantization: quantize a model without further training, calibrating and rounding it block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from strategies.common.blockwise_calibration import Batch, BlockwiseCalibrator, Seen, check_full_rank, collect, watch
from strategies.common.progress import report
from strategies.common.stored_weights import Experts, as_matrix, multiplies
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.gptq import Factor, factorize, round_to_nearest, round_weights
from strategies.quantization.outliers import keep_whole, outlier_columns
from strategies.quantization.qat import Quantized, Rules, become_quantized, choose
from strategies.quantization.quantizer import WeightQuantizer
from strategies.quantization.smoothing import shared_weights
from strategies.quantization.smoothing import smooth as smooth_norms

RATIOS = 40  # number of fractions of the largest magnitude tried for a static scale
SMALLEST = 0.1  # smallest of these fractions


@dataclass(frozen=True)
class _How:
    """Options that apply to every layer; see `quantize`."""

    method: str
    activations: ActivationQuantizer | None
    activation_range: str
    outliers: float | None
    act_order: bool
    damping: float

    @property
    def static(self) -> bool:
        """Whether activations have calibrated scales."""
        return self.activations is not None and not self.activations.dynamic

    def needs(self) -> list[str]:
        """Names of the options that need calibration."""
        asked = {"method 'gptq'": self.method == "gptq", "outliers": self.outliers is not None,
                 "activations that are not dynamic": self.static}
        return [name for name, wanted in asked.items() if wanted]


def quantize(model: nn.Module, batches: Iterable[Batch] | None, quantizer: WeightQuantizer, *,
             method: Literal["rtn", "gptq"] = "rtn", ignore: Iterable[str] = ("lm_head",), rules: Rules = (),
             activations: ActivationQuantizer | None = None, activation_range: Literal["minmax", "mse"] = "minmax",
             smooth: float | None = None, outliers: float | None = None, embeddings: bool = False,
             act_order: bool = True, damping: float = 0.01, device: torch.device | str | None = None,
             tell: Callable[[str], object] = lambda name: None) -> list[str]:
    """Quantize a model in place: its layers become those of quantization-aware training, with fixed grids.

    Every exporter writes the numbers that the model computes with, and training may continue from there: weights stay
    unchanged where they are rounded to nearest, and lie on the grid after GPTQ. (bf16 cannot represent all affine 8-bit
    grids: about one number in a few thousand becomes its neighbor.) Each block is calibrated on the outputs of the
    already quantized blocks before it. Embeddings, convolutions, experts (which see only the tokens routed to them) and
    layers that no row reaches are rounded to nearest with either method.

    Args:
        model: a causal model or an encoder of transformers, unsharded and in one process; any module if nothing is
            calibrated.
        batches: calibration rows, each the model's keyword arguments. Tokens whose `attention_mask` (rows, tokens) is
            zero are left out. None if nothing is calibrated.
        quantizer: quantizer of every layer that no rule matches.
        method: "rtn" (round to nearest) or "gptq" (`gptq.round_weights`).
        ignore: shell-style patterns of names to leave in full precision.
        rules: patterns with a quantizer of their own, or None for full precision; the first match decides.
        activations: quantizer of the inputs of linear and convolutional layers.
        activation_range: how static activation scales are calibrated: by the largest magnitude or the least squared
            error.
        smooth: alpha of `smoothing.smooth`; None for no smoothing.
        outliers: input columns of linear layers that exceed this magnitude (6.0 in LLM.int8()) stay in full precision,
            as `outliers.OutlierLinear`; None for none.
        embeddings: whether to quantize embeddings, and heads that share their weights.
        act_order: see `gptq.factorize`.
        damping: see `gptq.factorize`.
        device: where blocks run; see `BlockwiseCalibrator`.
        tell: called with the name of each layer when it is done.

    Returns:
        Names of the layers.

    Raises:
        ValueError: as `qat.prepare` raises it; rows are missing, or have fewer tokens than a layer has inputs; or
            nothing can be smoothed. The model is then unchanged. Also if a layer's inputs are not finite, exceed the
            threshold in all columns, or are absent where a scale is calibrated: earlier layers are then already
            quantized.
    """
    how = _How(method, activations, activation_range, outliers, act_order, damping)
    batches, chosen = list(batches or ()), choose(model, quantizer, ignore, rules, embeddings)
    for name, (module, own) in chosen.items():
        own.check(as_matrix(module), name)
    needs = how.needs() + (["smooth"] if smooth is not None else [])
    _check(how, batches, chosen, needs)
    if smooth is not None:
        smooth_norms(model, batches, smooth, chosen, device)
    rounding = _Rounding(model, chosen, how, tell)
    if how.needs():
        walk = BlockwiseCalibrator(model, batches, device)
        rounding.embeddings()
        with closing(walk.parts()) as parts:
            for modules in parts:
                rounding.part(walk, modules)
    rounding.rest()
    return list(chosen)


def _check(how: _How, batches: list[Batch], chosen: dict[str, tuple[nn.Module, WeightQuantizer]], needs: list[str]
           ) -> None:
    """Raise `ValueError` if an option is invalid or there are too few calibration rows for it."""
    for name, value, known in (("method", how.method, ("rtn", "gptq")),
                               ("activation_range", how.activation_range, ("minmax", "mse"))):
        if value not in known:
            raise ValueError(f"{name} is {' or '.join(known)}, not {value!r}")
    if how.damping <= 0:
        raise ValueError(f"a damping of {how.damping} cannot hold a second moment without full rank: take 0.01 or more")
    if needs and not batches:
        raise ValueError(f"{' and '.join(needs)} cannot do without calibration rows: give `batches`")
    if how.method == "gptq":
        check_full_rank({name: as_matrix(module).shape[1] for name, (module, _) in chosen.items()
                         if multiplies(module)}, batches, "rtn")


class _Rounding:
    """Rounds the layers of a model, each once."""

    def __init__(self, model: nn.Module, chosen: dict[str, tuple[nn.Module, WeightQuantizer]], how: _How,
                 tell: Callable[[str], object]) -> None:
        self._left, self._how, self._tell, self._count = dict(chosen), how, tell, len(chosen)
        self._tied = shared_weights(model)
        self._first: dict[int, Quantized] = {}  # by weight: layers that share a weight share its grid

    def embeddings(self) -> None:
        """Round the embeddings first, as the first block is calibrated on their quantized vectors."""
        for name in [name for name, (module, _) in self._left.items() if isinstance(module, nn.Embedding)]:
            self._round(name)

    def part(self, walk: BlockwiseCalibrator, modules: dict[str, nn.Module]) -> None:
        """Round the layers in the current part of the walk."""
        layers = {name: self._left[name][0] for name in modules if name in self._left}
        if not layers:
            return
        seen = collect(walk, layers, moments=self._how.method == "gptq")
        whole = {name: self._whole(name, seen[name]) for name in layers if name in seen}
        scales = self._input_scales(walk, {name: layers[name] for name in whole}, seen, whole)
        of, factor = None, None
        for name in whole:
            moment = seen[name].moment
            if seen[name] is not of and moment is not None:
                of = seen[name]
                factor = factorize(moment, self._how.damping, self._how.act_order, whole[name])
            self._round(name, factor if seen[name] is of else None, whole[name], scales.get(name))

    def rest(self) -> None:
        """Round to nearest the layers that no row reached."""
        for name in list(self._left):
            if self._how.static and not isinstance(self._left[name][0], (nn.Embedding, Experts)):
                raise ValueError(f"{name}: no calibration row reaches it, so its activations have no scale; give more "
                                 "rows, or take activations that are dynamic")
            self._round(name)

    def _whole(self, name: str, seen: Seen) -> torch.Tensor | None:
        """Columns of a layer that stay in full precision; None if there are none."""
        module = self._left[name][0]
        if self._how.outliers is None or not isinstance(module, nn.Linear) or id(module.weight) in self._tied:
            return None
        columns = outlier_columns(seen.largest, self._how.outliers, name)
        return columns if len(columns) else None

    def _input_scales(self, walk: BlockwiseCalibrator, layers: dict[str, nn.Module], seen: dict[str, Seen],
                      whole: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        activations = self._how.activations
        if activations is None or not self._how.static:
            return {}
        largest = {name: _without(seen[name].largest, whole[name], 0).amax(0, keepdim=True) for name in layers}
        if self._how.activation_range == "mse":
            largest = _least_error(walk, layers, largest, whole, activations)
        return {name: activations.scale(largest[name].to(self._left[name][1].scale_dtype)) for name in layers}

    @torch.no_grad()
    def _round(self, name: str, factor: Factor | None = None, whole: torch.Tensor | None = None,
               input_scale: torch.Tensor | None = None) -> None:
        module: Any
        module, own = self._left.pop(name)
        first = self._first.setdefault(id(module.weight), module)
        if first is module:
            if factor is None:
                _, grid = round_to_nearest(as_matrix(module), own, whole)
            else:
                found, grid = round_weights(as_matrix(module), own, factor)
                as_matrix(module).copy_(found)
        become_quantized(module, own, self._how.activations)
        if input_scale is not None:
            module.input_scale = nn.Parameter(input_scale, requires_grad=False)
        if first is module:
            module.fix(grid)
        else:
            module.scale = first.scale
            if hasattr(first, "zero_point"):
                module.zero_point = first.zero_point
        if whole is not None:
            keep_whole(module, whole)
        self._tell(name)
        report("layers", self._count - len(self._left), self._count)


def _without(inputs: torch.Tensor, whole: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Inputs of a layer with zeros in the columns (columns,) that stay in full precision."""
    return inputs if whole is None else inputs.index_fill(dim, whole, 0.0)


def _least_error(walk: BlockwiseCalibrator, layers: dict[str, nn.Module], largest: dict[str, torch.Tensor],
                 whole: dict[str, torch.Tensor | None], activations: ActivationQuantizer) -> dict[str, torch.Tensor]:
    """The magnitude (1,) to use as the largest of each layer's inputs, with the least squared error."""
    ratios = torch.linspace(1.0, SMALLEST, RATIOS).tolist()
    errors = {name: torch.zeros(RATIOS, dtype=torch.float64) for name in layers}

    def see(name: str, rows: torch.Tensor) -> None:
        rows = _without(rows.float(), whole[name], 1)
        for number, ratio in enumerate(ratios):
            rounded = activations.fake_quantize(rows, activations.scale(ratio * largest[name]))
            errors[name][number] += float((rounded - rows).square_().sum())

    first = watch(walk, layers, see)
    return {name: ratios[int(errors[first[name]].argmin())] * largest[name] for name in layers}
