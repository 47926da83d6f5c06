"""The ledger of bytes: what training a model keeps in memory, part by part, on one rank of however many.

Model state is exact, from shapes; activations are counted, by running the model's forward on tensors without data and
adding up what autograd keeps; the loss is counted from its shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import strategies.memory.fake_experts  # noqa: F401 - experts have shapes without data from here on
from strategies.memory.residency import Residency


@dataclass(frozen=True)
class Ledger:
    """Bytes of one rank in a training step, each part at its largest.

    Attributes:
        weights: as they are computed with, the rank's part.
        fp32_weights: a second copy that is updated, where there is one.
        gradients: of the weights, as they are kept.
        optimizer_state: of the optimizer.
        teacher: the rank's part of it.
        gathered: weights of others, while they are used.
        communication: buffers in which gradients are summed.
        activations: None where the architecture cannot be counted.
        loss: logits and what the loss keeps of them.
    """

    weights: int
    gradients: int
    optimizer_state: int
    teacher: int
    activations: int | None
    loss: int
    fp32_weights: int = 0
    gathered: int = 0
    communication: int = 0

    @classmethod
    def of(cls, held: Residency, activations: int | None, loss: int) -> Ledger:
        """The ledger of a rank that holds so much of its models."""
        parts = dict(held.parts)
        gathered = max((turn.forward + turn.arriving for turn in held.turns), default=0)
        back = max((turn.backward + turn.fetched for turn in held.turns), default=0)
        buffers = max((max(turn.buffers, turn.reduced) for turn in held.turns), default=0)
        return cls(
            weights=parts.get("weights", 0), fp32_weights=parts.get("fp32 weights", 0),
            gradients=held.gradients or parts.get("gradients", 0), optimizer_state=parts.get("optimizer state", 0),
            teacher=parts.get("teacher", 0), gathered=max(held.forward + max(gathered, back), held.teacher),
            communication=parts.get("buckets", 0) + held.backward + buffers, activations=activations, loss=loss)

    @property
    def model_state(self) -> int:
        """Weights, gradients and optimizer state: what ZeRO shards (Rajbhandari et al. 2020, section 3.1)."""
        return self.weights + self.fp32_weights + self.gradients + self.optimizer_state

    @property
    def total(self) -> int:
        """Sum of all parts; they are not at their largest at the same moment, and temporaries come on top."""
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


def loss_bytes(positions: int, width: int, vocabularies: int, vocabulary: int, rows: int) -> int:
    """Bytes of a tiled loss: fp32 logits of a tile, and the gradients of hidden states and head that it keeps.

    Args:
        positions: of a micro-batch.
        width: of the student's hidden states.
        vocabularies: of student and teacher, if it is asked, together.
        vocabulary: of the student.
        rows: positions of a tile.
    """
    return 4 * rows * vocabularies + 4 * width * (positions + vocabulary)
