"""The interface through which a trainer uses a student on one or more ranks, whichever engine shards it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from strategies.common.frozen_base import base_names
from strategies.common.shards import Layout, Piece, local

CLIP_EPS = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm


@dataclass(frozen=True)
class Update:
    """The outcome of an optimizer step.

    Attributes:
        norm: gradient norm over all weights and ranks, before clipping, with the loss scale divided out.
        taken: whether the weights were updated; the same on every rank.
        finite: whether the gradient was finite.
    """

    norm: float
    taken: bool
    finite: bool


def on_any_rank(flags: list[bool], device: torch.device, group: dist.ProcessGroup | None = None) -> list[bool]:
    """For each flag, whether it is set on any rank; a collective."""
    found = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in found.tolist()]


class InBackward(Protocol):
    """An optimizer that steps during the backward."""

    enabled: bool
    squared_norm: torch.Tensor

    def reset(self) -> None:
        """Reset `squared_norm`."""


class KeepsZeros(Protocol):
    """Keeps weights of a student zero while it is trained; see `SparseWeights`."""

    def mask_gradients(self) -> None:
        """Set gradients of weights that stay zero to zero."""

    def before_step(self) -> None:
        """See the gradients that the optimizer gets."""

    def mask_weights(self) -> None:
        """Set weights back to zero."""

    def scores(self, name: str) -> torch.Tensor | None:
        """Numbers of a parameter's elements that a checkpoint has to hold, if any."""

    def resident(self) -> list[torch.Tensor]:
        """The tensors that take memory between steps."""


class Engine:
    """A student on its ranks. This class holds it whole on every rank: one process, or data parallelism.

    Attributes:
        model: the wrapped module that training calls.
        student: the module itself, with its own parameter names.
        optimizer: its `param_groups` hold the learning rate.
        in_backward: makes the optimizer step during the backward, if it does; to be set before the first step.
        sparse: keeps weights zero, if some are to stay so; to be set before the first step.
        casts: whether the engine runs the model in half precision by itself, so that no autocast is needed.
        scales: whether the engine scales the loss by itself.
        sharded: whether a rank holds only a part of the student's fp32 weights.
        apart: parameters that DDP was told to ignore, because the loss is not known to depend on them.
    """

    casts = scales = sharded = False
    apart: Sequence[nn.Parameter] = ()

    def __init__(self, model: nn.Module, student: nn.Module, optimizer: torch.optim.Optimizer,
                 no_sync: Callable[[nn.Module], AbstractContextManager] | None = None) -> None:
        self.model, self.student, self.optimizer = model, student, optimizer
        self.in_backward: InBackward | None = None
        self.sparse: KeepsZeros | None = None
        self._no_sync = no_sync
        # DDP's gradients are views of its buckets, which are never freed.
        self._drops = not isinstance(model, nn.parallel.DistributedDataParallel)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Context for forward and backward of a micro-batch: gradients are reduced over ranks in the last one."""
        return nullcontext() if last or self._no_sync is None else self._no_sync(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a loss; over ranks they are averaged."""
        if self.in_backward is not None:
            self.in_backward.reset()
            self.in_backward.enabled = self._everywhere(loss.detach().isfinite())
        loss.backward()

    def update(self, clip: float | None, allowed: bool, scale: float = 1.0) -> Update:
        """Divide by the loss scale, clip, step if the gradient is finite and the step `allowed`, and drop gradients.

        Every rank makes the same decision, because the norm is of all ranks' gradients.
        """
        if self.in_backward is not None:
            return self._stepped(self.in_backward)
        self._average_apart()
        gradients = [local(parameter.grad) for parameter in self.parameters() if parameter.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        if self.sparse is not None:
            self.sparse.mask_gradients()
        norm = self._norm(gradients)
        length = float(norm)  # the only wait for the device before the weights are updated
        finite = math.isfinite(length)
        if finite and allowed:
            if clip is not None:
                torch._foreach_mul_(gradients, torch.clamp(clip / (norm + CLIP_EPS), max=1.0))
            self._step_sparse() if self.sparse is not None else self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self._drops)
        return Update(length, finite and allowed, finite)

    def _step_sparse(self) -> None:
        assert self.sparse is not None
        self.sparse.before_step()
        self.optimizer.step()
        self.sparse.mask_weights()

    def _average_apart(self) -> None:
        """Average the gradients of parameters that DDP ignores but that some rank's loss does depend on."""
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
        """The outcome of a backward during which the optimizer stepped; drops the gradients if it did not."""
        self.optimizer.zero_grad(set_to_none=True)
        norm = done.squared_norm.sqrt()
        finite = done.enabled and bool(norm.isfinite())
        return Update(float(norm) if done.enabled else math.nan, finite, finite)

    def _everywhere(self, flag: torch.Tensor) -> bool:
        """Whether a flag is set on every rank."""
        return bool(flag)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All trained parameters, as the optimizer has them."""
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def tensors(self) -> Iterator[tuple[torch.Tensor, Layout]]:
        """The fp32 weights that this rank holds, as the optimizer has them, each with its layout."""
        for name, parameter in self.student.named_parameters():
            yield parameter, Layout((Piece(name, tuple(parameter.shape), 0, parameter.numel()),))

    def saved(self) -> Iterator[tuple[torch.Tensor, Layout]]:
        """`tensors` without those of the frozen base beneath adapters, which has files of its own."""
        base = base_names(self.student)
        yield from ((tensor, layout) for tensor, layout in self.tensors()
                    if not base or any(piece.name not in base for piece in layout.pieces))

    def refresh(self) -> None:
        """Apply fp32 weights that were written into `tensors`."""

    def resident(self) -> list[object]:
        """Modules, optimizers and tensors in which this rank holds memory between steps."""
        return [self.student, self.inner, *(() if self.sparse is None else self.sparse.resident())]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer whose state is saved, without wrappers."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def scale_state(self) -> dict[str, float]:
        """Loss scaling state of an engine that scales by itself, as plain numbers."""
        return {}

    def load_scale_state(self, state: dict[str, float], loss_scale: float) -> None:
        """Restore what `scale_state` returned; `loss_scale` is the scale if another engine saved the checkpoint."""

    def release(self) -> None:
        """Free everything else that the engine holds."""

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """2-norm of all gradients, the same on every rank."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


class Sharded(Engine):
    """An engine in which a rank holds a part of every parameter."""

    sharded = True
    group: dist.ProcessGroup | None = None
    device = torch.device("cpu")  # device for collectives

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        norms = torch._foreach_norm(gradients)
        squares = torch.stack(norms).square().sum().to(self.device)
        dist.all_reduce(squares, group=self.group)
        return squares.sqrt().to(norms[0].device)

    def _everywhere(self, flag: torch.Tensor) -> bool:
        flag = flag.int().to(self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return bool(flag)

