"""Answers that a model writes with its most probable tokens, and whether they are the right ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from strategies.common.generation_settings import generating, left_padded
from trainer.evaluate.asking import Prompter, Reader, batches_by_length, shared
from trainer.evaluate.extraction import extracted, right_of
from trainer.evaluate.task_files import Question
from trainer.experiment.evaluate_nodes import Task

SHOWN = 5  # answers that are kept to look at
ALIKE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit, how much padding may change; others: 0.05


def answer_outcomes(reader: Reader, task: Task, questions: Sequence[Question], prompter: Prompter
                    ) -> tuple[dict[str, list[tuple[float, float]]], list[dict[str, Any]]] | None:
    """Whether what the model writes is the right answer, and a few of its answers to look at.

    Returns None if a process received a stop signal.
    """
    written = write_answers(reader, [prompter.ids(reader, question) for question in questions], task.max_new_tokens,
                            task.ends, prompter.closing)
    if written is None:
        return None
    pairs = [(extracted(task, text), right_of(task, question.answer))
             for text, question in zip(written, questions, strict=True)]
    shown = [{"line": question.line, "prompt": question.prompt, "written": text, "found": found, "right": right}
             for question, text, (found, right) in zip(questions[:SHOWN], written, pairs, strict=False)]
    return {"exact_match": [(float(found is not None and found == right), 1.0) for found, right in pairs]}, shown


def write_answers(reader: Reader, prompts: Sequence[list[int]], most: int, ends: Sequence[str], closing: str = ""
                  ) -> list[str] | None:
    """What a model writes after each prompt, greedily, whatever its own settings for generation say.

    Args:
        prompts: token ids of each.
        most: maximum number of tokens to write; prompts too long for that are cut off at their beginning.
        ends: texts that end an answer, and are not part of it.
        closing: what the chat template closes an answer with.

    Returns:
        The answers, or None if a process received a stop signal. They do not depend on how prompts are batched, as far
        as the model's arithmetic does not.
    """
    room = max(1, reader.length - most)
    given = [prompt[-room:] or [reader.before] for prompt in prompts]
    most = max(1, min(most, reader.length - max(map(len, given))))
    stops = end_tokens(reader.plain, reader.tokenizer, closing)
    with greedy(reader.plain, reader.tokenizer, stops, most):
        alike = not reader.apart and pads_alike(reader, given)
        batches = batches_by_length([len(ids) + most for ids in given], reader.tokens, reader.apart) if alike else [
            part for group in _by_length(given) for part in _parts(group, max(1, reader.tokens // (
                len(given[group[0]]) + most)), reader.apart)]
        found = shared(batches, lambda batch: _written(reader, [given[index] for index in batch], ends, stops),
                       reader.ranks, "batches of answers")
    return None if found is None else [found[index] for index in range(len(prompts))]


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, closing: str = "") -> list[int]:
    """Tokens that end an answer: those that the model and the tokenizer name, and the one that closes a chat's turn."""
    named = model.generation_config.eos_token_id
    found = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    turn = tokenizer(closing, add_special_tokens=False)["input_ids"] if closing else []
    if len(turn) == 1:
        found.append(turn[0])
    return sorted({one for one in found if one is not None})


@contextmanager
def greedy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, stops: list[int], most: int | None) -> Iterator[None]:
    """Context in which `model.generate` takes the most probable tokens, up to an end token."""
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with generating(model, GenerationConfig(max_new_tokens=most, eos_token_id=stops, pad_token_id=padding,
                                            do_sample=False)):
        yield


class _Ends(StoppingCriteria):
    """Ends each row of a batch once the text that it has written holds one of the ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[str], begin: int) -> None:
        self.tokenizer, self.ends, self.begin = tokenizer, ends, begin
        self.longest = max(len(end.encode()) for end in ends)  # tokens of an end at most

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        new = input_ids[:, max(self.begin, input_ids.shape[1] - self.longest - 2):]
        said = self.tokenizer.batch_decode(new, skip_special_tokens=False)
        return torch.tensor([any(end in text for end in self.ends) for text in said], device=input_ids.device)


@torch.no_grad()
def _written(reader: Reader, prompts: Sequence[list[int]], ends: Sequence[str], stops: Sequence[int]) -> list[str]:
    """The answers to prompts of one batch, within `greedy`."""
    new = _generate(reader, prompts, [_Ends(reader.tokenizer, ends, max(map(len, prompts)))] if ends else [])
    texts = []
    for row in new.tolist():
        stop = next((index for index, token in enumerate(row) if token in stops), len(row))
        text = reader.tokenizer.decode(row[:stop], skip_special_tokens=True)
        texts.append(text[:min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))])
    return texts


def _generate(reader: Reader, prompts: Sequence[list[int]], criteria: list[StoppingCriteria]) -> torch.Tensor:
    """(rows, written) new tokens after prompts that are padded on their left."""
    ids, seen = left_padded(prompts, reader.plain.generation_config.pad_token_id, reader.ranks.device)
    with reader.autocast():
        out = reader.plain.generate(input_ids=ids, attention_mask=seen, stopping_criteria=criteria)
    return out[:, ids.shape[1]:]


@torch.no_grad()
def pads_alike(reader: Reader, prompts: Sequence[list[int]]) -> bool:
    """Whether padding leaves a model's predictions as they are; one with own ideas of positions gets none.

    The shortest prompt is read alone and padded as beside the longest; the logits after both have to agree.
    """
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    if len(shortest) == len(longest):
        return True
    settings = reader.plain.generation_config
    kept = settings.max_new_tokens
    settings.max_new_tokens = 1
    try:
        logits = []
        for batch in ([shortest], [shortest, longest]):
            ids, seen = left_padded(batch, settings.pad_token_id, reader.ranks.device)
            with reader.autocast():
                out = reader.plain.generate(input_ids=ids, attention_mask=seen, output_logits=True,
                                            return_dict_in_generate=True)
            logits.append(out.logits[0][0])
    finally:
        settings.max_new_tokens = kept
    allowed = ALIKE.get(logits[0].dtype, 0.05) * float(logits[0].float().abs().max())
    return float((logits[0].float() - logits[1].float()).abs().max()) <= allowed


def _by_length(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Indices of prompts, grouped by their lengths, the longest first."""
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(index)
    return [groups[length] for length in sorted(groups, reverse=True)]


def _parts(group: list[int], size: int, apart: bool) -> list[list[int]]:
    size = 1 if apart else size
    return [group[begin:begin + size] for begin in range(0, len(group), size)]
