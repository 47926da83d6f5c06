"""Prune a model once, without training: block by block, each on the outputs of the pruned blocks before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, Literal

import torch
from torch import nn

from strategies.common.blockwise_calibration import Batch, BlockwiseCalibrator, Seen, check_full_rank, collect
from strategies.common.progress import report
from strategies.common.stored_weights import Experts, multiplies
from strategies.pruning.unstructured.layer_inputs import LayerInputs, output_error
from strategies.pruning.unstructured.prunable_layers import as_stored, prunable, rows_of
from strategies.pruning.unstructured.sparsegpt import sparsegpt
from strategies.pruning.unstructured.sparsity_pattern import Pattern

Method = Literal["magnitude", "wanda", "sparsegpt"]
METHODS = ("magnitude", "wanda", "sparsegpt")


def one_shot(model: nn.Module, batches: Iterable[Batch] | None, *, method: Method = "sparsegpt",
             sparsity: float | None = None, pattern: str | None = None, ignore: Iterable[str] = ("lm_head",),
             damping: float = 0.01, device: torch.device | str | None = None,
             tell: Callable[[str], object] = lambda name: None) -> dict[str, Any]:
    """Set weights of a model to zero, in place.

    - magnitude: the smallest weights of each layer.
    - wanda: of each row, the smallest |w| ||x||, with ||x|| the norm of the input (Sun et al. 2024, arXiv 2306.11695,
      eq. 1); the others stay as they are.
    - sparsegpt: see `sparsegpt.sparsegpt`; the others are changed to make up for it.

    Convolutions, experts that are stored as one tensor, and layers that no row reaches are pruned by magnitude with any
    method. Embeddings and heads that share their weights are left alone.

    Args:
        model: a causal model or an encoder of transformers, unsharded and in one process; any module if there are no
            batches.
        batches: calibration rows, each the model's keyword arguments. Tokens whose `attention_mask` (rows, tokens) is
            zero are left out. None or none for magnitude alone, whose errors are then not measured.
        sparsity: share of the weights of each layer that are set to zero.
        pattern: N:M in place of a sparsity: N weights are kept of every M consecutive ones in a row.
        ignore: shell-style patterns of names of layers to leave alone.
        damping: see `LayerInputs.of`.
        device: where blocks run; see `BlockwiseCalibrator`.
        tell: called with the name of each layer when it is done.

    Returns:
        What was done, as plain data: "method", "pattern", "sparsity" of all these layers, and "layers", by name, with
        "method", "weights", "sparsity", and "error": ||X (W - W_0)^T||^2 / ||X W_0^T||^2 on the calibration rows (None
        where it was not measured).

    Raises:
        ValueError: an option is out of its range, a pattern matches or divides no layer, there are too few rows, or
            there are no blocks that they could be taken through. The model is then unchanged. Also if a layer's inputs
            are not finite: earlier layers are then already pruned.
    """
    batches, wanted, chosen = list(batches or ()), Pattern.parse(sparsity, pattern), prunable(model, ignore)
    if method not in METHODS:
        raise ValueError(f"method is {', '.join(METHODS)}, not {method!r}")
    if not damping > 0:
        raise ValueError(f"a damping of {damping} cannot hold a second moment without full rank: take 0.01, or more")
    for name, layer in chosen.items():
        wanted.check(rows_of(layer, layer.weight).shape[1], name)
    if method != "magnitude":
        _check_rows(chosen, batches, method)
    pruning = _Pruning(chosen, method, wanted, damping, tell)
    if batches and (walk := _walk(model, batches, device, method)) is not None:
        with closing(walk.parts()) as parts:
            for modules in parts:
                pruning.part(walk, modules)
    pruning.rest()
    return {"method": method, "pattern": str(wanted), **pruning.done()}


def _walk(model: nn.Module, batches: list[Batch], device: torch.device | str | None, method: str
          ) -> BlockwiseCalibrator | None:
    """What takes calibration rows through a model; None for one without blocks, which magnitude does not need.

    Raises:
        ValueError: another method finds no blocks.
    """
    try:
        return BlockwiseCalibrator(model, batches, device)
    except ValueError as error:
        if method == "magnitude":
            return None
        raise ValueError(f"cannot find the blocks of {type(model).__name__}, through which method '{method}' takes its "
                         "calibration rows: take method 'magnitude'") from error


def _check_rows(chosen: dict[str, Any], batches: list[Batch], method: str) -> None:
    """Raise `ValueError` if there are too few calibration rows for a method."""
    if not batches:
        raise ValueError(f"method '{method}' cannot do without calibration rows: give `batches`")
    if method == "sparsegpt":
        check_full_rank({name: rows_of(layer, layer.weight).shape[1] for name, layer in chosen.items()
                         if multiplies(layer)}, batches, "wanda")


class _Pruning:
    """Prunes the layers of a model, each once."""

    def __init__(self, chosen: dict[str, Any], method: str, pattern: Pattern, damping: float,
                 tell: Callable[[str], object]) -> None:
        self._left, self._method, self._pattern, self._damping = dict(chosen), method, pattern, damping
        self._tell, self._layers = tell, {name: dict[str, Any]() for name in chosen}
        self._zeros = 0

    def part(self, walk: BlockwiseCalibrator, modules: dict[str, nn.Module]) -> None:
        """Prune the layers in the current part of the walk, and the experts whose inputs it does not see."""
        if walk.within:
            for name in [name for name, layer in self._left.items() if isinstance(layer, Experts)
                         and name.rpartition(".")[0] in modules]:
                self._prune(name, None, None)
        layers = {name: self._left[name] for name in modules if name in self._left}
        if not layers:
            return
        seen = collect(walk, layers, moments=True)
        of: Seen | None = None
        inputs: LayerInputs | None = None
        for name in (name for name in layers if name in seen):
            if seen[name] is not of:
                of, moment = seen[name], seen[name].moment
                inputs = LayerInputs.of(moment, self._damping) if moment is not None else None
            self._prune(name, of.moment, inputs)

    def rest(self) -> None:
        """Prune the layers whose inputs were not seen by magnitude."""
        for name in list(self._left):
            self._prune(name, None, None)

    def done(self) -> dict[str, Any]:
        """The record of all layers."""
        weights = sum(layer["weights"] for layer in self._layers.values())
        return {"sparsity": self._zeros / weights, "layers": self._layers}

    @torch.no_grad()
    def _prune(self, name: str, moment: torch.Tensor | None, inputs: LayerInputs | None) -> None:
        layer = self._left.pop(name)
        exact = rows_of(layer, layer.weight).to(torch.float32, copy=True)
        method = "magnitude" if inputs is None or moment is None else self._method
        if method == "sparsegpt" and inputs is not None:
            found = sparsegpt(exact, inputs, self._pattern)
        else:
            scores = exact.abs() if method == "magnitude" or moment is None else exact.abs() * moment.diagonal().sqrt()
            found = torch.where(self._pattern.largest(scores, per_row=method == "wanda"), exact, 0.0)
        layer.weight.copy_(as_stored(layer, found))
        stored = rows_of(layer, layer.weight).float()
        zeros = int((stored == 0).sum())
        self._zeros += zeros
        self._layers[name] = {"method": method, "weights": stored.numel(), "sparsity": zeros / stored.numel(),
                              "error": None if moment is None else output_error(stored, exact, moment)}
        self._tell(name)
        report("layers", len(self._layers) - len(self._left), len(self._layers))
