"""`limbeck show-data`: print a few records with their loss mask, and where the end of a row cuts them off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text as Line
from transformers import PreTrainedTokenizerBase

from trainer.data import sources
from trainer.data.dataset import cache_folder, encoder_for, for_each_source, tokenizer_for
from trainer.data.encoding import Document, Encoder
from trainer.data.messages import notes_on_calls, read_conversation, thoughts_of
from trainer.data.packing import cuts
from trainer.data.token_ids import IdEncoder
from trainer.experiment.data_nodes import Data, source_names, weights_of
from trainer.experiment.experiment import Experiment

SHOWN, COUNTED = 3, 200  # records to print, and records to compute statistics over


def show_data(experiment: Experiment, console: Console) -> None:
    """Print records of the training data, with targets colored, or in [[brackets]] if the output has no color.

    Raises:
        UserError: as in a run, for mistakes in the data and tokenizer; only the first records are read.
    """
    data, cache = experiment.data, cache_folder(experiment.run)
    corpora = for_each_source(data, lambda _, part: sources.open_corpus(part, cache))
    tokenizer = tokenizer_for(experiment, corpora)
    names = source_names(data)

    def show(number: int, part: Data) -> None:
        if data.sources is not None:
            console.print(Line(f"{names[number]}, {weights_of(data)[number]:.1%} of the tokens", style="bold"))
        read = list(islice(iter(corpora[number].train), COUNTED))
        _show_records(read, encoder_for(tokenizer, part, corpora[number].train), console)

    for_each_source(data, show)


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


def learned_of(document: Document) -> str:
    """How long a document is, and how much of it is learned."""
    return f"{len(document):,} tokens, {int(document.loss_mask.sum()):,} learned"


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


def shown_document(tokenizer: PreTrainedTokenizerBase, document: Document, capacity: int, plain: bool, color: bool
                   ) -> Line:
    """The text of a document, with its targets and the ends of rows marked."""
    line, kept = Line(), list(cuts(document.loss_mask, capacity, plain))
    for begin, end, loss_mask in _runs(document, capacity):
        if begin and begin % capacity == 0:
            line.append(f"\n--- a row ends here{'' if plain else '; what follows is left out'} ---\n", style="red")
        used = loss_mask and any(piece.start < end and begin < piece.stop for piece in kept)
        text = tokenizer.decode(document.tokens[begin:end].tolist(), clean_up_tokenization_spaces=False)
        text = text.replace("\x1b", "\N{SYMBOL FOR ESCAPE}")  # data must not send escape sequences to the terminal
        if color:
            line.append(text, style="green" if used else "dim")
        else:
            line.append(f"[[{text}]]" if used else text)
    return line


def _runs(document: Document, capacity: int) -> Iterator[tuple[int, int, bool]]:
    """(begin, end, whether targets) of maximal runs of tokens with the same loss mask within a row."""
    loss_mask, begin = document.loss_mask.copy(), 0
    loss_mask[::capacity] = False  # a row's first token has no context to be predicted from
    for at in range(1, len(loss_mask) + 1):
        if at == len(loss_mask) or loss_mask[at] != loss_mask[begin] or at % capacity == 0:
            yield begin, at, bool(loss_mask[begin])
            begin = at
