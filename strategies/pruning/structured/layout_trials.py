"""Finds how a model lays out units that share a tensor, such as fused queries, keys and values, by trying each way."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from strategies.common.blockwise_calibration import Batch
from strategies.pruning.structured.config_steps import Step
from strategies.pruning.structured.cut_proof import cut_and_compare
from strategies.pruning.structured.meta_shapes import builds, changed
from strategies.pruning.structured.unit_spaces import Layouts, ambiguous, find_spaces

MOST = 64  # ways that are tried
LAYERS, TOKENS = 2, 64  # of the model that they are tried on
EQUAL = 1e-4  # of the largest logit: wrong ways are about as far away as logits are large


def settle_layouts(model: nn.Module, step: Step, batch: Batch) -> Layouts:
    """For each kind of tensor that may be laid out in several ways, the one with which a cut computes the right thing.

    They are tried on a model with random weights, the same widths, and few layers and tokens.

    Raises:
        ValueError: none does.
    """
    many = ambiguous(model.config, step)
    if not many:
        return {}
    before, after = _small(model.config), _small(step.config)
    trial = Step(step.kind, after, step.before, step.after)
    shown = _tokens_within(batch, before)
    for ways in list(product(*(range(count) for count in many.values())))[:MOST]:
        layouts = dict(zip(many, ways, strict=True))
        if _difference(model, before, trial, layouts, shown) <= EQUAL:
            return layouts
    raise ValueError(f"{step.kind} of a {model.config.model_type} model cannot be cut: how {', '.join(many)} hold them "
                     "is not known")


def _difference(model: nn.Module, before: PretrainedConfig, step: Step, layouts: Layouts, batch: Batch) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = type(model)._from_config(copy.deepcopy(before), dtype=torch.float32).eval()
        for weight in whole.parameters():  # as large as trained weights: with values near 0 differences would not show
            weight.data.normal_(std=min(1.0, 2 / weight.shape[-1] ** 0.5) if weight.ndim > 1 else 1.0)
        spaces = find_spaces(before, step, layouts)
        kept = [space.choose(torch.rand(space.units, dtype=torch.float64)) for space in spaces]
    return cut_and_compare(whole, step, spaces, kept, batch)[1]


def _small(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with few layers and tokens, where it can have them."""
    count, values = getattr(config, "num_hidden_layers", None), {}
    if isinstance(count, int) and count > LAYERS:
        values = {name: value[:LAYERS] for name, value in config.to_dict().items()
                  if isinstance(value, list) and len(value) == count}
        values["num_hidden_layers"] = LAYERS
    vocabulary: dict[str, Any] = {"vocab_size": TOKENS, "pad_token_id": 0} if getattr(
        config, "vocab_size", TOKENS) > TOKENS else {}
    for made in (changed(config, use_cache=False, **values, **vocabulary), changed(config, use_cache=False, **values)):
        if builds(made):
            return made
    return config


def _tokens_within(batch: Batch, config: PretrainedConfig) -> Batch:
    moved = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    ids = moved.get("input_ids")
    return moved if ids is None else {**moved, "input_ids": ids % config.vocab_size}
