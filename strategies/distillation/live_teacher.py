"""A live teacher: it reads the student's batch before the student, and its head is used where the student's loss is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from strategies.distillation.losses.fused_head import LogitShape, hidden_states, output_head, with_head
from strategies.distillation.losses.teacher_targets import HiddenTargets, LogitTargets, Targets
from strategies.distillation.tokenizers.input_adapters import TeacherInputAdapter

T = TypeVar("T")


class OnDemand:
    """Holds a frozen model on the host, and copies it to a device for as long as it is used.

    Several teachers then take turns on the device, and it holds one of them at a time. Nothing is copied back.

    Args:
        model: whose tensors are moved to the host.
        device: where it is used.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        pin = device.type == "cuda"
        self.device = device
        self._host = {one: one.data.cpu().pin_memory() if pin else one.data.cpu()
                      for one in (*model.parameters(), *model.buffers())}
        self._back()

    @contextmanager
    def __call__(self, part: nn.Module | None = None) -> Iterator[None]:
        """Context manager within which the model, or only a part of it, is on the device."""
        needed = self._host if part is None else {*part.parameters(), *part.buffers()}
        for tensor in needed:
            tensor.data = self._host[tensor].to(self.device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._back()

    def _back(self) -> None:
        for tensor, host in self._host.items():
            tensor.data = host


@contextmanager
def always(part: nn.Module | None = None) -> Iterator[None]:
    """Context manager for a model that is where it is used."""
    yield


@dataclass(frozen=True)
class Said:
    """What a teacher says about a batch, from a forward pass or from a cache.

    Attributes:
        targets: its targets; None with `hidden`, or if no divergence needs any.
        hidden: (batch, sequence, width) its last hidden states, to be given to its head where the loss is computed.
        asked: (batch, sequence) True where it says something; None for everywhere.
        output: the output of its model.
        head: calls a function with its head.
    """

    targets: Targets | None = None
    hidden: torch.Tensor | None = None
    asked: torch.Tensor | None = None
    output: Any = None
    head: Callable[[Callable[[Any], Any]], Any] | None = None

    def judge(self, loss: Callable[[Targets | None, torch.Tensor | None], T]) -> T:
        """The loss of a student, from the teacher's targets and where there are any."""
        if self.hidden is None:
            return loss(self.targets, self.asked)
        assert self.head is not None
        return self.head(lambda head: loss(HiddenTargets(self.hidden, head), self.asked))


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that is asked at every step.

    Attributes:
        model: frozen and in evaluation mode.
        shape: scale and soft cap of its logits; None for a model whose head is not supported: its full logits are
            then computed.
        reader: how it reads the student's text.
        present: context manager within which the model, or the part of it that is given, is on the device.
    """

    model: nn.Module
    shape: LogitShape | None
    reader: TeacherInputAdapter
    present: Callable[..., Any] = always

    def __call__(self, inputs: Mapping[str, Any], targets: torch.Tensor) -> Said:
        """Run the teacher on the inputs of a student's batch."""
        reading, shape = self.reader(inputs, targets), self.shape
        with self.present():
            if shape is None:
                with torch.no_grad():
                    output = self.model(**reading.inputs)
                    logits, asked = reading.placed(output.logits, targets)
                return Said(LogitTargets(logits), asked=asked, output=output)
            hidden, output = hidden_states(self.model, reading.inputs)
        hidden, asked = reading.placed(hidden, targets)

        def head(use: Callable[[Any], Any]) -> Any:
            with self.present(output_head(self.model)):
                return with_head(self.model, shape, use)

        return Said(None, hidden, asked, output, head)
