"""Where inputs leave a model by the confidence of its exits, computed at full depth: what the exported code must do.

The rule (survey eq. 10; Teerapittayanon et al. 2016, algorithm 1, with the largest probability in place of the
entropy): an input leaves at the first exit whose largest softmax probability reaches the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from strategies.common.model_blocks import block_list

TILE = 256  # tokens whose logits of a language model exist at a time


def confidence(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(batch,) largest softmax probability of each row; of a row with logits for each token that of its least sure one.

    Args:
        logits: (batch, classes) or (batch, sequence, classes).
        mask: (batch, sequence) 1 where a token is not padding.
    """
    sure = logits.float().softmax(-1).amax(-1)
    if sure.ndim == 1:
        return sure
    return (sure if mask is None else sure.masked_fill(mask == 0, 1.0)).amin(1)


def first_confident(sure: torch.Tensor, threshold: float) -> torch.Tensor:
    """(rows,) number of the exit where each row leaves; that of the model's own head, behind the last exit, for none.

    Args:
        sure: (rows, exits) confidences.
    """
    reached = torch.cat([sure >= threshold, torch.ones_like(sure[:, :1], dtype=torch.bool)], 1)
    return reached.int().argmax(1)


@torch.no_grad()
def classifier_logits(model: nn.Module, exits: nn.ModuleDict, inputs: Mapping[str, Any]) -> torch.Tensor:
    """(exits + 1, batch, ..., classes) fp32 logits of each exit and, last, of the model's own head.

    Args:
        model: in evaluation mode, without its exits.
    """
    found: list[torch.Tensor] = []

    def keep(layer: str, output: torch.Tensor | tuple) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found.append(exits[layer](hidden, inputs.get("attention_mask")).float())

    blocks = model.get_submodule(block_list(model))
    hooks = [blocks[int(layer)].register_forward_hook(lambda _, __, output, layer=layer: keep(layer, output))
             for layer in exits]
    try:
        own = model(**inputs).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([*found, own])


@dataclass
class TokenExits:
    """Where the tokens of a language model leave, and how well they are predicted there.

    Attributes:
        exit: (batch, sequence) number of the exit, counted from 0; the last number is the model's own head.
        nats: (batch, sequence) cross-entropy with the targets there, 0 without a target.
        sure: (batch, sequence) confidence there.
        nearest: (batch, sequence) smallest distance of a confidence from the threshold on the way.
    """

    exit: torch.Tensor
    nats: torch.Tensor
    sure: torch.Tensor
    nearest: torch.Tensor


class _Deep(Exception):
    """All blocks have run: the model's own last norm and head would compute logits of all tokens at once."""


@dataclass
class TokenDepths:
    """Runs a language model so that each token leaves by itself, all tokens of a row in parallel.

    The hidden state with which a token leaves goes through the blocks above unchanged, and its keys and values there
    are computed from it: the state propagation of CALM (Schuster et al. 2022, arXiv 2207.07061). So blocks see the same
    keys and values as in a generation token by token with a cache that is filled in this way.

    Attributes:
        model: in evaluation mode, without its exits.
        exits: of a language model, as from `attach_exits`.
        norm: the model's last norm.
        logits: from normed hidden states (tokens, width), with scale and soft cap.
    """

    model: nn.Module
    exits: nn.ModuleDict
    norm: nn.Module
    logits: Callable[[torch.Tensor], torch.Tensor]
    _left: torch.Tensor | None = field(default=None, init=False, repr=False)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], targets: torch.Tensor, threshold: float,
                 may_leave: torch.Tensor | None = None) -> TokenExits:
        """Run the model.

        Args:
            inputs: its arguments.
            targets: (batch, sequence) next tokens, or a negative number for none.
            threshold: of the confidence.
            may_leave: (batch, sequence) False where a token goes through all blocks, as those of a prompt do.
        """
        allowed = torch.ones_like(targets, dtype=torch.bool) if may_leave is None else may_leave
        found = TokenExits(torch.full_like(targets, len(self.exits)), torch.zeros(targets.shape, device=targets.device),
                           torch.zeros(targets.shape, device=targets.device),
                           torch.full(targets.shape, 2.0, device=targets.device))
        self._left = torch.zeros_like(allowed)
        blocks = self.model.get_submodule(block_list(self.model))

        def behind(number: int, given: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            hidden = torch.where(self._left[..., None], given, hidden)
            if str(number) in self.exits:
                self._judge(list(self.exits).index(str(number)), hidden, targets, threshold, allowed & ~self._left,
                            found)
            if number == len(blocks) - 1:
                self._judge(len(self.exits), hidden, targets, -1.0, ~self._left, found)
                raise _Deep
            return hidden

        with _changing(blocks, behind):
            try:
                self.model(**inputs)
            except _Deep:
                return found
        raise AssertionError(f"{type(self.model).__name__} did not run its last block")

    def _judge(self, number: int, hidden: torch.Tensor, targets: torch.Tensor, threshold: float,
               asked: torch.Tensor, found: TokenExits) -> None:
        """Let the tokens leave that an exit, or the model's own head, is sure of, among those that are asked."""
        norm = self.norm if number == len(self.exits) else list(self.exits.values())[number]
        for at in asked.flatten().nonzero().flatten().split(TILE):
            scores = self.logits(norm(hidden.flatten(0, 1)[at])).float().log_softmax(-1)
            sure, wanted = scores.amax(-1).exp(), targets.flatten()[at]
            if threshold >= 0:
                found.nearest.view(-1)[at] = torch.minimum(found.nearest.view(-1)[at], (sure - threshold).abs())
            leaves = sure >= threshold
            nats = -scores.gather(-1, wanted.clamp(min=0)[:, None])[:, 0].masked_fill(wanted < 0, 0.0)
            for into, values in ((found.nats, nats), (found.sure, sure), (found.exit, torch.full_like(at, number))):
                into.view(-1)[at[leaves]] = values[leaves].to(into.dtype)
            self._left.view(-1)[at[leaves]] = True


@contextmanager
def _changing(blocks: nn.ModuleList, change: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
              ) -> Iterator[None]:
    """Within the context, `change(number, input, output)` is what a block puts out."""
    def behind(number: int, args: tuple, kwargs: dict, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        hidden = change(number, given, output[0] if isinstance(output, tuple) else output)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = [block.register_forward_hook(lambda _, args, kwargs, output, number=number: behind(
        number, args, kwargs, output), with_kwargs=True) for number, block in enumerate(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
