"""Prepare the data of an experiment: tokenizer, training rows and held-out rows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from trainer.data import sources, tokenizers
from trainer.data.batches import Order
from trainer.data.encoding import Encoder
from trainer.data.messages import notes_on_calls
from trainer.data.rows import PackedRows, StreamedRows, encode_to, keep_one
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data
from trainer.experiment.experiment import Experiment
from trainer.experiment.nodes import Run, Training
from trainer.files import fingerprint

VERSION = 3  # of the cache; raised when the encoding changes
LOOKED_AT = 100  # records to search for tool calls
CHAT = ("messages", "tools", "keys", "roles")


@dataclass(frozen=True)
class PreparedData:
    """The prepared data of a run.

    Attributes:
        tokenizer: the tokenizer of the student, and of the teacher unless it has its own.
        train: training rows.
        identity: short hash of the training data and its tokenization.
        held_out: (rows, sequence) tensors `input_ids`, `position_ids`, `targets`, and (rows,) `bytes`.
        notes: remarks for the user, such as how full the rows are and how much was cut off.
    """

    tokenizer: PreTrainedTokenizerBase
    train: PackedRows | StreamedRows
    identity: str
    held_out: dict[str, torch.Tensor]
    notes: list[str]


def prepare_text(experiment: Experiment) -> PreparedData:
    """Open, tokenize and pack the data of an experiment; slow results are cached in `run.cache`.

    Call on one process first, then on the others, which find everything in the cache.
    """
    data, cache = experiment.data, cache_folder(experiment.run)
    corpus = sources.open_corpus(data, cache)
    tokenizer = tokenizer_for(experiment, corpus)
    encoder, held = encoder_for(tokenizer, data, corpus.train), encoder_for(tokenizer, data, corpus.validation)
    plain = not (data.messages or data.prompt)
    of_records = notes_on_calls(islice(iter(corpus.train), LOOKED_AT), data)
    shape = {"capacity": data.sequence_length, "packing": data.packing, "plain": plain,
             "padding": tokenizer.pad_token_id}
    if data.streaming:
        train: Any = StreamedRows(corpus.train, encoder, **shape, shuffle=(experiment.seed, data.shuffle_buffer))
        held_out = list(islice(StreamedRows(corpus.validation, held, **shape, shuffle=None).rows(),
                               data.validation.rows))
        if not held_out:
            raise UserError("data.validation", "the held-out documents have no token to learn",
                            way_out="name held-out text in `data.validation.path`")
        return PreparedData(tokenizer, train, fingerprint(data.model_dump(mode="json")), _stack(held_out),
                    encoder.notes + of_records)
    train = _rows(corpus.train, encoder, cache, "data", shape)
    validation = _rows(corpus.validation, held, cache, "data.validation", shape)
    # Packing sorts rows by document length, so the held-out rows are a random sample, the same for every seed.
    order = Order(len(validation), seed=0)
    held_out = [validation[order[index]] for index in range(min(len(validation), data.validation.rows))]
    notes = _notes(train, data.sequence_length, plain, experiment.training) + encoder.notes + of_records
    return PreparedData(tokenizer, train, train.folder.name, _stack(held_out), notes)


def cache_folder(run: Run) -> Path:
    """The folder `run.cache`, created if it does not exist.

    Raises:
        UserError: the folder cannot be created.
    """
    cache = Path(run.cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("run.cache", f"cannot make this folder ({error.strerror})", value=str(cache),
                        way_out="name a folder that can be written") from error
    return cache


def tokenizer_for(experiment: Experiment, corpus: sources.Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer of an experiment: loaded, or trained on the training data and cached."""
    data, cache = experiment.data, Path(experiment.run.cache)
    origin = tokenizers.tokenizer_origin(data.tokenizer, experiment.with_weights)
    if origin is None:
        identity = data.model_dump(mode="json", include={"path", "name", "split", "revision", "text", *CHAT,
                                                         "prompt", "response", "max_documents", "validation",
                                                         "tokenizer", "streaming"})
        folder = cache / "tokenizers" / fingerprint([VERSION, identity, _content(corpus.train)])
        if not (folder / "tokenizer.json").exists():
            partial = folder.with_name(f".{folder.name}-{os.getpid()}")
            tokenizers.train_tokenizer(corpus.train, data, partial)
            keep_one(partial, folder)
        origin = ("data.tokenizer", str(folder), None)
    tokenizer = tokenizers.load_tokenizer(*origin)
    tokenizers.check_models(experiment.with_weights, tokenizer, experiment.objective.divergence.name,
                            experiment.student.from_teacher is not None)
    return tokenizer


def encoder_for(tokenizer: PreTrainedTokenizerBase, data: Data, documents: sources.Documents) -> Encoder:
    """Build the encoder for some documents; in those read as JSON, a null was written by the author of the data."""
    return Encoder(tokenizer, data, isinstance((documents.features or {}).get(data.messages), datasets.Json))


def _rows(documents: Any, encoder: Encoder, cache: Path, key: str, shape: dict[str, Any]) -> PackedRows:
    fields = encoder.data.model_dump(mode="json", include={"text", *CHAT, "prompt", "response"})
    identity = [VERSION, _content(documents), fields, encoder.tokenizer.backend_tokenizer.to_str(),
                encoder.tokenizer.chat_template, encoder.end, encoder.start]
    folder = cache / "tokens" / fingerprint(identity)
    if not folder.exists():
        encode_to(folder, documents, encoder)
    return PackedRows(folder, **shape, key=key)


def _content(documents: Any) -> str:
    """Identity of a data set's content: `datasets` fingerprints files by path, size and modification time."""
    return str(getattr(documents, "_fingerprint", documents.info.dataset_name))


def _stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _notes(train: PackedRows, capacity: int, plain: bool, training: Training) -> list[str]:
    share = train.tokens / (len(train) * capacity)
    notes = [f"{len(train):,} rows of {capacity} tokens, {share:.1%} full"]
    if train.cut and not plain:
        left_out = train.cut / (train.cut + train.tokens)
        notes.append(f"{left_out:.0%} of all tokens ({train.cut:,}) are left out: a record longer than a row loses its "
                     f"end, or has nothing to learn within it; data.sequence_length above {capacity} keeps more")
    if training.steps and len(train) < training.batch_size:
        notes.append(f"there are fewer rows than the {training.batch_size} of one step: every step repeats the same "
                     "text")
    return notes

