"""What a dry run says of the data: the first records of each local source, checked, counted and shown.

Nothing is downloaded, and nothing stays on the disk. A small source is read whole, and its figures are those of the
run; of a larger one the first records are read, and the figures of the whole follow from them.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from trainer.data import sources
from trainer.data.dataset import encoder_for, for_each_source
from trainer.data.encoding import Document
from trainer.data.messages import notes_on_calls
from trainer.data.packing import cuts, pack
from trainer.data.provenance import notes_on_provenance
from trainer.data.shown_documents import SHOWN, learned_of, shown_document
from trainer.data.tokenizers import Origin, load_tokenizer, train_tokenizer
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data, source_names, weights_of

SMALL = 2 * 2**20  # bytes of a source that is read whole
READ, CHARACTERS = 200, 2**20  # most records to read of a larger one, and characters in them
COUNTED = 4 * 2**20  # bytes of a file whose records are counted, to estimate those of the others
LONGEST = 800  # characters to show of a record
Records = list[dict[str, Any]]


@dataclass
class Preview:
    """What is known of one source.

    Attributes:
        source: its name.
        weight: its share of the tokens.
        not_looked_at: why it was not read; "" if it was.
        exact: whether the figures are those of a run; else they are estimates.
        read: records that were read.
        records: records to train on; None if it is not known how many there are.
        rows: rows to train on.
        tokens: tokens in them, without padding.
        learned: share of these tokens that is learned.
        left_out: share of all tokens that is in no row.
        cut: share of records that are longer than a row.
        notes: remarks, such as how the chat template writes them.
        examples: the first records as they are learned, what is learned in [[brackets]].
    """

    source: str
    weight: float
    not_looked_at: str = ""
    exact: bool = False
    read: int = 0
    records: int | None = None
    rows: int | None = None
    tokens: int | None = None
    learned: float = 0.0
    left_out: float = 0.0
    cut: float = 0.0
    notes: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


def preview(data: Data, origin: Origin | None, cache: Path | None = None) -> list[Preview]:
    """Look at the first records of each source.

    Args:
        data: the data of the experiment.
        origin: where its tokenizer is; None to train one on the records that are read.
        cache: the folder shared between runs, which may have data of the hub from an earlier one.

    Raises:
        UserError: as in a run, for mistakes in these records, their fields and the chat template.
    """
    named = [Preview(*one) for one in zip(source_names(data), weights_of(data), strict=True)]
    with tempfile.TemporaryDirectory(prefix="limbeck-") as folder:
        opened = for_each_source(data, lambda number, part: _opened(part, named[number], Path(folder), cache))
        looked = [(part, _first(documents, named[number].exact))
                  for number, (part, documents) in enumerate(zip(data.parts, opened, strict=True)) if documents]
        tokenizer = tokenizer_here(origin, looked, Path(folder)) if looked else None

        def look(number: int, part: Data) -> Preview:
            found, documents = named[number], opened[number]
            if documents is None or tokenizer is None:
                found.not_looked_at = found.not_looked_at or "its tokenizer is not on this machine"
                return found
            return _counted(found, part, documents, tokenizer)

        looked_at = for_each_source(data, look)
    if origin is None and not all(one.exact for one in looked_at):
        for one in looked_at:
            one.exact = False
            one.notes.append("the tokenizer of the run is trained on more text than what was read here")
    return looked_at


def _opened(data: Data, found: Preview, folder: Path, cache: Path | None) -> sources.Documents | None:
    """The training documents of a source: all that a run has if it is small, else a stream; None if it is not here."""
    if not sources.is_local(data.path):
        documents = None if cache is None else sources.from_hub_cache(data, cache)
        if documents is None:
            found.not_looked_at = ("it is no local data, so that its fields, template and number of rows are unknown; "
                                   "limbeck show-data downloads and shows it")
        else:
            found.notes.append("this is the copy of an earlier run in run.cache; a run asks the hub for a newer one")
        return documents
    held_out = data.validation.path
    if held_out is not None:
        sources.check_path(held_out, "data.validation.path")
    here = held_out is None or sources.is_local(held_out)
    found.exact = here and not data.streaming and data.path != sources.PYTHON_LIBRARY and sum(
        Path(file).stat().st_size for path in (data.path, held_out) if path for file in sources.files_of(path)) <= SMALL
    if found.exact:
        return sources.open_corpus(data, folder).train
    streamed = data.model_copy(update={"streaming": data.path != sources.PYTHON_LIBRARY,  # which is read whole anyway
                                       "split": data.split.partition("[")[0]})
    return sources.open_training(streamed, folder)


def _first(documents: Iterable[dict[str, Any]], everything: bool) -> Records:
    """The first records of some documents."""
    if everything:
        return list(documents)
    records, size = [], 0
    for record in islice(documents, READ):
        records.append(record)
        size += sum(len(value) for value in record.values() if isinstance(value, str))
        if size > CHARACTERS and len(records) >= SHOWN:
            break
    return records


def tokenizer_here(origin: Origin | None, looked: Sequence[tuple[Data, Records]], folder: Path, writes: bool = True
                   ) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a run, or one that is trained on these records; None if it is not on this machine."""
    if origin is None:
        train_tokenizer(looked, folder / "tokenizer")
        return load_tokenizer("data.tokenizer", str(folder / "tokenizer"), None, writes)
    try:
        return load_tokenizer(*origin, writes, local_files_only=True)
    except UserError:
        if Path(origin[1]).exists():
            raise
        return None


def _counted(found: Preview, data: Data, documents: sources.Documents, tokenizer: PreTrainedTokenizerBase
             ) -> Preview:
    """Encode the first records of a source, and count and show what is learned of them."""
    records = _first(documents, found.exact)
    encoder = encoder_for(tokenizer, data, documents)
    encoded = [encoder([record]) for record in records]
    found.read, found.examples = len(records), _examples(encoded, data, tokenizer)
    found.notes += [*notes_on_provenance(data.path), *encoder.notes, *notes_on_calls(records, data)]
    every = [document for one in encoded for document in one]
    capacity = data.sequence_length
    pieces = [document[cut] for document in every for cut in cuts(document.loss_mask, capacity, data.is_plain)]
    if not pieces:
        raise UserError("data", f"no document has a token to learn within {capacity} tokens",
                        way_out="check the fields, or raise `data.sequence_length`")
    rows, tokens = sum(1 for _ in pack(pieces, capacity, data.packing)), sum(map(len, pieces))
    found.learned = sum(int(piece.loss_mask[1:].sum()) for piece in pieces) / tokens
    found.left_out = 1 - tokens / sum(map(len, every))
    found.cut = sum(len(document) > capacity for document in every) / len(every)
    found.records, times = (len(records), 1.0) if found.exact else _whole(data, documents, records)
    if found.records is not None:
        found.rows, found.tokens = round(rows * times), round(tokens * times)
    return found


def _examples(encoded: list[list[Document]], data: Data, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    shown = []
    for number, documents in enumerate(encoded[:SHOWN], 1):
        for document in documents:
            text = shown_document(tokenizer, document, data.sequence_length, data.is_plain, color=False).plain
            more = f" ... and {len(text) - LONGEST:,} characters more" if len(text) > LONGEST else ""
            shown.append(f"record {number}: {learned_of(document)}\n{text[:LONGEST]}{more}")
    return shown


def _whole(data: Data, documents: sources.Documents, read: Records) -> tuple[int | None, float]:
    """About how many records a run trains on, and how many times those that were read; None if it is not known."""
    count, size = _size(data, documents)
    if not count:
        return None, 1.0
    kept = min(count, data.max_documents or count)
    if not data.validation.path and not data.validation.split:
        held_out = data.validation.rows if data.streaming else round(kept * data.validation.fraction)
        kept = max(1, kept - max(1, held_out))
    if not size:
        return kept, kept / len(read)
    return kept, kept / count * size / max(1, sum(len(record["text"].encode()) for record in read))


def _size(data: Data, documents: sources.Documents) -> tuple[int | None, int | None]:
    """About how many records a source has, None if it is not known; and their bytes, if they are plain text files."""
    if not sources.is_local(data.path):
        return (None if "[" in data.split else len(documents)), None
    if data.path == sources.PYTHON_LIBRARY:
        return len(documents), sum(len(text.encode()) for text in documents["text"])
    files = sources.files_of(data.path)
    sizes = [Path(file).stat().st_size for file in files]
    kinds = {sources.BUILDERS[Path(file).suffix] for file in files}
    if len(kinds) != 1 or "[" in data.split:
        return None, None
    (kind,) = kinds
    if kind == "text":
        return len(files), sum(sizes)
    if kind == "parquet":
        return sum(parquet.read_metadata(file).num_rows for file in files), None
    return round(_records_per_byte(files[0], kind) * sum(sizes)), None


def _records_per_byte(file: str, kind: str) -> float:
    """Records per byte at the beginning of a JSON or CSV file; 0 if it is one array of JSON."""
    with open(file, "rb") as handle:
        begin = handle.read(COUNTED)
    if kind == "json":
        return 0.0 if begin.lstrip()[:1] == b"[" else begin.count(b"\n") / len(begin)
    csv.field_size_limit(COUNTED)
    return (sum(1 for _ in csv.reader(io.StringIO(begin.decode(errors="replace")))) - 1) / len(begin)
