"""How much each block changes the hidden states, and models without some of their blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from strategies.common.blockwise_calibration import Batch, find_blocks
from strategies.pruning.structured.calibration_rows import counted, inputs_of, only_counted


@torch.no_grad()
def block_influence(model: nn.Module, batches: Sequence[Batch]) -> torch.Tensor:
    """(blocks,) 1 - mean cosine similarity of each block's input and output, over all tokens that count.

    Source: ShortGPT (Men et al. 2024, arXiv 2403.03853, equation 1).

    Raises:
        ValueError: the model has no list of blocks, or states are not finite.
    """
    _, blocks = find_blocks(model)
    sums, tokens = torch.zeros(len(blocks), dtype=torch.float64), [0] * len(blocks)
    mask: list[torch.Tensor | None] = [None]

    def hook(number: int, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        before, after = _hidden(args, kwargs), output if isinstance(output, torch.Tensor) else output[0]
        similar = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).flatten()
        similar = only_counted(similar, mask[0])
        sums[number] += (1 - similar.double()).sum().cpu()
        tokens[number] += len(similar)

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.enter_context(block.register_forward_hook(
                lambda _, args, kwargs, output, number=number: hook(number, args, kwargs, output), with_kwargs=True))
        for batch in batches:
            mask[0] = counted(batch)
            model(**inputs_of(batch))
    found = sums / torch.tensor(tokens)
    if not found.isfinite().all():
        raise ValueError("layers: hidden states on the calibration rows are not finite, or there is no token")
    return found


@contextmanager
def without_blocks(model: nn.Module, kept: Sequence[int], batch: Batch) -> Iterator[None]:
    """Within the context, the other blocks pass on what enters them, in the form that blocks of this model return."""
    _, blocks = find_blocks(model)
    form: list[bool] = []
    handle = blocks[0].register_forward_hook(lambda _, __, output: form.append(isinstance(output, tuple)))
    with torch.no_grad():
        model(**inputs_of(batch))
    handle.remove()

    def passing(*args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(args, kwargs)
        return (hidden,) if form[0] else hidden

    skipped = [block for number, block in enumerate(blocks) if number not in kept]
    try:
        for block in skipped:
            block.forward = passing
        yield
    finally:
        for block in skipped:
            del block.forward


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]
