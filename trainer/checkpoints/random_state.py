"""Random state of a process, as tensors: torch's on CPU and GPU, Python's and numpy's."""

from __future__ import annotations

import random

import numpy as np
import torch

VERSION = 3  # of Python's own format: 624 words of the Mersenne Twister, where it stands in them, a normal left over


def seed_everything(seed: int) -> None:
    """Seed every generator that a model may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, torch.Tensor]:
    """The state of every generator, by name.

    A normal number that a generator has drawn in advance is a tensor of one element; of none where there is none.
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
    """Put every generator back that `state` knows of, and this process has.

    Raises:
        ValueError, RuntimeError, TypeError: it is no such state.
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
