"""Record tensors inside a transformers model while it runs: the queries, keys, values and outputs of its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from strategies.common.model_blocks import block_count, block_list

PROJECTIONS = {"query": ("q_proj", "query", "q_lin"), "key": ("k_proj", "key", "k_lin"),
               "value": ("v_proj", "value", "v_lin")}
FUSED, ORDER = ("c_attn", "Wqkv"), ("query", "key", "value")
KINDS = ("hidden", *PROJECTIONS)


class Values:
    """Context manager in which each forward of a model records values, queries, keys or outputs of some of its blocks.

        with Values(student, [3]) as ours, Values(teacher, [11]) as theirs:
            ...both models run...
        loss = relation_sum(ours.of(3), theirs.of(11), kept, visible, heads)

    Recorded tensors keep their autograd graph, also under activation checkpointing, until the next forward or `clear`.
    What backward recomputes is not recorded. Queries and keys are recorded right after their projection: before rotary
    embeddings, and before a query or key norm. With grouped-query attention there are fewer value heads than query
    heads, so values are narrower than queries.

    "hidden" is the output of a block: entry i + 1 of transformers' `output_hidden_states` for block i. The last block
    of a language model is an exception: transformers' entry is taken after the final norm, this one before it. A single
    forward can give both. Of a convolutional net, which has stages and no blocks, it is a map (batch, channels, height,
    width).

    Args:
        model: a transformers model, or a module around one. Its blocks are the one `ModuleList` that is as long as the
            configuration says, or the stages of a convolutional net (see `stages_of`). Projections are found by name:
            those of Llama and ViT (`v_proj`), BERT (`value`), DistilBERT (`v_lin`), GPT-2 (`c_attn`) and ModernBERT
            (`Wqkv`).
        layers: indices of blocks, from 0.
        kinds: any of "value", "query", "key", "hidden".

    Raises:
        ValueError: a layer is out of range, a kind is unknown, or blocks or projections are not found or not unique, as
            in a block that also has cross-attention.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int], kinds: Iterable[str] = ("value",)) -> None:
        self._parent, blocks = _blocks(model)
        self._sources: dict[tuple[int, str], tuple[nn.Module, int | None]] = {}
        for layer in layers:
            if not 0 <= layer < len(blocks):
                raise ValueError(f"layer {layer}: the layers of {_name(model)} are 0 to {len(blocks) - 1}")
            for kind in kinds:
                if kind not in KINDS:
                    raise ValueError(f"kind {kind!r}: there are {', '.join(KINDS)}")
                where = f"block {layer} of {_name(model)}"
                self._sources[layer, kind] = (blocks[layer], None) if kind == "hidden" else \
                    _projection(blocks[layer], kind, where)
        self._left: dict[tuple[int, str], torch.Tensor] = {}
        self._handles: list = []
        self._running, self._ran, self._graph = False, False, False

    def __enter__(self) -> Values:
        self._handles = [self._parent.register_forward_pre_hook(self._begin),
                         self._parent.register_forward_hook(self._end, always_call=True)]
        for key, (module, third) in self._sources.items():
            self._handles.append(module.register_forward_hook(partial(self._leave, key, third)))
        return self

    def __exit__(self, *_) -> None:
        while self._handles:
            self._handles.pop().remove()

    def of(self, layer: int, kind: str = "value") -> torch.Tensor:
        """A recorded tensor (batch, sequence, width) of the last forward, with all heads concatenated.

        Raises:
            ValueError: it was not asked for, the model has not run, or its block did not call the projection.
        """
        if (layer, kind) not in self._sources:
            there = ", ".join(f"{kind} of {layer}" for layer, kind in self._sources)
            raise ValueError(f"{kind} of layer {layer} is not recorded; recorded are: {there}")
        if (layer, kind) not in self._left:
            why = "ran its block without it, as a compiled or planned block does: of that only hidden is recorded" \
                if self._ran else "has not run within the context"
            raise ValueError(f"{kind} of layer {layer}: {_name(self._parent)} {why}")
        return self._left[layer, kind]

    def clear(self) -> None:
        """Drop the tensors of the last forward, and the autograd graph that they hold."""
        self._left.clear()
        self._ran = False

    def _begin(self, *_) -> None:
        self.clear()
        self._running, self._graph = True, torch.is_grad_enabled()

    def _end(self, parent: nn.Module, inputs: tuple, output: object) -> None:
        self._running, self._ran = False, output is not None  # None where it raised

    def _leave(self, key: tuple[int, str], third: int | None, module: nn.Module, inputs: tuple, output) -> None:
        if not self._running:  # backward recomputes a checkpointed block
            return
        if self._graph and not torch.is_grad_enabled():
            raise ValueError(f"{key[1]} of layer {key[0]} has no gradient inside of a reentrant checkpoint; use "
                             'gradient_checkpointing_kwargs={"use_reentrant": False}')
        tensor = output[0] if isinstance(output, tuple) else output
        self._left[key] = tensor if third is None else tensor.chunk(3, -1)[third]


def _blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the blocks, and the blocks; stages of a convolutional net."""
    if block_count(model) is None:
        name, stages = stages_of(model)
        return model.get_submodule(name.rpartition(".")[0]), stages
    found = block_list(model)
    return model.get_submodule(found.rpartition(".")[0]), model.get_submodule(found)


def stages_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stages of a convolutional net, with their name: the list of modules, not inside of another, that has most
    weights.

    They are the four stages of a ResNet, RegNet or ConvNeXt, and the inverted residuals of a MobileNetV2.

    Raises:
        ValueError: no list has at least half of the weights.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    name, found = max(outer, key=lambda one: _weights(one[1]), default=("", None))
    if found is None or 2 * _weights(found) < _weights(model):
        raise ValueError(f"{_name(model)} has neither blocks nor stages whose outputs could be compared")
    return name, found


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _projection(block: nn.Module, kind: str, where: str) -> tuple[nn.Module, int | None]:
    """The module that makes the projection, and which third of its output that is; None for all of the output."""
    separate = {name: module for name, module in block.named_modules() if name.split(".")[-1] in PROJECTIONS[kind]}
    fused = {name: module for name, module in block.named_modules() if name.split(".")[-1] in FUSED
             and _is_threefold(name.split(".")[-1], module)}
    found = separate | fused
    if len(found) != 1:
        raise ValueError(f"{where}: looked for one module that makes the {kind}, named "
                         f"{' or '.join(PROJECTIONS[kind])}, or {' or '.join(FUSED)} as GPT-2's and ModernBERT's, "
                         "and found "
                         f"{', '.join(found) or 'none'}")
    module = next(iter(found.values()))
    return module, ORDER.index(kind) if fused else None


def _is_threefold(name: str, module: nn.Module) -> bool:
    """Whether a projection makes queries, keys and values one after the other.

    GPT-BigCode's, a linear layer that is named as GPT-2's, does not: its heads alternate.
    """
    if isinstance(module, Conv1D):
        return module.nf == 3 * module.nx
    return name == "Wqkv" and isinstance(module, nn.Linear) and module.out_features == 3 * module.in_features


def _name(model: nn.Module) -> str:
    return type(model).__name__
