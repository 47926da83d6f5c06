"""Prepare classified data: texts, words of texts, or images, each with the number of its class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from strategies.common.progress import report
from strategies.distillation.losses.tiled_loss import IGNORED
from trainer.data import sources
from trainer.data.class_names import ClassNumbers, classes_of
from trainer.data.classified_here import ELSEWHERE, stamp_of
from trainer.data.classified_rows import Arrays, ImageRows, TextRows, write_arrays
from trainer.data.image_files import VERSION, ImageProcessing, ImageReader
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data
from trainer.files import fingerprint

FORMAT = 2  # of the cache; raised when the preparation changes
BATCH = 256  # records that are tokenized at a time
UNLIMITED = 10**12  # a tokenizer that knows no longest text has a larger number there


def class_names(data: Data, cache: Path) -> tuple[str, ...]:
    """The classes of some data, from its settings if they are there, else from its training records.

    Raises:
        UserError: as in `classes_of`.
    """
    if data.class_names is not None:
        return data.class_names
    return _class_names(data.model_dump_json(exclude=ELSEWHERE), cache, stamp_of(data))


@lru_cache(maxsize=8)
def _class_names(data: str, cache: Path, stamp: tuple) -> tuple[str, ...]:
    asked = Data.model_validate_json(data)
    return classes_of(asked, sources.open_corpus(asked, cache).train)


class Classified:
    """The prepared data of a classification.

    Args:
        data: its settings.
        corpus: training and held-out records.
        processor: the tokenizer, or what prepares images.
        cache: the folder shared between runs.
        seed: of the variations of training images.

    Attributes:
        classes: names of the classes in their order.
        processor: the tokenizer, or what prepares images; saved with the student.
        train: training rows.
        held_out: held-out rows, stacked by name.
        identity: short hash of the training data and its preparation.
        notes: remarks for the user.
    """

    def __init__(self, data: Data, corpus: sources.Corpus, processor: Any, cache: Path, seed: int) -> None:
        self.classes, self.processor, self.notes = classes_of(data, corpus.train), processor, []
        parts = [self._rows(data, part, key, cache, seed)
                 for part, key in ((corpus.train, "data.path"), (corpus.validation, "data.validation"))]
        self.train, validation = parts
        if data.task != "image_classification":
            _name_inputs(self.processor, self.train[0], data.sequence_length)
        self.identity = self.train.folder.name
        order = np.random.default_rng(0).permutation(len(validation))[:data.validation.rows]
        rows = [validation[int(number)] for number in order]
        self.held_out = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        self._remark(data, len(validation))

    def _rows(self, data: Data, documents: sources.Documents, key: str, cache: Path, seed: int) -> Any:
        numbers = ClassNumbers(data, documents, self.classes, key)
        images = data.task == "image_classification"
        folder = cache / "classified" / fingerprint([
            FORMAT, data.task, str(getattr(documents, "_fingerprint", "")), data.read,
            [getattr(data, name) for name in data.read], self.classes,
            [data.images.size, data.images.channels] if images else
            [data.sequence_length, self.processor.backend_tokenizer.to_str()]])
        if not folder.exists():
            write_arrays(folder, image_arrays(data, documents, numbers) if images else
                         text_arrays(data, documents, numbers, self.processor))
        arrays = Arrays(folder)
        return ImageRows(arrays, data.images, seed) if images else TextRows(
            arrays, data.sequence_length, self.processor.pad_token_id, data.task == "token_classification")

    def _remark(self, data: Data, held_out: int) -> None:
        labels = np.asarray(self.train.arrays.flat["labels"])
        count = np.bincount(labels[labels != IGNORED], minlength=len(self.classes))
        measured = len(self.held_out["targets"])
        self.notes.append(f"{len(self.classes)} classes, {len(self.train):,} rows to train on, {held_out:,} held out")
        if held_out > measured:
            self.notes.append(f"accuracy is measured on {measured:,} of the {held_out:,} held-out rows: raise "
                              "data.validation.rows for all of them")
        if lacking := [name for name, own in zip(self.classes, count, strict=True) if not own]:
            self.notes.append(f"no training record is of class {', '.join(lacking[:5])}"
                              + (" ..." if len(lacking) > 5 else ""))
        if data.task != "image_classification" and (cut := int((self.train.lengths >= data.sequence_length).sum())):
            self.notes.append(f"{cut / len(self.train):.0%} of the texts fill data.sequence_length, and may be cut off")


def _name_inputs(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], length: int) -> None:
    """Have a tokenizer give what training gives, also where it is loaded again: it is saved with the student."""
    tokenizer.model_input_names = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in row]
    if tokenizer.model_max_length > UNLIMITED:
        tokenizer.model_max_length = length


def text_arrays(data: Data, documents: sources.Documents, numbers: ClassNumbers, tokenizer: PreTrainedTokenizerBase,
                places: Sequence[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
    """The tokens of each record with its label, or with one for each token.

    Args:
        places: where each record is in the data, from 0, for messages; None if these are all of it, or the first.
    """
    places = range(len(documents)) if places is None else places
    words, pairs = data.task == "token_classification", data.text_pair is not None
    for begin in range(0, len(documents), BATCH):
        report("records", begin, len(documents))
        records = documents[begin:begin + BATCH]
        first = [_checked(one, data, places[begin + at])
                 for at, one in enumerate(records[data.words if words else data.text])]
        second = [_checked(one, data, places[begin + at])
                  for at, one in enumerate(records[data.text_pair])] if pairs else None
        found = tokenizer(first, second, truncation=True, max_length=data.sequence_length, is_split_into_words=words,
                          return_token_type_ids=pairs or None, return_attention_mask=False, verbose=False)
        for at, ids in enumerate(found["input_ids"]):
            label = records[data.label][at]
            if words:
                if len(label or ()) != len(first[at]):
                    raise UserError("data.label", f"the record that begins with {' '.join(first[at])[:60]!r} has "
                                    f"{len(first[at])} words and {len(label or ())} labels", value=data.label,
                                    way_out="mend or remove it")
                labels = np.asarray(_of_tokens(found.word_ids(at), numbers.of_words(label)), np.int32)
            else:
                labels = np.asarray([numbers(label)], np.int32)
            text = " ".join(first[at]) if words else first[at]
            record = {"tokens": np.asarray(ids, np.int32), "labels": labels, "bytes": np.asarray(
                [len(text.encode()) + (len(second[at].encode()) if second else 0)], np.int64)}
            if pairs and "token_type_ids" in found:
                record["segments"] = np.asarray(found["token_type_ids"][at], np.int8)
            yield record


def _of_tokens(words: list[int | None], labels: list[int]) -> list[int]:
    """The label of each token: its word's for the first token of a word, else none (as in BERT, section 5.3)."""
    return [IGNORED if word is None or (at and words[at - 1] == word) else labels[word]
            for at, word in enumerate(words)]


def _checked(value: Any, data: Data, number: int) -> Any:
    """A record's text or words, checked."""
    if data.task == "token_classification":
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return value
        wanted, key = "a list of words", "words"
    else:
        if isinstance(value, str):
            return value
        wanted, key = "text", "text"
    raise UserError(f"data.{key}", f"record {number + 1} has {'nothing' if value in (None, []) else repr(value)[:60]} "
                    f"in this field where {wanted} is expected", value=getattr(data, key),
                    way_out="mend or remove the record")


def image_arrays(data: Data, documents: sources.Documents, numbers: ClassNumbers) -> Iterator[dict[str, np.ndarray]]:
    """The pixels of each record with its label."""
    import datasets

    if isinstance((documents.features or {}).get(data.image), datasets.Image):
        documents = documents.cast_column(data.image, datasets.Image(decode=False))
    place = Path(data.path)
    read = ImageReader(data, place if place.is_dir() else place.parent)
    columns = [name for name in documents.column_names if name != VERSION]
    for number, record in enumerate(documents.select_columns(columns)):
        if number % BATCH == 0:
            report("images", number, len(documents))
        yield {"pixels": read(record, number).reshape(-1), "labels": np.asarray([numbers(record[data.label])],
                                                                                np.int32)}


def processing(data: Data) -> ImageProcessing:
    """What prepares the images of an experiment."""
    return ImageProcessing(data.images)
