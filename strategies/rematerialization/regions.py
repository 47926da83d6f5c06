"""Find a model's regions and capture each as the model calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from strategies.memory.meter import resident_tensors
from strategies.rematerialization.capture import Captured
from strategies.rematerialization.execute import (
    STANDS_IN,
    compiled,
    gpus_in_use,
    own_forward,
    replace_forward,
    restore_forward,
)
from strategies.rematerialization.fallback import Measured, measured_call


@dataclass(frozen=True)
class Meta:
    """Shape and kind of a tensor, without it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Meta:
        """The kind of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad,
                   tensor.untyped_storage().nbytes())

    def empty(self) -> torch.Tensor:
        """A tensor of this kind."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass
class Call:
    """One call of a region in a step.

    Attributes:
        name, module: the region.
        captured: its graph, or None with the `reason` why it could not be captured.
        input: bytes of the tensors passed in that the region before handed out; else of the largest with a gradient.
        passed: which of its arguments those are.
        chained: whether the region before handed them out.
        changes: whether it writes to what it is given, so that it cannot run twice.
        measured: what it needed where it could not be captured.
        arguments, outputs: kinds of its tensors in and out among whatever else there is, and how all is nested.
    """

    name: str
    module: nn.Module
    captured: Captured | None = None
    reason: str = ""
    input: int = 0
    passed: frozenset[int] = frozenset()
    chained: bool = False
    changes: bool = False
    measured: Measured | None = None
    arguments: tuple[list[Meta | object], TreeSpec] = field(default=([], None), repr=False)
    outputs: tuple[list[Meta | object], TreeSpec] = field(default=([], None), repr=False)


def find_regions(model: nn.Module) -> dict[str, nn.Module]:
    """The model's repeated blocks by name, or the model itself where there are none to speak of.

    Blocks are the children of a list of at least two, some of them equal in the shapes of their parameters, that
    together hold most of what is not an embedding. Networks of convolutions are one region: what they would hand from
    block to block is as large as what they keep.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if 4 * sum(module.weight.numel() for module in model.modules() if _convolves(module)) >= total:
        return {"": model}
    lists = [(name, module) for name, module in model.named_modules()
             if isinstance(module, (nn.ModuleList, nn.Sequential)) and _repeats(module)]
    outer = [(name, module) for name, module in lists
             if not any(name.startswith(f"{other}.") for other, _ in lists)]
    blocks = {f"{name}.{index}": block for name, module in outer for index, block in module.named_children()}
    embeddings = {id(parameter) for module in model.modules() if isinstance(module, nn.Embedding)
                  for parameter in module.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in embeddings)
    covered = sum(parameter.numel() for block in blocks.values() for parameter in block.parameters())
    return blocks if covered * 2 >= total and blocks else {"": model}


def _convolves(module: nn.Module) -> bool:
    """Whether a module convolves; cutting an image into patches does not count."""
    return isinstance(module, (nn.modules.conv._ConvNd)) and module.kernel_size != module.stride


def _repeats(module: nn.Module) -> bool:
    shapes = [(type(child), tuple(tuple(parameter.shape) for parameter in child.parameters()))
              for child in module.children()]
    return len(shapes) >= 2 and len(set(shapes)) < len(shapes) and all(shape for _, shape in shapes)


@contextmanager
def calling(modules: dict[str, nn.Module], instead: Callable[[str, nn.Module], Callable]) -> Iterator[None]:
    """Within the context, regions' forwards are replaced by `instead(name, module)`; hooks around them stay.

    A plan that is installed is back afterwards.
    """
    planned = {name: module.__dict__["forward"] for name, module in modules.items()
               if getattr(module.__dict__.get("forward"), STANDS_IN, False)}
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


def record(modules: dict[str, nn.Module], run: Callable[[], object]) -> list[Call]:
    """Run a model forward once and capture each of its regions with what it is given.

    Tensors between regions are cut off from the graph of autograd, so that nothing is kept from one to the next.
    Generators and buffers are as before, afterwards. Calls that no gradient comes back through are left out.

    Args:
        modules: regions by name.
        run: calls the model.
    """
    seen: list[Captured] = []
    function = compiled(_as_traced, notice=seen.append)
    calls: list[Call] = []
    last: list[torch.Tensor] = []  # held, so that no other storage takes their place in memory
    anchor = torch.zeros(1, requires_grad=True)

    def instead(name: str, module: nn.Module) -> Callable:
        def forward(*args, **kwargs):
            if not takes_part(module, args, kwargs):
                return own_forward(module, *args, **kwargs)
            args, kwargs = without_cache(args, kwargs)
            call = Call(name, module, arguments=_kinds((args, kwargs)))
            given = tree_flatten((args, kwargs))[0]
            _note_input(call, given, set(map(_storage, last)))
            versions = [version(leaf) for leaf in given]
            seen.clear()
            out = _captured_call(call, function, seen, args, kwargs)
            call.changes = versions != [version(leaf) for leaf in given]
            leaves, spec = tree_flatten(out)
            call.outputs = _kinds(out)
            calls.append(call)
            leaves = [_Cut.apply(anchor, leaf) if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf
                      for leaf in leaves]
            last[:] = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            return tree_unflatten(leaves, spec)
        return forward

    with _undisturbed(modules.values()), calling(modules, instead), torch.enable_grad():
        run()
    return calls


def _captured_call(call: Call, function: Callable, seen: list[Captured], args: tuple, kwargs: dict) -> object:
    try:
        out = function(call.module, *args, **kwargs)
    except Exception as error:  # whatever torch.compile could not do; what the module itself raises comes again
        call.reason = first_line(error)
        out, call.measured = measured_call(call.module, args, kwargs)
        return out
    if len(seen) == 1:
        call.captured = seen[0]
    else:
        call.reason = "torch.compile made no graph of it"
        out, call.measured = measured_call(call.module, args, kwargs)
    return out


class _Cut(torch.autograd.Function):
    """A tensor cut off from what made it; unlike a leaf, the model may write to it."""

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None


def takes_part(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a gradient will come back through this call of a module."""
    if not torch.is_grad_enabled():
        return False
    return (any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_flatten((args, kwargs))[0])
            or any(parameter.requires_grad for parameter in module.parameters()))


def without_cache(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments without a key-value cache of transformers: it would hold what is to be recomputed, and grow twice.

    transformers' own activation checkpointing drops it as well.
    """
    def is_cache(value: object) -> bool:
        return any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers.")
                   for kind in type(value).__mro__)

    args = tuple(None if is_cache(value) else value for value in args)
    dropped = {name: None for name, value in kwargs.items() if is_cache(value)}
    if dropped and kwargs.get("use_cache"):
        dropped["use_cache"] = False
    return args, {**kwargs, **dropped}


def _note_input(call: Call, leaves: Sequence[object], before: set[int]) -> None:
    given = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    passed = {index: leaf for index, leaf in given.items() if _storage(leaf) in before}
    call.chained = bool(passed)
    if not passed:
        wanted = [index for index, leaf in given.items() if leaf.requires_grad]
        passed = {index: given[index] for index in sorted(wanted, key=lambda index: -given[index].numel())[:1]}
    call.passed = frozenset(passed)
    call.input = resident_tensors([leaf.detach() for leaf in passed.values()])


def _kinds(structure: object) -> tuple[list[Meta | object], TreeSpec]:
    leaves, spec = tree_flatten(structure)
    return [Meta.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def version(leaf: object) -> tuple[int, int] | None:
    """Another whenever a tensor has been written to, or is another."""
    if not isinstance(leaf, torch.Tensor):
        return None
    return id(leaf), 0 if leaf.is_inference() else leaf._version


def _as_traced(captured: Captured) -> list[int]:
    return list(range(len(captured.operations) + 1))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _undisturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Generators and buffers as they were."""
    places = [(part, name, buffer) for module in modules for part in module.modules()
              for name, buffer in part._buffers.items() if buffer is not None]
    values = {id(buffer): (buffer, buffer.clone()) for _, _, buffer in places}
    with torch.random.fork_rng(gpus_in_use()):
        try:
            yield
        finally:
            for part, name, buffer in places:
                part._buffers[name] = buffer
            with torch.no_grad():
                for buffer, value in values.values():
                    buffer.copy_(value)
