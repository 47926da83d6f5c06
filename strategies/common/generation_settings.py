"""The generation settings of a model, which only models that write text have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
