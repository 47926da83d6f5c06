"""What is trained beside the student and is no part of it: its exits, and the projections of intermediate losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from strategies.common.model_tasks import task_of
from strategies.distillation.losses.fused_head import LogitShape, output_head
from strategies.distillation.losses.self_distillation import ExitObjective, ExitTerms
from strategies.pruning.early_exit.exit_decisions import classifier_logits
from strategies.pruning.early_exit.exit_heads import (
    NAME,
    attach_exits,
    check_layers,
    detach_exits,
    parts_of,
    pooling_of,
)
from trainer.errors import UserError, error_context
from trainer.experiment.exit_nodes import EarlyExits
from trainer.experiment.objective_nodes import Objective
from trainer.model_files import first_line
from trainer.models.classifier_trials import example_inputs
from trainer.teacher.intermediate_losses import attach_projections

KEY, REMOVE = "objective.early_exits", "remove objective.early_exits"
CLOSE = 1e-4  # largest difference of logits by the parts of a model that were found, relative to the largest logit


def attach_parts(objective: Objective, seed: int, student: nn.Module, teacher: PretrainedConfig | None) -> None:
    """Attach to the student what its objective trains beside it; shapes are enough."""
    attach_projections(objective, seed, student, teacher)
    if objective.early_exits is not None:
        with error_context(KEY, way_out=REMOVE):
            attach_exits(student, objective.early_exits.layers, seed=seed)


def build_exits(objective: Objective, student: nn.Module) -> ExitTerms | None:
    """The losses of the student's exits, which are attached; None without any."""
    asked = objective.early_exits
    if asked is None:
        return None
    return ExitTerms(student, NAME, ExitObjective(asked.layers, asked.weight, asked.cross_entropy))


def check_exits(asked: EarlyExits | None, student: nn.Module) -> None:
    """Raise `UserError` if the student has no place for an exit; shapes are enough."""
    if asked is None:
        return
    with error_context(KEY, value="early_exits", way_out=f"{REMOVE}: exits sit after blocks of transformers"):
        parts = parts_of(student)
    blocks = len(student.get_submodule(parts.blocks))
    fitting = [layer for layer in asked.layers if layer < blocks - 1] or ([blocks // 2 - 1] if blocks > 1 else [])
    with error_context(f"{KEY}.layers", value=list(asked.layers),
                       way_out=f"write {fitting}, for example" if fitting else REMOVE):
        check_layers(asked.layers, blocks)


def settle_exits(student: nn.Module, shape: LogitShape | None) -> None:
    """Find out on small inputs how the student's own head reads its blocks, and have its exits do the same.

    Args:
        student: with weights, and with exits or without.
        shape: what a language model does with the output of its head; None for a classifier, or if it is not known.

    Raises:
        UserError: the student does something between its blocks and its logits that exits do not do.
    """
    if not hasattr(student, NAME):
        return
    name = type(student).__name__
    try:
        if task_of(student.config) == "causal_lm":
            _settle_language(student, shape)
        else:
            _settle_classifier(student)
    except UserError:
        raise
    except Exception as error:  # foreign model code can raise anything
        raise UserError(KEY, f"exits cannot be put on {name}: {first_line(error)}", way_out=REMOVE) from error


def take_exits(student: nn.Module) -> nn.ModuleDict | None:
    """Remove the exits from a student, and return them; None if it has none."""
    return detach_exits(student).eval() if hasattr(student, NAME) else None


def logits_from(model: nn.Module, shape: LogitShape, normed: torch.Tensor) -> torch.Tensor:
    """Logits of a language model from the hidden states that enter its head."""
    return shape(output_head(model)(normed))


def _settle_classifier(student: nn.Module) -> None:
    one = {name: tensor[:1] for name, tensor in example_inputs(student).items()}
    pooling, exits = pooling_of(student, one), getattr(student, NAME)
    for exit in exits.values():
        exit.pooling = pooling
    was = student.training
    classifier_logits(student.eval(), exits, one)
    student.train(was)


@torch.no_grad()
def _settle_language(student: nn.Module, shape: LogitShape | None) -> None:
    """Check that logits are those of the last norm and the head, with scale and soft cap."""
    parts, found = parts_of(student), []
    if shape is None:
        raise UserError(KEY, f"the head of {type(student).__name__} is not known here, and an exit cannot use it",
                        way_out=REMOVE)

    def keep(_: nn.Module, __: tuple, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    assert parts.norm is not None
    hook, was = student.get_submodule(parts.blocks)[-1].register_forward_hook(keep), student.training
    try:
        ids = torch.arange(4, device=next(student.parameters()).device)[None]
        logits = student.eval()(input_ids=ids, use_cache=False).logits
        ours = logits_from(student, shape, student.get_submodule(parts.norm)(found[0]))
    finally:
        hook.remove()
        student.train(was)
    if not (logits - ours).abs().max() <= CLOSE * logits.abs().max():
        raise UserError(KEY, f"{type(student).__name__} does more between its blocks and its head than a norm",
                        way_out=REMOVE)
