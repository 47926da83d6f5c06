"""A student whose weights stay zero, or become so, while it is trained."""

from __future__ import annotations

import torch
from torch import nn

from strategies.common.frozen_base import has_adapters
from strategies.pruning.unstructured.gradual import GradualPruning
from strategies.pruning.unstructured.prunable_layers import prunable
from strategies.pruning.unstructured.sparse_weights import SparseWeights
from trainer.errors import UserError, error_context
from trainer.experiment.sparsity_nodes import Sparsity

FEWEST = 0.01  # share of zeros below which there are none to keep: they are there by chance

WAY_OUT = "change it, or name the layers in student.sparsity.ignore"


class SparseTraining:
    """Keeps and makes the zeros of a student in a run; does nothing for a student without.

    Args:
        asked: the sparsity of the student; None without.
        student: without wrappers, with the parameters that the optimizer has.
        steps: of the run.

    Attributes:
        weights: what an engine has to call in each step; None without.
    """

    def __init__(self, asked: Sparsity | None, student: nn.Module, steps: int) -> None:
        self.weights: SparseWeights | None = None if asked is None else asked.keeper(student, steps)

    def resumed(self, step: int) -> None:
        """Take the zeros of a checkpoint, if a schedule has made some before its step."""
        weights = self.weights
        if isinstance(weights, GradualPruning) and step and weights.schedule.reached(step - 1):
            weights.read_zeros()

    def shown(self, step: int) -> dict[str, float]:
        """What the record of a step says, counted from 0: the share of zeros that a schedule has reached."""
        weights = self.weights
        return {"sparsity": weights.schedule.reached(step)} if isinstance(weights, GradualPruning) else {}

    def prune(self, step: int) -> None:
        """Make the zeros that a schedule asks for after so many steps. A collective call."""
        if self.weights is not None:
            self.weights.prune(step)


def check_sparsity(asked: Sparsity | None, model: nn.Module) -> None:
    """Raise `UserError` if a student has no layer to prune, or one that its pattern does not divide.

    Args:
        model: shapes are enough.
    """
    if asked is not None:
        with error_context("student.sparsity.pattern" if asked.pattern else "student.sparsity.ignore",
                           value=asked.pattern or list(asked.ignore), way_out=WAY_OUT):
            asked.check(model)


def check_zeros(asked: Sparsity | None, student: nn.Module) -> None:
    """Raise `UserError` if a student is to keep zeros that it does not have; it is whole, with its weights."""
    if asked is None or asked.method != "keep" or has_adapters(student):  # whose base may be held in other numbers
        return
    layers = prunable(student, asked.ignore).values()
    with torch.no_grad():
        zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    share = zeros / sum(layer.weight.numel() for layer in layers)
    if share < FEWEST:
        raise UserError("student.sparsity.method", f"{share:.2%} of the weights that the student starts with are zero: "
                        "there is nothing to keep", value="keep",
                        way_out="name a sparse model in student.path, or prune it: sparsegpt, wanda, magnitude")
