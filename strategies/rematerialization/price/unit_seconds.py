"""Seconds that the units of a model compute in a training step, by the roofline, from a step on fake tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from strategies.rematerialization.capture.uncaptured import HALF
from strategies.rematerialization.price.costs import Device
from strategies.rematerialization.price.gpu_attention import as_on_gpus

FORWARD, BACKWARD = "forward", "backward"
# Fractions of a data sheet's 16-bit operations that the best of many matrix products attained, in a published
# measurement: stas00/ml-engineering, compute/accelerator/README.md, "Maximum Achievable Matmul FLOPS comparison table"
# (A100 SXM 271.2 of 312, H100 SXM 794.5 of 989 TFLOP/s, "H200 is the same"). Others are taken at their data sheet.
ATTAINED = {"a100-40gb": 271.2 / 312, "a100-80gb": 271.2 / 312, "h100": 794.5 / 989, "h200": 794.5 / 989}
# Share of that roofline's speed that a whole step held: in mosaicml/llm-foundry's scripts/train/benchmarking/README.md
# for MPT-7B on one node of 8, 4,641 tokens/s per A100 and 10,643 per H100, by `benchmarks.sharding.scale`. Elementwise
# kernels do not attain the data sheet's bandwidth, nor do GPUs hold their clock. Others are taken to be like the A100.
SUSTAINED = {"a100-40gb": 0.794, "a100-80gb": 0.794, "h100": 0.655, "h200": 0.655}
FREE = {torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided,
        torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided, torch.ops.aten.lift_fresh}
Unit = tuple[str, ...]


def sustained(device: str) -> float:
    """Share of the roofline's speed that a whole step holds on a device."""
    return SUSTAINED.get(device, SUSTAINED["a100-80gb"])


class OperationSeconds(TorchDispatchMode):
    """Adds up the roofline's seconds of all operations that run within the context, under the present label.

    Attributes:
        label: (owner, phase) that operations are counted under.
        seconds: by label.
        phase: forward or backward.
    """

    def __init__(self, device: Device, attained: float = 1.0) -> None:
        super().__init__()
        self.device, self.attained = device, attained
        self.label: tuple[Any, str] = ((), FORWARD)
        self.seconds: defaultdict[tuple[Any, str], float] = defaultdict(float)
        self.phase = FORWARD

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seconds[self.label] += self._of(func, args, kwargs or {}, out)
        return out

    def _of(self, func: Any, args: tuple, kwargs: dict, out: Any) -> float:
        """Seconds of an operation: the larger of compute and memory time (Williams et al. 2009)."""
        packet = getattr(func, "overloadpacket", None)
        if packet in FREE or _is_view(func):
            return 0.0
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)] + made
        if not made:  # a question about a tensor
            return 0.0
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        half = any(tensor.dtype in HALF for tensor in made)
        speed = self.device.half * self.attained if half else self.device.single
        count = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        return self.device.overhead + max(count / speed, moved / self.device.bandwidth)


def _is_view(func: Any) -> bool:
    """Whether what an operation returns is another view of what it was given."""
    returned = func._schema.returns if isinstance(func, torch._ops.OpOverload) else ()
    return any(one.alias_info is not None and not one.alias_info.is_write for one in returned)


def unit_seconds(loss: Callable[[], torch.Tensor], models: Mapping[str, nn.Module], units: Mapping[str, Sequence[Unit]],
                 device: Device) -> dict[str, dict[Unit, tuple[float, float]]]:
    """Seconds (forward, backward) of each unit of each model in one micro-batch.

    Whatever runs outside of units counts for the unit that ran before it, so that the loss counts for the last one.

    Args:
        loss: computes the loss of the models, which are of fake tensors; within their fake mode.
        models: by name.
        units: of each model, names of modules in the order in which they are called. The empty one is the model itself.
        device: a GPU by its data sheet.
    """
    clock = OperationSeconds(device, ATTAINED.get(device.name, 1.0))
    with ExitStack() as stack:
        if device.name != "cpu":
            stack.enter_context(as_on_gpus())
        for name, model in models.items():
            stack.enter_context(_labels(clock, name, model, units[name]))
        with clock, torch.enable_grad():
            found = loss()
            clock.phase, clock.label = BACKWARD, (clock.label[0], BACKWARD)
            found.backward()
    return {name: {unit: (clock.seconds[(name, unit), FORWARD] + (clock.seconds[(), FORWARD] if first else 0.0),
                          clock.seconds[(name, unit), BACKWARD])
                   for unit in units[name]} for first, name in ((not at, name) for at, name in enumerate(models))}


@contextmanager
def _labels(clock: OperationSeconds, name: str, model: nn.Module, units: Sequence[Unit]) -> Iterator[None]:
    """Within the context, the clock's label follows what runs; a forward during backward is recomputation."""
    handles = []

    def enter(unit: Unit) -> Callable[..., None]:
        def before(*_: Any) -> None:
            if clock.phase == FORWARD:
                clock.label = ((name, unit), FORWARD)
        return before

    def leave(unit: Unit) -> Callable[..., None]:
        def back(gradient: torch.Tensor) -> None:
            clock.label = ((name, unit), BACKWARD)

        def after(module: nn.Module, args: tuple, out: object) -> None:
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            if made and clock.phase == FORWARD:
                made[0].register_hook(back)
        return after

    for unit in units:
        modules = [model.get_submodule(part) for part in unit] or [model]
        handles.append(modules[0].register_forward_pre_hook(enter(unit)))
        if unit:
            handles.append(modules[-1].register_forward_hook(leave(unit)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
