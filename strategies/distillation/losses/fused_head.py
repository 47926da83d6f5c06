"""A language model whose loss is taken where its output head is, so that its logits never exist."""

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

PROBES = (-40.0, -3.0, -1e-3, 1e-3, 3.0, 40.0, 1e8)  # logits that a model is shown, to see what it makes of them


@dataclass(frozen=True)
class LogitShape:
    """What a model does to what leaves its head: `cap tanh(scale x / cap)`, or `scale x` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Logits of products with the head."""
        return self.head(products.new_empty(0, 0)).shape(products)

    def head(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Head:
        """A head that does so."""
        return Head(weight, bias, self.scale, self.cap)


Take = Callable[[torch.Tensor, Head, Any], Any]


def output_head(model: nn.Module) -> nn.Module:
    """The module that turns a model's last hidden states into logits.

    Raises:
        ValueError: the model hands none out.
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
    """While in here a call of the model returns `take(hidden, head, output)` instead of its output.

    The model's own forward runs up to its head, which is then called as a module, so that hooks which gather its
    weights see it; `take` runs inside of that call, and inside of the model's. Call the model through what wraps it:
    DistributedDataParallel, FSDP2 and DeepSpeed then see one forward and one backward as ever.

    Args:
        model: without wrappers.
        take: gets hidden states (..., width) as they enter the head, the head, and the model's output, in which
            `logits` are of no use. Tensors that training goes through must be in what it returns.
        shape: what the model makes of its logits; None leaves them as they are.
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
    """Hidden states (..., width) that would enter the model's head, without gradient, and its output without logits."""
    own, head = model.forward, output_head(model)
    with _running(model, lambda *args, **kwargs: _body(own, model, head, args, kwargs)):
        return model(**inputs)


def with_head(model: nn.Module, shape: LogitShape, use: Callable[[Head], Any]) -> Any:
    """`use(head)` of a frozen model, with the head's weights gathered where the model is sharded."""
    head = output_head(model)

    def inside(_: torch.Tensor | None) -> Any:
        with _gathered(model) if isinstance(head.weight, DTensor) else nullcontext():
            return use(shape.head(effective_weight(head), head.bias))

    with _running(head, inside):
        return head(None)


def effective_weight(head: nn.Module) -> torch.Tensor:
    """The weight (vocabulary, width) that a head multiplies with: where it is quantized in training, as it then is."""
    return head.effective_weight if hasattr(head, "effective_weight") else head.weight


@torch.no_grad()
def logit_shape(model: nn.Module) -> LogitShape:
    """Find what a model does to its logits, by showing it some.

    Raises:
        ValueError: it is neither a factor nor a soft cap, or the head is not linear.
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
    """Whether no class in between has a product of its own: Dory's head scales each token's logits, for example."""
    return all(f"{base.__module__}.".startswith(("torch.", "strategies.")) for base in kind.__mro__
               if "forward" in vars(base))


class _InPlace(nn.Module):
    """Stands in a head's place; some models ask it for its weight's dtype."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.__dict__["weight"] = head.weight  # not a parameter of this one


class _Catches(_InPlace):
    """Keeps what it is given."""

    hidden: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden = hidden
        return hidden[..., :1]


class _Shows(_InPlace):
    """Gives the same logits whatever it is given, in fp32: rounded to bf16 they would tell of another factor."""

    def __init__(self, head: nn.Module, logits: torch.Tensor) -> None:
        super().__init__(head)
        self.logits = logits

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


def _body(own: Callable, model: nn.Module, head: nn.Module, args: tuple, kwargs: dict) -> tuple[torch.Tensor, Any]:
    """Run a model without its head."""
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
    """Within the context a module runs another forward, hooks around it as they are."""
    before = module.__dict__.get("forward")  # a plan's, or a wrapper's
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
    """Weights that belong to the whole model, as a head's do that are an embedding's too, while it does not run."""
    assert isinstance(model, FSDPModule), "only FSDP2 leaves parts of weights between calls"
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
