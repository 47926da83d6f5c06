"""The tokenizer: loaded, or trained on the training text and cached."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.data.sources import Documents, fields
from trainer.errors import UserError
from trainer.experiment.nodes import Data
from trainer.experiment.tree import Experiment

END = "<|endoftext|>"
TRAINING_DOCUMENTS = 2000  # enough text for a vocabulary; the rest would only take time


def tokenizer_origin(experiment: Experiment) -> tuple[str, str, str | None] | None:
    """(key, path, revision) of the tokenizer to load, or None where one is to be trained."""
    own = experiment.data.tokenizer
    if own.path:
        return "data.tokenizer.path", own.path, own.revision
    if own.train_vocabulary:
        return None
    for key, model in (("teacher.path", experiment.teacher), ("student.path", experiment.student)):
        if model is not None and model.path:
            return key, model.path, model.revision
    raise UserError("data.tokenizer", "no model brings a tokenizer",
                    way_out="set `data.tokenizer.train_vocabulary: 2048`, or name one in `data.tokenizer.path`")


def load_tokenizer(key: str, path: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer; one without a padding token pads with its end-of-sequence token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(key, f"cannot load this tokenizer: {reason}", value=path,
                        way_out="name a hub id or a folder with tokenizer.json in `data.tokenizer.path`") from error
    if not tokenizer.is_fast:
        raise UserError(key, "this tokenizer has no fast version, which label masks need", value=path,
                        way_out="name a folder with tokenizer.json in `data.tokenizer.path`")
    if tokenizer.eos_token_id is None:
        raise UserError(key, "this tokenizer has no end-of-sequence token, so no text would ever end", value=path,
                        way_out="add `eos_token` to its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(documents: Documents, data: Data, folder: Path) -> None:
    """Train a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) and write it to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=data.tokenizer.train_vocabulary, special_tokens=[END],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(_texts(documents, data), trainer=trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
                            ).save_pretrained(folder)


def _texts(documents: Documents, data: Data) -> Iterator[str]:
    for record in islice(documents, TRAINING_DOCUMENTS):
        for name in fields(data):
            value = record[name]
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield from (message.get("content") or "" for message in value if isinstance(message, dict))
