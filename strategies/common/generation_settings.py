"""The generation settings of a model, which only models that write text have, and batches of prompts for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig


def save_generation_settings(model: nn.Module, folder: Path) -> None:
    """Write `generation_config.json`, if the model has such settings."""
    settings: Any = getattr(model, "generation_config", None)
    if settings is not None:
        settings.save_pretrained(folder)


def copy_generation_settings(origin: nn.Module, target: nn.Module) -> None:
    """Give a model the generation settings of another, if that has some."""
    settings: Any = getattr(origin, "generation_config", None)
    if settings is not None:
        target.generation_config = settings


def load_generation_settings(folder: str | Path, target: nn.Module) -> None:
    """Give a model that writes text the generation settings in a folder."""
    if getattr(target, "generation_config", None) is not None:
        target.generation_config = GenerationConfig.from_pretrained(folder)


@contextmanager
def generating(model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """Context in which `model.generate` follows these settings alone, in evaluation mode.

    generate() takes every field that is left out from the model's own settings, which may sample, or hold penalties
    that count in greedy decoding, too.
    """
    own, mode = model.generation_config, model.training
    model.generation_config = settings
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(mode)


def left_padded(rows: Sequence[Any], padding: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, longest) ids that all end in the last column, and 1 where there is no padding.

    Args:
        rows: token ids of each row, as a list or a tensor.
        device: where the result is needed; rows that are tensors are put together where they are.
    """
    longest, place = max(map(len, rows)), getattr(rows[0], "device", "cpu")
    ids = torch.full((len(rows), longest), padding, device=place)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row):] = torch.as_tensor(row)
        mask[number, longest - len(row):] = 1
    return ids.to(device), mask.to(device)
