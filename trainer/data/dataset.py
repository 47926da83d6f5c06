"""Prepare the data of an experiment: tokenizer, training rows and held-out rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from trainer.data import sources, tokenizers
from trainer.data.classified import Classified, processing
from trainer.data.encoding import Encoder
from trainer.data.messages import notes_on_calls
from trainer.data.mixture import Ingredient, MixedRows, MixedStreams, Rows
from trainer.data.provenance import notes_on_provenance
from trainer.data.rows import PackedRows, Row, StreamedRows, encode_to, keep_one
from trainer.data.token_ids import IdEncoder
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data, of_source, source_names, weights_of
from trainer.experiment.experiment import Experiment
from trainer.experiment.nodes import HELD_OUT, Run, Training
from trainer.files import fingerprint

VERSION = 3  # of the cache; raised when the encoding changes
DECIDING = 16  # held-out rows from which on an evaluation says which step is the best
LOOKED_AT = 100  # records to search for tool calls
CHAT = ("messages", "tools", "keys", "roles")
IN_TOKENIZER = {"path", "name", "split", "revision", "text", *CHAT, "prompt", "response", "max_documents", "validation",
                "tokenizer", "streaming"}


T = TypeVar("T")


@dataclass(frozen=True)
class PreparedData:
    """The prepared data of a run.

    Attributes:
        tokenizer: the tokenizer of the student, and of the teacher unless it has its own.
        train: training rows.
        identity: short hash of the training data and its tokenization; of a mixture, whatever its weights are.
        held_out: (rows, sequence) tensors `input_ids`, `position_ids`, `targets`, and (rows,) `bytes`.
        notes: remarks for the user, such as how full the rows are and how much was cut off.
        held_out_of: of a mixture, which of the held-out rows are of which source.
        mixture: what the run takes of each source of a mixture.
        classes: for classification, the names of the classes in their order.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    identity: str
    held_out: dict[str, torch.Tensor]
    notes: list[str]
    held_out_of: dict[str, slice] = field(default_factory=dict)
    mixture: list[Ingredient] = field(default_factory=list)
    classes: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> int | None:
        """Embedding rows that the tokenizer needs; None for images."""
        return None if "pixel_values" in self.held_out else tokenizers.vocabulary_size(self.tokenizer)

    @property
    def described(self) -> dict[str, Any]:
        """What `plan.json` says of the data."""
        return {"text": self.notes, **({"mixture": [asdict(one) for one in self.mixture]} if self.mixture else {})}


@dataclass(frozen=True)
class _Part:
    """The prepared data of one source."""

    train: PackedRows | StreamedRows
    held_out: list[Row]
    notes: list[str]


def prepare_text(experiment: Experiment) -> PreparedData:
    """Open, tokenize and pack the data of an experiment; slow results are cached in `run.cache`.

    Call on one process first, then on the others, which find everything in the cache.
    """
    data, cache = experiment.data, cache_folder(experiment.run)
    if not data.is_language:
        corpus = sources.open_corpus(data, cache)
        processor = processing(data) if data.task == "image_classification" else tokenizer_for(experiment, [corpus])
        found = Classified(data, corpus, processor, cache, experiment.seed)
        return PreparedData(processor, found.train, found.identity, found.held_out, found.notes, classes=found.classes)
    corpora = for_each_source(data, lambda _, part: sources.open_corpus(part, cache))
    tokenizer = tokenizer_for(experiment, corpora)
    most = _held_out_counts(data)
    parts = for_each_source(data, lambda number, part: _part(
        part, corpora[number], tokenizer, most[number], cache, experiment.seed))
    train, identity = _together(data, [part.train for part in parts])
    rows = None if data.streaming else _rows_of_run(experiment.training, len(train))
    notes = [note for name, part in zip(source_names(data), parts, strict=True)
             for note in (part.notes if data.sources is None else [f"{name}: {one}" for one in part.notes])]
    if rows and experiment.training.steps and len(train) < experiment.training.batch_size:
        notes.append(f"there are fewer rows than the {experiment.training.batch_size} of one step: every step repeats "
                     "the same text")
    mixture = _ingredients(data, train, rows, experiment.seed)
    if mixture:
        notes.insert(0, f"mixture by tokens: {', '.join(map(str, mixture))}")
    held_out = _held_out(data, [part.held_out for part in parts])
    notes += _notes_on_held_out({name: len(own) for name, own in held_out.items()}, experiment.training, data)
    return PreparedData(tokenizer, train, identity, _stack([row for rows in held_out.values() for row in rows]), notes,
                        {} if data.sources is None else dict(_slices(held_out)), mixture)


def for_each_source(data: Data, do: Callable[[int, Data], T]) -> list[T]:
    """The results of a function for the data of each source; its errors name the source's own keys."""
    results = []
    for number, part in enumerate(data.parts):
        with of_source(None if data.sources is None else number):
            results.append(do(number, part))
    return results


def _part(data: Data, corpus: sources.Corpus, tokenizer: PreTrainedTokenizerBase, held_out_rows: int, cache: Path,
          seed: int) -> _Part:
    """Tokenize and pack one source, or prepare it to be streamed."""
    encoder, held = (encoder_for(tokenizer, data, documents) for documents in (corpus.train, corpus.validation))
    shape = {"capacity": data.sequence_length, "packing": data.packing, "plain": data.is_plain,
             "padding": tokenizer.pad_token_id}
    notes = [*notes_on_provenance(data.path), *encoder.notes,
             *notes_on_calls(islice(iter(corpus.train), LOOKED_AT), data)]
    if data.streaming:
        stream = StreamedRows(corpus.train, encoder, **shape, shuffle=(seed, data.shuffle_buffer))
        held_out = list(islice(StreamedRows(corpus.validation, held, **shape, shuffle=None).rows(), held_out_rows))
        if not held_out:
            raise UserError("data.validation", "the held-out documents have no token to learn",
                            way_out="name held-out text in `data.validation.path`")
        return _Part(stream, held_out, notes)
    train = _rows(corpus.train, encoder, cache, "data", shape)
    validation = _rows(corpus.validation, held, cache, "data.validation", shape)
    # Packing sorts rows by document length, so the held-out rows are a random sample, the same for every seed.
    order = validation.order(seed=0)
    held_out = [validation[order[index]] for index in range(min(len(validation), held_out_rows))]
    return _Part(train, held_out, _notes(train, data) + notes)


def _together(data: Data, parts: Sequence[Any]) -> tuple[Rows, str]:
    """The rows of all sources, and their identity."""
    if data.streaming:
        train: Rows = parts[0] if data.sources is None else MixedStreams(parts, weights_of(data))
        return train, fingerprint(data.model_dump(mode="json"))
    if data.sources is None:
        return parts[0], parts[0].folder.name
    return MixedRows(parts, weights_of(data)), fingerprint([part.folder.name for part in parts])


def _rows_of_run(training: Training, rows: int) -> int:
    """How many rows a run trains on, each as often as it does, where an epoch has `rows`."""
    return training.seen(rows) or training.steps * training.batch_size


def _ingredients(data: Data, train: Rows, rows: int | None, seed: int) -> list[Ingredient]:
    if isinstance(train, MixedRows):
        return train.ingredients(source_names(data), rows, seed)
    return [] if data.sources is None else [Ingredient(*one) for one in zip(source_names(data), weights_of(data),
                                                                             strict=True)]


def _held_out_counts(data: Data) -> list[int]:
    """How many rows each source holds out at most: its own number, or its share of that of all together."""
    whole = data.validation
    if data.sources is None or whole.path:  # a set that all sources name is evaluated on once
        return [part.validation.rows for part in data.parts]
    return [max(1, round(weight * whole.rows)) if source.validation is None else source.validation.rows
            for source, weight in zip(data.sources, weights_of(data), strict=True)]


def _held_out(data: Data, rows: Sequence[list[Row]]) -> dict[str, list[Row]]:
    """The held-out rows by name; a set that several sources name is in it once."""
    found: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for name, part, own in zip(source_names(data), data.parts, rows, strict=True):
        where = part.validation.path
        identity = fingerprint([where, part.validation.split, sources.fields(part)]) if where else name
        if identity not in seen:
            found[name if where is None or where in found else where] = own
        seen.add(identity)
    return found


def _slices(rows: dict[str, list[Row]]) -> Iterator[tuple[str, slice]]:
    """Where the rows of each name are, one name after the other."""
    begin = 0
    for name, own in rows.items():
        yield name, slice(begin, begin + len(own))
        begin += len(own)


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


def tokenizer_for(experiment: Experiment, corpora: Sequence[sources.Corpus]) -> PreTrainedTokenizerBase:
    """The tokenizer of an experiment: loaded, or trained on the training data of its sources and cached."""
    data, cache = experiment.data, Path(experiment.run.cache)
    origin = tokenizers.tokenizer_origin(data.tokenizer, experiment.with_weights)
    if origin is None:
        parts = [(part, corpus.train) for part, corpus in zip(data.parts, corpora, strict=True)]
        keys = IN_TOKENIZER | (set() if data.is_language else {"task", *data.read})
        identity = [[part.model_dump(mode="json", include=keys), _content(train)] for part, train in parts]
        folder = cache / "tokenizers" / fingerprint([VERSION, *(identity[0] if data.sources is None else identity)])
        if not (folder / "tokenizer.json").exists():
            partial = folder.with_name(f".{folder.name}-{os.getpid()}")
            tokenizers.train_tokenizer(parts, partial)
            keep_one(partial, folder)
        origin = ("data.tokenizer", str(folder), None)
    tokenizer = tokenizers.load_tokenizer(*origin, writes=data.is_language)
    name = experiment.objective.divergence.name if data.is_language else None
    tokenizers.check_models([*experiment.with_weights, *experiment.others_with_weights], tokenizer, name,
                            experiment.student.from_teacher is not None)
    return tokenizer


def encoder_for(tokenizer: PreTrainedTokenizerBase, data: Data, documents: sources.Documents) -> Encoder | IdEncoder:
    """Build the encoder for some documents; in those read as JSON, a null was written by the author of the data."""
    if data.input_ids:
        return IdEncoder(tokenizer, data)
    return Encoder(tokenizer, data, isinstance((documents.features or {}).get(data.messages), datasets.Json))


def _rows(documents: Any, encoder: Encoder | IdEncoder, cache: Path, key: str, shape: dict[str, Any]) -> PackedRows:
    fields = encoder.data.model_dump(mode="json", include={"text", *CHAT, "prompt", "response"})
    # Keys of later versions, so that what earlier ones have tokenized is found.
    later = encoder.data.model_dump(mode="json", include={"input_ids", "labels", "system"}, exclude_none=True)
    identity = [VERSION, _content(documents), {**fields, **later}, encoder.tokenizer.backend_tokenizer.to_str(),
                encoder.tokenizer.chat_template, encoder.end, encoder.start]
    folder = cache / "tokens" / fingerprint(identity)
    if not folder.exists():
        encode_to(folder, documents, encoder)
    return PackedRows(folder, **shape, key=key)


def _content(documents: Any) -> str:
    """Identity of a data set's content: `datasets` fingerprints files by path, size and modification time."""
    return str(getattr(documents, "_fingerprint", documents.info.dataset_name))


def _notes_on_held_out(rows: dict[str, int], training: Training, data: Data) -> list[str]:
    """How many rows an evaluation has, and whether that is too few to decide which step is the best."""
    count = sum(rows.values())
    of = "" if data.sources is None else f": {', '.join(f'{own:,} of {name}' for name, own in rows.items())}"
    notes = [f"{count:,} held-out row{'s' * (count != 1)}{of}"]
    if training.keep_best in HELD_OUT and training.steps != 0 and count < DECIDING:
        what = "training.keep_best and training.early_stopping decide" if training.early_stopping else \
            "training.keep_best decides"
        notes.append(f"{what} by fewer than {DECIDING} held-out rows: which evaluation is the best may be chance; "
                     "raise data.validation.rows, and hold out more text where there is too little")
    return notes


def _stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _notes(train: PackedRows, data: Data) -> list[str]:
    capacity = data.sequence_length
    share = train.tokens / (len(train) * capacity)
    notes = [f"{len(train):,} rows of {capacity} tokens, {share:.1%} full"]
    if train.cut and not data.is_plain:
        left_out = train.cut / (train.cut + train.tokens)
        notes.append(f"{left_out:.0%} of all tokens ({train.cut:,}) are left out: a record longer than a row loses its "
                     f"end, or has nothing to learn within it; data.sequence_length above {capacity} keeps more")
    return notes
