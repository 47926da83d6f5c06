"""Decides whether a load-balancing loss for the student's mixture-of-experts routers is added, and with which weight.

The experiment decides, or else the model's configuration.
"""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from strategies.distillation.losses.load_balancing import balancing_function
from trainer.errors import UserError
from trainer.experiment.objective_nodes import Objective

KEY = "objective.balancing"


def balancing_weight(objective: Objective, config: PretrainedConfig) -> float | None:
    """The weight of the balancing loss; None if it is not requested, or is 0 for an architecture that has none.

    Raises:
        UserError: the loss is requested, and none is known for the architecture.
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
    """A message about the balancing loss of a mixture of experts; None if there is nothing to say."""
    own, weight = _coefficient(config), balancing_weight(objective, config)
    if weight:
        return (f"the routers' balancing loss is a term of the objective, with weight {weight:g}: the mean over "
                "micro-batches of each one's own")
    if own is not None and _has_loss(config) and objective.balancing is None:
        return ("no balancing loss is added for the routers: the configuration has a weight for it, and "
                f"output_router_logits false; {KEY}={own:g} adds it")
    return None


def _coefficient(config: PretrainedConfig) -> float | None:
    """The weight of the balancing loss in a configuration, under any of the names it may have there."""
    places: list[tuple[Any, str]] = [(config, "router_aux_loss_coef"), (config, "aux_loss_coef"),
                                     (getattr(config, "ffn_config", None), "moe_loss_weight")]
    return next((float(value) for holder, name in places if (value := getattr(holder, name, None)) is not None), None)


def _has_loss(config: PretrainedConfig) -> bool:
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return kind is not None and balancing_function(kind) is not None
