"""What a dry run and `limbeck show-data` say of classified data: its classes, and its first records as rows."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from strategies.distillation.losses.tiled_loss import IGNORED
from trainer.data.class_names import ClassNumbers, classes_of
from trainer.data.classified import image_arrays, text_arrays
from trainer.data.classified_here import Here, records_here
from trainer.data.data_preview import LONGEST, tokenizer_here
from trainer.data.shown_documents import SHOWN
from trainer.data.sources import Documents, check_path
from trainer.data.tokenizers import Origin
from trainer.experiment.data_nodes import Data

COUNTED = 1000  # most records whose tokens are counted
LISTED = 20  # most classes that are listed with the number of their records
WHOLE = 2**30  # tokens of a row that nothing is cut off for


@dataclass
class ClassifiedPreview:
    """What is known of classified data.

    Attributes:
        source: its path.
        not_looked_at: why it was not read; "" if it was.
        records: records to train on.
        held_out: records held out; None if they are not on this machine.
        measured: those of them that are measured.
        classes: training records of each class, or words where these have one.
        usual: share of the held-out answers that are of their most frequent class; None without any.
        tokens: mean tokens of a text, among those that were counted; None for images.
        counted: texts whose tokens were counted: all, or some that are evenly spread, since data may be sorted.
        longest: most tokens of one of these texts.
        cut: share of these texts that are longer than a row.
        notes: remarks.
        examples: the first records as they are read.
        weight: share of the data; 1, since there is one source.
    """

    source: str
    not_looked_at: str = ""
    records: int = 0
    held_out: int | None = None
    measured: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    usual: tuple[str, float] | None = None
    tokens: float | None = None
    counted: int = 0
    longest: int = 0
    cut: float = 0.0
    notes: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    weight: float = 1.0

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Names and values for people."""
        if self.not_looked_at:
            return [("not looked at", self.not_looked_at)]
        held_out = "held-out data that is not on this machine" if self.held_out is None else \
            f"{self.held_out:,} held out" + (f", {self.measured:,} of them measured (data.validation.rows)"
                                             if self.measured < self.held_out else "")
        rows = [("records", f"{self.records:,} to train on, {held_out}"), ("classes", self._classes)]
        if self.usual is not None:
            rows.append(("to beat", f"{self.usual[1]:.1%} accuracy, by always answering {self.usual[0]}"))
        if self.tokens is not None:
            some = f", in {self.counted:,} texts" if self.counted < self.records else ""
            rows.append(("tokens", f"{self.tokens:.1f} in a text on average, {self.longest:,} at most{some}; "
                                   f"{self.cut:.1%} of the texts are longer than data.sequence_length, and are cut off "
                                   "there"))
        return [*rows, *(("note", note) for note in self.notes)]

    @property
    def _classes(self) -> str:
        if len(self.classes) <= LISTED:
            return f"{len(self.classes)}: {_listed(self.classes)}"
        order = sorted(self.classes.items(), key=lambda one: -one[1])
        return (f"{len(self.classes)}, from {_listed(dict(order[:3]))} to {_listed(dict(order[-3:]))}")


def classified_preview(data: Data, origin: Origin | None, cache: Path) -> list[ClassifiedPreview]:
    """Look at classified data as far as it is on this machine: all labels, and some records.

    Args:
        data: the data of the experiment.
        origin: where its tokenizer is; None to train one on the records, or for images.
        cache: the folder shared between runs, which may have data of the hub from an earlier one.

    Raises:
        UserError: as in a run, for mistakes in labels, and in the records that are read here.
    """
    if data.validation.path is not None:
        check_path(data.validation.path, "data.validation.path")
    found, here = ClassifiedPreview(data.path), records_here(data, cache)
    if here.train is None:
        found.not_looked_at = "it is no local data; limbeck show-data downloads and shows it"
        return [found]
    if here.copied:
        found.notes.append("this is the copy of an earlier run in run.cache; a run asks the hub for a newer one")
    tokenizer = None
    if data.task != "image_classification":
        with tempfile.TemporaryDirectory(prefix="limbeck-") as folder:
            tokenizer = tokenizer_here(origin, [(data, list(here.train))] * (origin is None), Path(folder), False)
    look(found, data, here, tokenizer)
    return [found]


def look(found: ClassifiedPreview, data: Data, here: Here, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Count the classes of some records, and show the first.

    Args:
        found: receives what is found.
        tokenizer: that of the run; None for images, or if it is not on this machine.

    Raises:
        UserError: as in a run, for mistakes in labels, and in the records that are read here.
    """
    assert here.train is not None, "there is nothing to look at"
    _count_classes(found, data, here.train, here.held_out)
    _show_records(found, data, here.train, tokenizer)


def _count_classes(found: ClassifiedPreview, data: Data, train: Documents, held_out: Documents | None) -> None:
    """Count the labels of all records."""
    names = classes_of(data, train)
    counts = Counter(_labels(data, train, names, "data.path"))
    found.records = len(train)
    found.classes = {name: counts[number] for number, name in enumerate(names)}
    if lacking := [name for name, count in found.classes.items() if not count]:
        found.notes.append(f"no training record is of class {', '.join(lacking[:5])}" + " ..." * (len(lacking) > 5))
    if held_out is not None:
        found.held_out, found.measured = len(held_out), min(len(held_out), data.validation.rows)
        answers = Counter(_labels(data, held_out, names, "data.validation"))
        if answers:
            number, most = answers.most_common(1)[0]
            found.usual = names[number], most / answers.total()


def _labels(data: Data, documents: Documents, names: tuple[str, ...], key: str) -> list[int]:
    """The number of each record's class, of each word's that has one."""
    numbers = ClassNumbers(data, documents, names, key)
    labels = documents.select_columns([data.label])[:][data.label]
    if data.task != "token_classification":
        return [numbers(label) for label in labels]
    return [number for words in labels for number in numbers.of_words(words or ()) if number != IGNORED]


def _show_records(found: ClassifiedPreview, data: Data, documents: Documents, tokenizer: PreTrainedTokenizerBase | None
                  ) -> None:
    """Read some records as a run does: count the tokens of texts from all of the data, and show the first records."""
    names = tuple(found.classes)
    numbers = ClassNumbers(data, documents, names, "data.path")
    first = documents.select(range(min(SHOWN, len(documents))))
    if data.task == "image_classification":
        found.examples = [shown_image(data, record, names, number)
                          for number, record in enumerate(image_arrays(data, first, numbers), 1)]
        return
    if tokenizer is None:
        found.notes.append("its tokenizer is not on this machine, so that no tokens are shown")
        return
    whole = data.model_copy(update={"sequence_length": WHOLE})
    places = np.linspace(0, len(documents) - 1, min(COUNTED, len(documents))).astype(int).tolist()
    lengths = np.asarray([len(record["tokens"]) for record in text_arrays(
        whole, documents.select(places), numbers, tokenizer, places)])
    found.counted, found.tokens, found.longest = len(lengths), float(lengths.mean()), int(lengths.max())
    found.cut = float((lengths > data.sequence_length).mean())
    found.examples = [shown_text(data, record, names, number, tokenizer)
                      for number, record in enumerate(text_arrays(whole, first, numbers, tokenizer), 1)]


def shown_text(data: Data, record: dict[str, np.ndarray], names: tuple[str, ...], number: int,
               tokenizer: PreTrainedTokenizerBase) -> str:
    """A text as its tokens, each word's class behind the first token of the word, or the class of all in front."""
    kept = data.sequence_length
    pieces = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in record["tokens"][:kept]]
    if data.task == "token_classification":
        pieces = [piece.strip() + (f"/{names[label]}" if label != IGNORED else "")
                  for piece, label in zip(pieces, record["labels"], strict=False)]
        text, title = " ".join(pieces), f"record {number}:"
    else:
        text, title = "|".join(pieces), f"record {number}: {names[int(record['labels'][0])]}"
    text = text.replace("\x1b", "\N{SYMBOL FOR ESCAPE}")  # data must not send escape sequences to the terminal
    text = text[:LONGEST] + (f" ... and {len(text) - LONGEST:,} characters more" if len(text) > LONGEST else "")
    cut = len(record["tokens"]) - kept
    return f"{title}\n{text}" + (f"\n--- about {cut:,} tokens more are cut off ---" if cut > 0 else "")


def shown_image(data: Data, record: dict[str, np.ndarray], names: tuple[str, ...], number: int) -> str:
    """The class of an image, and what a model is given."""
    images, pixels = data.images, record["pixels"]
    return (f"record {number}: {names[int(record['labels'][0])]}, {images.channels} x {images.size} x {images.size} "
            f"pixels of {pixels.min()} to {pixels.max()}, {pixels.mean():.0f} on average")


def _listed(classes: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in classes.items())
