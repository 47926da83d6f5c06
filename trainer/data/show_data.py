"""`limbeck show-data`: print a few records with their loss mask, and where the end of a row cuts them off."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text as Line
from transformers import PreTrainedTokenizerBase

from trainer.data import sources
from trainer.data.classified_here import Here
from trainer.data.classified_preview import ClassifiedPreview, look
from trainer.data.dataset import cache_folder, encoder_for, for_each_source, tokenizer_for
from trainer.data.encoding import Document, Encoder
from trainer.data.messages import notes_on_calls, read_conversation, thoughts_of
from trainer.data.packing import cuts
from trainer.data.shown_documents import SHOWN, learned_of, shown_document
from trainer.data.token_ids import IdEncoder
from trainer.experiment.data_nodes import Data, source_names, weights_of
from trainer.experiment.experiment import Experiment

COUNTED = 200  # records to compute statistics over


def show_data(experiment: Experiment, console: Console) -> None:
    """Print records of the training data, with targets colored, or in [[brackets]] if the output has no color.

    Raises:
        UserError: as in a run, for mistakes in the data and tokenizer; only the first records are read.
    """
    data, cache = experiment.data, cache_folder(experiment.run)
    if not data.is_language:
        corpus = sources.open_corpus(data, cache)
        tokenizer = None if data.task == "image_classification" else tokenizer_for(experiment, [corpus])
        _show_classified(data, Here(corpus.train, corpus.validation), tokenizer, console)
        return
    corpora = for_each_source(data, lambda _, part: sources.open_corpus(part, cache))
    tokenizer = tokenizer_for(experiment, corpora)
    names = source_names(data)

    def show(number: int, part: Data) -> None:
        if data.sources is not None:
            console.print(Line(f"{names[number]}, {weights_of(data)[number]:.1%} of the tokens", style="bold"))
        read = list(islice(iter(corpora[number].train), COUNTED))
        _show_records(read, encoder_for(tokenizer, part, corpora[number].train), console)

    for_each_source(data, show)


def _show_classified(data: Data, here: Here, tokenizer: PreTrainedTokenizerBase | None, console: Console) -> None:
    """Print the first of some classified records, and how many there are of each class."""
    found = ClassifiedPreview(data.path)
    look(found, data, here, tokenizer)
    for example in found.examples:
        title, _, rest = example.partition("\n")
        console.print(Line(title, style="bold"))
        console.print(Line(rest), soft_wrap=True)
    console.print(Line("\n".join(f"{name}: {value}" for name, value in found.rows)), soft_wrap=True)


def _show_records(read: list[dict[str, Any]], encoder: Encoder | IdEncoder, console: Console) -> None:
    """Print the first of some records, and statistics over all of them."""
    data, tokenizer = encoder.data, encoder.tokenizer
    records = [encoder([record]) for record in read]
    for number, documents in enumerate(records[:SHOWN], 1):
        for part, document in enumerate(documents, 1):
            of = f", sample {part} of {len(documents)}" if len(documents) > 1 else ""
            console.print(Line(f"record {number}{of}: {learned_of(document)}", style="bold"))
            console.print(shown_document(tokenizer, document, data.sequence_length, data.is_plain, console.is_terminal),
                          soft_wrap=True)
    documents = [document for record in records for document in record]
    thoughts = [] if isinstance(encoder, IdEncoder) else left_out_thoughts(
        tokenizer, encoder, zip(read, records, strict=True))
    console.print(Line("\n".join([*summary(documents, len(records), data.sequence_length, data.is_plain), *thoughts,
                                  *encoder.notes, *notes_on_calls(read, data)])), soft_wrap=True)


def summary(documents: list[Document], records: int, capacity: int, plain: bool) -> list[str]:
    """Describe which share of some documents the loss covers, and what is left out."""
    pieces = [[document[cut] for cut in cuts(document.loss_mask, capacity, plain)] for document in documents]
    tokens = sum(map(len, documents))
    kept = [piece for found in pieces for piece in found]
    learned = sum(int(piece.loss_mask[1:].sum()) for piece in kept)  # a piece's first token has no context
    longer = sum(len(document) > capacity for document in documents)
    lines = [f"of the first {records:,} records, {tokens:,} tokens: {learned / max(1, tokens):.0%} are learned"]
    if longer:
        cut = "cut into rows" if plain else "cut off there"
        lines.append(f"{longer:,} of {len(documents):,} are longer than the {capacity:,} tokens of a row, and {cut}")
    if nothing := sum(not found for found in pieces):
        lines.append(f"{nothing:,} of {len(documents):,} have nothing to learn within a row, and are left out")
    return lines


def left_out_thoughts(tokenizer: PreTrainedTokenizerBase, encoder: Encoder,
                      records: Iterable[tuple[dict[str, Any], list[Document]]]) -> list[str]:
    """A note on how many answers have reasoning text that the chat template leaves out, so that it is not learned."""
    if not encoder.data.messages:
        return []
    every = missing = 0
    for record, documents in records:
        messages, _ = read_conversation(record, encoder.data, encoder.as_written)
        thoughts = [thought for message in messages if message["role"] == "assistant"
                    if (thought := thoughts_of(message))]
        loss_mask = "\n".join(tokenizer.decode(one.tokens[one.loss_mask].tolist(), clean_up_tokenization_spaces=False)
                           for one in documents) if thoughts else ""
        every += len(thoughts)
        missing += sum(thought.splitlines()[-1].strip() not in loss_mask for thought in thoughts)
    return [f"{missing:,} of {every:,} answers with thoughts are learned without them: the chat template leaves them "
            "out"] if missing else []
