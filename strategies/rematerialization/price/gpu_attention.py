"""Plan for a GPU on a machine without one: capture attention as GPU kernels compute it.

torch chooses an attention kernel by the device of its tensors. A fake tensor that is not on a GPU gets the CPU's
choice, which with dropout is to materialize the whole matrix of attention probabilities, as no GPU kernel would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from strategies.common.planned_device import planned_for_gpu
from strategies.rematerialization.price.costs import HALF


@contextmanager
def attention_as_on_gpus() -> Iterator[None]:
    """Within the context, attention is one of the fused GPU kernels; for fake tensors only."""
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Within the context, what depends on the device is as on a GPU; for fake tensors only."""
    with attention_as_on_gpus(), planned_for_gpu():
        yield


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
                    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                    enable_gqa: bool = False) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with the kernel that a GPU would use.

    That is flash attention in 16 bit without a mask (Dao 2023), otherwise memory-efficient attention (Rabe & Staats
    2021). Neither materializes the probabilities.

    Args:
        query: [N, heads, L, E]; key and value: [N, heads, S, E], with fewer heads if `enable_gqa`.
        attn_mask: [N or 1, heads or 1, L, S], bool or added to the scores.

    Returns:
        [N, heads, L, E]
    """
    if query.dim() != 4:
        return torch._C._nn.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal,
                                                         scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if attn_mask is None and query.dtype in HALF:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False,
                                                                  scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True, dropout_p,
                                                                  is_causal, scale=scale)[0]
