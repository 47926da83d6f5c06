"""The exits of a model: small heads after some of its blocks, which are trained and saved with it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from strategies.common.model_blocks import block_list
from strategies.common.model_tasks import task_of

NAME = "early_exits"
Pooling = Literal["none", "first", "last", "mean"]
INITIAL = 0.02  # standard deviation of a classifier's first weights, as most encoders have it


class ClassifierExit(nn.Module):
    """Classes from the hidden states of a block: a norm, the pooling of the model's own head, and a linear layer.

    The off-ramps of DeeBERT (Xin et al. 2020, section 2.1), with a norm, since blocks that norm their input put out
    hidden states whose size grows with depth.

    Args:
        width: of the hidden states.
        classes: number of classes.
        pooling: which tokens count: the first or last one, all on average, or each by itself ("none").
        generator: of the initial weights.
    """

    def __init__(self, width: int, classes: int, pooling: Pooling, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, classes, device="meta")  # which draws nothing
        bias = torch.zeros(classes)
        drawn = torch.randn(classes, width, generator=generator, device="cpu") * INITIAL
        self.linear.weight, self.linear.bias = nn.Parameter(drawn.to(bias.device)), nn.Parameter(bias)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, classes), or (batch, sequence, classes) without pooling.

        Args:
            hidden: (batch, sequence, width).
            mask: (batch, sequence) 1 where a token is not padding; None if there is no padding.
        """
        return self.linear(pooled(self.norm(hidden), self.pooling, mask))


class LanguageExit(nn.Module):
    """Hidden states of a block, normed for the model's own output head, by a norm that begins as the model's last one.

    The head is shared, as in LayerSkip (Elhoushi et al. 2024, section 4.1.2): a head of its own would be as large as
    the embeddings for each exit.

    Args:
        norm: the model's last norm, which is copied.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        # Tensors are cloned first: the deep copy of a fake one, of a planned step, reads memory that is not there.
        own: dict[int, object] = {id(one): nn.Parameter(one.detach().clone()) for one in norm.parameters()}
        own |= {id(one): one.detach().clone() for one in norm.buffers()}
        self.norm = copy.deepcopy(norm, own)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., width) from (..., width)."""
        return self.norm(hidden)


@dataclass(frozen=True)
class ModelParts:
    """Where the parts of a model are that exits need, by the names of its modules.

    Attributes:
        blocks: the list of its blocks.
        norm: the last norm of a language model; None for a classifier.
    """

    blocks: str
    norm: str | None


def parts_of(model: nn.Module) -> ModelParts:
    """Find those parts; shapes are enough.

    Raises:
        ValueError: the model has no list of blocks, or is a language model in which no last norm is found.
    """
    blocks = block_list(model)
    return ModelParts(blocks, _last_norm(model, blocks) if task_of(model.config) == "causal_lm" else None)


def pooled(hidden: torch.Tensor, pooling: Pooling, mask: torch.Tensor | None) -> torch.Tensor:
    """The tokens that count of hidden states (batch, sequence, width); see `ClassifierExit`."""
    if pooling == "none":
        return hidden
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "last":
        if mask is None:
            return hidden[:, -1]
        last = (mask * torch.arange(1, hidden.shape[1] + 1, device=mask.device)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def attach_exits(model: nn.Module, layers: Sequence[int], pooling: Pooling = "first", seed: int = 0) -> nn.ModuleDict:
    """Register exits after some blocks as a submodule of the model, so that optimizers and checkpoints include them.

    Args:
        layers: indices of blocks, counted from 0, without the last one.
        pooling: of a classifier; one of tokens has none.
        seed: of the initial weights; the global generators are left unchanged.

    Raises:
        ValueError: a layer is out of range, given twice or the last one, none is given, or the model has none.
    """
    parts = parts_of(model)
    check_layers(layers, len(model.get_submodule(parts.blocks)))
    if hasattr(model, NAME):
        raise ValueError(f"{type(model).__name__} has a submodule {NAME}; remove it with detach_exits")
    exits, generator = nn.ModuleDict(), torch.Generator().manual_seed(seed)
    if task_of(model.config) == "token_classification":
        pooling = "none"
    with next(model.parameters()).device:
        for layer in layers:
            exits[str(layer)] = LanguageExit(model.get_submodule(parts.norm)) if parts.norm is not None else \
                ClassifierExit(model.config.hidden_size, model.config.num_labels, pooling, generator)
    model.add_module(NAME, exits)
    return exits


def detach_exits(model: nn.Module) -> nn.ModuleDict:
    """Remove the exits from a model and return them, from the first block to the last.

    Raises:
        ValueError: it has none.
    """
    if not hasattr(model, NAME):
        raise ValueError(f"{type(model).__name__} has no exits; put some there with attach_exits")
    exits = getattr(model, NAME)
    delattr(model, NAME)
    return exits


def check_layers(layers: Sequence[int], blocks: int) -> None:
    """Raise `ValueError` unless there are layers, all of them in order, once each, and before the last of the blocks.

    Args:
        blocks: number of blocks of the model.
    """
    if not layers:
        raise ValueError("there is no exit without a layer after which it sits")
    if wrong := [layer for layer in layers if not 0 <= layer < blocks]:
        raise ValueError(f"there is no block {wrong[0]}: the blocks are 0 to {blocks - 1}")
    if blocks - 1 in layers:
        raise ValueError(f"block {blocks - 1} is the last one, after which the model's own head comes")
    if list(layers) != sorted(set(layers)):
        raise ValueError("layers are given once each, from the first to the last")


def pooling_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Pooling:
    """Find which tokens the head of a classifier reads: those whose last hidden states have a gradient.

    Args:
        inputs: of one row; with `attention_mask` (1, sequence), some tokens of it are padding.
    """
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, __: tuple, output: torch.Tensor | tuple) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    blocks, was = model.get_submodule(block_list(model)), model.training
    hook = blocks[-1].register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model.eval()(**inputs).logits
            if logits.ndim == 3:
                return "none"
            gradient, = torch.autograd.grad((logits * torch.arange(
                1, logits.shape[-1] + 1, device=logits.device)).sum(), found)
    finally:
        hook.remove()
        model.train(was)
    return _pooling(gradient[0].abs().sum(-1) > 0, inputs.get("attention_mask"))


def _pooling(read: torch.Tensor, mask: torch.Tensor | None) -> Pooling:
    """The pooling by which (sequence,) tokens are read."""
    last = read.numel() - 1 if mask is None else int(mask[0].nonzero().max())
    where = read.nonzero().flatten().tolist()
    return "first" if where == [0] else "last" if where == [last] else "mean"


def _last_norm(model: nn.Module, blocks: str) -> str:
    """Name of the norm after the blocks: beside their list, and behind it where there are several."""
    above = blocks.rpartition(".")[0]
    names = [name for name, child in model.get_submodule(above).named_children()
             if "norm" in type(child).__name__.lower() or blocks == f"{above}.{name}".lstrip(".")]
    at = names.index(blocks.rpartition(".")[2])
    found = names[at + 1:] or names[:at]
    if len(found) != 1:
        raise ValueError(f"looked for one norm behind the blocks of {type(model).__name__}, and found "
                         f"{', '.join(found) or 'none'}")
    return f"{above}.{found[0]}".lstrip(".")
