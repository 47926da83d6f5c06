"""Saves and restores the random state of a process as tensors: torch on CPU and GPU, Python and NumPy."""

from __future__ import annotations

import random

import numpy as np
import torch

# Version of Python's state format: 624 words of the Mersenne Twister, the position in them, and a cached normal number.
VERSION = 3


def seed_everything(seed: int) -> None:
    """Seed every generator that a model may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, torch.Tensor]:
    """The state of every generator, by name.

    The normal number that a generator may have cached is a tensor of one element, or an empty one if there is none.
    """
    version, words, normal = random.getstate()
    assert version == VERSION
    _, keys, position, has_normal, numpy_normal = np.random.get_state()
    state = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor(words), "python_normal": _left_over(normal),
        "numpy": torch.tensor([*keys.tolist(), position]),
        "numpy_normal": _left_over(numpy_normal if has_normal else None),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restore every generator that `state` contains and this process has.

    Raises:
        ValueError, RuntimeError, TypeError: the state is invalid.
    """
    torch.set_rng_state(state["cpu"])
    if "python" in state:
        normal = state["python_normal"].tolist()
        random.setstate((VERSION, tuple(state["python"].tolist()), *(normal or [None])))
    if "numpy" in state:
        *keys, position = state["numpy"].tolist()
        normal = state["numpy_normal"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, len(normal), *(normal or [0.0])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _left_over(normal: float | None) -> torch.Tensor:
    return torch.tensor([] if normal is None else [normal], dtype=torch.float64)
