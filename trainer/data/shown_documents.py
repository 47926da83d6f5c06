"""Documents for people: their text with what is learned marked, and where the end of a row cuts them off."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text as Line
from transformers import PreTrainedTokenizerBase

from trainer.data.encoding import Document
from trainer.data.packing import cuts

SHOWN = 3  # records to show


def learned_of(document: Document) -> str:
    """How long a document is, and how much of it is learned."""
    return f"{len(document):,} tokens, {int(document.loss_mask.sum()):,} learned"


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
