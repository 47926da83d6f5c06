"""The balancing loss of routers, as a term of a student's objective: what transformers adds to a model's own loss."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NAME = "load_balancing_loss_func"  # of a module of transformers
KNOWN = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # what it is called with


def balancing_function(kind: type[nn.Module]) -> Callable | None:
    """The function that a model's class has its balancing loss from; None where it has none that is known here."""
    modules = (sys.modules.get(own.__module__) for own in kind.__mro__)  # of a wrapper's class, what it wraps
    function = next((getattr(module, NAME) for module in modules if hasattr(module, NAME)), None)
    known = function is not None and list(inspect.signature(function).parameters) == KNOWN
    return function if known and "output_router_logits" in inspect.signature(kind.forward).parameters else None


def balancing_loss(student: nn.Module, output: Any, real: torch.Tensor | None) -> torch.Tensor:
    """The mean over layers of experts * sum_i f_i P_i (Fedus et al. 2022, eq. 4-6), as transformers computes it.

    f_i is the share of tokens that expert i gets and P_i the mean probability that its router gives it, both over the
    tokens of all layers of this call. It is a mean of products of means: of a batch in parts it is not the mean of the
    parts' own.

    Args:
        student: without wrappers.
        output: of its forward, asked for router logits.
        real: (batch, sequence) which tokens are no padding; None for all.

    Raises:
        RuntimeError: the forward gave no router logits.
    """
    logits = getattr(output, "router_logits", None)
    if not logits:
        raise RuntimeError(f"{type(student).__name__} gives no router logits, so that its balancing loss would be none")
    # Of nothing but padding there is no mean; it counts for no target, and must be a number all the same.
    mask = None if real is None else (real | ~real.any()).to(logits[0].device)
    return balancing_function(type(student))(logits, student.num_experts, student.num_experts_per_tok, mask)
