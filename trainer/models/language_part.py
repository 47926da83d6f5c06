"""Checks that the language model taken from a multimodal model computes on text what the whole model does."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)

from trainer.errors import UserError
from trainer.experiment.model_nodes import Model

if TYPE_CHECKING:  # pragma: no cover - importing it at run time would be circular
    from trainer.data.dataset import PreparedData

PLACES = re.compile(r"(image|video|audio)_token_(id|index)")  # placeholder tokens, replaced by images, video or sound
SPECIAL = re.compile(r".*_token_(id|index)")
logger = logging.getLogger(__name__)

TRIED = 24  # most tokens to compare the two models on
NEAR = {torch.float32: 1e-4}  # largest allowed logit difference, relative to the largest logit, by dtype
NEAR_OTHERS = 2e-2  # the same for narrower dtypes


@torch.no_grad()
def check_alone(alone: nn.Module, origin: PretrainedConfig, key: str, value: str) -> bool:
    """Compare a language model extracted from a multimodal model with the whole model, on text.

    The whole model is built on the meta device, with the extracted language model's modules in place of its own. So no
    more memory or files are needed, and masks, positions and the handling of embeddings and logits are the whole's.

    Returns:
        Whether the comparison was possible.

    Raises:
        UserError: the logits differ.
    """
    ids = _text_tokens(alone.config.vocab_size, origin).to(alone.device)
    try:
        whole = _around(alone, origin)
        theirs = None if whole is None else whole.eval()(input_ids=ids, use_cache=False).logits
    except Exception as error:  # some models cannot run on text without an image, and fail in various ways
        theirs = None
        logger.debug(error)
    if theirs is None or theirs.is_meta:
        logger.warning(f"{key}: whether its language model says of text what the whole says could not be tried")
        return False
    training = alone.training
    ours = alone.eval()(input_ids=ids, use_cache=False).logits
    alone.train(training)
    share = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not share <= NEAR.get(ours.dtype, NEAR_OTHERS):
        raise UserError(f"{key}.path", "it is multimodal, and its language model alone says something else of text "
                        f"than the whole model (logits differ by {share:.2g} of the largest)", value=value,
                        way_out="name a model of text alone")
    return True


def check_places(models: Mapping[str, Model | None], text: PreparedData) -> None:
    """Raise `UserError` if the text contains placeholder tokens for images, video or sound."""
    if not hasattr(text.train, "token_counts"):
        return  # a stream cannot be searched in advance
    places = {token: key for key, model in models.items() if model is not None and model.path is not None
              for token in _places(model)}
    counts = text.train.token_counts(1 + max(places, default=0))
    for token, key in places.items():
        if count := int(counts[token]):
            name = text.tokenizer.convert_ids_to_tokens(token)
            raise UserError(f"{key}.path", f"the text has the token {name!r} {count:,} times, in whose place this "
                            "model is given pictures or sound, and its language model alone is used",
                            value=models[key].path, way_out="take that token out of the data, or these records")


def _places(model: Model) -> Iterator[int]:
    config = AutoConfig.from_pretrained(model.path, revision=model.revision or "main",
                                        trust_remote_code=model.trust_remote_code)
    if config.get_text_config(decoder=True) is not config:
        for name, token in vars(config).items():
            if PLACES.fullmatch(name) and isinstance(token, int):
                yield token


def _text_tokens(vocabulary: int, origin: PretrainedConfig) -> torch.Tensor:
    """(1, tokens) ids spread over the vocabulary, without special tokens."""
    special = set(_special(origin.to_dict()))
    ids = torch.linspace(0, vocabulary - 1, min(vocabulary, 4 * TRIED)).long().tolist()
    return torch.tensor([[one for one in ids if one not in special][::4] or [0]])


def _special(values: dict[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif isinstance(name, str) and SPECIAL.fullmatch(name):
            yield from (one for one in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(one, int))


def _around(alone: nn.Module, origin: PretrainedConfig) -> nn.Module | None:
    """The multimodal model on meta with this language model inserted; None if there is no unique place for it."""
    config, dtype = copy.deepcopy(origin), next(alone.parameters()).dtype
    config.__dict__.pop("quantization_config", None)
    for auto in (AutoModelForMultimodalLM, AutoModelForSeq2SeqLM, AutoModelForCausalLM):
        if type(config) not in auto._model_mapping:
            continue
        with torch.device("meta"):
            whole = auto.from_config(config, dtype=dtype)
        places = [name for name, module in whole.named_modules() if type(module) is type(alone.base_model)]
        if len(places) == 1 and type(whole) is not type(alone):
            whole.set_submodule(places[0], alone.base_model)
            whole.set_output_embeddings(alone.get_output_embeddings())
            return whole
    return None
