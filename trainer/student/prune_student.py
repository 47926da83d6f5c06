"""Structured pruning of the student before it is trained, with its own training rows and loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from strategies.distillation.losses.tiled_loss import IGNORED
from strategies.pruning.structured.cut_model import cut_model
from trainer.data.batches import model_inputs
from trainer.data.dataset import PreparedData
from trainer.data.first_rows import first_rows
from trainer.errors import UserError
from trainer.experiment.pruning_nodes import Prune, pruning_errors
from trainer.models.pruned_config import some_layers


def prune_student(prune: Prune, model: nn.Module, text: PreparedData, seed: int, micro_batch: int
                  ) -> tuple[nn.Module, dict[str, Any]]:
    """The cut model, and what was cut as plain data; the given model is consumed.

    Raises:
        UserError: it cannot be cut so, or its rows cannot say what is important.
    """
    device = next(model.parameters()).device
    batches = pruning_batches(text, prune, seed, micro_batch, device)
    with pruning_errors(prune):
        return cut_model(model, prune.build(), batches, target_loss, prune.importance, some_layers)


def pruning_batches(text: PreparedData, prune: Prune, seed: int, micro_batch: int, device: torch.device
                    ) -> list[dict[str, Any]]:
    """The first training rows as inputs of a model, with `targets`, and `counted` for packed rows that are padded.

    Raises:
        UserError: importance is that of the gradient, and the rows have no targets, or one class only.
    """
    rows = first_rows(text, prune.calibration_rows, seed, also=("length",))
    if prune.importance == "gradient":
        _check_targets(rows["targets"], prune)
    batches = []
    for begin in range(0, len(rows["targets"]), micro_batch):
        part = {name: tensor[begin:begin + micro_batch].to(device) for name, tensor in rows.items()}
        batch = {**model_inputs(part), "targets": part["targets"]}
        if "position_ids" in batch:
            places = torch.arange(part["input_ids"].shape[1], device=device)
            batch["counted"] = places < part["length"][:, None]
        batches.append(batch)
    return batches


def _check_targets(targets: torch.Tensor, prune: Prune) -> None:
    found = targets[targets != IGNORED].unique()
    if len(found) < 2:
        what = "none has a target" if not len(found) else "all their targets are the same"
        raise UserError("student.prune.importance", f"of the {len(targets)} calibration rows {what}, so that the "
                        "gradient cannot say what is important", value=prune.importance,
                        way_out="use `importance: activations`, or more `calibration_rows`")


def target_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Mean cross-entropy of the targets in a batch, () in nats."""
    inputs = {name: value for name, value in batch.items() if name not in ("targets", "counted")}
    logits = model(**inputs).logits.float()
    return functional.cross_entropy(logits.flatten(0, -2), batch["targets"].flatten(), ignore_index=IGNORED)
