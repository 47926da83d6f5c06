"""The measured memory of one training step."""

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
from torch.autograd import profiler

from strategies.memory.tracker import ENTERED, strided_parts, tensors_of

_FREE, _MARK = "limbeck.free.", "limbeck.mark."
LET_GO = 1e-3, 1.0  # seconds that gloo has to let go of a tensor: at least, and at most while its threads are busy
_GLOO = "pt_gloo_runloop"  # how torch names gloo's threads
CUDA_BLOCK = 512  # bytes to whose next multiple the CUDA caching allocator rounds a request up
_CUDA_ENTRIES = 1_000_000  # most allocations and frees that a timeline on CUDA keeps; the newest stay
_cuda_marks: list[tuple[float, str]] | None = None  # (microseconds, name) while a step is measured on CUDA


@dataclass(frozen=True)
class Measured:
    """Memory of one step.

    Attributes:
        peak: the most bytes allocated at once, `base` included.
        base: bytes allocated before the step: on CUDA all of them, on CPU those of the `resident` tensors.
        reserved: bytes that the CUDA caching allocator held at its largest; None on CPU.
        timeline: [changes, 2]: microseconds since the step began, and bytes allocated after the change, base included.
            Its largest value is `peak` on CPU; on CUDA what the allocator adds beyond rounding is missing.
        marks: (name, number of changes in the timeline before `mark` was called).
    """

    peak: int
    base: int
    reserved: int | None = None
    timeline: numpy.ndarray = field(default_factory=lambda: numpy.zeros((0, 2), dtype=numpy.int64), compare=False)
    marks: tuple[tuple[str, int], ...] = ()


def measure(step: Callable[[], object], device: torch.device | str, resident: Iterable[Any] = ()) -> Measured:
    """Run a step once and measure its memory on a device.

    On CPU this profiles torch's allocator, whether operations run eagerly or in compiled code. Included are the calling
    thread and what autograd runs for it; a data loader's threads and processes are not, nor is memory that libraries
    take from the system behind torch's back (BLAS packing buffers). Profiling costs about 15 microseconds for
    each operation and reading the events 25 more; nothing of it is kept. No other profiler may be running.

    On CUDA the allocator's own peak is read, which costs two synchronizations, and its trace without stacks, which is
    left out where somebody else is recording memory history. The step's peak statistics are reset.

    Args:
        step: for example forward, backward and the optimizer's step. Its value is dropped while it is measured.
        device: where the bytes are counted.
        resident: modules, optimizers and tensors that exist already. On CPU their bytes are the `base`, and their end
            counts if it comes within the step, as that of gradients in `zero_grad`. An iterator is used up before the
            step, a list keeps its tensors alive. Unused on CUDA.

    Raises:
        ValueError: the device is neither CPU nor CUDA.
        Whatever the step raises.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _measure_cuda(step, device)
    if device.type != "cpu":
        raise ValueError(f"memory is measured on cpu and cuda, not on {device.type}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch reads it now; else each profile writes two lines to stderr
    base, watchers = _watch(resident)
    with patient_waiting(), profiler.profile(use_kineto=True, profile_memory=True) as profile:
        step()
    changes, marks = changes_of(_walk(profile.kineto_results.experimental_event_tree()))
    del watchers
    timeline = cumulative(changes, base)
    return Measured(int(timeline[:, 1].max(initial=base)), base, None, timeline, marks)


@contextmanager
def patient_waiting() -> Iterator[None]:
    """Within the context, who waits for a sum over ranks waits a moment longer.

    gloo's own thread holds the tensors too, and lets go of them just after it is done. If it were the last one to, the
    end of their memory would not be seen: the profiler hears of the threads that it was started for only. On a busy
    machine that thread may be put aside for long; where the system tells (Linux), we wait until it sleeps.
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
    """What Linux tells of each of gloo's threads in this process; nothing elsewhere."""
    return [thread for thread in Path("/proc/self/task").glob("*") if _told(thread / "comm").strip() == _GLOO]


def _runs(thread: Path) -> bool:
    """Whether a thread runs, or would if it were its turn."""
    return _told(thread / "stat").rpartition(")")[2].split()[:1] == ["R"]


def _told(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # the thread has ended
        return ""


def mark(name: str) -> None:
    """Name the present moment in the step that is being measured, or counted by `LiveBytes`; else do nothing."""
    for tracker in ENTERED:
        tracker.mark(name)
    if _cuda_marks is not None:
        _cuda_marks.append((time.time_ns() / 1000, name))
    with torch._C._profiler._RecordFunctionFast(_MARK + name):
        pass


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

def _watch(things: Iterable[Any]) -> tuple[int, list[weakref.ref]]:
    """Bytes of resident storages on CPU, and references that write each one's end into the profile.

    The profiler does not know how large a block was that is older than its window, so it cannot report that end.
    """
    def ended(size: int) -> Callable[[Any], None]:
        def write(_: Any) -> None:
            with torch._C._profiler._RecordFunctionFast(f"{_FREE}{size}"):
                pass
        return write

    storages = [storage for storage in _storages(things) if storage.device.type == "cpu"]
    base = sum(storage.nbytes() for storage in storages)
    return base, [weakref.ref(storage, ended(storage.nbytes())) for storage in storages]


def _walk(events: list[Any]) -> Iterator[tuple[int, str, int, int]]:
    """(nanoseconds, name, bytes, address) of the profile's allocations on CPU and of our own notes, in any order."""
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

    A free counts where its allocation was seen, with the bytes of that. Any other is of an older block; our own notes
    say its end. The size that the profiler gives for a free may be that of another block, which lived at the same
    address before. A block that another thread let go of, unseen, ends when its address is given out again.
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
    recording = not torch._C._cuda_isHistoryEnabled()  # else somebody records already, and ours would end theirs
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
