"""Losses, gradients and weights that are not finite: where they come from, in words and numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from strategies.common.shards import local_of
from strategies.sharding.engine import Engine

TOLD = 4  # micro-batches named in a diagnosis


class Backward:
    """Whether a micro-batch's gradient is finite, before it is mixed with those of other micro-batches and processes.

    Looked at where backward ends, at what the embeddings put out: a NaN or an infinity comes down to there through the
    residual stream. One that only the gradient of a single weight has, made of finite parts, is not seen here.

    Args:
        student: the model without wrappers, which is given a hook.
    """

    def __init__(self, student: nn.Module) -> None:
        self._finite: torch.Tensor | None = None
        student.get_input_embeddings().register_forward_hook(self._follow)

    def _follow(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._look)

    def _look(self, gradient: torch.Tensor) -> None:
        least, most = torch.aminmax(gradient.detach())  # which makes no tensor as large as the gradient
        self._finite = least.isfinite() & most.isfinite()

    def finite(self, loss: torch.Tensor) -> torch.Tensor:
        """Whether the loss and the gradient of the backward since the last call were: a scalar on the device."""
        found, self._finite = self._finite, None
        return loss.detach().isfinite() if found is None else loss.detach().isfinite() & found


def locate_nonfinite(accelerator: Accelerator, rows: list[torch.Tensor], finite: list[torch.Tensor]
                     ) -> list[dict[str, Any]]:
    """Process, micro-batch and rows of all processes' micro-batches that were not finite; a collective.

    Args:
        rows: numbers of the rows of each of this process's micro-batches in a step.
        finite: for each, whether its loss and gradient were.
    """
    own = torch.stack([flag.long() for flag in finite])
    numbers = torch.stack(rows).to(own.device)
    flags, every = accelerator.gather(own[None]), accelerator.gather(numbers[None])
    return [{"process": process, "micro_batch": number, "rows": every[process, number].tolist()}
            for process, number in torch.argwhere(flags == 0).tolist()]


def diagnosis(record: dict[str, Any], times: int, checkpoints: object) -> str:
    """Why a run that met one step after another that was not finite ends, and what to do.

    Args:
        record: of the last step.
        times: such steps in a row.
        checkpoints: the folder of good ones.
    """
    what = "gradient" if isinstance(record["loss"], float) and record["loss"] - record["loss"] == 0 else "loss"
    where = "".join(f"; process {one['process']}, micro-batch {one['micro_batch']}, rows {one['rows']}"
                    for one in record["nonfinite"][:TOLD])
    return (f"the {what} was not finite for {times} steps in a row, last at step {record['step']}{where}.\n"
            f"  No such step reached the weights; they are safe in {checkpoints}.\n"
            "  -> lower optimizer.lr, set training.clip, or use precision.dtype bf16 or fp32; "
            "then start the same command again, or another run")


@torch.no_grad()
def weights_finite(engine: Engine) -> torch.Tensor:
    """Whether all weights that this process holds are: a scalar."""
    held = [local_of(tensor) for tensor, _ in engine.tensors()]
    largest = torch._foreach_norm([tensor for tensor in held if tensor.numel()], ord=math.inf)  # no sum to overflow
    return torch.stack([value.float() for value in largest]).isfinite().all() if largest else torch.tensor(True)
