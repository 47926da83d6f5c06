"""What a trainer asks of a student that is shared out over ranks, whichever engine does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from strategies.common.shards import Layout, Piece, local

CLIP_EPS = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm


@dataclass(frozen=True)
class Update:
    """What came of an optimizer step.

    Attributes:
        norm: of the gradient over all weights and ranks, before clipping, the loss scale divided out.
        taken: whether the weights were updated; the same on every rank.
        finite: whether the gradient was.
    """

    norm: float
    taken: bool
    finite: bool


def on_any_rank(flags: list[bool], device: torch.device, group: dist.ProcessGroup | None = None) -> list[bool]:
    """For each flag whether some rank has it set; a collective."""
    found = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in found.tolist()]


class InBackward(Protocol):
    """An optimizer that steps during backward."""

    enabled: bool
    squared_norm: torch.Tensor

    def reset(self) -> None:
        """Begin `squared_norm` anew."""


class Engine:
    """A student on its ranks. This one holds it whole on every rank: one process, or data parallelism.

    Attributes:
        model: what is called in training, wrapped.
        student: the module itself, with the names of its parameters.
        optimizer: whose `param_groups` hold the learning rate.
        in_backward: where the optimizer steps during backward, what makes it; to be set before the first step.
        casts: whether the engine runs the model in its half precision by itself, so that no autocast is needed.
        scales: whether the engine scales the loss by itself.
        sharded: whether a rank holds a part of the student's fp32 weights.
        apart: parameters that DDP was told to leave alone, since the loss is not known to depend on them.
    """

    casts = scales = sharded = False
    apart: Sequence[nn.Parameter] = ()

    def __init__(self, model: nn.Module, student: nn.Module, optimizer: torch.optim.Optimizer,
                 no_sync: Callable[[nn.Module], AbstractContextManager] | None = None) -> None:
        self.model, self.student, self.optimizer = model, student, optimizer
        self.in_backward: InBackward | None = None
        self._no_sync = no_sync
        # DDP's gradients lie in its buckets, which are there for good.
        self._drops = not isinstance(model, nn.parallel.DistributedDataParallel)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Context of one micro-batch's forward and backward: gradients are summed over ranks in the last one."""
        return nullcontext() if last or self._no_sync is None else self._no_sync(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        """Add a loss's gradients to those there are. Over ranks they are averaged."""
        if self.in_backward is not None:
            self.in_backward.reset()
            self.in_backward.enabled = self._everywhere(loss.detach().isfinite())
        loss.backward()

    def update(self, clip: float | None, allowed: bool, scale: float = 1.0) -> Update:
        """Divide by the loss scale, clip, and step if the gradient is finite and it is `allowed`; drop the gradients.

        Every rank comes to the same decision: the norm is of all ranks' gradients.
        """
        if self.in_backward is not None:
            return self._stepped(self.in_backward)
        self._average_apart()
        gradients = [local(parameter.grad) for parameter in self.parameters() if parameter.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm = self._norm(gradients)
        length = float(norm)  # the one wait for the device before the weights move
        finite = math.isfinite(length)
        if finite and allowed:
            if clip is not None:
                torch._foreach_mul_(gradients, torch.clamp(clip / (norm + CLIP_EPS), max=1.0))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self._drops)
        return Update(length, finite and allowed, finite)

    def _average_apart(self) -> None:
        """Average gradients that DDP does not, of parameters that some rank's loss depends on after all."""
        if not self.apart:
            return
        reached = on_any_rank([parameter.grad is not None for parameter in self.apart], self.apart[0].device)
        for parameter, is_reached in zip(self.apart, reached, strict=True):
            if is_reached:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def _stepped(self, done: InBackward) -> Update:
        """What came of a backward in which the optimizer has stepped already; gradients are left where it did not."""
        self.optimizer.zero_grad(set_to_none=True)
        norm = done.squared_norm.sqrt()
        finite = done.enabled and bool(norm.isfinite())
        return Update(float(norm) if done.enabled else math.nan, finite, finite)

    def _everywhere(self, flag: torch.Tensor) -> bool:
        """Whether something holds on every rank."""
        return bool(flag)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that are trained, as the optimizer has them."""
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def tensors(self) -> Iterator[tuple[torch.Tensor, Layout]]:
        """The fp32 weights that this rank holds, as the optimizer has them, and what they consist of."""
        for name, parameter in self.student.named_parameters():
            yield parameter, Layout((Piece(name, tuple(parameter.shape), 0, parameter.numel()),))

    def refresh(self) -> None:
        """Take over fp32 weights that were written into `tensors`."""

    def resident(self) -> list[object]:
        """Modules, optimizers and tensors in which this rank holds memory between steps."""
        return [self.student, self.inner]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer whose state is kept, without wrappers."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def scale_state(self) -> dict[str, float]:
        """Loss scaling of an engine that does it by itself, as plain numbers."""
        return {}

    def load_scale_state(self, state: dict[str, float], loss_scale: float) -> None:
        """Continue where `scale_state` was taken; `loss_scale` is known where another engine had it."""

    def release(self) -> None:
        """Let go of everything that the engine holds besides."""

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """2-norm of all gradients, the same on every rank."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


class Sharded(Engine):
    """An engine in which a rank holds a part of every parameter."""

    sharded = True
    group: dist.ProcessGroup | None = None
    device = torch.device("cpu")  # on which ranks exchange

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        norms = torch._foreach_norm(gradients)
        squares = torch.stack(norms).square().sum().to(self.device)
        dist.all_reduce(squares, group=self.group)
        return squares.sqrt().to(norms[0].device)

    def _everywhere(self, flag: torch.Tensor) -> bool:
        flag = flag.int().to(self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return bool(flag)

