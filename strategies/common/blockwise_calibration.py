"""Calibration: what enters the layers of a model, block after block, with the memory of one block."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from strategies.common.stored_weights import multiplies

Batch = Mapping[str, Any]  # what the model is called with: `input_ids` (rows, tokens), `position_ids`, ...


class _Reached(Exception):
    """Ends a forward where its hidden states are known."""

    def __init__(self, hidden: torch.Tensor | None) -> None:
        self.hidden = hidden


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks and its name, for example `model.layers`: the first as long as the configuration says.

    Raises:
        ValueError: there is no configuration, or no such list.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(f"cannot find the blocks of {type(model).__name__}: calibration needs a list of "
                     f"`config.num_hidden_layers` ({count}) of them; only method 'rtn' goes without")


class BlockwiseCalibrator:
    """Takes calibration rows through a model, part after part: what is before its blocks, each block, and the rest.

        walk = Walk(model, batches)
        with closing(walk.parts()) as parts:
            for modules in parts:
                with hooks on modules:
                    walk.run()
                change modules

    A part sees what the parts before it give after they were changed (as in Frantar et al. 2023, section 4). Kept is
    one set of hidden states, on CPU, in which a batch replaces itself. The model's own forward runs each time, with
    blocks that are done handing on what they get: so masks, positions and whatever else a block is given are made
    for it as they always are, for packed rows too, and none of that is kept.

    One process; the model is whole. Dropout is off, caches are not filled, and no gradient is kept.

    Attributes:
        model: the model.
        batches: what it is called with.
        mask: (rows * tokens,) which tokens of the batch that is running count; None for all.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], device: torch.device | str | None = None) -> None:
        """Args:
            device: where parts run. What is not a block is there all the time, and blocks come one after the other.
                None for where the model is.
        """
        self.model, self.batches = model, batches
        self.mask: torch.Tensor | None = None
        self._name, self._blocks = find_blocks(model)
        self._home = next(model.parameters()).device
        self._device = self._home if device is None else torch.device(device)
        self._kept: list[torch.Tensor | None] = [None] * len(batches)  # inputs of the present block, by batch
        self._place = -1  # of the present block; -1 before the first, their number behind the last
        self._tuples = False  # whether blocks return tuples

    @property
    def within(self) -> bool:
        """Whether the present part is a block."""
        return 0 <= self._place < len(self._blocks)

    def parts(self) -> Generator[dict[str, nn.Module], None, None]:
        """Modules by name, of one part at a time; those outside the blocks come twice, before them and after them."""
        outside = {name: module for name, module in self.model.named_modules()
                   if not name.startswith(f"{self._name}.")}
        with _evaluated(self.model), self._lent(self._rest):
            yield outside
            self._advance()
            for place, block in enumerate(self._blocks):
                self._place = place
                with self._lent(partial(_tensors, block)):
                    prefix = f"{self._name}.{place}"
                    yield {f"{prefix}.{name}" if name else prefix: module for name, module in block.named_modules()}
                    if block is not self._blocks[-1]:
                        self._advance()
                        continue
                    self._place += 1
                    yield outside

    def run(self, count: int | None = None) -> None:
        """Run the batches, or the first `count`, through the present part, for hooks on its modules to see."""
        for number in range(len(self.batches))[:count]:
            self.forward(number)

    @torch.no_grad()
    def forward(self, number: int) -> torch.Tensor | None:
        """Run one batch through the present part: the hidden states (rows, tokens, width) it ends with.

        None behind the last block, where the model's forward goes on to its end.
        """
        batch = {name: value.to(self._device) if isinstance(value, torch.Tensor) else value
                 for name, value in self.batches[number].items()}
        self.mask = token_mask(batch)
        with self._between(number):
            try:
                self.model(**batch)
            except _Reached as reached:
                return reached.hidden
        return None

    def _advance(self) -> None:
        for number in range(len(self.batches)):
            self._kept[number] = self.forward(number).to("cpu")

    @contextmanager
    def _between(self, number: int) -> Iterator[None]:
        """Within the context a forward skips the blocks before the present one, and ends behind it."""
        last = len(self._blocks) - 1
        with ExitStack() as stack:
            for block in self._blocks[:min(self._place, last)]:
                stack.enter_context(_forward_of(block, self._hand_on))
            if self._place >= 0:
                block = self._blocks[min(self._place, last)]
                stack.enter_context(block.register_forward_pre_hook(partial(self._put, number), with_kwargs=True))
                stack.enter_context(block.register_forward_hook(self._done))
            if self._place < last:
                stack.enter_context(self._blocks[self._place + 1].register_forward_pre_hook(_stop, with_kwargs=True))
            yield

    def _put(self, number: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = self._kept[number].to(self._device, copy=True)  # a block may write into what it gets
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(args, kwargs)
        return (hidden,) if self._tuples else hidden

    def _done(self, block: nn.Module, args: tuple, output: Any) -> None:
        self._tuples = isinstance(output, tuple)
        if self._place == len(self._blocks) - 1:
            raise _Reached(output[0] if self._tuples else output)

    def _rest(self) -> Iterator[torch.Tensor]:
        """Parameters and buffers outside the blocks."""
        inside = {id(tensor) for tensor in _tensors(self._blocks)}
        return (tensor for tensor in _tensors(self.model) if id(tensor) not in inside)

    @contextmanager
    def _lent(self, tensors: Callable[[], Iterator[torch.Tensor]]) -> Iterator[None]:
        """Within the context these are on the device; those that came to them, as scales, come home with them."""
        try:
            for tensor in tensors():
                tensor.data = tensor.data.to(self._device)
            yield
        finally:
            for tensor in tensors():
                tensor.data = tensor.data.to(self._home)


def _stop(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Reached(_hidden(args, kwargs))


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())


@contextmanager
def _forward_of(block: nn.Module, forward: Callable) -> Iterator[None]:
    before = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    cached = getattr(model.config, "use_cache", False)
    model.eval()
    try:
        if cached:
            model.config.use_cache = False
        yield
    finally:
        if cached:
            model.config.use_cache = cached
        for module, training in modes:
            module.training = training


# ---- what is seen

def token_mask(batch: Batch) -> torch.Tensor | None:
    """(rows * tokens,) which tokens of a batch count: those whose `attention_mask` is not zero; None for all."""
    mask = batch.get("attention_mask")
    return mask.flatten().bool() if mask is not None and mask.ndim == 2 else None


def watch(
    walk: BlockwiseCalibrator, layers: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]
) -> dict[str, str]:
    """Run the present part, and call `see(name, rows)` with what enters its layers, once where several read the same.

    Args:
        layers: of the present part, by name.
        see: given the first of the layers that read the same values, and these: (tokens, inputs) of a linear layer,
            tokens that are masked left out; (values, 1) of a convolution.

    Returns:
        For every layer that was reached, the name that its values were seen under.
    """
    first: dict[str, str] = {}
    latest: list[tuple[weakref.ref, str]] = []

    def hook(name: str, layer: nn.Module, args: tuple) -> None:
        values = args[0]
        if name not in first:
            first[name] = next((other for known, other in latest if known() is values), name)
        latest[:] = [(weakref.ref(values), first[name])]
        if first[name] == name:
            see(name, _rows(layer, values, walk.mask))

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(partial(hook, name)))
        walk.run()
    return first


def _rows(layer: nn.Module, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if not multiplies(layer):
        return values.reshape(-1, 1)
    rows = values.reshape(-1, values.shape[-1])
    return rows[mask] if mask is not None and len(mask) == len(rows) else rows


@dataclass
class Seen:
    """What entered layers.

    Attributes:
        largest: (inputs,) largest magnitude of each input channel, fp32.
        moment: (inputs, inputs) X^T X in fp32, the sum over tokens; None where it was not asked for.
    """

    largest: torch.Tensor
    moment: torch.Tensor | None = None


def collect(walk: BlockwiseCalibrator, layers: Mapping[str, nn.Module], moments: bool = False) -> dict[str, Seen]:
    """Run the present part, and say what entered its layers: one object for those that read the same values.

    Args:
        layers: of the present part, by name.
        moments: whether second moments of linear layers are summed.

    Returns:
        For every layer that was reached.

    Raises:
        ValueError: what enters a layer is not finite.
    """
    found: dict[str, Seen] = {}

    def see(name: str, rows: torch.Tensor) -> None:
        rows = rows.float()
        width = rows.shape[1]
        if name not in found:
            summed = moments and multiplies(layers[name])
            found[name] = Seen(rows.new_zeros(width), rows.new_zeros(width, width) if summed else None)
        seen = found[name]
        if len(rows):
            seen.largest = torch.maximum(seen.largest, rows.abs().amax(0))
        if seen.moment is not None:
            seen.moment.addmm_(rows.T, rows)

    first = watch(walk, layers, see)
    for name, seen in found.items():
        if not seen.largest.isfinite().all():
            raise ValueError(f"{name}: what enters it on the calibration rows is not finite; the model before it "
                             "overflows, or its weights are not what they should be")
    return {name: found[other] for name, other in first.items()}
