"""Makes length-dependent rotary frequencies (RoPE) depend on each document's own length instead of the whole batch.

Two schemes in transformers look at the largest position in the batch. LongRoPE (Ding et al. 2024, arXiv 2402.13753) has
one set of factors up to the length of its original training and another beyond. Dynamic NTK scaling has the plain
frequencies up to `max_position_embeddings` and others beyond. So one long document, or padding with ascending
positions, would change the frequencies of all other documents.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def by_document(model: nn.Module) -> nn.Module:
    """Patch the model's length-dependent rotary embeddings to work per document; returns the same model.

    Models without them stay unchanged. A document begins where positions restart at 0. Names of weights do not change.
    """
    for module in model.modules():
        schemes = getattr(module, "rope_type", None)
        if not isinstance(schemes, (str, dict)) or isinstance(module, _ByDocument):
            continue
        layered = schemes if isinstance(schemes, dict) else {None: schemes}
        if any(_depends(scheme) for scheme in layered.values()):
            for layer_type, scheme in layered.items():
                if scheme == "longrope":
                    _prepare_long(module, layer_type)
            kind = type(module)
            module.__class__ = type(kind.__name__, (_ByDocument, kind), {"__module__": kind.__module__})
    return model


def long_documents(position_ids: torch.Tensor, most: int) -> torch.Tensor:
    """(..., sequence) whether each position belongs to a document of more than `most` tokens.

    Args:
        position_ids: (..., sequence) positions, ascending by one within a document. A document continued from a KV
            cache counts as long as its largest position says.
        most: a number of tokens.
    """
    length = position_ids.shape[-1]
    # For each position, the index in the row at which its document would have position `most`.
    at = torch.arange(length, device=position_ids.device) - position_ids + most
    there = position_ids.gather(-1, at.clamp(0, length - 1)) == most
    return (position_ids >= most) | (there & (at < length))


class _ByDocument:
    """Mixin placed in front of a rotary embedding's own class in the method resolution order."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer_type = kwargs.get("layer_type", args[0] if args else None)
        scheme = self.rope_type if layer_type is None else self.rope_type[layer_type]
        if scheme != "longrope":  # dynamic: skip the update, since positions stay within `max_position_embeddings`
            with torch.no_grad():
                return inspect.unwrap(_own(self).forward)(self, x, position_ids, *args, **kwargs)
        parameters = self.config.rope_parameters if layer_type is None else self.config.rope_parameters[layer_type]
        long = long_documents(position_ids, parameters["original_max_position_embeddings"])
        short_of = _own(self).forward(self, x, torch.where(long, 0, position_ids), *args, **kwargs)
        long_of = _own(self).forward(self, x, position_ids, *args, **kwargs)
        return tuple(torch.where(long[..., None], theirs, ours) for theirs, ours in zip(long_of, short_of, strict=True))


def _own(module: _ByDocument) -> type:
    return type(module).__mro__[2]


def _depends(scheme: str) -> bool:
    return scheme == "longrope" or "dynamic" in scheme


def _prepare_long(module: nn.Module, layer_type: str | None) -> None:
    """Register LongRoPE's long frequencies as a buffer.

    transformers computes them lazily in a forward pass; if the first one ran on fake tensors, they would stay fake.
    """
    name = "long_inv_freq" if layer_type is None else f"{layer_type}_long_inv_freq"
    parameters = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
    inv_freq = module.inv_freq if layer_type is None else getattr(module, f"{layer_type}_inv_freq")
    more = {} if layer_type is None else {"layer_type": layer_type}
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, inv_freq.device, seq_len=parameters["original_max_position_embeddings"] + 1, **more)
    module.__dict__.pop(name, None)
    module.register_buffer(name, frequencies, persistent=False)
