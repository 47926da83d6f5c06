"""Writes a model with its exits as a folder of its own, with the code that runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from strategies.common.model_tasks import task_of
from strategies.pruning.early_exit.exit_curve import Point
from strategies.pruning.early_exit.exit_heads import parts_of

WEIGHTS, SETTINGS, CODE = "exits.safetensors", "exits.json", "early_exit.py"


def write_exits(folder: Path, model: nn.Module, exits: nn.ModuleDict, threshold: float, curve: Sequence[Point],
                scale: float = 1.0, cap: float | None = None) -> None:
    """Write exits beside the files of a model for transformers, and the code that runs both without this project.

    Args:
        folder: a folder that transformers loads the model from.
        model: the model, without its exits.
        threshold: confidence from which on an input leaves, unless its user says otherwise.
        curve: what thresholds save and cost.
        scale, cap: what a language model applies to the output of its head.
    """
    parts, first = parts_of(model), next(iter(exits.values()))
    about = {"task": task_of(model.config), "layers": [int(layer) for layer in exits], "threshold": threshold,
             "blocks": parts.blocks, "norm": parts.norm, "pooling": getattr(first, "pooling", None), "scale": scale,
             "cap": cap, "curve": [one.to_dict() for one in curve]}
    save_file({name: tensor.detach().cpu().contiguous()
               for name, tensor in exits.state_dict().items()}, folder / WEIGHTS)
    (folder / SETTINGS).write_text(json.dumps(about, indent=2) + "\n")
    shutil.copyfile(Path(__file__).with_name("exit_runtime.py"), folder / CODE)
