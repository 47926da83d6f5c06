"""Safetensors files that others may read, as any file that a program writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_weights(tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, with the permissions of the process's umask.

    safetensors 0.8 writes into a temporary file and renames it, which leaves it readable by its owner alone.
    """
    save_file(dict(tensors), file, metadata=metadata)
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
