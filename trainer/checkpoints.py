"""Checkpoints of a run: weights, optimizer, loss scale, random state and step, in safetensors and JSON.

A checkpoint is written beside and renamed when all of it is on disk; older ones are removed only after that.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

NAME = "step-{:08d}"


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any],
         keep: int, rank: int, wait: Any) -> Path:
    """Write a checkpoint from all processes.

    Args:
        folder: the run's `checkpoints`.
        step: optimizer steps done.
        model: the unwrapped model.
        optimizer: its optimizer.
        state: what else the main process must remember, as plain data.
        keep: checkpoints to leave, this one included.
        rank: number of this process; each writes its own random state.
        wait: a barrier over all processes.
    """
    final = folder / NAME.format(step)
    if final.exists():  # this step is saved; writing it again would only put it at risk
        return final
    partial = folder / f".{final.name}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    save_file(_random_state(), partial / f"random-{rank}.safetensors")
    if rank == 0:
        save_model(model, str(partial / "model.safetensors"))
        tensors, groups = _flatten(optimizer.state_dict())
        save_file(tensors, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, "groups": groups, **state}, indent=1))
    wait()
    if rank == 0:
        for file in [*partial.iterdir(), partial]:
            _sync(file)
        os.rename(partial, final)
        _sync(folder)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    wait()
    return final


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint."""
    return max(folder.glob("step-*"), default=None)


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer state and random state back, and return its plain state.

    A process that the checkpoint did not know keeps its fresh random state.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    load_model(model, str(checkpoint / "model.safetensors"), device="cpu")
    optimizer.load_state_dict(_unflatten(load_file(checkpoint / "optimizer.safetensors"), state.pop("groups")))
    random = checkpoint / f"random-{rank}.safetensors"
    if random.exists():
        _set_random_state(load_file(random))
    return state


def _flatten(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Optimizer state as named tensors, and its groups as plain data."""
    tensors = {f"{index}.{name}": value.detach().contiguous() for index, entry in state["state"].items()
               for name, value in entry.items()}
    return tensors, state["param_groups"]


def _unflatten(tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": groups}


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
