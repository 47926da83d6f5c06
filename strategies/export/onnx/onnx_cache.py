"""A causal language model whose key/value cache goes in and out, for tracing.

transformers' models look up how they attend, and by what mask, under a name. Under `NAME` they find the functions of
this module: attention that is one `Attention` node of ONNX's opset 23 with the cache as its inputs and outputs, and a
mask that hides padding and other documents, both of which the graph sees from its inputs alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from strategies.export.onnx.onnx_layers import same_tensors
from strategies.export.quantized_layers import quantized_layers

NAME = "limbeck_onnx"
OPSET = 23  # the first that has `Attention`
# Largest differences from the model's own attention, as a share of the largest logit; with rounded activations.
CLOSE, ROUNDED = 1e-4, 2e-2
# Keyword arguments of an attention function that change what it computes, and that `_attention` does not know.
UNKNOWN = ("position_bias", "s_aux")

Shape = tuple[int, int, int]  # heads, width of a key, width of a value


class NoCache(Exception):
    """Why the graph of a model has no cache."""


class CachedLogits(nn.Module):
    """A causal language model that takes a key/value cache, and returns it with the new tokens in it.

    A token sees those of its own document that `attention_mask` does not hide. A document begins where positions do
    not go on by one, and at position 0; what the cache holds belongs to the document of the first new token.
    """

    def __init__(self, model: nn.Module) -> None:
        """Share the tensors of a model, which is not changed."""
        super().__init__()
        self.model = same_tensors(model)
        for module in self.model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = NAME
        self.keyword = _cache_keyword(model)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor,
                past: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Logits (rows, tokens, vocabulary) of the new tokens, and the cache after them, in the order of `past`.

        Args:
            input_ids: (rows, tokens) of the new tokens.
            attention_mask: (rows, cached + new tokens), zero where a token is hidden.
            position_ids: (rows, tokens) of the new tokens.
            past: keys and values by turns, (rows, heads, cached tokens, width) of each layer.

        Raises:
            NoCache: a layer keeps something else, or not all layers do.
        """
        cache = DynamicCache()
        cache.layers = [_Layer(key, value) for key, value in zip(past[::2], past[1::2], strict=True)]
        begins = torch.cat([position_ids[:, :1] == 0, position_ids[:, 1:] != position_ids[:, :-1] + 1], 1)
        token = _call.set((cache.layers, begins.long().cumsum(1)))
        try:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                                use_cache=True, **{self.keyword: cache}).logits
        finally:
            _call.reset(token)
        presents = [present for layer in cache.layers for present in layer.present]
        if len(presents) != len(past):
            raise NoCache("its layers do not all attend by way of transformers' interface")
        return logits, *presents


class _Layer(DynamicLayer):
    """A layer's cache before new tokens, and the one after them that `_attention` leaves in `present`."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = key, value, True
        self.dtype, self.device = key.dtype, key.device
        self.present: tuple[torch.Tensor, ...] = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
               ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens alone: the node for attention appends them."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]  # the base class compares it with 0, which would fix it in the graph


# What `_attention` and `_mask` need of the call that they are in: the cache, and the document (rows, tokens) of each
# new token. The document of what is cached is number 0.
_call: ContextVar[tuple[list[_Layer], torch.Tensor]] = ContextVar("call")


def _attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor, scaling: float | None = None, softcap: float | None = None,
               **more: Any) -> tuple[torch.Tensor, None]:
    """Attend from new tokens (rows, heads, tokens, width) to all; returns (rows, tokens, heads, width)."""
    if any(more.get(name) is not None for name in UNKNOWN):
        raise NoCache(f"its attention takes {' or '.join(name for name in UNKNOWN if more.get(name) is not None)}")
    layer = _call.get()[0][module.layer_idx]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None:
        found, *present, _ = torch.onnx.ops.attention(
            query, key, value, attention_mask, layer.keys, layer.values, scale=scale)
        layer.present = tuple(present)
    else:  # opset 23's own soft cap comes after the mask, which it would soften, too
        layer.present = torch.cat([layer.keys, key], -2), torch.cat([layer.values, value], -2)
        found = _capped(query * scale, *layer.present, attention_mask, softcap)
    return found.transpose(1, 2), None


def _capped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, softcap: float
            ) -> torch.Tensor:
    """Attention with soft-capped scores, for groups of query heads that share a key."""
    query = query.unflatten(1, (key.shape[1], -1))
    scores = torch.tanh(query @ key[:, :, None].transpose(-1, -2) / softcap) * softcap
    weights = torch.where(mask[:, :, None], scores, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value[:, :, None]).flatten(1, 2)


def _mask(batch_size: int, q_length: int, kv_length: int, q_offset: int, mask_function: Callable,
          attention_mask: torch.Tensor, kv_offset: int = 0, **_: Any) -> torch.Tensor:
    """(rows, 1, new tokens, all tokens) booleans: whether a token sees another. `mask_function` is the layer's kind."""
    documents = _call.get()[1]
    rows = torch.arange(batch_size, device=documents.device)[:, None, None, None]
    new = (torch.arange(q_length, device=documents.device) + q_offset)[:, None]
    every = (torch.arange(kv_length, device=documents.device) + kv_offset)[None]
    cached = documents.new_zeros(documents.shape[0], kv_length - q_length)
    same = documents[:, :, None] == torch.cat([cached, documents], 1)[:, None]
    seen = mask_function(rows, torch.zeros_like(rows), new[None, None], every[None, None])
    seen = seen & same[:, None] & attention_mask[:, None, None].bool()
    return seen | (new == every)  # a hidden token sees itself: a softmax over nothing is not a number


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def cache_shapes(model: nn.Module) -> list[Shape]:
    """Shapes of what each layer of a model caches for a token, of a model that computes the same with `CachedLogits`.

    That is tried with a few tokens.

    Raises:
        NoCache: it has another kind of cache, or other logits with it.
    """
    try:
        shapes = _shapes(model)
        _try(model, shapes)
    except NoCache:
        raise
    except Exception as error:  # any model may come, and fail in any way
        raise NoCache(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}") from error
    return shapes


def no_past(shapes: Sequence[Shape], rows: int, length: int = 0, device: Any = "cpu") -> list[torch.Tensor]:
    """Keys and values of `length` cached tokens, which are zeros."""
    return [torch.zeros(rows, heads, length, width, device=device)
            for heads, *widths in shapes for width in widths]


@torch.no_grad()
def _shapes(model: nn.Module) -> list[Shape]:
    device = next(model.parameters()).device
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[1, 2]], device=device), use_cache=True, **{_cache_keyword(model): cache})
    if not cache.layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized
                               for layer in cache.layers):
        raise NoCache("not all of its layers keep keys and values")
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]


@torch.no_grad()
def _try(model: nn.Module, shapes: list[Shape]) -> None:
    """Two documents in a row: at once, from a cache on, and the second one's end with the first one hidden."""
    device, cached = next(model.parameters()).device, CachedLogits(model)
    ids = torch.arange(1, 9, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=device)
    shown = torch.ones_like(ids)
    wanted = model(input_ids=ids, position_ids=positions, use_cache=False).logits

    def differs(first: int, mask: torch.Tensor) -> bool:
        past = no_past(shapes, 1, 0, device)
        if first:
            _, *past = cached(ids[:, :first], shown[:, :first], positions[:, :first], past)
        found, *_ = cached(ids[:, first:], mask, positions[:, first:], past)
        return not bool((found - wanted[:, first:]).abs().max() <= close)

    rounds = any(layer.activations is not None for _, layer in quantized_layers(model))
    close = (ROUNDED if rounds else CLOSE) * wanted.abs().max()
    if differs(0, shown) or differs(3, shown) or differs(7, shown.index_fill(1, torch.arange(5, device=device), 0)):
        raise NoCache("it has other logits with a cache")


def _cache_keyword(model: nn.Module) -> str:
    """What the argument of `forward` that takes a cache is called, which changed within transformers 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
