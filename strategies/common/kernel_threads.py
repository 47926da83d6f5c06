"""Threads for compiled kernels, which leave the interpreter to each other while they run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def in_threads(work: Callable[[T], Any], parts: Sequence[T]) -> None:
    """Call `work` with every part, from as many threads as torch has, the calling one among them.

    Each takes the next part as soon as it is done with one: a thread that is put aside by other work holds up the
    others for no longer than its own part. Returns when all parts are done.

    Raises:
        Whatever `work` raises.
    """
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        for part in parts:
            work(part)
        return
    left, turn = iter(parts), threading.Lock()

    def take() -> None:
        while True:
            with turn:
                try:
                    part = next(left)
                except StopIteration:
                    return
            work(part)

    others = [_pool(os.getpid(), threads - 1).submit(take) for _ in range(threads - 1)]
    try:
        take()
    finally:
        wait(others)
    for other in others:
        other.result()


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: after a fork, those of the parent are not there."""
    return ThreadPoolExecutor(threads, thread_name_prefix="limbeck-kernels")
