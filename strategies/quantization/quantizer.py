"""The weight quantizer: fake-quantizes weights in training and makes the quantized numbers that are exported.

A weight (outputs, ...) has a scale for each output and group of inputs; a grid is these scales with their zero points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from strategies.common.planned_device import kind_of
from strategies.quantization import scales
from strategies.quantization.straight_through import LearnedScale, StraightThrough

Kind = Literal["int", "ternary", "binary", "fp8"]
Rule = Literal["minmax", "mse", "absmean", "learned"]
RULES: dict[str, tuple[Rule, ...]] = {  # valid rules of each kind, the default first
    "int": ("minmax", "mse", "learned"), "ternary": ("absmean", "mse", "learned"), "binary": ("absmean", "learned"),
    "fp8": ("minmax", "mse")}
FP8 = torch.float8_e4m3fn


class Grid(NamedTuple):
    """The representable values of each group: w_hat = scale * (q - zero_point).

    Attributes:
        scale: (outputs, groups), in the dtype it is stored in; negative where the largest weight is positive.
        zero_point: (outputs, groups) integers in fp32; None where it is zero.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None = None


def without_data(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a meta or fake tensor, as when a run is only planned."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _by_kernel(tensor: torch.Tensor) -> bool:
    """Whether `group_kernels` serve a tensor: an ordinary or fake one on the CPU, and torch.compile not tracing."""
    return (kind_of(tensor) == "cpu" and type(tensor) in (torch.Tensor, nn.Parameter, FakeTensor)
            and not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor))


@dataclass(frozen=True)
class WeightQuantizer:
    """Uniform weight quantization with one scale for a group of inputs, an output channel or the whole tensor.

    With w the weights that share a scale and [lowest, highest] the integers of the kind (survey eq. 11):

        q = clip(round(w / scale) + zero_point, lowest, highest)        w_hat = scale * (q - zero_point)

    A symmetric grid of b bits has one more negative number than positive ones, -2^(b-1). The sign of the scale is
    chosen such that the largest weight falls on it, as in llama.cpp's Q4_0, so that no number is wasted; at 2 bits that
    would be one of four. `ternary` is BitNet b1.58's (Ma et al. 2024, eq. 1-3), `binary` XNOR-Net's (Rastegari et al.
    2016, eq. 6), `fp8` is e4m3 with 448 as its largest number. The scale is rounded to `scale_dtype` before it is used,
    so that training sees the scale that is stored.

    Attributes:
        bits: bits of an `int`, 2 to 8; the other kinds have their own (ternary 2, binary 1, fp8 8).
        group_size: number of neighboring inputs that share a scale; None for a whole output channel.
        scale_dtype: dtype the scale is stored in.
        kind: the type of numbers.
        symmetric: whether zero_point is zero.
        rule: how scales are found: from the largest weight (`minmax`), the mean magnitude (`absmean`), the least
            squared error (`mse`), or by training (`learned`; Esser et al. 2020), starting from the least squared error.
            In training the last two are kept as a ratio to the scale that covers the weights, so that they follow when
            weights grow and no step needs a search. None for the kind's default.
        per_tensor: one scale for all outputs.
        positive: keep symmetric scales positive, for runtimes that refuse others; the extreme number -2^(b-1) is then
            used only where weights reach further below zero than above.
    """

    bits: int | None = None
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32
    kind: Kind = "int"
    symmetric: bool = True
    rule: Rule | None = None
    per_tensor: bool = False
    positive: bool = False

    def __post_init__(self) -> None:
        own = {"int": self.bits or 4, "ternary": 2, "binary": 1, "fp8": 8}[self.kind]
        if self.bits not in (None, own):
            raise ValueError(f"{self.kind} weights have {own} bits, not {self.bits}")
        if not 2 <= own <= 8 and self.kind == "int":
            raise ValueError(f"whole numbers can have 2 to 8 bits, not {own}; one bit is the kind `binary`")
        object.__setattr__(self, "bits", own)
        object.__setattr__(self, "rule", self.rule or RULES[self.kind][0])
        if self.rule not in RULES[self.kind]:
            raise ValueError(f"scales of {self.kind} weights come from {' or '.join(RULES[self.kind])}, not "
                             f"{self.rule}")
        if not self.symmetric and self.kind != "int":
            raise ValueError(f"{self.kind} weights have no zero point: they are symmetric")
        if self.positive and not self.symmetric:
            raise ValueError("scales beside a zero point are positive without being told to be")
        if self.per_tensor and self.group_size:
            raise ValueError(f"a scale is of a group of {self.group_size} or of the tensor, not of both")

    @property
    def lowest(self) -> int:
        """The smallest number."""
        assert self.bits is not None, "settled when it was made"
        return {"int": -2 ** (self.bits - 1), "ternary": -1, "binary": -1, "fp8": -448}[self.kind]

    @property
    def highest(self) -> int:
        """The largest number."""
        assert self.bits is not None, "settled when it was made"
        return {"int": 2 ** (self.bits - 1) - 1, "ternary": 1, "binary": 1, "fp8": 448}[self.kind]

    @property
    def searched(self) -> bool:
        """Whether scales are searched for or learned, rather than computed directly from the weights."""
        return self.rule in ("mse", "learned")

    def check(self, weight: torch.Tensor, name: str = "weight") -> None:
        """Raise `ValueError` if `weight` (outputs, ...) cannot be quantized; without data only its shape is checked."""
        if weight.ndim < 2:
            raise ValueError(f"{name}: only matrices and kernels are quantized, this has shape {tuple(weight.shape)}")
        inputs = weight[0].numel()
        if self.group_size and inputs % self.group_size:
            raise ValueError(f"{name}: groups of {self.group_size} do not divide its {inputs} inputs")
        if without_data(weight) or not weight.numel():
            return
        lowest, highest = weight.detach().aminmax()
        if not (lowest.isfinite() and highest.isfinite()):
            raise ValueError(f"{name}: a weight is not finite")
        if lowest == 0 and highest == 0:
            raise ValueError(f"{name}: all weights are zero, so there is nothing to scale them by")

    # ---- the grid

    @torch.no_grad()
    def grid(self, weight: torch.Tensor, ratio: torch.Tensor | None = None) -> Grid:
        """The grid that the rule gives for a weight (outputs, ...).

        Args:
            weight: (outputs, ...).
            ratio: (outputs, groups) ratio of the scale to the covering one, if it was found before.
        """
        if ratio is not None:
            scale, zero_point = self._covering(weight)
            return self.stored(scale * ratio, zero_point)
        return self.stored(*(self._best(weight) if self.searched else self._covering(weight)))

    @torch.no_grad()
    def first_ratio(self, weight: torch.Tensor) -> torch.Tensor:
        """Ratio of the scale with the least squared error to the covering scale (outputs, groups)."""
        covering = self.stored(self._covering(weight)[0]).scale.float()
        return torch.ones_like(covering) if without_data(weight) else self._best(weight)[0] / covering

    def stored(self, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> Grid:
        """A grid with its scale rounded to the dtype it is stored in.

        A group of zeros gets scale 1, because 0 would divide by zero. So does a group so small that its scale
        underflows in `scale_dtype`.
        """
        scale = scale.to(self.scale_dtype)
        return Grid(scale.masked_fill(scale == 0, 1.0), zero_point)

    def numbers(self, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
        """q in the shape of `weight`: int8, or float8 for `fp8`."""
        return self._rounded(weight, grid).to(FP8 if self.kind == "fp8" else torch.int8)

    def dequantize(self, numbers: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
        """scale * (q - zero_point) in the shape of `numbers`."""
        return self._product(numbers.to(grid.scale.dtype), grid).to(dtype)

    def _covering(self, weight: torch.Tensor) -> scales.Found:
        """Scale in fp32 and zero point computed directly from the weights' range or mean magnitude."""
        groups = self._grouped(weight.detach())
        if self.kind in ("ternary", "binary"):
            return groups.abs().mean(-1, dtype=torch.float32), None
        if not _by_kernel(weight):
            return scales.covering(*scales.ranges(groups), self)
        from strategies.quantization import group_kernels  # imports numba

        if self.kind == "int" and self.symmetric and not self.positive:
            return group_kernels.signed_scales(_flat(groups), self.lowest).view(groups.shape[:2]), None
        least, most = group_kernels.ranges(_flat(groups))
        return scales.covering(least.view(groups.shape[:2]), most.view(groups.shape[:2]), self)

    def _best(self, weight: torch.Tensor) -> scales.Found:
        """Scale and zero point of the least squared error; for binary numbers that is the mean magnitude."""
        groups = self._grouped(weight.detach())
        if self.kind == "ternary":
            return scales.best_ternary(groups), None
        return self._covering(weight) if self.kind == "binary" else scales.best(groups, self)

    # ---- training

    def fake_quantize(self, weight: torch.Tensor, ratio: torch.Tensor | None = None, grid: Grid | None = None
                      ) -> torch.Tensor:
        """`dequantize(numbers(weight))`, with a gradient (survey eq. 12).

        Args:
            weight: (outputs, ...).
            ratio: (outputs, groups) ratio of the scale to the covering one; gets a gradient if it is learned.
            grid: a given grid, instead of one computed from the weight.
        """
        grid = self.grid(weight, ratio) if grid is None else grid
        rounded = self.rounded(weight, grid)
        if ratio is None or not ratio.requires_grad:
            return StraightThrough.apply(weight, rounded)
        return LearnedScale.apply(weight, ratio, rounded, *grid, self)

    @torch.no_grad()
    def rounded(self, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
        """`dequantize(numbers(weight))` in the dtype of `weight`, without a gradient."""
        if not self._in_one_pass(weight, grid.scale):
            return self._product(self._rounded(weight, grid), grid).to(weight.dtype)
        from strategies.quantization import group_kernels

        # A product in half precision is the one in fp32, rounded: its factors have few bits.
        made = group_kernels.rounded(_flat(self._grouped(weight.detach())), *grid, self.lowest, self.highest)
        return made.to(grid.scale.dtype).to(weight.dtype).view(weight.shape)

    def gradient_of_scale(self, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None,
                          gradient: torch.Tensor) -> torch.Tensor:
        """Gradient of the scale (outputs, groups) in fp32, from that of the fake-quantized weight; see `LearnedScale`.

        Args:
            weight, gradient: (outputs, ...).
            scale, zero_point: (outputs, groups), with which the weight was quantized.
        """
        if not self._in_one_pass(weight, scale):
            terms = self.slope(weight, scale, zero_point)
            return terms.mul_(gradient.reshape(terms.shape)).sum(-1)
        from strategies.quantization import group_kernels

        groups, arriving = (self._grouped(one.detach()) for one in (weight, gradient))
        terms = group_kernels.by_scale(_flat(groups), scale, zero_point, _flat(arriving), self.lowest,
                                       self.highest).view(groups.shape)
        # A sum depends on the order in memory, which is to be that of the weights.
        return (terms if groups.is_contiguous() else torch.empty_like(groups, dtype=torch.float32).copy_(terms)).sum(-1)

    def slope(self, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        """d w_hat / d scale (outputs, groups, weights of a group) in fp32; see `LearnedScale`."""
        ratio = self._ratio(weight, scale)
        if self.kind == "binary":
            return torch.where(ratio >= 0, 1.0, -1.0)
        shift = 0.0 if zero_point is None else zero_point.unsqueeze(-1)
        numbers = ratio.round().add_(shift)
        inside = (numbers >= self.lowest) & (numbers <= self.highest)
        return numbers.clamp_(self.lowest, self.highest).sub_(shift).sub_(ratio.mul_(inside))

    # ---- arithmetic on groups

    def _in_one_pass(self, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether `group_kernels` round a weight, with their fp32 arithmetic."""
        return self.kind in ("int", "ternary") and _by_kernel(weight) and scale.dtype.itemsize <= 4

    def _ratio(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """w / scale (outputs, groups, weights of a group) in fp32."""
        return self._grouped(weight.detach()).float() / scale.float().unsqueeze(-1)

    def _rounded(self, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
        """q in fp32, in the shape of `weight`."""
        ratio = self._ratio(weight, grid.scale)
        if self.kind == "binary":
            ratio = torch.where(ratio >= 0, 1.0, -1.0)
        elif self.kind == "fp8":
            ratio = ratio.clamp_(self.lowest, self.highest).to(FP8).float()
        else:
            ratio = ratio.round_()
            if grid.zero_point is not None:
                ratio += grid.zero_point.unsqueeze(-1)
            ratio = ratio.clamp_(self.lowest, self.highest)
        return ratio.reshape(weight.shape)

    def _product(self, numbers: torch.Tensor, grid: Grid) -> torch.Tensor:
        """scale * (q - zero_point) in the scale's dtype, as loaders of exported files compute it."""
        groups = self._grouped(numbers.to(grid.scale.dtype))
        if grid.zero_point is not None:
            groups = groups - grid.zero_point.to(groups.dtype).unsqueeze(-1)
        return (groups * grid.scale.unsqueeze(-1)).reshape(numbers.shape)

    def _grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """(outputs, ...) -> (outputs, groups, weights of a group), with a single output and group if `per_tensor`."""
        if self.per_tensor:
            return weight.reshape(1, 1, -1)
        return weight.flatten(1).unflatten(1, (-1, self.group_size or weight[0].numel()))


def _flat(groups: torch.Tensor) -> torch.Tensor:
    """(outputs, groups, weights of a group) as contiguous rows in fp32."""
    return groups.flatten(0, 1).float().contiguous()
