"""Builds the intermediate distillation losses (hidden states, relations, values, attention maps) of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from transformers import PretrainedConfig

from strategies.distillation.losses.features import NAME, Projections
from strategies.distillation.losses.intermediate import (
    AttentionMaps,
    Features,
    IntermediateTerms,
    Relations,
    ValueRelations,
)
from trainer.errors import UserError, error_context
from trainer.experiment.objective_nodes import INSIDE, Objective
from trainer.models.layer_widths import has_maps, layer_widths


def attach_projections(objective: Objective, seed: int, student: nn.Module, teacher: PretrainedConfig | None) -> None:
    """Attach projections to the student if hidden states of different widths are compared."""
    if objective.features is None or teacher is None:
        return
    pairs = _pairs(objective, "features", student.config, teacher)
    projections = Projections(pairs, layer_widths(student.config), layer_widths(teacher), seed)
    if projections.by_layer:
        projections.attach(student)


def build_intermediate(
    objective: Objective, student: nn.Module, teacher: nn.Module | None, variances: Mapping[int, float] | None = None
) -> IntermediateTerms | None:
    """Build the intermediate losses; None if there is no teacher or no such loss in the objective.

    `variances` are those of `start_features`; a plan, which has no numbers, is made without.

    For attention maps, both models are switched to the eager attention implementation.

    Raises:
        UserError: a layer does not exist in one of the models, or the number of heads does not divide its values.
    """
    asked = objective.planned
    if teacher is None or not asked.has_intermediate:
        return None
    configs = student.config, teacher.config
    features = relations = values = maps = None
    if asked.features is not None:
        features = Features(asked.features.weight, _pairs(objective, "features", *configs), asked.features.loss,
                            variances)
    if asked.relations is not None:
        relations = Relations(asked.relations.distance, asked.relations.angle,
                              _pairs(objective, "relations", *configs), asked.relations.tokens)
    if asked.values is not None:
        values = ValueRelations(asked.values.weight, _pairs(objective, "values", *configs), asked.values.heads)
    if asked.attention_maps is not None:
        maps = AttentionMaps(asked.attention_maps.weight, _pairs(objective, "attention_maps", *configs))
        for model in (student, teacher):
            model.set_attn_implementation("eager")  # the only one that materializes attention maps
    with error_context("objective.values" if values else "objective.features"):
        return IntermediateTerms(student, teacher, features, relations, values, maps)


def reweigh(terms: IntermediateTerms | None, objective: Objective) -> None:
    """Give the losses the weights of an objective that has no schedules, such as that of a step."""
    if terms is None:
        return
    if terms.features is not None:
        terms.features = replace(terms.features, weight=objective.features.weight)
    if terms.relations is not None:
        terms.relations = replace(terms.relations, distance=objective.relations.distance,
                                  angle=objective.relations.angle)
    if terms.values is not None:
        terms.values = replace(terms.values, weight=objective.values.weight)
    if terms.maps is not None:
        terms.maps = replace(terms.maps, weight=objective.attention_maps.weight)


def without_projections(student: nn.Module) -> nn.Module:
    """The student with any projections removed, as training returns it."""
    if hasattr(student, NAME):
        Projections.detach_from(student)
    return student


def check_intermediate(objective: Objective, student: PretrainedConfig, teacher: PretrainedConfig | None,
                       planned: bool = False) -> None:
    """Raise `UserError` if the objective names a layer that one of the models does not have, or compares what is not
    alike.

    Args:
        planned: whether the student has a memory budget.
    """
    if planned and teacher is not None and objective.features is not None and has_maps(student):
        raise UserError("objective.features", "under a memory budget a convolutional net is planned as one block, "
                        "inside of which no stage is seen", value="features",
                        way_out="leave out objective.features or memory.budget")
    for name in INSIDE:
        if teacher is not None and getattr(objective, name) is not None:
            _check_kinds(name, student, teacher)
            _pairs(objective, name, student, teacher)


def _check_kinds(name: str, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """Raise `UserError` for a loss between maps and tokens, or between parts that a convolutional net does not have."""
    maps = [config.model_type for config in (student, teacher) if has_maps(config)]
    if name == "features" and len(maps) == 1:
        raise UserError("objective.features", f"{maps[0]} has maps of channels and the other model tokens, and they "
                        "have no positions in common", value="features",
                        way_out="leave it out: the divergence from the teacher's classes goes with all models")
    if name != "features" and maps:
        raise UserError(f"objective.{name}", f"it compares tokens or attention, and {maps[0]} is a convolutional net, "
                        "which has neither", value=name, way_out="use objective.features, or leave it out")


def _pairs(objective: Objective, name: str, student: PretrainedConfig, teacher: PretrainedConfig
           ) -> tuple[tuple[int, int], ...]:
    return objective.pairs(name, len(layer_widths(student)), len(layer_widths(teacher)))
