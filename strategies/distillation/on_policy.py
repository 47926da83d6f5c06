"""On-policy distillation: sequences that the student generates, on which its teacher then teaches it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationConfig

from strategies.common.generation_settings import generating, left_padded
from strategies.distillation.losses.response import IGNORED


@torch.no_grad()
def written_rows(student: nn.Module, batch: dict[str, torch.Tensor], *, prompt_tokens: int, new_tokens: int,
                 temperature: float, end: int, padding: int, seed: int) -> dict[str, torch.Tensor]:
    """Let the student continue the prompts of a batch by sampling (Agarwal et al. 2024, GKD, algorithm 1).

    The prompt of a row is its first document up to the first target, or up to `prompt_tokens` tokens if that is more.
    Only the generated tokens become targets, up to the first end-of-sequence token. Sampling runs without gradients.

    Args:
        student: a transformers model without wrappers, not sharded.
        batch: `input_ids`, `position_ids`, `targets` (rows, length).
        prompt_tokens: least length of a prompt, for texts whose targets begin with the first token.
        new_tokens: most tokens to generate; a row ends earlier when it is full.
        temperature: of the sampling.
        end, padding: token ids.
        seed: of the sampling; the global generators are left unchanged.

    Returns:
        the same names and shapes, and `length` (rows,), the number of tokens before the padding.
    """
    rows, length = batch["input_ids"].shape
    device = batch["input_ids"].device
    prompts = [_prompt(*row, prompt_tokens) for row in zip(batch["input_ids"], batch["position_ids"], batch["targets"],
                                                           strict=True)]
    given, seen = left_padded(prompts, padding, device)  # all continue at the same index
    settings = GenerationConfig(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
                                eos_token_id=end, pad_token_id=padding)
    with generating(student, settings), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = student.generate(input_ids=given, attention_mask=seen)
    found = [_row(prompt, new[given.shape[1]:], length, end, padding) for prompt, new in zip(prompts, out, strict=True)]
    ids, targets, lengths = (torch.stack(parts) for parts in zip(*found, strict=True))
    return {"input_ids": ids, "targets": targets, "length": lengths,
            "position_ids": torch.arange(length, device=device).expand(rows, -1).contiguous()}


def _prompt(ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, least: int) -> torch.Tensor:
    """The beginning of a row's first document, to be used as prompt."""
    starts = torch.argwhere(positions[1:] == 0)
    document = int(starts[0]) + 1 if len(starts) else len(ids)
    loss_mask = torch.argwhere(targets[:document] != IGNORED)
    first = int(loss_mask[0]) + 1 if len(loss_mask) else document
    return ids[:min(max(first, least), document, len(ids) - 1)]


def _row(prompt: torch.Tensor, new: torch.Tensor, length: int, end: int, padding: int
         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and targets (length,) of a prompt with its continuation, and the number of tokens before the padding."""
    ends = torch.argwhere(new == end)
    new = new[:int(ends[0]) + 1 if len(ends) else len(new)][:length - len(prompt)]
    ids, targets = prompt.new_full((length,), padding), prompt.new_full((length,), IGNORED)
    ids[:len(prompt) + len(new)] = torch.cat([prompt, new])
    targets[len(prompt) - 1:len(prompt) + len(new) - 1] = new
    return ids, targets, torch.tensor(len(prompt) + len(new), device=ids.device)
