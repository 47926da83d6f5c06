"""Finds the weights of a quantized student that stay in full precision, and checks that it was intended."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from strategies.export.hf.transformers_folder import PARTS, no_place
from strategies.export.quantized_layers import quantized_layers
from strategies.quantization.qat import choose
from trainer.errors import UserError
from trainer.experiment.quantization_nodes import Quantization
from trainer.run.metrics import readable

LARGEST_SHARE = 0.1  # of all weights: how many may stay in full precision without being named in `ignore`
KINDS = {"embeddings": "embeddings", "ignored": "named in `ignore`", "passed over": "nothing quantizes them",
         "vectors": "norms and biases"}


def without_place(model: nn.Module, asked: Quantization, dtype: torch.dtype) -> dict[str, str]:
    """Layers selected for quantization that an exported transformers folder cannot hold quantized, with the reason.

    Raises:
        ValueError: there is nothing to quantize.
    """
    chosen = choose(model, asked.build(dtype), asked.ignore, asked.rules(dtype), asked.embeddings)
    return no_place(model, {name: layer for name, (layer, _) in chosen.items()})


def ignored(asked: Quantization, more: Mapping[str, str]) -> tuple[str, ...]:
    """Patterns of the layers left in full precision: those of the experiment, and the names in `more`."""
    return *asked.ignore, *map(glob.escape, more)


def whole_weights(model: nn.Module, asked: Quantization) -> dict[str, dict[str, int]]:
    """Element counts of the weights that stay in full precision, by reason (see `KINDS`) and name.

    A one-dimensional parameter counts as a vector. The search goes over parameters and not over layer classes, so it
    finds everything that the quantization scheme does not cover.
    """
    rounded = {id(getattr(layer, part, None)) for _, layer in quantized_layers(model) for part in PARTS}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    for name, parameter in model.named_parameters():
        if id(parameter) in rounded:
            continue
        layer = name.removesuffix(".weight")
        named = any(fnmatchcase(one, pattern) for one in (layer, name) for pattern in asked.ignore)
        kind = "vectors" if parameter.ndim < 2 else "ignored" if named else (
            "embeddings" if id(parameter) in embeddings and not asked.embeddings else "passed over")
        found[kind][layer] = parameter.numel()
    return found


def check_share(model: nn.Module, asked: Quantization, dtype: torch.dtype, why: Mapping[str, str]) -> None:
    """Raise `UserError` if more than `LARGEST_SHARE` of the weights stay in full precision unasked.

    Args:
        model: the quantized student; shapes are enough.
        why: reasons by layer name, from `without_place`.
    """
    every = sum(parameter.numel() for parameter in model.parameters())
    left = whole_weights(model, asked)["passed over"]
    count = sum(left.values())
    if count <= LARGEST_SHARE * every:
        return
    largest = max(left, key=left.__getitem__)
    patterns = list(dict.fromkeys(map(_pattern, left)))
    holder = type(model.get_submodule(largest.rpartition(".")[0])).__name__
    reason = why.get(largest, f"belongs to a {holder}, whose weights no scheme is for")
    raise UserError(
        "student.quantization.ignore", f"{count / every:.0%} of the student's weights, "
        f"{readable(count * dtype.itemsize)} of its file, would stay in full precision: {_pattern(largest)} {reason}",
        value=list(asked.ignore),
        way_out=f"if that is wanted, name them, ignore: {json.dumps([*asked.ignore, *patterns])}; or do not quantize")


def tell_share(model: nn.Module, asked: Quantization, dtype: torch.dtype) -> str:
    """Describe how much of a quantized student stays in full precision, and why."""
    every = sum(parameter.numel() for parameter in model.parameters())
    found = {kind: weights for kind, weights in whole_weights(model, asked).items() if weights}
    count = sum(sum(weights.values()) for weights in found.values())
    parts = [f"{KINDS[kind]} {sum(weights.values()) / every:.1%}" + _examples(kind, weights)
             for kind, weights in found.items()]
    return (f"{count / every:.1%} of the weights, {readable(count * dtype.itemsize)} of the file, stay in full "
            f"precision: {', '.join(parts)}")


def _examples(kind: str, weights: Mapping[str, int]) -> str:
    if kind != "passed over":
        return ""
    return f" ({', '.join(list(dict.fromkeys(map(_pattern, weights)))[:4])})"


def _pattern(name: str) -> str:
    """The name with each number, such as that of a block, replaced by a star."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
