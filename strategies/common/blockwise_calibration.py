"""Run calibration data through a model one block at a time, and collect statistics of the layers' inputs."""

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

Batch = Mapping[str, Any]  # keyword arguments of the model: `input_ids` (rows, tokens), `position_ids`, ...


class _Reached(Exception):
    """Raised to end a forward early, with the hidden states that it has reached."""

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
    """Takes calibration batches through a model part by part: the modules before its blocks, each block, and the rest.

        walk = BlockwiseCalibrator(model, batches)
        with closing(walk.parts()) as parts:
            for modules in parts:
                with hooks on modules:
                    walk.run()
                change modules

    A part's inputs come from earlier parts as already changed (as in Frantar et al. 2023, section 4). Only one set of
    hidden states is stored, on the CPU, and each batch's is replaced as it advances. The model's own forward runs for
    every part, with finished blocks passing their input through. So masks, positions and other arguments of blocks are
    computed as usual, for packed rows too, and need not be stored.

    This works in a single process with an unsharded model. Dropout and KV caches are off, and gradients are disabled.

    Attributes:
        model: the model.
        batches: keyword arguments of the model, for each batch.
        mask: (rows * tokens,) True for the tokens of the running batch that count; None for all.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], device: torch.device | str | None = None) -> None:
        """Args:
            device: where parts run. Blocks are moved there one at a time, everything else stays there throughout.
                None for the model's device.
        """
        self.model, self.batches = model, batches
        self.mask: torch.Tensor | None = None
        self._name, self._blocks = find_blocks(model)
        self._home = next(model.parameters()).device
        self._device = self._home if device is None else torch.device(device)
        self._kept: list[torch.Tensor | None] = [None] * len(batches)  # inputs of the current block, by batch
        self._place = -1  # index of the current block; -1 before the first, their number after the last
        self._tuples = False  # whether blocks return tuples

    @property
    def within(self) -> bool:
        """Whether the current part is a block."""
        return 0 <= self._place < len(self._blocks)

    def parts(self) -> Generator[dict[str, nn.Module], None, None]:
        """Yield each part's modules by name; those outside the blocks come twice, before the blocks and after them."""
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
        """Run all batches, or the first `count`, through the current part, so that hooks on its modules see them."""
        for number in range(len(self.batches))[:count]:
            self.forward(number)

    @torch.no_grad()
    def forward(self, number: int) -> torch.Tensor | None:
        """Run one batch through the current part, and return its output hidden states (rows, tokens, width).

        The result is None after the last block, where the model's forward runs to its end.
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
        """Within the context, a forward skips the blocks before the current one and ends after it."""
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
        hidden = self._kept[number].to(self._device, copy=True)  # a block may modify its input in place
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
        """Within the context, tensors are on the device; those added meanwhile, as scales, are moved back too."""
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


# ---- statistics of inputs

def token_mask(batch: Batch) -> torch.Tensor | None:
    """(rows * tokens,) True for tokens of a batch whose `attention_mask` is not zero; None if it has no such mask."""
    mask = batch.get("attention_mask")
    return mask.flatten().bool() if mask is not None and mask.ndim == 2 else None


def counted_tokens(batches: Sequence[Batch]) -> int:
    """Tokens of batches with `input_ids`, without those that an `attention_mask` leaves out."""
    masks = [(batch["input_ids"], token_mask(batch)) for batch in batches]
    return sum(ids.numel() if mask is None else int(mask.sum()) for ids, mask in masks)


def check_full_rank(inputs: Mapping[str, int], batches: Sequence[Batch], otherwise: str) -> None:
    """Raise `ValueError` if a layer has more inputs than there are calibration tokens to measure them on.

    Args:
        inputs: number of inputs of each layer that is calibrated.
        batches: without `input_ids` in each, as of images, nothing is said.
        otherwise: a method that goes without.
    """
    if not inputs or not all("input_ids" in batch for batch in batches):
        return
    widest, tokens = max(inputs, key=lambda name: inputs[name]), counted_tokens(batches)
    if tokens < inputs[widest]:
        raise ValueError(f"the calibration rows have {tokens} tokens, and {widest} has {inputs[widest]} inputs: its "
                         f"second moment can have full rank from {inputs[widest]} tokens on; give more rows, or take "
                         f"method '{otherwise}'")


def watch(
    walk: BlockwiseCalibrator, layers: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]
) -> dict[str, str]:
    """Run the current part, and call `see(name, rows)` with the inputs of its layers, once for layers that share them.

    Args:
        layers: layers of the current part, by name.
        see: called with the name of the first layer that reads an input, and the input: (tokens, inputs) without
            masked tokens for a linear layer, (values, 1) for a convolution.

    Returns:
        For every layer that was reached, the name that was passed to `see` with its input.
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
    """Statistics of a layer's input X (tokens, inputs).

    Attributes:
        largest: (inputs,) largest magnitude of each input channel, fp32.
        moment: (inputs, inputs) second moment X^T X, summed over tokens in fp32; None if not requested.
    """

    largest: torch.Tensor
    moment: torch.Tensor | None = None


def collect(walk: BlockwiseCalibrator, layers: Mapping[str, nn.Module], moments: bool = False) -> dict[str, Seen]:
    """Run the current part and collect statistics of its layers' inputs; layers that share an input share an object.

    Args:
        layers: layers of the current part, by name.
        moments: whether to sum second moments for linear layers.

    Returns:
        The statistics for every layer that was reached.

    Raises:
        ValueError: the input of a layer is not finite.
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
