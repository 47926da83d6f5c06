"""The memory ledger: bytes of each part of training, such as weights, gradients and activations, on one rank.

Model state is computed exactly from shapes. Activations are counted by running the model's forward on fake tensors and
adding up what autograd saves. The loss is computed from its shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import strategies.memory.fake_experts  # noqa: F401 - lets experts run on fake tensors
from strategies.memory.residency import Residency


@dataclass(frozen=True)
class Ledger:
    """Bytes of one rank in a training step, each part at its peak.

    Attributes:
        weights: the rank's shard of the weights, in the dtype of the computation.
        fp32_weights: a second copy that the optimizer updates, if there is one.
        gradients: of the weights, as they are stored.
        optimizer_state: of the optimizer.
        teacher: the rank's shard of the teacher.
        gathered: weights that are all-gathered while they are used.
        communication: buffers in which gradients are reduced.
        activations: None if they cannot be counted for the architecture.
        loss: logits, and what the loss saves of them.
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
        """The ledger of a rank, from its residency, activations and loss."""
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
        """Sum of all parts. It is not the peak: parts peak at different moments, and temporaries are not included."""
        return sum(count for count in asdict(self).values() if count)

    def rows(self) -> list[tuple[str, int]]:
        """Nonzero parts, largest first."""
        return sorted(((name, count) for name, count in asdict(self).items() if count), key=lambda part: -part[1])


def parameter_bytes(model: nn.Module, trained: bool = False) -> int:
    """Bytes of all parameters, or of the trainable ones; tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()
               if parameter.requires_grad or not trained)


def saved_activation_bytes(build: Callable[[], nn.Module], inputs: Callable[[], Mapping[str, Any]],
                           autocast: torch.dtype | None = None) -> int:
    """Bytes that autograd saves between forward and backward, without logits, counted on fake tensors.

    Args:
        build: makes a model whose output has `logits`; it is called in a `FakeTensorMode`.
        inputs: makes the arguments of its forward for a micro-batch; called there, too.
        autocast: dtype of mixed precision, or None for fp32.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # views share a storage, which counts once
        return tensor

    with FakeTensorMode():
        model = build()
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        given = inputs()
        with (torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
              torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None)):
            logits = model(**given).logits
        own.add(logits.untyped_storage()._cdata)
        return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def loss_bytes(positions: int, width: int, vocabularies: int, vocabulary: int, rows: int) -> int:
    """Bytes of a tiled loss: fp32 logits of a tile, and the gradients of hidden states and head that it saves.

    Args:
        positions: number of positions in a micro-batch.
        width: of the student's hidden states.
        vocabularies: size of the student's vocabulary, plus the teacher's if its logits are computed too.
        vocabulary: size of the student's vocabulary; 0 if its head is frozen.
        rows: positions in a tile.
    """
    return 4 * rows * vocabularies + 4 * width * (positions + vocabulary)
