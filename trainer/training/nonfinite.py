"""Detects losses, gradients and weights that are not finite, and reports where they come from."""

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
    """Checks each micro-batch's gradient for NaN and infinity, before it is accumulated or reduced with others.

    The check looks at the gradient of the embeddings' output, where backward ends: a NaN or infinity propagates there
    through the residual stream. It misses an overflow that arises only in the gradient of a single weight, from finite
    factors. A convolutional net has no embeddings: there it looks at the gradient of the first weight.

    Args:
        student: the unwrapped model; a hook is registered on its input embeddings, or on that weight.
    """

    def __init__(self, student: nn.Module) -> None:
        self._finite: torch.Tensor | None = None
        try:
            student.get_input_embeddings().register_forward_hook(self._follow)
        except NotImplementedError:  # a hook on a layer would be inside of what is planned: the whole net
            next(weight for weight in student.parameters() if weight.requires_grad).register_hook(self._look)

    def _follow(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._look)

    def _look(self, gradient: torch.Tensor) -> None:
        least, most = torch.aminmax(gradient.detach())  # unlike isfinite(), allocates no tensor of the gradient's size
        self._finite = least.isfinite() & most.isfinite()

    def finite(self, loss: torch.Tensor) -> torch.Tensor:
        """Whether the loss, and the gradient of the backward since the last call, are finite: a scalar tensor."""
        found, self._finite = self._finite, None
        return loss.detach().isfinite() if found is None else loss.detach().isfinite() & found


def locate_nonfinite(accelerator: Accelerator, rows: list[torch.Tensor], finite: list[torch.Tensor]
                     ) -> list[dict[str, Any]]:
    """Process, micro-batch and row numbers of every micro-batch that was not finite. A collective call.

    Args:
        rows: the row numbers of each of this process's micro-batches in the step.
        finite: whether the loss and gradient of each were finite.
    """
    own = torch.stack([flag.long() for flag in finite])
    numbers = torch.stack(rows).to(own.device)
    flags, every = accelerator.gather(own[None]), accelerator.gather(numbers[None])
    return [{"process": process, "micro_batch": number, "rows": every[process, number].tolist()}
            for process, number in torch.argwhere(flags == 0).tolist()]


def diagnosis(record: dict[str, Any], times: int, checkpoints: object) -> str:
    """The message for a run that ends because too many steps in a row were not finite, with what to do about it.

    Args:
        record: the log record of the last step.
        times: the number of nonfinite steps in a row.
        checkpoints: the folder with the good checkpoints.
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
    """Whether all weights that this process holds are finite: a scalar tensor."""
    held = [local_of(tensor) for tensor, _ in engine.saved()]
    # The maximum norm: unlike a 2-norm, it cannot overflow in a sum.
    largest = torch._foreach_norm([tensor for tensor in held if tensor.numel()], ord=math.inf)
    return torch.stack([value.float() for value in largest]).isfinite().all() if largest else torch.tensor(True)
