"""Log-likelihoods of texts after others: of the choices of a question, and of whole texts in windows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.evaluate.asking import Prompter, Reader, batches_by_length, shared
from trainer.evaluate.task_files import Question

WINDOW = 2048  # most tokens of a window: a long context would need many bytes of logits


@dataclass(frozen=True)
class Passage:
    """Token ids, the last `counted` of which are predicted from those before them."""

    ids: list[int]
    counted: int


def choice_outcomes(reader: Reader, questions: Sequence[Question], prompter: Prompter
                    ) -> dict[str, list[tuple[float, float]]] | None:
    """Whether the right choice is the likeliest after its question, as it is and per character of the choice.

    These are `acc` and `acc_norm` of lm-evaluation-harness. Returns None if a process received a stop signal.
    """
    passages = [passage_of(reader, text, prompter.separator + choice, prompter.start(reader, text))
                for question in questions for text in [prompter(question)] for choice in question.choices]
    found = log_likelihoods(reader, passages)
    if found is None:
        return None
    plain, per_character, begin = [], [], 0
    for question in questions:
        own = found[begin:begin + len(question.choices)]
        begin += len(own)
        each = [value / len(choice) for value, choice in zip(own, question.choices, strict=True)]
        plain.append((float(own.index(max(own)) == question.right), 1.0))
        per_character.append((float(each.index(max(each)) == question.right), 1.0))
    return {"accuracy": plain, "accuracy_per_character": per_character}


def text_outcomes(reader: Reader, questions: Sequence[Question]) -> dict[str, list[tuple[float, float]]] | None:
    """(bits, bytes) of each text, every token of which is predicted once.

    A text is read in windows without overlap, each from the last token of the one before; the first from the token that
    begins texts. Returns None if a process received a stop signal.
    """
    passages, owners = [], []
    for number, question in enumerate(questions):
        for window in windows(reader.encode(question.answer), reader.before, min(WINDOW, reader.length)):
            passages.append(window)
            owners.append(number)
    found = log_likelihoods(reader, passages)
    if found is None:
        return None
    nats = [0.0] * len(questions)
    for number, value in zip(owners, found, strict=True):
        nats[number] -= value
    return {"bits_per_byte": [(own / math.log(2), float(len(question.answer.encode())))
                              for own, question in zip(nats, questions, strict=True)]}


def windows(ids: list[int], before: int, length: int) -> Iterator[Passage]:
    """Windows of at most `length` predicted tokens each, that together predict every token of a text once."""
    for begin in range(0, len(ids), length):
        part = ids[begin:begin + length]
        yield Passage([ids[begin - 1] if begin else before, *part], len(part))


def passage_of(reader: Reader, prompt: str, answer: str, start: Sequence[int] = ()) -> Passage:
    """An answer after its prompt, tokenized as one text: white space at the end of the prompt belongs to the answer.

    What does not fit the model is cut off from the beginning of the prompt.

    Args:
        start: token ids before the prompt.
    """
    spaces = len(prompt) - len(prompt.rstrip())
    prompt, answer = prompt[:len(prompt) - spaces], prompt[len(prompt) - spaces:] + answer
    if not prompt:
        ids = reader.encode(answer)
        return Passage([reader.before, *ids], len(ids))
    context, whole = [*start, *reader.encode(prompt)], [*start, *reader.encode(prompt + answer)]
    counted = max(1, len(whole) - len(context))  # an answer may have become part of the prompt's last token
    ids = [*context, *whole[len(context):]]
    return Passage(ids[-(reader.length + 1):], min(counted, reader.length))


@torch.no_grad()
def log_likelihoods(reader: Reader, passages: Sequence[Passage]) -> list[float] | None:
    """Log-likelihood in nats of the counted tokens of each passage; None if a process received a stop signal."""
    names = inspect.signature(reader.plain.forward).parameters
    device, padding = reader.ranks.device, reader.tokenizer.pad_token_id or 0

    def read(batch: list[int]) -> list[float]:
        own = [passages[index] for index in batch]
        longest = max(len(one.ids) for one in own) - 1
        ids = torch.full((len(own), longest), padding)
        seen = torch.zeros_like(ids)
        for row, one in enumerate(own):
            ids[row, :len(one.ids) - 1] = torch.tensor(one.ids[:-1])
            seen[row, :len(one.ids) - 1] = 1
        first = min(len(one.ids) - 1 - one.counted for one in own)
        kept = {"logits_to_keep": longest - first} if "logits_to_keep" in names else {}
        with reader.autocast():
            logits = reader.called(input_ids=ids.to(device), attention_mask=seen.to(device), use_cache=False,
                                   **kept).logits
        begin = longest - logits.shape[1]
        return [_of_row(row[len(one.ids) - 1 - one.counted - begin:len(one.ids) - 1 - begin], one.ids[-one.counted:])
                for row, one in zip(logits, own, strict=True)]

    mode = reader.called.training
    reader.called.eval()
    try:
        batches = batches_by_length([len(one.ids) for one in passages], reader.tokens, reader.apart)
        found = shared(batches, read, reader.ranks, "batches of texts")
    finally:
        reader.called.train(mode)
    return None if found is None else [found[index] for index in range(len(passages))]


def _of_row(logits: torch.Tensor, targets: list[int]) -> float:
    """Sum of the log-probabilities of targets (n,) by their logits (n, vocabulary)."""
    wanted = torch.tensor(targets, device=logits.device)
    return -float(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").double().sum())
