"""Cuts a model: scores its units, removes those with the least, and proves the result by running both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from strategies.common.blockwise_calibration import Batch, find_blocks
from strategies.pruning.structured.block_influence import block_influence, without_blocks
from strategies.pruning.structured.calibration_rows import compared
from strategies.pruning.structured.channel_spaces import channel_spaces
from strategies.pruning.structured.config_steps import Fewer, Step, fewer_layers, steps
from strategies.pruning.structured.cut import ORDER, Cut
from strategies.pruning.structured.cut_proof import cut_and_compare, difference, logits
from strategies.pruning.structured.layout_trials import settle_layouts
from strategies.pruning.structured.meta_shapes import changed
from strategies.pruning.structured.residual_rotation import norms_of, principal_components, rotate
from strategies.pruning.structured.slicing import empty_model, move_weights, set_to_zero
from strategies.pruning.structured.unit_scores import (
    Importance,
    Loss,
    holds_experts,
    routed_weights,
    unit_scores,
)
from strategies.pruning.structured.unit_spaces import Space, best, find_spaces

EQUAL = 1e-5  # largest difference of logits, over the largest logit
ROTATED = 1e-3  # the same for a rotation, whose weights are rounded to fp32


def cut_model(model: nn.Module, cut: Cut, batches: Sequence[Batch], loss: Loss | None = None,
              importance: Importance = "activations", fewer: Fewer | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Remove whole units of a model, so that a plain configuration says the shapes that are left.

    Kinds are cut in the order of `ORDER`, and units are scored anew after each. Units are ranked within their layer:
    which ones remain differs from layer to layer, how many does not. Blocks are always ranked by their influence.

    The model is consumed: its weights move to the result, and it must not be used afterwards. Memory holds the model
    and one of its weights; with `gradient`, a backward pass as well, but of all gradients only one at a time.

    Args:
        model: a transformers model in fp32, on one device.
        batches: calibration rows as keyword arguments of the model, with masks; padding does not count. They may also
            have `labels` or `targets` for the loss, and `counted` (rows, tokens), False for padding without a mask.
        loss: for `gradient`, the loss of the model on a batch.
        fewer: gives a configuration with some of the layers; see `cut_config`.

    Returns:
        The cut model, and plain JSON: for each step the units kept in each layer, their scores, parameters and bytes
        before and after, and how far logits are from those of the whole model with the units zeroed.

    Raises:
        ValueError: the cut cannot be made; the cut model does not compute what the whole one does without the units.
    """
    if not batches:
        raise ValueError("a cut needs calibration rows")
    if importance == "gradient" and loss is None:
        raise ValueError("importance 'gradient' needs a loss")
    training, cache = model.training, getattr(model.config, "use_cache", None)
    model.eval()
    model.config.use_cache, model.config.architectures = False, [type(model).__name__]
    record: dict[str, Any] = {"importance": importance, "before": _size(model), "steps": []}
    work = _Work(list(batches), loss, importance, fewer or fewer_layers)
    for kind in ORDER:
        for step in steps(kind, model.config, cut, work.fewer):
            model, found = work.carried_out(model, step, cut.width_by == "rotation" and kind == "width")
            record["steps"].append(found)
    if cache is not None:
        model.config.use_cache = cache
    record["after"] = _size(model)
    return model.train(training), record


class _Work:
    """What every step needs: calibration rows, those that models are compared on, and how units are scored."""

    def __init__(self, batches: list[Batch], loss: Loss | None, importance: Importance, fewer: Fewer) -> None:
        self.batches, self.loss, self.importance, self.fewer = batches, loss, importance, fewer
        self.shown = compared(batches[0])

    def carried_out(self, model: nn.Module, step: Step, rotated: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The model after a step, and the record of it."""
        before = _size(model)
        if step.kind == "layers":
            model, units, off = self._layers(model, step)
        elif rotated:
            model, units, off = self._rotated(model, step)
        else:
            model, units, off = self._units(model, step)
        if not off <= EQUAL:
            raise ValueError(f"{step.kind} of a {model.config.model_type} model cannot be cut: its logits are "
                             f"{off:.2g} of the largest away from those of the whole model with these units zeroed")
        return model, {"kind": step.kind, "by": "rotation" if rotated else "selection", "units": units,
                       "difference": off, "before": before, "after": _size(model)}

    def _layers(self, model: nn.Module, step: Step) -> tuple[nn.Module, dict[str, Any], float]:
        scores = block_influence(model, self.batches)
        mask = best(step.after["layers"])(scores)
        kept = tuple(mask.nonzero().flatten().tolist())
        expected = logits(model, self.shown, partial(without_blocks, model, kept, self.shown))
        model = without_layers(model, kept, self.fewer)
        return model, {"layers": _described(mask, scores)}, difference(expected, logits(model, self.shown))

    def _units(self, model: nn.Module, step: Step) -> tuple[nn.Module, dict[str, Any], float]:
        if step.kind == "channels":
            spaces = channel_spaces(model, model.config, step, self.shown)
        else:
            spaces = find_spaces(model.config, step, settle_layouts(model, step, self.shown))
        scores = self._scores(model, spaces, step)
        kept = [space.choose(one) for space, one in zip(spaces, scores, strict=True)]
        smaller, off = cut_and_compare(model, step, spaces, kept, self.shown)
        units: dict[str, Any] = {}
        for space, mask, one in zip(spaces, kept, scores, strict=True):
            heads = step.before["heads"] if space.label.startswith("heads") else space.units
            units[space.label] = _described(mask[:heads], one[:heads])
            if heads < space.units:
                units[f"kv_{space.label}"] = _described(mask[heads:], one[heads:] + one[:heads].view(
                    space.units - heads, -1).sum(1))
        return smaller, units, off

    def _scores(self, model: nn.Module, spaces: list[Space], step: Step) -> list[torch.Tensor]:
        if step.kind != "experts" or self.importance != "activations":
            return unit_scores(model, spaces, self.batches, self.importance, self.loss)
        routed = routed_weights(model, self.batches)
        holders = {name for name, module in model.named_modules() if holds_experts(module)}
        return [next(routed[holder] for holder in holders if any(
            site.name.startswith(f"{holder}.") for site in space.sites)) for space in spaces]

    def _rotated(self, model: nn.Module, step: Step) -> tuple[nn.Module, dict[str, Any], float]:
        space, = find_spaces(model.config, step, {})
        norms = norms_of(model, space)
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        expected = logits(model, self.shown)
        basis, share = principal_components(model, norms, self.batches)
        rotate(model, space, norms, basis, self.shown)
        turned = difference(expected, logits(model, self.shown))
        if not turned <= ROTATED:
            raise ValueError(f"width_by: logits of the rotated {model.config.model_type} model are {turned:.2g} of the "
                             "largest away from what they were; use selection")
        kept, count = step.after["width"], step.before["width"]
        mask = torch.arange(count) < kept
        set_to_zero(model, [space], [mask])
        expected = logits(model, self.shown)
        smaller = empty_model(model, step.config)
        move_weights(model, smaller, [space], [mask])
        for name in norms:  # the sum of squares of the whole stream, over fewer channels
            nn.init.constant_(smaller.get_parameter(f"{name}.weight"), (count / kept) ** 0.5)
        return smaller, {"width": {"kept": list(range(kept)), "scores": _rounded(share), "untied": tied,
                                   "rotation": turned}}, difference(expected, logits(smaller, self.shown))


def without_layers(model: nn.Module, kept: tuple[int, ...], fewer: Fewer) -> nn.Module:
    """A model with some of the blocks of another, whose weights it shares."""
    prefix, blocks = find_blocks(model)
    smaller = empty_model(model, changed(fewer(model.config, kept), use_cache=False))
    mine = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    state: dict[str, torch.Tensor] = {}
    for name in smaller.state_dict():
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        state[name] = mine[f"{prefix}.{kept[int(number)]}.{rest}" if name.startswith(f"{prefix}.") else name]
    smaller.load_state_dict(state, assign=True)
    smaller.tie_weights()
    return smaller.eval()


def _size(model: nn.Module) -> dict[str, int]:
    parameters = list(model.parameters())
    return {"parameters": sum(one.numel() for one in parameters),
            "bytes": sum(one.numel() * one.element_size() for one in parameters)}


def _described(mask: torch.Tensor, scores: torch.Tensor) -> dict[str, Any]:
    return {"kept": mask.nonzero().flatten().tolist(), "scores": _rounded(scores)}


def _rounded(scores: torch.Tensor) -> list[float]:
    return [float(f"{score:.6g}") for score in scores.tolist()]
