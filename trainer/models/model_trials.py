"""Trial runs of a model before training: it must be causal, count positions from 0, and keep documents separate.

The trials run the model on synthetic rows, so they work for any architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from strategies.distillation.losses.fused_head import hidden_states
from trainer.errors import UserError
from trainer.experiment.model_nodes import Model
from trainer.model_files import first_line
from trainer.models.reload_trial import check_reload

SHORT = 12  # tokens of the short trial row
AFFORDED, AFFORDED_SETTING = 1e11, 1e12  # limits on weights x tokens: for full rows, for rows just past a setting
SMALL, AFFORDED_EARLY = 3e7, 1e8  # most weights of a trial model with all its layers, and of any trial model
REPEATED = 7  # distinct tokens in a document of repeated tokens
LEAST_LONG = 64  # tokens of the long trial row, at least, where full rows are too expensive
# Settings that make a model of some architecture causal.
FLAGS = ({"is_decoder": True}, {"is_causal": True}, {"causal": True}, {"use_bidirectional_attention": False},
         {"bidirectional": False}, {"attn_type": "uni"})


def check_causal(model: nn.Module, key: str, length: int, path: str | None = None) -> None:
    """Raise `UserError` if the model's logits depend on later tokens, which it is to predict.

    Args:
        model: the model, with or without trained weights.
        key: `student` or `teacher`.
        length: tokens of the longest row.
        path: where the configuration comes from; None for dimensions in the experiment.
    """
    try:
        if is_causal(model, length):
            return
    except Exception as error:  # foreign model code on user-given dimensions can raise anything
        raise UserError(key, f"{type(model).__name__} cannot run: {first_line(error)}",
                        way_out="check the dimensions of its architecture") from error
    flag = _causal_with(model.config)
    name = type(model).__name__
    where = f"{key}.path" if path else f"{key}.architecture"
    if flag is None:
        way_out = "name a causal language model: llama, qwen3 or gpt2, for example"
    elif path:
        (setting, value), = flag.items()
        way_out = f"write \"{setting}\": {str(value).lower()} into its config.json, if it was trained so"
    else:
        (setting, value), = flag.items()
        way_out = f"add `{setting}: {str(value).lower()}` to {where}"
    raise UserError(where, f"{name} is not causal as it is configured: what it says at a position depends on later "
                    "tokens, so that it would see the very ones it is to predict",
                    value=path or model.config.model_type, way_out=way_out)


@torch.no_grad()
def check_positions(model: nn.Module, key: str, path: str | None = None) -> None:
    """Raise `UserError` if a model does not count positions from 0, as training rows do.

    RoBERTa, for example, counts from its padding token's id plus one. With the `position_ids` of a row it would read
    other position embeddings than it was trained with, and than it uses by default.
    """
    tokens, padding = _tokens(model, SHORT), getattr(model.config, "pad_token_id", None)
    tokens = torch.where(tokens == padding, SHORT % model.config.vocab_size, tokens) if padding is not None else tokens
    with _tried(model):
        given = _states(model, tokens, torch.arange(SHORT, device=tokens.device))
        own = _states(model, tokens, None)
    if (given - own).abs().max() > _tolerance(model) * own.abs().max():
        name = type(model).__name__
        raise UserError(f"{key}.path" if path else f"{key}.architecture", f"{name} counts positions otherwise than "
                        "from 0 on, as every row gives them: it would be trained on other positions than it has in use",
                        value=path or model.config.model_type,
                        way_out="name a causal language model: llama, qwen3 or gpt2, for example")


def check_packing(model: nn.Module, key: str, length: int) -> None:
    """Raise `UserError` if documents packed into one row of `length` tokens would see each other."""
    if not documents_stay_apart(model, length):
        raise UserError("data.packing", f"documents packed into one sequence would see each other in the {key} "
                        f"({type(model).__name__}): it does not keep them apart by position", value=True,
                        way_out="set `data.packing: false`")


@torch.no_grad()
def check_padding(model: nn.Module, key: str, length: int) -> None:
    """Raise `UserError` if a model's output for a document depends on what follows it in its row.

    A model that attends to the top k of all earlier keys may break ties differently in a longer row. Keys do tie:
    repeated tokens have equal keys in Doge's first layer.
    """
    with _tried(model):
        *_, size = tried_lengths(model, length)
        if _same_in_longer_rows(model, size):
            return
        fitting = [one for one in sorted(set(_numbers(model.config.to_dict()))) if SHORT <= one < size
                   and _same_in_longer_rows(model, one)]
    raise UserError("data.sequence_length", f"what the {key} ({type(model).__name__}) says of a document depends on "
                    "how long its row is: it picks keys, and others among equal ones where there are more",
                    value=length, way_out=f"set data.sequence_length={fitting[-1]}, where it keeps all" if fitting else
                    "take shorter rows, or another architecture")


def _same_in_longer_rows(model: nn.Module, size: int) -> bool:
    """Whether a document of few distinct tokens has the same hidden states alone as in a row of `size` tokens."""
    at, own = torch.arange(size, device=_device(model)), size - min(5, size // 2)
    tokens, positions = at % REPEATED, torch.where(at < own, at, at - own)
    alone, longer = (_states(model, tokens[:end], positions[:end])[:own] for end in (own, size))
    return bool((alone - longer).abs().max() <= 2e-2 * alone.abs().max())


def check_early_causal(asked: Model, key: str, config: PretrainedConfig) -> None:
    """Try a model with random weights, made from its configuration alone, if it is small enough for that.

    Raises:
        UserError: the model cannot be built, is not causal, or counts positions otherwise; or a student's files would
            not reload as they were saved.
    """
    if asked.trust_remote_code:
        return
    try:
        small = _small(config)
        model = _random(small) if _weights(small) <= AFFORDED_EARLY else None
    except Exception as error:  # foreign model code can raise anything
        raise UserError(f"{key}.path" if asked.path else f"{key}.architecture",
                        f"a {config.model_type} model of these dimensions cannot be made: {first_line(error)}",
                        value=asked.path or config.model_type, way_out="check its dimensions") from error
    if model is not None:
        check_causal(model, key, SHORT, asked.path)
        check_positions(model, key, asked.path)
        if key == "student" and _weights(small) <= SMALL:
            check_reload(model, key, asked.path)


@torch.no_grad()
def is_causal(model: nn.Module, length: int = SHORT) -> bool:
    """Whether changing the tokens from some position on leaves the outputs before it unchanged.

    The model is run on a short row, with several such positions, and on a row of about `length` tokens.
    """
    with _tried(model):
        for size in tried_lengths(model, length):
            tokens = _tokens(model, size)
            positions = torch.arange(size, device=tokens.device)
            before = _states(model, tokens, positions)
            for cut in ((1, size // 2, size - 1) if size <= SHORT else (size - 1,)):
                later = torch.where(positions < cut, tokens, (tokens + 1 + positions) % model.config.vocab_size)
                after = _states(model, later, positions)
                if (before[:cut] - after[:cut]).abs().max() > _tolerance(model) * before.abs().max():
                    return False
    return True


@torch.no_grad()
def documents_stay_apart(model: nn.Module, length: int = SHORT) -> bool:
    """Whether the outputs of a packed document are those it has alone, and do not depend on the document before it.

    The model is run on a short row and on one of about `length` tokens. Masked positions have weight zero, so changing
    the other document must leave the outputs equal. Running a document alone has another shape, which may round
    differently, so that comparison has a looser tolerance.
    """
    with _tried(model):
        return all(_stay_apart(model, size) for size in tried_lengths(model, length))


def _stay_apart(model: nn.Module, size: int) -> bool:
    tokens, second = _tokens(model, size), min(5, size // 2)
    at = torch.arange(size, device=tokens.device)
    positions = torch.where(at < size - second, at, at - (size - second))
    changed = torch.where(at < size - second, tokens.flip(0), tokens)
    last = slice(size - second, size)
    try:
        packed, other = (_states(model, ids, positions)[last] for ids in (tokens, changed))
        alone = _states(model, tokens[last], positions[last])
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    largest = float(alone.abs().max())
    return bool((packed - other).abs().max() <= 1e-6 * largest and (packed - alone).abs().max() <= 2e-2 * largest)


@contextmanager
def _tried(model: nn.Module) -> Iterator[None]:
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def _tokens(model: nn.Module, size: int) -> torch.Tensor:
    return torch.arange(size, device=_device(model)) % model.config.vocab_size


def _device(model: nn.Module) -> torch.device:
    """The device that a model runs on; some of its weights may be on meta."""
    return next(one.device for one in model.parameters() if one.device.type != "meta")


def _states(model: nn.Module, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """(sequence, width) the input of the model's head, called as in training; logits if its head is unknown.

    Args:
        positions: None to let the model count positions itself, as in ordinary use.
    """
    inputs = {"input_ids": tokens[None], "use_cache": False}
    if positions is not None:
        inputs["position_ids"] = positions[None]
    try:
        found = hidden_states(model, inputs)[0]
    except (ValueError, AssertionError, StopIteration):
        found = model(**inputs).logits
    return found[0].float()


def trial_states(model: nn.Module, size: int) -> torch.Tensor:
    """(size, width) the input of the model's head on a fixed row of tokens."""
    tokens = _tokens(model, size)
    return _states(model, tokens, torch.arange(size, device=tokens.device))


def tried_lengths(model: nn.Module, length: int) -> list[int]:
    """Lengths of the rows to try a model on: a short one and `length`.

    If the model is too large for `length`, the second is just past the largest affordable length in its settings, such
    as an attention window, and at least `LEAST_LONG`.
    """
    if length <= SHORT:
        return [SHORT]
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights * length > AFFORDED:
        named = [value for value in _numbers(model.config.to_dict()) if SHORT < value < length]
        length = min(length, max([LEAST_LONG, *(value + 8 for value in named if weights * value <= AFFORDED_SETTING)]))
    return [SHORT, length]


def _numbers(values: object) -> Iterator[int]:
    if isinstance(values, dict):
        for name, value in values.items():
            if isinstance(value, int) and not isinstance(value, bool) and any(
                    part in name for part in ("window", "chunk", "position", "block", "length", "topk")):
                yield value
            elif isinstance(value, dict):
                yield from _numbers(value)


def _tolerance(model: nn.Module) -> float:
    """Relative tolerance for outputs that should be equal: mixtures of experts may add in another order."""
    return 1e-5 if next(model.parameters()).dtype == torch.float32 else 2e-2


def _causal_with(config: PretrainedConfig) -> dict[str, object] | None:
    """A setting that makes a small model of this configuration causal, those that it knows first; None if none does."""
    known = {*config.to_dict(), *type(config)().to_dict()}
    for flag in sorted(FLAGS, key=lambda flag: not known >= set(flag)):
        changed = _small(config)
        try:
            for name, value in flag.items():
                setattr(changed, name, value)
            if is_causal(_random(type(changed)(**changed.to_dict()))):
                return flag
        except Exception:  # a setting of other architectures, which may break this one in any way
            continue
    return None


def _random(config: PretrainedConfig) -> nn.Module:
    """A model with random weights, from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


def _weights(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        return sum(one.numel() for one in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())


def _small(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration, cut to two layers if the whole model has more than `SMALL` weights."""
    changed = copy.deepcopy(config)
    if _weights(config) > SMALL:
        changed.num_hidden_layers = min(2, changed.num_hidden_layers)
    return changed
