"""The configurations on the way from a model to its cut, one step for each kind of unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import lcm
from typing import Any

from transformers import PretrainedConfig

from strategies.pruning.structured.attention_heads import (
    head_choices,
    head_counts,
    head_numbers,
    heads_make_width,
    with_head_size,
    with_heads,
)
from strategies.pruning.structured.cut import ORDER, Cut, kept_of
from strategies.pruning.structured.meta_shapes import (
    builds,
    changed,
    feasible,
    refused,
    setting,
    tensor_shapes,
)

MLP = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_dim", "moe_intermediate_size",
       "shared_expert_intermediate_size")
ALIGNED = 8  # channels of experts: products of all experts at once need rows of 16 bytes, in bf16 too
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_k", "moe_top_k", "num_experts_per_token")

Fewer = Callable[[PretrainedConfig, tuple[int, ...]], PretrainedConfig]  # a configuration of some of the layers


@dataclass(frozen=True)
class Step:
    """One kind of unit to cut.

    Attributes:
        kind: one of `ORDER`; `heads+width` where a model has both only together.
        config: the configuration afterwards.
        before: number of units now, by name: heads, kv_heads, mlp, width, layers, experts.
        after: number of units that remain.
        sets: how many sets of equal size the units form, each of which keeps as many: groups of experts.
    """

    kind: str
    config: PretrainedConfig
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    sets: int = 1


def cut_config(config: PretrainedConfig, cut: Cut, fewer: Fewer | None = None) -> PretrainedConfig:
    """The configuration of a cut model, from shapes alone: no weights are read, nothing runs.

    Which layers remain is measured only when the model is cut. Here they are the first ones, which matters for models
    whose layers differ in shape.

    Args:
        fewer: gives a configuration with some of its layers; None for `fewer_layers`.

    Raises:
        ValueError: the configuration cannot say the numbers asked for; names the nearest that it can.
    """
    for kind in ORDER:
        for step in steps(kind, config, cut, fewer):
            config = step.config
    return config


def steps(kind: str, config: PretrainedConfig, cut: Cut, fewer: Fewer | None = None) -> list[Step]:
    """The steps for one of `ORDER`; none where that is not cut.

    Raises:
        ValueError: as `cut_config`.
    """
    if kind == "layers":
        return _layers(config, cut, fewer or fewer_layers)
    made = {"experts": _experts, "heads": _heads, "mlp": _mlp, "width": _width, "channels": _channels}
    return made[kind](config, cut)


# ---- layers

def fewer_layers(config: PretrainedConfig, layers: tuple[int, ...]) -> PretrainedConfig:
    """The configuration with some of its layers; settings with one entry for each layer are cut with them.

    Raises:
        ValueError: the blocks do not have the shapes that they have in the whole model.
    """
    count = config.num_hidden_layers
    lists = {name: [value[layer] for layer in layers] for name, value in config.to_dict().items()
             if isinstance(value, list) and len(value) == count}
    found = changed(config, num_hidden_layers=len(layers), **lists)
    theirs, ours = tensor_shapes(config), tensor_shapes(found)
    for name, shape in ours.items():
        if theirs.get(renumbered(name, layers, count, theirs)) != shape:
            raise ValueError(f"layers {list(layers)} of a {config.model_type} model do not make a model of their own: "
                             f"{name} differs")
    return found


def renumbered(name: str, layers: tuple[int, ...], count: int, theirs: Any) -> str:
    """The name that a tensor of the smaller model has in the whole one, whose tensors `theirs` are named by.

    Layers are counted by the outermost list of modules that has `count` of them.
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            prefix = ".".join(parts[:place])
            if _listed(prefix, theirs) == count and int(part) < len(layers):
                return ".".join([*parts[:place], str(layers[int(part)]), *parts[place + 1:]])
            return name
    return name


def _listed(prefix: str, names: Any) -> int:
    start = len(prefix) + 1
    return len({name[start:].partition(".")[0] for name in names if name.startswith(f"{prefix}.")
                and name[start:].partition(".")[0].isdigit()})


def _layers(config: PretrainedConfig, cut: Cut, fewer: Fewer) -> list[Step]:
    if cut.layers is None:
        return []
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise refused(config, "layers")
    kept = kept_of("layers", cut.layers, count)
    return [Step("layers", fewer(config, tuple(range(kept))), {"layers": count}, {"layers": kept})]


# ---- experts

def _experts(config: PretrainedConfig, cut: Cut) -> list[Step]:
    if cut.experts is None:
        return []
    name = next((one for one in EXPERTS if isinstance(getattr(config, one, None), int)), None)
    if name is None:
        raise ValueError(f"experts: a {config.model_type} model has none that can be cut")
    count = getattr(config, name)
    top_k = max((getattr(config, one) for one in TOP_K if isinstance(getattr(config, one, None), int)), default=1)
    kept = kept_of("experts", cut.experts, count)
    if kept < top_k:
        raise ValueError(f"experts: {kept} of {count} remain, and each token is routed to {top_k}; use at least "
                         f"{top_k}")
    kept = feasible(config, "experts", cut.experts, kept, count, lambda number: changed(config, **{name: number}))
    sets = getattr(config, "n_group", None) or 1
    if kept % sets:
        raise ValueError(f"experts: {kept} of {count} cannot be shared evenly by the {sets} groups that experts are "
                         f"routed in; use {max(1, kept // sets) * sets}")
    return [Step("experts", changed(config, **{name: kept}), {"experts": count}, {"experts": kept}, sets)]


# ---- attention heads

def _heads(config: PretrainedConfig, cut: Cut) -> list[Step]:
    if cut.heads is None and cut.kv_heads is None:
        return []
    heads, groups = head_counts(config)
    left, shared = head_numbers(config, cut, heads, groups)
    if heads_make_width(config):
        if cut.width is None:
            size = config.hidden_size // heads
            raise ValueError(f"heads: the width of a {config.model_type} model is that of its heads, {size} channels "
                             f"each, so that both are cut together; give `width: {left * size}` too")
        return []  # together with the width
    left, shared = _possible_heads(config, cut, left, shared)
    return [Step("heads", with_heads(config, left, shared), {"heads": heads, "kv_heads": groups},
                 {"heads": left, "kv_heads": shared})]


def _possible_heads(config: PretrainedConfig, cut: Cut, left: int, shared: int) -> tuple[int, int]:
    """These numbers of query and key-value heads, or for a fraction the nearest with which the model can be built.

    Raises:
        ValueError: it cannot be built with numbers that were asked for.
    """
    try:
        tensor_shapes(with_heads(config, left, shared))
        return left, shared
    except ValueError as error:
        choices = sorted(head_choices(config, cut, shared), key=lambda one: (abs(one[0] - left), one))
        found = next((one for one in choices if builds(with_heads(config, *one))), None)
        name = "kv_heads" if cut.heads is None else "heads"
        if found is not None and not isinstance(getattr(cut, name), int):
            return found
        raise ValueError(f"{name}: {left} query and {shared} key-value heads are no {config.model_type} model ({error})"
                         + (f"; the nearest that are: {found[0]} and {found[1]}" if found else "")) from error


# ---- feed-forward channels

def _mlp(config: PretrainedConfig, cut: Cut) -> list[Step]:
    if cut.mlp is None:
        return []
    found: list[Step] = []
    names = mlp_sizes(config)
    if not names:
        raise ValueError(f"mlp: a {config.model_type} configuration has no size of its feed-forward parts to cut")
    if len(names) > 1 and isinstance(cut.mlp, int):
        raise ValueError(f"mlp: feed-forward parts have several sizes ({', '.join(names)}), so that one count cannot "
                         "serve all; give a fraction")
    multiple = _multiple(config, cut, "mlp", cut.mlp)
    for name, count in names.items():
        kept = kept_of("mlp", cut.mlp, count, multiple)
        kept = feasible(config, "mlp", cut.mlp, kept, count, setting(config, name), multiple)
        config = changed(config, **{name: kept})
        found.append(Step("mlp", config, {"mlp": count}, {"mlp": kept}))
    return found


def _multiple(config: PretrainedConfig, cut: Cut, name: str, asked: float | int) -> int:
    """What counts are multiples of: of a mixture of experts, `ALIGNED` too."""
    if not any(isinstance(getattr(config, one, None), int) for one in EXPERTS):
        return cut.multiple_of
    if isinstance(asked, int) and asked % ALIGNED:
        raise ValueError(f"{name}: {asked} channels of experts cannot be multiplied at once, which needs a multiple of "
                         f"{ALIGNED}; use {max(1, asked // ALIGNED) * ALIGNED}")
    return lcm(cut.multiple_of, ALIGNED)


def mlp_sizes(config: PretrainedConfig) -> dict[str, int]:
    """Sizes of feed-forward parts by their names in the configuration, those that some weight has as its size."""
    found: dict[str, int] = {}
    for name in MLP:
        if not hasattr(config, name):
            continue
        size = getattr(config, name) or 4 * config.hidden_size  # GPT-2 and its kin write null for four times the width
        try:
            if tensor_shapes(changed(config, **{name: size + 8})) != tensor_shapes(config):
                found[name] = size
        except ValueError:
            continue
    return found


# ---- the residual stream

def _width(config: PretrainedConfig, cut: Cut) -> list[Step]:
    if cut.width is None:
        return []
    count = getattr(config, "hidden_size", None)
    if not isinstance(count, int):
        raise refused(config, "the width")
    if getattr(config, "num_attention_heads", None) and heads_make_width(config):
        return [_heads_and_width(config, cut, count)]
    pinned = changed(with_head_size(config), **mlp_sizes(config))
    multiple = _multiple(config, cut, "width", cut.width)
    kept = kept_of("width", cut.width, count, multiple)
    kept = feasible(config, "width", cut.width, kept, count, lambda number: _with_width(pinned, number), multiple)
    made = _with_width(pinned, kept)
    if cut.width_by == "rotation":
        made = _rotated(config, made, count, kept)
    return [Step("width", made, {"width": count}, {"width": kept})]


def _with_width(config: PretrainedConfig, width: int) -> PretrainedConfig:
    """Another width, also of embeddings that are as wide."""
    also = {name: width for name in ("word_embed_proj_dim", "embedding_size")
            if getattr(config, name, None) == config.hidden_size}
    return changed(config, hidden_size=width, **also)


def _rotated(config: PretrainedConfig, made: PretrainedConfig, count: int, kept: int) -> PretrainedConfig:
    """Untied, with the epsilon of norms that are taken over fewer channels of the same sum of squares."""
    if not isinstance(getattr(config, "rms_norm_eps", None), float):
        raise ValueError(f"width_by: rotation needs RMS norms, which a {config.model_type} configuration does not "
                         "have; use selection")
    return changed(made, tie_word_embeddings=False, rms_norm_eps=config.rms_norm_eps * count / kept)


def _heads_and_width(config: PretrainedConfig, cut: Cut, count: int) -> Step:
    """Heads and the width that they make up, cut together."""
    heads, _ = head_counts(config)
    size = count // heads
    if cut.width_by == "rotation":
        raise ValueError(f"width_by: the width of a {config.model_type} model is that of its heads, which no rotation "
                         "keeps apart; use selection")
    wanted = kept_of("width", cut.width, count)
    near = max(1, min(heads - 1, (wanted + size // 2) // size))
    if cut.heads is None and cut.kv_heads is None:
        raise ValueError(f"width: the width of a {config.model_type} model is that of its heads, {size} channels each, "
                         f"so that both are cut together; give `heads: {near}` and `width: {near * size}`")
    left, shared = head_numbers(config, cut, heads, heads)
    if isinstance(cut.width, int) and cut.width != left * size or abs(wanted - left * size) >= size:
        raise ValueError(f"width: {cut.width} is not that of {left} heads of {size} channels each; use {left * size}, "
                         f"or `heads: {near}` with `width: {near * size}`")
    pinned = changed(config, **mlp_sizes(config))
    made = changed(_with_width(pinned, left * size), num_attention_heads=left)
    tensor_shapes(made)
    return Step("heads+width", made, {"heads": heads, "kv_heads": heads, "width": count},
                {"heads": left, "kv_heads": shared, "width": left * size})


# ---- convolutions

def _channels(config: PretrainedConfig, cut: Cut) -> list[Step]:
    if cut.channels is None:
        return []
    sizes = getattr(config, "hidden_sizes", None)
    if isinstance(sizes, (list, tuple)) and not getattr(config, "num_attention_heads", None):
        values: dict[str, Any] = {"hidden_sizes": [kept_of("channels", cut.channels, one, cut.multiple_of)
                                                   for one in sizes]}
        if isinstance(getattr(config, "embedding_size", None), int):
            values["embedding_size"] = kept_of("channels", cut.channels, config.embedding_size, cut.multiple_of)
    elif isinstance(getattr(config, "depth_multiplier", None), (int, float)):
        values = {"depth_multiplier": config.depth_multiplier * cut.channels}
        if cut.multiple_of > 1:
            raise ValueError(f"multiple_of: channels of a {config.model_type} model are multiples of "
                             f"{getattr(config, 'depth_divisible_by', 8)} by its own rule; leave it out")
    else:
        raise ValueError(f"channels: a {config.model_type} configuration has no numbers of channels to cut")
    made = changed(config, **values)
    if tensor_shapes(made) == tensor_shapes(config):
        raise ValueError(f"channels: {cut.channels} changes no layer of this {config.model_type} model; use less")
    return [Step("channels", made)]
