"""Find a model's regions (its repeated blocks, or the whole model) and capture each as the model calls it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from weakref import WeakSet

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from strategies.common.progress import report
from strategies.memory.meter import resident_tensors
from strategies.memory.workspace import product_workspace
from strategies.rematerialization.capture.call_arguments import takes_part, without_cache
from strategies.rematerialization.capture.compile_region import (
    compiled,
    own_forward,
    quiet,
    replace_forward,
    restore_forward,
    stood_in,
)
from strategies.rematerialization.capture.joint_graph import Captured, read_by_backward
from strategies.rematerialization.capture.trial_run import (
    alike,
    attributes_kept,
    equal,
    once_more,
    own_gradients,
    tensor_attributes,
    turned_back,
    undisturbed,
)
from strategies.rematerialization.capture.uncaptured import MeasuredCall, measured_call


@dataclass(frozen=True)
class Meta:
    """Metadata of a tensor, without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Meta:
        """The metadata of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad,
                   tensor.untyped_storage().nbytes())

    def empty(self) -> torch.Tensor:
        """An uninitialized tensor with this metadata."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


NONE: Mapping[str, str] = MappingProxyType({})
LEAVING: WeakSet[nn.Module] = WeakSet()
"""Regions that store tensors on their submodules as plain attributes."""


@dataclass
class RegionCall:
    """One call of a region in a step.

    Attributes:
        name, module: the region.
        captured: its graph; None if it could not be captured, for the `reason` given.
        input: bytes of the arguments that the previous region returned; if none, of the largest that requires a
            gradient.
        passed: indices of those arguments.
        chained: whether the previous region returned them.
        read: indices of arguments that its backward is known to read.
        unfit: why it cannot be recomputed, or replaced by a stand-in; empty if it can.
        measured: memory and operations of a call that runs unchanged.
        arguments, outputs: flattened arguments and outputs, tensors as `Meta`, and their tree structure.
        attributes: (submodule, name, metadata) of tensors that it stores on its submodules instead of returning them.
    """

    name: str
    module: nn.Module
    captured: Captured | None = None
    reason: str = ""
    input: int = 0
    passed: frozenset[int] = frozenset()
    chained: bool = False
    read: frozenset[int] = frozenset()
    unfit: str = ""
    measured: MeasuredCall | None = None
    arguments: tuple[list[Meta | object], TreeSpec] = field(default=([], None), repr=False)
    outputs: tuple[list[Meta | object], TreeSpec] = field(default=([], None), repr=False)
    attributes: list[tuple[nn.Module, str, Meta]] = field(default_factory=list, repr=False)


def find_regions(model: nn.Module) -> dict[str, nn.Module]:
    """The model's repeated blocks by name, or the model itself if there are none worth planning.

    Blocks are the children of a ModuleList or Sequential with at least two children, some of which have parameters of
    the same shapes. Together they must hold at least half of the parameters outside embeddings and the output head. A
    convolutional network is a single region, because what its blocks pass on is as large as what they keep.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if 4 * sum(module.weight.numel() for module in model.modules() if _convolves(module)) >= total:
        return {"": model}
    lists = [(name, module) for name, module in model.named_modules()
             if isinstance(module, (nn.ModuleList, nn.Sequential)) and _repeats(module)]
    outer = [(name, module) for name, module in lists
             if not any(name.startswith(f"{other}.") for other, _ in lists)]
    blocks = {f"{name}.{index}": block for name, module in outer for index, block in module.named_children()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    ends = {id(parameter) for module in model.modules() if isinstance(module, nn.Embedding) or module is head
            for parameter in module.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in ends)
    covered = sum(parameter.numel() for block in blocks.values() for parameter in block.parameters())
    return blocks if covered * 2 >= total and blocks else {"": model}


def _convolves(module: nn.Module) -> bool:
    """Whether a module is a convolution; splitting an image into patches does not count."""
    return isinstance(module, (nn.modules.conv._ConvNd)) and module.kernel_size != module.stride


def _repeats(module: nn.Module) -> bool:
    shapes = [(type(child), tuple(tuple(parameter.shape) for parameter in child.parameters()))
              for child in module.children()]
    return len(shapes) >= 2 and len(set(shapes)) < len(shapes) and all(shape for _, shape in shapes)


@contextmanager
def calling(modules: dict[str, nn.Module], instead: Callable[[str, nn.Module], Callable]) -> Iterator[None]:
    """Within the context, regions' forwards are replaced by `instead(name, module)`; hooks around them still run.

    An installed plan is restored afterwards.
    """
    planned = {name: module.__dict__["forward"] for name, module in modules.items() if stood_in(module)}
    try:
        for name, module in modules.items():
            replace_forward(module, instead(name, module))
        yield
    finally:
        for name, module in modules.items():
            if name in planned:
                module.forward = planned[name]
            else:
                restore_forward(module)


def record(
    modules: dict[str, nn.Module], run: Callable[[], object], around: Sequence[nn.Module] = (),
    uncaptured: Mapping[str, str] = NONE, counted: Collection[str] = (),
) -> list[RegionCall]:
    """Run a model forward once and capture each of its regions with the arguments it gets.

    Tensors between regions are detached from the autograd graph, so that nothing is kept from one region to the next.
    RNG states and buffers are restored afterwards. Calls that no gradient flows back through are left out.

    Args:
        modules: regions by name.
        run: calls the model.
        around: modules that run too, such as the model itself and a teacher.
        uncaptured: names of regions that are not to be captured, each with the reason.
        counted: names of regions that need not run, since each is equal to the one before it and takes what that one
            returns; they share its graph. Those that a graph cannot stand in for run all the same.
    """
    capturing = _Capturing()
    calls: list[RegionCall] = []
    last: list[torch.Tensor] = []  # kept alive, so that no other storage reuses their identity
    anchor = torch.zeros(1, requires_grad=True)

    def instead(name: str, module: nn.Module) -> Callable:
        def forward(*args, **kwargs):
            if not takes_part(module, args, kwargs):
                return own_forward(module, *args, **kwargs)
            args, kwargs = without_cache(args, kwargs)
            if name in counted and name not in uncaptured and _is_as_before(calls, last, args, kwargs):
                calls.append(replace(calls[-1], name=name, module=module))
                report("captured blocks", len(calls), len(modules))
                return last[0]
            call = RegionCall(name, module, arguments=_kinds((args, kwargs)))
            given = tree_flatten((args, kwargs))[0]
            _note_input(call, given, last)
            versions, left = [version(leaf) for leaf in given], tensor_attributes(module)
            out = capturing.call(call, args, kwargs, uncaptured.get(name, ""))
            leaves, spec = tree_flatten(out)
            call.outputs = _kinds(out)
            if versions != [version(leaf) for leaf in given]:
                call.unfit = "it writes to a tensor that it is given"
            elif not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
                call.unfit = "it hands out no tensors, or only inside of objects"
            calls.append(call)
            report("captured blocks", len(calls), len(modules))

            def cut(leaf: object) -> object:
                turns = isinstance(leaf, torch.Tensor) and leaf.requires_grad
                return _Cut.apply(anchor, leaf.detach()) if turns else leaf

            LEAVING.discard(module)
            for (part, attribute), value in tensor_attributes(module).items():
                if left.get((part, attribute)) is not value:
                    LEAVING.add(module)
                    call.attributes.append((part, attribute, Meta.of(value)))
                    part.__dict__[attribute] = cut(value)
            leaves = list(map(cut, leaves))
            last[:] = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            return tree_unflatten(leaves, spec)
        return forward

    with (undisturbed([*modules.values(), *around]), attributes_kept(modules.values()), calling(modules, instead),
          torch.enable_grad()):
        run()
    return calls


def _is_as_before(calls: Sequence[RegionCall], last: Sequence[torch.Tensor], args: tuple, kwargs: dict) -> bool:
    """Whether a region gets what the one before it got, but the one tensor that this one returned."""
    if not calls or len(last) != 1 or len(calls[-1].outputs[0]) != 1:
        return False
    before, given = calls[-1], tree_flatten((args, kwargs))[0]
    return (before.captured is not None and before.chained and not before.unfit and not before.attributes
            and before.arguments == _kinds((args, kwargs)) and {index for index, leaf in enumerate(given)
            if isinstance(leaf, torch.Tensor) and looks_at(leaf, last[0])} == before.passed)


class _Tracer:
    """Runs modules through torch.compile, whose guards decide which call needs a new graph, and notes which graphs ran.

    A process keeps one, because a run plans the same blocks several times: with another tile of the loss, with its
    model.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[Captured, list[object]]] = []  # graphs that ran, with their inputs' storages
        self.function = compiled(_as_traced, notice=lambda captured, inputs: self.seen.append(
            (captured, [_storage(value) if isinstance(value, torch.Tensor) else None for value in inputs])))

    def __call__(self, module: nn.Module, *args, **kwargs) -> object:
        with quiet("torch._dynamo.convert_frame"):
            return self.function(module, *args, **kwargs)


TRACERS: dict[object, _Tracer] = {}
"""By the attention function set in `torch.nn.functional`: planning for a GPU replaces it, which no guard checks."""


class _Capturing:
    """Captures calls of regions; equal ones share a graph."""

    def __init__(self) -> None:
        self.tried: dict[tuple, bool] = {}  # by kind of module: whether the captured graph gives its gradients
        self.unchanged: dict[str, MeasuredCall | None] = {}  # by graph: what a call needs uncaptured
        self.inherited = F.scaled_dot_product_attention in TRACERS
        self.tracer = TRACERS.setdefault(F.scaled_dot_product_attention, _Tracer())

    @property
    def seen(self) -> list[tuple[Captured, list[object]]]:
        """Graphs that have run in the present call."""
        return self.tracer.seen

    def call(self, call: RegionCall, args: tuple, kwargs: dict, unfit: str = "") -> object:
        """Call a region and note its graph, or the reason why there is none and what it needs uncaptured.

        `unfit` is the reason not to capture it, if any.

        The captured graph's gradients are compared with the module's own once for each kind of module, because
        torch.compile has silently lost the gradients of autograd functions (torch 2.11).
        """
        if unfit:
            call.reason = unfit
            return self._as_it_is(call, args, kwargs)
        self.seen.clear()
        leaves = tree_flatten((args, kwargs))[0]
        kind = (type(call.module), call.module.training, str(_kinds((args, kwargs))[0]),
                tuple((parameter.shape, parameter.requires_grad) for parameter in call.module.parameters()))
        versions = [version(leaf) for leaf in leaves]
        expected = None if kind in self.tried else own_gradients(call.module, args, kwargs)
        try:
            out = self._captured(call.module, args, kwargs)
        except Exception as error:  # any failure of torch.compile; the module's own errors are raised again below
            call.reason = first_line(error)
        else:
            written = versions != [version(leaf) for leaf in leaves]  # such a region is unfit anyway
            self.tried.setdefault(kind, expected is None or written or alike(
                turned_back(call.module, leaves, out), expected))
            if len(self.seen) == 1 and self.tried[kind]:
                call.captured, inputs = self.seen[0]
                wanted = read_by_backward(call.captured)
                read = {storage for node, storage in zip(call.captured.primals, inputs, strict=True) if node in wanted}
                call.read = frozenset(index for index, leaf in enumerate(leaves)
                                      if isinstance(leaf, torch.Tensor) and _storage(leaf) in read)
                call.measured = self._unchanged(call, args, kwargs)
                return out
            call.reason = ("its gradients are others when torch.compile has captured it" if self.seen
                           else "torch.compile made no graph of it")
        return self._as_it_is(call, args, kwargs)

    def _unchanged(self, call: RegionCall, args: tuple, kwargs: dict) -> MeasuredCall | None:
        """What a captured region needs where it runs unchanged, if that can be measured; equal ones are once."""
        signature = call.captured.signature
        if signature not in self.unchanged:
            torch.clear_autocast_cache()  # so that 16-bit copies of its weights are counted
            with undisturbed([call.module]), attributes_kept([call.module]):
                try:
                    self.unchanged[signature] = measured_call(call.module, args, kwargs)[1]
                except Exception:  # of operations that run captured alone, such as torch.cond on fake tensors
                    self.unchanged[signature] = None
        return self.unchanged[signature]

    def _as_it_is(self, call: RegionCall, args: tuple, kwargs: dict) -> object:
        """Call a region without capturing it, and note what it needs."""
        again = once_more(call.module, args, kwargs)
        torch.clear_autocast_cache()  # so that 16-bit copies of its weights are counted
        out, call.measured = measured_call(call.module, args, kwargs, product_workspace)
        if again is not None and not equal(again, out):
            call.unfit = "it draws random numbers that cannot be drawn again, or does not do the same twice"
        return out

    def _captured(self, module: nn.Module, args: tuple, kwargs: dict) -> object:
        try:
            return self.tracer(module, *args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # torch.compile limits the graphs per function
            again = _Tracer()
        except Exception:  # retry once without the graphs of an earlier study, which may be the cause
            if not self.inherited:
                raise
            again, self.inherited = _Tracer(), False
        out = again(module, *args, **kwargs)
        self.tracer = TRACERS[F.scaled_dot_product_attention] = again
        return out


class _Cut(torch.autograd.Function):
    """A tensor detached from what made it that, unlike a leaf, the model may write to."""

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None


def _note_input(call: RegionCall, leaves: Sequence[object], before: Sequence[torch.Tensor]) -> None:
    given = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    passed = {index: leaf for index, leaf in given.items() if any(looks_at(leaf, out) for out in before)}
    call.chained = bool(passed)
    if not passed:
        wanted = [index for index, leaf in given.items() if leaf.requires_grad]
        passed = {index: given[index] for index in sorted(wanted, key=lambda index: -given[index].numel())[:1]}
    call.passed = frozenset(passed)
    call.input = resident_tensors([leaf.detach() for leaf in passed.values()])


def looks_at(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors share storage and dtype: the first is the other or a view of it."""
    return _storage(tensor) == _storage(other) and tensor.dtype == other.dtype


def _kinds(structure: object) -> tuple[list[Meta | object], TreeSpec]:
    leaves, spec = tree_flatten(structure)
    return [Meta.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec


def first_line(error: BaseException) -> str:
    """An error's message, first line only."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def version(leaf: object) -> tuple[int, int] | None:
    """Changes whenever a tensor has been written to or replaced by another."""
    if not isinstance(leaf, torch.Tensor):
        return None
    return id(leaf), 0 if leaf.is_inference() else leaf._version


def _as_traced(captured: Captured) -> list[int]:
    return list(range(len(captured.operations) + 1))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
