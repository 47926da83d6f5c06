"""Price the operations of a region: seconds, from a roofline or by timing them, and bytes of temporaries."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import flop_registry

from strategies.memory.workspace import with_values, workspace
from strategies.rematerialization.capture.compile_region import gpus_in_use
from strategies.rematerialization.capture.joint_graph import Captured, tensors
from strategies.rematerialization.capture.uncaptured import HALF
from strategies.rematerialization.price.option_store import OptionStore

TRIES = 5


@dataclass(frozen=True)
class Device:
    """What a roofline needs to know about a device, from the manufacturer's data sheet.

    Attributes:
        name: short name.
        half, single: dense matrix operations per second in 16 bit, and in 32 bit without TensorFloat.
        bandwidth: bytes per second to and from memory.
        memory: bytes; 0 if unknown.
        overhead: seconds to launch any operation.
        workspace: bytes that cuBLAS takes through torch's allocator for each thread that multiplies matrices: 32 MiB
            from Hopper on, 8,519,680 before (pytorch's CublasHandlePool.cpp and pull request 120925).
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: int = 0
    overhead: float = 4e-6
    workspace: int = 8_519_680


GIB = 2**30
DEVICES = {device.name: device for device in (
    Device("h200", 989e12, 67e12, 4.8e12, 141 * 10**9, workspace=32 * 2**20),
    Device("h100", 989e12, 67e12, 3.35e12, 80 * 10**9, workspace=32 * 2**20),
    Device("a100-80gb", 312e12, 19.5e12, 2.04e12, 80 * GIB),
    Device("a100-40gb", 312e12, 19.5e12, 1.56e12, 40 * GIB),
    Device("l40s", 362e12, 91.6e12, 0.864e12, 48 * GIB),
    Device("l4", 121e12, 30.3e12, 0.3e12, 24 * GIB),
    Device("v100", 125e12, 15.7e12, 0.9e12, 32 * GIB),
    Device("t4", 65e12, 8.1e12, 0.32e12, 16 * GIB),
    Device("rtx4090", 165e12, 82.6e12, 1.01e12, 24 * GIB),
    Device("rtx3090", 71e12, 35.6e12, 0.936e12, 24 * GIB),
    Device("cpu", 1e11, 1e11, 2e10, 0, 1e-5),
)}


def this_device(kind: str) -> Device:
    """The present device's entry in the table; an unknown GPU gets typical values.

    Args:
        kind: "cpu" or "cuda".
    """
    if kind != "cuda" or not torch.cuda.is_available():
        return DEVICES["cpu"]
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    memory = torch.cuda.get_device_properties(0).total_memory
    for known in DEVICES.values():
        if known.name.split("-")[0] in name:
            return Device(name, known.half, known.single, known.bandwidth, memory)
    return Device(name, 300e12, 20e12, 2e12, memory)


def flops(node: fx.Node) -> int:
    """Floating-point operations of a node by torch's formulas: 2 m n k for a matrix product, 0 if elementwise."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in flop_registry:
        return 0
    args, kwargs = arguments(node)
    try:
        return int(flop_registry[packet](*args, **kwargs, out_val=node.meta["val"]))
    except (TypeError, ValueError, AssertionError):
        return 0


def moved(node: fx.Node) -> int:
    """Bytes that an operation reads and writes."""
    read = [part.meta["val"] for part in node.all_input_nodes if "val" in part.meta]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors([*read, node.meta.get("val")]))


def roofline(node: fx.Node, device: Device) -> float:
    """Seconds of an operation: the larger of compute and memory time (Williams et al. 2009; Cleti 2025, eq. 3-4)."""
    dtypes = {tensor.dtype for tensor in tensors(node.meta.get("val"))}
    speed = device.half if dtypes & set(HALF) else device.single
    return device.overhead + max(flops(node) / speed, moved(node) / device.bandwidth)


class Prices:
    """Seconds and temporaries of operations; each distinct operation is priced once.

    Args:
        device: device of the roofline.
        measure: whether to time each operation on the present device instead, with tensors of its shapes.
        largest: bytes of an operation's tensors above which it is not timed.
        store: keeps measurements from one process to the next, per device and number of threads, so that the same model
            is planned the same way again.
    """

    def __init__(self, device: Device, measure: bool = False, largest: int = 2 * GIB,
                 store: OptionStore | None = None) -> None:
        self.device = device
        self.measure = measure
        self.largest = largest
        self.store = store if measure else None
        self._known: dict[tuple, tuple[float, int]] = {}
        self._regions: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def price(self, captured: Captured) -> tuple[np.ndarray, np.ndarray]:
        """(operations,) seconds, and (operations,) bytes of temporaries."""
        if captured.signature not in self._regions:
            key = "prices", captured.signature, self.device.name, torch.get_num_threads(), self.largest
            found = self._kept(key, len(captured.operations)) or [self._price(node) for node in captured.operations]
            if self.store is not None:
                self.store.keep(key, [[float(seconds), int(count)] for seconds, count in found])
            self._regions[captured.signature] = (np.array([seconds for seconds, _ in found]),
                                                 np.array([count for _, count in found], dtype=np.int64))
        return self._regions[captured.signature]

    def roofline(self, captured: Captured) -> np.ndarray:
        """(operations,) seconds by the roofline, which are reproducible."""
        return np.array([roofline(node, self.device) for node in captured.operations])

    def _kept(self, key: tuple, operations: int) -> list[tuple[float, int]] | None:
        """Measurements from another process, if they have a valid price for each operation."""
        try:
            kept = [] if self.store is None else self.store.find(key) or []
            found = [(float(seconds), int(count)) for seconds, count in kept]
        except (ValueError, TypeError, OverflowError):
            return None
        sound = len(found) == operations and all(0 <= seconds < np.inf and count >= 0 for seconds, count in found)
        return found if sound else None

    def _price(self, node: fx.Node) -> tuple[float, int]:
        key = _key(node)
        if key not in self._known:
            seconds, count = roofline(node, self.device), 0
            if self.measure and isinstance(node.target, torch._ops.OpOverload) and moved(node) <= self.largest:
                args, kwargs = arguments(node)
                count = workspace(node.target, args, kwargs) or 0
                seconds = _timed(node, args, kwargs) or seconds
            self._known[key] = seconds, count
        return self._known[key]


def arguments(node: fx.Node) -> tuple[tuple, dict]:
    """A node's arguments as fake tensors."""
    return fx.node.map_arg((node.args, node.kwargs), lambda part: part.meta["val"])


def _key(node: fx.Node) -> tuple:
    def describe(part: fx.Node) -> str:
        return str([(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
                    for tensor in tensors(part.meta.get("val"))])

    return str(node.target), str(fx.node.map_arg((node.args, node.kwargs), describe))


def _timed(node: fx.Node, args: tuple, kwargs: dict) -> float | None:
    """Shortest seconds of an operation on random tensors; None if it rejects them."""
    kinds = {tensor.device.type for tensor in tensors(node.meta.get("val"))}
    wait: Callable[[], object] = torch.cuda.synchronize if kinds == {"cuda"} else lambda: None
    try:
        with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng(gpus_in_use()):
            real_args, real_kwargs = with_values((args, kwargs))
            taken = []
            for _ in range(TRIES + 1):
                wait()
                begin = time.perf_counter()
                node.target(*real_args, **real_kwargs)
                wait()
                taken.append(time.perf_counter() - begin)
        return min(taken[1:])
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        return None
