"""Matrix products of fp32 tensors on a CPU by the library that is faster at them.

torch gives fp32 products to MKL and all others to oneDNN. On AMD processors with AVX-512, MKL runs at half of their
rate or less, and oneDNN at the whole. torch hands fp32 products over to oneDNN only together with the permission to
round their operands to bf16 (`fp32_precision = "bf16"`). oneDNN uses it where the processor has matrix
units for bf16 (AMX), and computes in fp32 where it has none. So the permission is given only after a product has shown
that nothing is rounded.

2,048 x 896 x 4,864 on two cores of an AMD EPYC with AVX-512: 215 GFLOP/s by MKL, 470 by oneDNN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

SIZE = 256  # of the product that is tried

_plain = False  # whether products stay as they are, whoever asks


@contextmanager
def fp32_products(device: torch.device, faster: bool) -> Iterator[None]:
    """Within the context, `faster_fp32_products`; or none at all, whoever asks for them inside.

    oneDNN takes buffers from torch, which plans count (`strategies/memory/workspace.py`).
    """
    global _plain
    before, _plain = _plain, _plain or not faster
    try:
        with faster_fp32_products(device):
            yield
    finally:
        _plain = before


@contextmanager
def faster_fp32_products(device: torch.device) -> Iterator[None]:
    """Within the context fp32 products on a CPU are oneDNN's, where that is faster and rounds no more than MKL's.

    Which it is depends on the processor alone, so that a run that goes on has the same bits. Products of bf16 or
    float64, and those on a GPU, are as before.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if _plain or device.type != "cpu" or settings.fp32_precision != "none" or not is_faster():
        yield
        return
    put_back = _as_on_gpu()
    # Which gives the permission on CPU and GPU: with that of one alone, `torch.get_float32_matmul_precision` raises.
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        found = settings.fp32_precision
        torch.set_float32_matmul_precision("highest")
        settings.fp32_precision = "none" if found == "bf16" else found  # somebody has decided otherwise in between
        put_back()


def _as_on_gpu() -> Callable[[], None]:
    """A function that puts back what is set for products on a GPU, by the older or the newer of torch's two ways."""
    settings = torch.backends.cuda.matmul  # type: ignore[attr-defined]
    newer = settings.fp32_precision
    try:
        older = torch.get_float32_matmul_precision() != "highest" and settings.allow_tf32
    except RuntimeError:  # what is set by the newer way is not known to the older
        older = False

    def put_back() -> None:
        if older:
            settings.allow_tf32 = True
        else:
            settings.fp32_precision = newer

    return put_back


@cache
def is_faster() -> bool:
    """Whether this processor is one on which oneDNN's fp32 products are faster, and are products of fp32 numbers."""
    return (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
            and _vendor() == "AuthenticAMD" and rounds_nothing())


def rounds_nothing() -> bool:
    """Whether oneDNN's product of numbers with the 24 bits of fp32 and a permutation has all of these bits."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        # Modes count what is allocated, or make tensors without data.
        with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.no_grad():
            return _is_exact()
    finally:
        settings.fp32_precision = before


def _is_exact() -> bool:
    cpu = torch.device("cpu")  # whatever the defaults are
    given = 1 + torch.arange(SIZE * SIZE, dtype=torch.float32, device=cpu).view(SIZE, SIZE) * 2.0**-23
    places = torch.arange(SIZE, device=cpu)
    order = places.roll(1)
    shuffle = torch.zeros(SIZE, SIZE, dtype=torch.float32, device=cpu)
    shuffle[order, places] = 1
    return all(torch.equal(found, wanted) for found, wanted in (
        (given @ shuffle, given[:, order]), (shuffle.T @ given, given[order]),
        (given.T @ shuffle, given.T[:, order]), (shuffle.T @ given.T, given.T[order])))


def _vendor() -> str | None:
    """Of the processor, as Linux tells it; None elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)
