"""Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947): a teacher's answers, as text for a student.

Which answer a prompt gets depends on the prompt, the settings and its own seed, not on the prompts beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from strategies.common.generation_settings import generating, left_padded


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        new_tokens: most tokens of an answer, the one that ends it included.
        temperature: of sampling; 0 takes the most probable token each time.
        top_p: sample from the fewest most probable tokens that have this much of the probability together (Holtzman
            et al. 2020, nucleus sampling); 1 for all tokens.
        beams: beams of a beam search; 1 for none. The best of its ends is the mode that Kim & Rush train on.
        answers: answers to each prompt, which are samples, or the best of a beam search.

    Raises:
        ValueError: a number is out of range, or does not go with another.
    """

    new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    answers: int = 1

    def __post_init__(self) -> None:
        for name in ("new_tokens", "beams", "answers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a number from 1 on, not {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"the temperature is a number from 0 on, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a probability above 0, and at most 1, not {self.top_p}")
        if self.beams > 1 and self.temperature:
            raise ValueError("a beam search draws nothing: its temperature is 0")
        if self.top_p < 1 and not self.temperature:
            raise ValueError("top_p is for sampling, and at temperature 0 nothing is drawn")
        if self.answers > 1 and not self.temperature and self.answers > self.beams:
            raise ValueError(f"{self.answers} answers at temperature 0 are the same, or the best of as many beams")

    @property
    def width(self) -> int:
        """Sequences that are decoded at a time for one prompt."""
        return max(self.beams, self.answers)


@torch.no_grad()
def decode_answers(model: nn.Module, prompts: Sequence[Sequence[int]], decoding: Decoding, *, ends: Collection[int],
                   padding: int, seeds: Sequence[str]) -> list[list[list[int]]]:
    """The answers of a model to a batch of prompts.

    Args:
        model: a causal language model of transformers, in evaluation mode, not sharded.
        prompts: token ids of each prompt.
        ends: ids of the tokens that end an answer.
        padding: id of the padding token.
        seeds: one for each prompt, from which all its samples are drawn.

    Returns:
        For each prompt, the token ids of its answers, each with the token that ended it; one without was cut off after
        `new_tokens`.
    """
    each = decoding.answers if decoding.temperature else 1  # a beam search expands its prompts itself
    device = next(model.parameters()).device
    given, seen = left_padded([prompt for prompt in prompts for _ in range(each)], padding, device)
    settings = GenerationConfig(
        do_sample=False, num_beams=decoding.beams, num_return_sequences=decoding.answers if each == 1 else 1,
        max_new_tokens=decoding.new_tokens, eos_token_id=sorted(ends), pad_token_id=padding, use_cache=True)
    drawn = LogitsProcessorList()
    if decoding.temperature:
        numbers = [uniforms(f"{seed} {number}", decoding.new_tokens) for seed in seeds for number in range(each)]
        drawn.append(RowSampler(torch.stack(numbers).to(device), given.shape[1], decoding.temperature, decoding.top_p))
    with generating(model, settings):
        found = model.generate(input_ids=given, attention_mask=seen, logits_processor=drawn)
    answers = [_ended(row, ends) for row in found[:, given.shape[1]:].tolist()]
    return [answers[at:at + decoding.answers] for at in range(0, len(answers), decoding.answers)]


class RowSampler(LogitsProcessor):
    """Draws the next token of each row with numbers of its own, and leaves it as the only possible one.

    With transformers' own sampling all rows of a batch share one generator, so that a sample would depend on the rows
    beside it, and on where an interrupted work goes on.

    Args:
        draws: (rows, new tokens) numbers in [0, 1).
        begin: tokens before the first that is drawn.
        temperature: above 0.
        top_p: see `Decoding`.
    """

    def __init__(self, draws: torch.Tensor, begin: int, temperature: float, top_p: float = 1.0) -> None:
        self.draws, self.begin, self.temperature, self.top_p = draws, begin, temperature, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) scores that are 0 at the token of each row, and minus infinity elsewhere.

        Inversion: the first token at which the cumulative probability exceeds the number drawn.
        """
        probabilities = torch.softmax(scores.double() / self.temperature, -1)
        order = None
        if self.top_p < 1:
            probabilities, order = torch.sort(probabilities, stable=True, dim=-1, descending=True)
            probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < self.top_p)
        upto = probabilities.cumsum(-1)
        draw = self.draws[:, input_ids.shape[1] - self.begin, None].double() * upto[:, -1:]
        last = torch.searchsorted(upto, upto[:, -1:].contiguous())  # of those that are possible at all
        token = torch.searchsorted(upto, draw, right=True).minimum(last)
        if order is not None:
            token = order.gather(-1, token)
        return torch.full_like(scores, float("-inf")).scatter_(-1, token, 0.0)


def uniforms(seed: str, count: int) -> torch.Tensor:
    """(count,) float64 numbers in [0, 1), the same for the same seed on every device."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1
    return torch.rand(count, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def _ended(row: list[int], ends: Collection[int]) -> list[int]:
    """A row up to its first end token, without the padding after it."""
    return row[:next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]
