"""Numbers of attention heads that remain, and configurations that say them."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from strategies.pruning.structured.cut import Cut, kept_of
from strategies.pruning.structured.meta_shapes import changed, refused, tensor_shapes

KV_HEADS = ("num_key_value_heads", "num_kv_heads")


def head_counts(config: PretrainedConfig) -> tuple[int, int]:
    """Numbers of query heads and of key-value heads.

    Raises:
        ValueError: the configuration has no number of heads.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise refused(config, "heads")
    shared = next((found for name in KV_HEADS if (found := getattr(config, name, None))), heads)
    if heads % shared:
        raise ValueError(f"heads: {heads} query heads do not share {shared} key-value heads evenly")
    return heads, shared


def head_numbers(config: PretrainedConfig, cut: Cut, heads: int, groups: int) -> tuple[int, int]:
    """Query and key-value heads that remain."""
    if groups == heads:  # each head is a group of its own: what is cut of either is cut of both
        asked = {name: kept_of(name, value, heads) for name, value in (("heads", cut.heads), ("kv_heads", cut.kv_heads))
                 if value is not None}
        if len(set(asked.values())) > 1:
            raise ValueError(f"kv_heads: each of the {heads} heads of this model has keys and values of its own, so "
                             f"that as many of both remain; leave `kv_heads` out to keep {asked['heads']}")
        left = next(iter(asked.values()))
        return left, left
    shared = groups if cut.kv_heads is None else kept_of("kv_heads", cut.kv_heads, groups)
    each = heads // groups
    if cut.heads is None:
        return shared * each, shared
    wanted = cut.heads if isinstance(cut.heads, int) else cut.heads * heads
    here = int(wanted / shared + 0.5)
    inside = max(1, min(each, here))
    if isinstance(cut.heads, int) and cut.heads != inside * shared:
        raise ValueError(f"heads: {cut.heads} cannot be shared evenly by {shared} key-value heads of at most {each} "
                         f"each; the nearest that can: {inside * shared}")
    if here < 1:
        raise ValueError(f"heads: {cut.heads} of {heads} leaves less than one head for each of {shared} key-value "
                         f"heads; the least is {shared}, or cut `kv_heads` too")
    if inside * shared == heads:
        raise ValueError(f"heads: {cut.heads} of {heads} keeps all of them, so that nothing is cut"
                         + (f"; use at most {shared * (each - 1)}" if each > 1 else ""))
    return inside * shared, shared


def head_choices(config: PretrainedConfig, cut: Cut, shared: int) -> list[tuple[int, int]]:
    """Numbers of query and key-value heads that a cut of the same kind could leave, with `shared` key-value heads."""
    heads, groups = head_counts(config)
    if cut.heads is None or groups == heads:
        return [(number * (heads // groups), number) for number in range(1, groups)]
    return [(number * shared, shared) for number in range(1, heads // groups + (shared < groups))]


def with_heads(config: PretrainedConfig, heads: int, groups: int) -> PretrainedConfig:
    """Other numbers of heads of the same size."""
    values: dict[str, Any] = {"num_attention_heads": heads}
    values |= {name: groups for name in KV_HEADS if getattr(config, name, None)}
    return changed(with_head_size(config), **values)


def with_head_size(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with the size of a head as a value of its own, where it can have that."""
    if getattr(config, "head_dim", None) or not getattr(config, "num_attention_heads", None):
        return config
    heads = config.num_attention_heads
    return changed(config, head_dim=config.hidden_size // heads)


def heads_make_width(config: PretrainedConfig) -> bool:
    """Whether a model's heads are its width in equal parts, so that one cannot be cut without the other."""
    heads, groups = head_counts(config)
    part = next((one for one in range(2, heads + 1) if heads % one == 0), None)
    if part is None:
        return False
    try:
        fewer = tensor_shapes(with_heads(config, heads // part, heads // part if groups == heads else 1))
    except ValueError:
        return False
    return fewer == tensor_shapes(config)
