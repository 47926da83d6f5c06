"""Measure the memory of one training step, on CPU with torch's profiler, on CUDA with the allocator's statistics."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch._C._autograd import _enable_profiler
from torch._C._profiler import RecordScope
from torch.autograd import profiler

from strategies.memory.tracker import ENTERED, strided_parts, tensors_of

_FREE, _MARK = "limbeck.free.", "limbeck.mark."
LET_GO = 1e-3, 1.0  # seconds for gloo to release a tensor: at least, and at most while its threads are busy
_GLOO = "pt_gloo_runloop"  # torch's name for gloo's threads
CUDA_BLOCK = 512  # bytes; the CUDA caching allocator rounds requests up to a multiple of this
_CUDA_ENTRIES = 1_000_000  # most allocations and frees in a timeline on CUDA; older ones are dropped
_cuda_marks: list[tuple[float, str]] | None = None  # (microseconds, name) while a step is measured on CUDA


@dataclass(frozen=True)
class Measured:
    """Memory of one step.

    Attributes:
        peak: most bytes allocated at once, including `base`.
        base: bytes allocated before the step: on CUDA all of them, on CPU those of the `resident` tensors.
        reserved: most bytes reserved by the CUDA caching allocator; None on CPU.
        timeline: [changes, 2]: microseconds since the first change, and bytes allocated after the change, including
            `base`. Its maximum is `peak` on CPU; on CUDA it lacks what the allocator adds beyond rounding.
        marks: (name, number of changes in the timeline before `mark` was called).
    """

    peak: int
    base: int
    reserved: int | None = None
    timeline: numpy.ndarray = field(default_factory=lambda: numpy.zeros((0, 2), dtype=numpy.int64), compare=False)
    marks: tuple[tuple[str, int], ...] = ()


def measure(step: Callable[[], object], device: torch.device | str, resident: Iterable[Any] = ()) -> Measured:
    """Run a step once and measure its memory on a device.

    On CPU, torch's allocator is profiled, for eager and compiled code. This covers the calling thread and what autograd
    runs for it, but not the threads and processes of a data loader, nor memory that libraries allocate without torch
    (BLAS packing buffers). Operations are not recorded, only allocations and frees, some microseconds each, and no
    events are kept. No other profiler may be running.

    On CUDA, the allocator's own peak is read, which costs two synchronizations, and its trace without stacks, which is
    skipped if memory history is already being recorded. The device's peak statistics are reset.

    Args:
        step: for example forward, backward and the optimizer's step. Its return value is dropped within the
            measurement.
        device: the device whose bytes are counted.
        resident: modules, optimizers and tensors that exist already. On CPU their bytes are `base`, and if one is freed
            during the step, as gradients are in `zero_grad`, that is counted. An iterator is exhausted before the step;
            a list keeps its tensors alive. Unused on CUDA.

    Raises:
        ValueError: the device is neither CPU nor CUDA.
        Whatever the step raises.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _measure_cuda(step, device)
    if device.type != "cpu":
        raise ValueError(f"memory is measured on cpu and cuda, not on {device.type}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at this point; else each profile writes two lines to stderr
    base, watchers = _watch(resident)
    with patient_waiting(), _Allocations(use_kineto=True, profile_memory=True) as profile:
        step()
    changes, marks = changes_of(_walk(profile.kineto_results.experimental_event_tree()))
    del watchers, profile  # its events
    timeline = cumulative(changes, base)
    return Measured(int(timeline[:, 1].max(initial=base)), base, None, timeline, marks)


@contextmanager
def patient_waiting() -> Iterator[None]:
    """Within the context, waiting for a collective takes slightly longer, until gloo has released its tensors.

    gloo's own thread also holds references to the tensors, and drops them just after the collective is done. If it were
    the last to do so, the free would be missed, since the profiler covers only the threads that it was started for. On
    a busy machine that thread may be descheduled for long; on Linux, which shows its state, we wait until it sleeps.
    """
    work = getattr(torch._C, "_distributed_c10d", None) and torch._C._distributed_c10d.Work
    if not work or not torch.distributed.is_initialized():
        yield
        return
    wait, threads = work.wait, _threads_of_gloo()

    def longer(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = wait(self, *args, **kwargs)
        time.sleep(LET_GO[0])
        until = time.monotonic() + LET_GO[1]
        while any(map(_runs, threads)) and time.monotonic() < until:
            time.sleep(LET_GO[0])
        return found

    work.wait = longer
    try:
        yield
    finally:
        work.wait = wait


def _threads_of_gloo() -> list[Path]:
    """The /proc folders of gloo's threads in this process on Linux; empty elsewhere."""
    return [thread for thread in Path("/proc/self/task").glob("*") if _told(thread / "comm").strip() == _GLOO]


def _runs(thread: Path) -> bool:
    """Whether a thread is running or runnable."""
    return _told(thread / "stat").rpartition(")")[2].split()[:1] == ["R"]


def _told(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # the thread has ended
        return ""


def mark(name: str) -> None:
    """Mark the current moment in a step that is being measured, or counted by `LiveBytes`; otherwise do nothing."""
    for tracker in ENTERED:
        tracker.mark(name)
    if _cuda_marks is not None:
        _cuda_marks.append((time.time_ns() / 1000, name))
    _record(_MARK + name)


def resident_tensors(*things: Any) -> int:
    """Bytes of the distinct storages of modules (parameters, buffers, gradients), optimizers (state) and tensors."""
    return sum(storage.nbytes() for storage in _storages(things))


def _storages(things: Iterable[Any]) -> list[torch.UntypedStorage]:
    found = {}
    for tensor in tensors_of(*things):
        for part in strided_parts(tensor):
            found[part.untyped_storage()._cdata] = part.untyped_storage()
    return list(found.values())


# ---- CPU: the profiler's events

class _Allocations(profiler.profile):
    """A profile of allocations, and of what `_record` writes into it, without the operations around them.

    Operations would be most of it: they cost time, and of a training step's memory what is then never used again.
    """

    running = False

    def _start_trace(self) -> None:
        self.entered = True
        _enable_profiler(self.config(), self.kineto_activities, {RecordScope.USER_SCOPE})
        _Allocations.running = True

    def __exit__(self, *error: Any) -> None:
        _Allocations.running = False
        super().__exit__(*error)


def _record(name: str) -> None:
    """Write a name into the profile of `measure`, if one is running."""
    if _Allocations.running:
        torch.ops.profiler._record_function_exit._RecordFunction(
            torch.ops.profiler._record_function_enter_new(name, None))


def _watch(things: Iterable[Any]) -> tuple[int, list[weakref.ref]]:
    """Bytes of resident storages on CPU, and weak references that record each one's free in the profile.

    The profiler does not know the size of a block that was allocated before it started, and so cannot report the free.
    """
    def ended(size: int) -> Callable[[Any], None]:
        def write(_: Any) -> None:
            _record(f"{_FREE}{size}")
        return write

    storages = [storage for storage in _storages(things) if storage.device.type == "cpu"]
    base = sum(storage.nbytes() for storage in storages)
    return base, [weakref.ref(storage, ended(storage.nbytes())) for storage in storages]


def _walk(events: list[Any]) -> Iterator[tuple[int, str, int, int]]:
    """Yield (nanoseconds, name, bytes, address) for CPU allocations and our own records in a profile, unordered."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        kind = event.tag.name
        if kind == "Allocation":
            detail = event.extra_fields
            if detail.device.type == "cpu":
                yield event.start_time_ns, "", detail.alloc_size, detail.ptr
        elif kind == "TorchOp" and event.name.startswith((_FREE, _MARK)):
            yield event.start_time_ns, event.name, 0, 0


def changes_of(
    events: Iterable[tuple[int, str, int, int]],
) -> tuple[list[tuple[float, int]], tuple[tuple[str, int], ...]]:
    """Changes (microseconds, bytes) and marks from (nanoseconds, name, bytes, address) in any order.

    A free counts only if its allocation was seen, with that allocation's bytes. Any other free is of an older block,
    which our own records cover. The profiler's size of a free is not used: it may be that of another block, which was
    at the same address before. A block that another thread freed unseen ends when its address is allocated again.
    """
    changes: list[tuple[float, int]] = []
    marks: list[tuple[str, int]] = []
    ours: dict[int, int] = {}
    for moment, name, size, address in sorted(events, key=lambda event: event[0]):
        if name.startswith(_MARK):
            marks.append((name.removeprefix(_MARK), len(changes)))
        elif name.startswith(_FREE):
            changes.append((moment / 1000, -int(name.removeprefix(_FREE))))
        elif size > 0:
            if address in ours:
                changes.append((moment / 1000, -ours[address]))
            ours[address] = size
            changes.append((moment / 1000, size))
        elif address in ours:
            changes.append((moment / 1000, -ours.pop(address)))
    return changes, tuple(marks)


def cumulative(changes: list[tuple[float, int]], base: int) -> numpy.ndarray:
    """[changes, 2] of microseconds since the first change and bytes after each change."""
    if not changes:
        return numpy.zeros((0, 2), dtype=numpy.int64)
    moments, sizes = zip(*changes, strict=True)
    since = [int(moment - moments[0]) for moment in moments]
    return numpy.stack([numpy.array(since), base + numpy.cumsum(sizes)], axis=1).astype(numpy.int64)


# ---- CUDA: the caching allocator's own numbers

def _measure_cuda(step: Callable[[], object], device: torch.device) -> Measured:
    global _cuda_marks
    torch.cuda.synchronize(device)
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    recording = not torch._C._cuda_isHistoryEnabled()  # if somebody else is recording, ours would end it
    if recording:
        torch.cuda.memory._record_memory_history("all", context=None, max_entries=_CUDA_ENTRIES, clear_history=True)
    trace, _cuda_marks = [], []
    try:
        step()
        torch.cuda.synchronize(device)
        if recording:
            index = torch.cuda.current_device() if device.index is None else device.index
            trace = torch.cuda.memory._snapshot(device)["device_traces"][index]
    finally:
        noted, _cuda_marks = _cuda_marks, None
        if recording:
            torch.cuda.memory._record_memory_history(None)
    changes, marks = changes_of_trace(trace, noted)
    return Measured(torch.cuda.max_memory_allocated(device), base, torch.cuda.max_memory_reserved(device),
                    cumulative(changes, base), marks if trace else ())


def changes_of_trace(
    trace: list[dict[str, Any]], noted: list[tuple[float, str]]
) -> tuple[list[tuple[float, int]], tuple[tuple[str, int], ...]]:
    """Changes (microseconds, bytes) and marks from the allocator's trace; a block ends when its free is requested."""
    sign = {"alloc": 1, "free_requested": -1}
    changes = [(entry["time_us"], sign[entry["action"]] * -(-entry["size"] // CUDA_BLOCK) * CUDA_BLOCK)
               for entry in trace if entry["action"] in sign]
    marks = tuple((name, sum(moment < noted_at for moment, _ in changes)) for noted_at, name in noted)
    return changes, marks
