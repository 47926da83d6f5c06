"""Measure the temporary memory of an operation's kernel, which counting tensors cannot see."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_map_only

from strategies.common.planned_device import kind_of
from strategies.memory.meter import measure, resident_tensors
from strategies.memory.tracker import LiveBytes

LIMIT = 2 * 2**30  # most bytes of arguments and outputs with which an operation is run
_INTRINSIC = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Indices of (mean, inverse deviation, weight) in the arguments: on CPU the kernels store statistics in the weight's
# dtype, but torch's shape functions return the input's, which the backward kernels then reject.
_STATISTICS = {"native_layer_norm_backward": (3, 4, 5), "native_batch_norm_backward": (5, 6, 2)}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
_HALF = {torch.bfloat16, torch.float16}
_found: dict[tuple, int | None] = {}


def workspace(operation: Any, args: tuple, kwargs: dict[str, Any] | None = None, limit: int = LIMIT) -> int | None:
    """Bytes that an operation allocates besides its outputs at its peak, measured by running it on this machine.

    The operation runs twice, since the first call may set up state that a library keeps, and the second run is
    measured. It gets new tensors of the given shapes, strides and dtypes: floats are random in [0, 1), integers and
    booleans 0, which is a valid index. Neither the arguments nor any random generator change. Results are cached for
    the life of the process, by arguments and number of threads (a kernel may use a buffer for each). Memory that a
    library allocates without torch's allocator is not seen.

    Args:
        operation: for example torch.ops.aten.convolution_backward.default.
        args, kwargs: with real or fake tensors.
        limit: bytes of arguments plus outputs above which the operation is not run.

    Returns:
        The bytes, or None if unknown: above the limit, on a device that is absent or neither CPU nor CUDA, or if the
        operation rejects such values.
    """
    if not isinstance(operation, OpOverload):
        return None  # a higher-order operator runs others, each of which is measured
    if operation.is_view or operation._opname in _INTRINSIC or operation.namespace == "prim":
        return 0
    args = _with_statistics(operation, args)
    library = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]  # which computes products
    key = (operation, limit, torch.get_num_threads(), library, *_described((args, kwargs or {})))
    if key not in _found:
        _found[key] = _try(operation, args, kwargs or {}, limit)
    return _found[key]


def product_workspace(operation: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """`workspace` of a matrix product that oneDNN computes on a CPU, which packs operands into buffers; 0 for all else.

    For a `LiveBytes` that counts what a step would take: products are what a step has everywhere, also where nothing
    is captured, as in its loss.
    """
    if getattr(operation, "_opname", "") not in _PRODUCTS:
        return 0
    first = args[0]
    if kind_of(first) != "cpu" or (first.dtype not in _HALF and not _fp32_by_onednn()):
        return 0
    return workspace(operation, args, kwargs) or 0


def _fp32_by_onednn() -> bool:
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]


def _with_statistics(operation: OpOverload, args: tuple) -> tuple:
    mean, deviation, weight = _STATISTICS.get(operation._opname, (None, None, None))
    if mean is None or args[weight] is None or args[mean] is None or args[mean].dtype == args[weight].dtype:
        return args
    repaired = list(args)
    for place in (mean, deviation):
        repaired[place] = args[place].to(args[weight].dtype)
    return tuple(repaired)


def _described(arguments: Any) -> tuple:
    """A hashable description of everything that an operation's memory may depend on."""
    leaves, structure = tree_flatten(arguments)
    return (str(structure), *[
        (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in leaves])


def _try(operation: OpOverload, args: tuple, kwargs: dict, limit: int) -> int | None:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    kinds = {tensor.device.type for tensor in tensors} | {str(kwargs.get("device") or "cpu").split(":")[0]}
    device = "cuda" if "cuda" in kinds else "cpu"
    if kinds - {"cpu", "cuda"} or device == "cuda" and not torch.cuda.is_available():
        return None
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return None
    try:
        generators = [torch.cuda.current_device()] if device == "cuda" else []
        with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng(generators):
            if _planned_bytes(operation, args, kwargs) > limit:
                return None
            return _excess(operation, *with_values((args, kwargs)), device)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        return None


def _planned_bytes(operation: OpOverload, args: tuple, kwargs: dict) -> int:
    """Bytes of arguments and outputs, found with fake tensors; of arguments alone if output shapes depend on values."""
    with FakeTensorMode(), LiveBytes() as tracker:
        args, kwargs = tree_map_only(torch.Tensor, _empty_like, (args, kwargs))
        try:
            kept = operation(*args, **kwargs)
        except Exception:  # noqa: BLE001 - whatever a shape function raises, the real run decides
            kept = None
        del kept
    return tracker.peak


def _excess(operation: OpOverload, args: tuple, kwargs: dict, device: str) -> int:
    kept = [operation(*args, **kwargs)]
    kept.clear()
    before = resident_tensors(args, kwargs)
    measured = measure(lambda: kept.append(operation(*args, **kwargs)), device)
    outputs = resident_tensors(args, kwargs, kept) - before
    return max(0, measured.peak - measured.base - outputs)


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def with_values(arguments: Any) -> Any:
    """Replace tensors in arguments by real ones like them: floats random in [0, 1), integers and booleans 0."""
    def real(tensor: torch.Tensor) -> torch.Tensor:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = torch.zeros(extent if tensor.numel() else 0, dtype=tensor.dtype, device=tensor.device)
        if flat.is_floating_point():
            flat.uniform_()  # filled before striding: an expanded view has the same element in many places
        return flat.as_strided(tensor.shape, tensor.stride())
    return tree_map_only(torch.Tensor, real, arguments)
