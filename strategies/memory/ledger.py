"""The ledger of bytes: what training a model keeps in memory, part by part.

A first ledger: weights, gradients, optimizer state and teacher are exact; activations are counted, by running the
model's forward on tensors without data and adding up what autograd keeps; the loss is counted from its shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class Ledger:
    """Bytes per process of one training step; `activations` is None where the architecture cannot be counted."""

    weights: int
    gradients: int
    optimizer_state: int
    teacher: int
    activations: int | None
    loss: int

    @property
    def total(self) -> int:
        """Sum of all parts: what is kept when the loss turns back; the peak has its temporaries on top."""
        return sum(count for count in asdict(self).values() if count)

    def rows(self) -> list[tuple[str, int]]:
        """Parts that take any bytes, largest first."""
        return sorted(((name, count) for name, count in asdict(self).items() if count), key=lambda part: -part[1])


def parameter_bytes(model: nn.Module, trained: bool = False) -> int:
    """Bytes of all parameters, or of those that are trained; tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()
               if parameter.requires_grad or not trained)


def saved_activation_bytes(
    build: Callable[[], nn.Module], batch: int, sequence: int, autocast: torch.dtype | None = None
) -> int:
    """Bytes that autograd keeps between forward and backward, logits excluded, counted without computing.

    Args:
        build: makes a causal language model; it is called where tensors have shapes but no data.
        batch: sequences per micro-batch.
        sequence: tokens per sequence, packed from several documents.
        autocast: dtype of mixed precision, or None for fp32.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # views share a storage, which is kept once
        return tensor

    with FakeTensorMode():
        model = build()
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        ids = torch.zeros(batch, sequence, dtype=torch.long)
        with (torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
              torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None)):
            logits = model(input_ids=ids, position_ids=ids, use_cache=False).logits
        own.add(logits.untyped_storage()._cdata)
        return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def loss_bytes(batch: int, sequence: int, vocabulary: int, logit_bytes: int, distilled: bool) -> int:
    """Bytes of logits and of what the loss keeps of them, for the untiled loss of this version.

    Cross-entropy keeps fp32 log-probabilities beside the student's logits; KL keeps the fp32 difference of the two
    distributions beside the teacher's logits.
    """
    values = batch * sequence * vocabulary
    return values * (logit_bytes + 4) * (2 if distilled else 1)
