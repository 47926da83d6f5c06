"""The load-balancing loss of a mixture of experts as a term of the objective; transformers adds it to its own loss."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NAME = "load_balancing_loss_func"  # in a modeling module of transformers
KNOWN = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # the supported signature


def balancing_function(kind: type[nn.Module]) -> Callable | None:
    """The function that computes the load-balancing loss of a model's class; None if none has a supported signature."""
    modules = (sys.modules.get(own.__module__) for own in kind.__mro__)  # with those of bases: a wrapper's is the model
    function = next((getattr(module, NAME) for module in modules if hasattr(module, NAME)), None)
    known = function is not None and list(inspect.signature(function).parameters) == KNOWN
    return function if known and "output_router_logits" in inspect.signature(kind.forward).parameters else None


def balancing_loss(student: nn.Module, output: Any, real: torch.Tensor | None) -> torch.Tensor:
    """The load-balancing loss experts * sum_i f_i P_i (Fedus et al. 2022, eq. 4-6), as transformers computes it.

    f_i is the share of tokens that are routed to expert i, and P_i the mean probability that routers give it, both over
    the tokens of this call and all layers. As a sum of products of means, the loss of a batch is not the mean of the
    losses of its micro-batches.

    Args:
        student: without wrappers.
        output: of its forward, called with `output_router_logits=True`.
        real: (batch, sequence) True for tokens that are not padding; None for all.

    Raises:
        RuntimeError: the output has no router logits.
    """
    logits = getattr(output, "router_logits", None)
    if not logits:
        raise RuntimeError(f"{type(student).__name__} gives no router logits, so that its balancing loss would be none")
    # With nothing but padding the mean would be NaN. Such a call has no targets, so the loss is multiplied by 0, but
    # it must still be finite.
    mask = None if real is None else (real | ~real.any()).to(logits[0].device)
    return balancing_function(type(student))(logits, student.num_experts, student.num_experts_per_tok, mask)
