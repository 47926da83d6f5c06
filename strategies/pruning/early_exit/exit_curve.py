"""What early exits save, and what that costs: blocks and arithmetic against accuracy, by threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from strategies.common.model_blocks import block_list
from strategies.pruning.early_exit.exit_decisions import confidence, first_confident

THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
IGNORED = -100
FILLED = ("k_proj", "v_proj", "q_proj", "c_attn", "query_key_value", "qkv_proj", "Wqkv", "key", "value", "query")


@dataclass(frozen=True)
class Point:
    """One threshold of a curve.

    Attributes:
        threshold: of the confidence; above 1 nothing leaves.
        blocks: share of the blocks that is computed.
        flops: share of the multiplications of the whole model, those of the exits included.
        exits: share of the rows or tokens that leaves at each exit and, last, at the model's own head.
        accuracy: of a classifier.
        bits_per_byte: of a language model.
    """

    threshold: float
    blocks: float
    flops: float
    exits: tuple[float, ...]
    accuracy: float | None = None
    bits_per_byte: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the figure that the model does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Costs:
    """Multiplications for one token, or for one row of a classifier: those with matrices of weights.

    Attention scores, norms and embeddings are left out; the first grow with the length of the text, and are in the same
    blocks.

    Attributes:
        layers: the blocks after which there is an exit.
        blocks: of each block.
        filled: of each block whose keys and values alone are computed, from the state of a token that has left.
        exit: of an exit.
        head: of the model's own head.
    """

    layers: tuple[int, ...]
    blocks: tuple[int, ...]
    filled: tuple[int, ...]
    exit: int
    head: int

    @classmethod
    def of(cls, model: nn.Module, exits: nn.ModuleDict, tokens: int) -> Costs:
        """Of a model and its exits.

        Args:
            tokens: of a row, where a row leaves as a whole; 1 where each token leaves by itself.
        """
        name = block_list(model)
        blocks = model.get_submodule(name)
        language = not hasattr(next(iter(exits.values())), "linear")
        above = [module for path, module in model.named_modules() if not path.startswith(f"{name}.")]
        head = model.get_output_embeddings().weight.numel() if language else \
            sum(one.weight.numel() for one in above if isinstance(one, nn.Linear))
        own = head if language else next(iter(exits.values())).linear.weight.numel()
        return cls(tuple(map(int, exits)), tuple(tokens * _multiplied(block) for block in blocks),
                   tuple(_filling(block) if language else 0 for block in blocks), own, head)

    def share(self, left: Sequence[float]) -> float:
        """Share of the whole model's multiplications, where these shares leave at each exit and at the model's head."""
        spent = 0.0
        for number, share in enumerate(left):
            whole = number == len(self.layers)
            depth = len(self.blocks) if whole else self.layers[number] + 1
            seen = number if whole else number + 1
            spent += share * (sum(self.blocks[:depth]) + sum(self.filled[depth:]) + seen * self.exit
                              + self.head * whole)
        return spent / (sum(self.blocks) + self.head)

    def depth(self, left: Sequence[float]) -> float:
        """Share of the blocks that is computed."""
        depths = [layer + 1 for layer in self.layers] + [len(self.blocks)]
        return sum(share * depth for share, depth in zip(left, depths, strict=True)) / len(self.blocks)


def point(costs: Costs, threshold: float, exit: torch.Tensor, **figure: float) -> Point:
    """A point of a curve.

    Args:
        exit: (n,) where each row or token leaves.
        figure: `accuracy` or `bits_per_byte`.
    """
    counts = torch.bincount(exit.flatten(), minlength=len(costs.layers) + 1).double()
    left = tuple((counts / counts.sum().clamp(min=1)).tolist())
    flops = 1.0 if threshold > 1 else costs.share(left)  # above 1 no exit is asked
    return Point(threshold, costs.depth(left), flops, left, **figure)


def classifier_curve(logits: torch.Tensor, targets: torch.Tensor, costs: Costs, mask: torch.Tensor | None = None,
                     thresholds: Sequence[float] = THRESHOLDS) -> list[Point]:
    """The curve of a classifier, from logits at full depth.

    Args:
        logits: (exits + 1, rows, ..., classes), as from `classifier_logits`.
        targets: (rows, ...) classes, or `IGNORED`.
        mask: (rows, sequence) 1 where a token is not padding.
    """
    sure = torch.stack([confidence(one, mask) for one in logits[:-1]], 1)
    kept, answers = targets != IGNORED, logits.argmax(-1)
    found = []
    for threshold in thresholds:
        exit = first_confident(sure, threshold)
        said = answers[exit, torch.arange(len(exit))]
        found.append(point(costs, threshold, exit, accuracy=float((said == targets)[kept].double().mean())))
    return found


def _multiplied(block: nn.Module) -> int:
    """Weights of the matrices of a block, each of which is multiplied with once for a token."""
    return sum(parameter.numel() for parameter in block.parameters() if parameter.ndim == 2)


def _filling(block: nn.Module) -> int:
    """The same of the projections before attention, by which the cache of a skipped block is filled."""
    return sum(parameter.numel() for name, module in block.named_modules() if name.rpartition(".")[2] in FILLED
               for parameter in module.parameters(recurse=False) if parameter.ndim == 2)
