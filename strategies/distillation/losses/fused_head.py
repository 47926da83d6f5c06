"""Compute the loss of a language model at its output head, so that its full logits are never materialized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from strategies.distillation.losses.heads import Head

PROBES = (-40.0, -3.0, -1e-3, 1e-3, 3.0, 40.0, 1e8)  # substituted for a head's output, to find scale and soft cap


@dataclass(frozen=True)
class LogitShape:
    """What a model applies to the output x of its head: `cap tanh(scale x / cap)`, or `scale x` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Logits from the output of the head."""
        return self.head(products.new_empty(0, 0)).shape(products)

    def head(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Head:
        """A head with this scale and cap."""
        return Head(weight, bias, self.scale, self.cap)


Take = Callable[[torch.Tensor, Head, Any], Any]


def output_head(model: nn.Module) -> nn.Module:
    """The module that turns a model's last hidden states into logits.

    Raises:
        ValueError: `get_output_embeddings` returns none.
    """
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if getattr(head, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} hands out no output head (get_output_embeddings)")
    return head


@contextmanager
def at_head(model: nn.Module, take: Take, shape: LogitShape | None = None) -> Iterator[None]:
    """Within the context, a call of the model returns `take(hidden, head, output)` instead of its output.

    The model's own forward runs without its head. Then the head is called as a module, so that hooks that gather its
    weights run, and `take` runs inside that call, which is inside the model's. Call the model through its wrappers:
    DistributedDataParallel, FSDP2 and DeepSpeed then see one forward and one backward as usual.

    Args:
        model: without wrappers.
        take: gets the hidden states (..., width) that enter the head, the head, and the model's output, whose `logits`
            are placeholders. It must return every tensor that needs a gradient, so that wrappers find them.
        shape: scale and soft cap that the model applies to its logits; None for neither.
    """
    head, own, shape = output_head(model), model.forward, shape or LogitShape()

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, output = _body(own, model, head, args, kwargs)
        with _running(head, lambda hidden: take(hidden, shape.head(effective_weight(head), head.bias), output)):
            return head(hidden)

    with _running(model, forward):
        yield


@torch.no_grad()
def hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
    """Hidden states (..., width) that enter the model's head, and its output with placeholder logits; no gradients."""
    own, head = model.forward, output_head(model)
    with _running(model, lambda *args, **kwargs: _body(own, model, head, args, kwargs)):
        return model(**inputs)


def with_head(model: nn.Module, shape: LogitShape, use: Callable[[Head], Any]) -> Any:
    """Call `use(head)` with the head of a frozen model, with its weights gathered where the model is sharded."""
    head = output_head(model)

    def inside(_: torch.Tensor | None) -> Any:
        with _gathered(model) if isinstance(head.weight, DTensor) else nullcontext():
            return use(shape.head(effective_weight(head), head.bias))

    with _running(head, inside):
        return head(None)


def effective_weight(head: nn.Module) -> torch.Tensor:
    """The weight (vocabulary, width) that a head multiplies with; in quantization-aware training the quantized one."""
    return head.effective_weight if hasattr(head, "effective_weight") else head.weight


@torch.no_grad()
def logit_shape(model: nn.Module) -> LogitShape:
    """Find the scale and soft cap that a model applies to its logits, by running it with known values as head output.

    Raises:
        ValueError: the model does anything else to its logits, or its head is not linear.
    """
    head, device = output_head(model), next(model.parameters()).device
    if not isinstance(head, nn.Linear) or not _plainly_linear(type(head)):
        raise ValueError(f"the output head of {type(model).__name__} is no linear layer")
    shown = torch.tensor(PROBES, device=device)
    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device), "use_cache": False}
    with _replaced(model, head, _Shows(head, shown)):
        found = model(**inputs).logits.flatten().float()
    if found.shape != shown.shape:
        raise ValueError(f"{type(model).__name__} does something to its logits that is not known here")
    scale, limit = float(found[3] / shown[3]), float(found[-1])
    shape = LogitShape(round(scale, 6) if scale else 0.0, None if abs(limit) > 1e6 * abs(scale) else limit)
    if not torch.allclose(shape(shown), found, rtol=1e-2):
        raise ValueError(f"{type(model).__name__} does something to its logits that is not known here: of "
                         f"{[round(value, 3) for value in PROBES]} it makes "
                         f"{[round(value, 3) for value in found.tolist()]}")
    return shape


def _plainly_linear(kind: type) -> bool:
    """Whether only torch and this project define its forward; Dory's head, for example, scales each token's logits."""
    return all(f"{base.__module__}.".startswith(("torch.", "strategies.")) for base in kind.__mro__
               if "forward" in vars(base))


class _InPlace(nn.Module):
    """Stands in for a head; some models read the dtype of its weight."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.__dict__["weight"] = head.weight  # not registered as a parameter of this module


class _Catches(_InPlace):
    """Keeps the hidden states that it is called with."""

    hidden: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden = hidden
        return hidden[..., :1]


class _Shows(_InPlace):
    """Returns fixed logits whatever its input, in fp32: rounded to bf16 they would make the scale look different."""

    def __init__(self, head: nn.Module, logits: torch.Tensor) -> None:
        super().__init__(head)
        self.logits = logits

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


def _body(own: Callable, model: nn.Module, head: nn.Module, args: tuple, kwargs: dict) -> tuple[torch.Tensor, Any]:
    """Run a model without its head; hidden states that would enter the head, and the model's output."""
    catches = _Catches(head)
    with _replaced(model, head, catches):
        output = own(*args, **kwargs)
    assert catches.hidden is not None, f"{type(model).__name__} did not call its output head"
    return catches.hidden, output


@contextmanager
def _replaced(model: nn.Module, head: nn.Module, other: nn.Module) -> Iterator[None]:
    parent, name = next((parent, name) for parent in model.modules() for name, child in parent._modules.items()
                        if child is head)
    parent._modules[name] = other
    try:
        yield
    finally:
        parent._modules[name] = head


@contextmanager
def _running(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Within the context, a module runs another forward; its hooks run as before."""
    before = module.__dict__.get("forward")  # set by a memory plan or a wrapper
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Within the context, the weights of the model's root FSDP2 group are gathered, though the model is not running.

    A head that is tied to the embedding has its weight in that group.
    """
    assert isinstance(model, FSDPModule), "only FSDP2 leaves parts of weights between calls"
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
