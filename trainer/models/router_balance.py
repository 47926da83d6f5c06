"""Whether a student's routers are balanced, and with which weight: as its configuration asks, or as a person does."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from strategies.distillation.losses.load_balancing import balancing_function
from trainer.errors import UserError
from trainer.experiment.objective_nodes import Objective

KEY = "objective.balancing"


def balancing_weight(objective: Objective, config: PretrainedConfig) -> float | None:
    """The weight of the balancing loss; None for a student that has none, or that is not asked for it.

    Raises:
        UserError: it is asked for, and the architecture has none.
    """
    wanted = objective.balancing
    if wanted is None and getattr(config, "output_router_logits", False):
        wanted = _coefficient(config)
    if wanted is None or _has_loss(config):
        return wanted
    if not wanted:
        return None
    asked = objective.balancing is not None
    raise UserError(KEY, f"transformers' {config.model_type} has no balancing loss of routers that is known here"
                    + ("" if asked else ", and its configuration asks for one (output_router_logits: true)"),
                    value=objective.balancing, way_out="leave it out" if asked else "set it to 0 to train without")


def balancing_note(objective: Objective, config: PretrainedConfig) -> str | None:
    """What is to be said of a mixture of experts, in words."""
    own, weight = _coefficient(config), balancing_weight(objective, config)
    if weight:
        return (f"the routers' balancing loss is a term of the objective, with weight {weight:g}: the mean over "
                "micro-batches of each one's own")
    if own is not None and _has_loss(config) and objective.balancing is None:
        return ("no balancing loss is added for the routers: the configuration has a weight for it, and "
                f"output_router_logits false; {KEY}={own:g} adds it")
    return None


def _coefficient(config: PretrainedConfig) -> float | None:
    """The weight that a configuration has for it, whatever it calls it."""
    places: list[tuple[Any, str]] = [(config, "router_aux_loss_coef"), (config, "aux_loss_coef"),
                                     (getattr(config, "ffn_config", None), "moe_loss_weight")]
    return next((float(value) for holder, name in places if (value := getattr(holder, name, None)) is not None), None)


def _has_loss(config: PretrainedConfig) -> bool:
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return kind is not None and balancing_function(kind) is not None
