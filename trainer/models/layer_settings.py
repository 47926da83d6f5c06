"""Derives the configuration of a student made of some of its teacher's layers, adjusting all per-layer settings.

No configuration declares which of its settings are per layer. They take many forms: lists with one entry per layer,
lists of layer numbers, counts from either end, periods with offsets. So candidates are tried: a configuration is right
if the blocks of its model, built on the meta device, match the teacher's in class, shapes and plain settings. Whether
the model also computes the same is tested by running it; see `trainer.models.teacher_layers`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from trainer.model_files import last_line
from trainer.models.task_heads import auto_class

COUNTED = re.compile("period|interval|offset|every|step|freq|pattern|first|replace|window_layers|start|end_|dense|"
                     "shared|cross|_layers$|skip")  # integer settings that may count layers
NUMBERED = re.compile("(layers?|idxs?|indices|ids)$")  # list settings that may hold layer numbers
PERIODS = re.compile("period|interval|every|step|freq")
FOREIGN = re.compile("token|label|architectures|time_step")
SIZES = re.compile("(experts|heads|size|dim|rank|per_tok)$")
WRONG, FAILED = 1000, 10**9  # penalties: for another class or shape, and for a model that cannot be built
MOST_TRIED = 300  # limit on the configurations tried


def layer_count_name(config: PretrainedConfig) -> str:
    """The configuration's own name for `num_hidden_layers`."""
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def with_layers(teacher: PretrainedConfig, layers: tuple[int, ...]) -> tuple[PretrainedConfig, list[str]]:
    """The teacher's configuration reduced to some of its layers.

    Returns:
        The configuration, and a line for each block whose plain settings it could not make equal to the teacher's.

    Raises:
        ValueError: no configuration found gives these layers the modules and shapes that they have in the teacher.
    """
    try:
        values, least, lines = _found(type(teacher), _Frozen(teacher.to_dict()), layers)
    except Exception as error:  # a foreign configuration class that cannot be rebuilt from its own values
        raise ValueError(last_line(error)) from error
    if least >= WRONG:
        raise ValueError(lines[0])
    return type(teacher)(**copy.deepcopy(values)), list(lines)


def other_layers(count: int, layers: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Alternative choices of as many layers out of `count`: those near the requested ones first, `0, 1, ...` last."""
    for other in ((0, *layers[1:]), (*layers[:-1], count - 1), (0, *layers[1:-1], count - 1), (0, 1, *layers[2:]),
                  tuple(range(len(layers)))):
        if len(set(other)) == len(other) == len(layers) and other != layers:
            yield other


class _Frozen(dict):
    """A configuration's values, hashable by their `repr` for use as a cache key."""

    def __hash__(self) -> int:
        return hash(repr(self))

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)


@lru_cache(maxsize=16)
def _found(kind: type, values: _Frozen, layers: tuple[int, ...]) -> tuple[dict[str, Any], int, tuple[str, ...]]:
    search = _Search(kind, dict(values), layers)
    least, lines = search.differences(search.best)
    return search.best, least, tuple(lines)


class _Search:
    """Searches for configuration values that make a model's blocks match the chosen blocks of the teacher.

    Attributes:
        best: the values with the fewest differences so far.
    """

    def __init__(self, kind: type, values: dict[str, Any], layers: tuple[int, ...]) -> None:
        self.kind, self.values, self.layers = kind, values, layers
        self.count_name = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        self.count = kind(**copy.deepcopy(values)).num_hidden_layers
        try:
            self.teacher = blocks_of(kind(**copy.deepcopy(values)))
        except Exception:  # cannot be built on meta, or from a configuration alone: nothing to compare with
            self.teacher = None
        options = {name: found for name, value in values.items() if (found := list(self._options(name, value)))}
        self.best = {**values, self.count_name: len(layers), **{name: found[0] for name, found in options.items()}}
        self.least, self.tried = self.differences(self.best)[0], 0
        if len(layers) < self.count and self.teacher:
            self._descend({name: [*found, values[name]] for name, found in options.items()})
            self._descend({name: self._counts(value) for name, value in values.items() if self._counts_layers(name)})
            share = len(layers) / self.count
            # Floats may be scaled by the depth of the model.
            self._descend({name: [value * share ** power for power in (0.5, -0.5, 1, -1)]
                           for name, value in values.items() if isinstance(value, float) and value})
            self._together()

    def differences(self, values: dict[str, Any]) -> tuple[int, list[str]]:
        """Count the differences between a model with these values and the teacher, with a line per differing block."""
        if not self.teacher:
            return 0, []
        try:
            student = blocks_of(self.kind(**copy.deepcopy(values)))
        except Exception as error:  # the architecture rejects the values, with an error of any kind
            return FAILED, [f"no such model can be made: {last_line(error)}"]
        paired = [name for name in self.teacher if name in student]
        if not paired:
            return FAILED, ["they are no list of modules"]
        total, lines = 0, []
        for own, layer in enumerate(self.layers):
            theirs, ours = ({f"{name}.{key}": value for name in paired for key, value in of[name][number].items()}
                            for of, number in ((self.teacher, layer), (student, own)))
            found = [name for name in sorted({*theirs, *ours})
                     if not self._alike(theirs.get(name), ours.get(name), layer, own)]
            if found:
                total += sum(WRONG if name.endswith(("()", ".shape")) else 1 for name in found)
                lines.append(f"layer {layer} has {found[0]} = {theirs.get(found[0])!r}, and {ours.get(found[0])!r} as "
                             f"layer {own} of the student")
        return total, lines

    def _alike(self, theirs: Any, ours: Any, layer: int, own: int) -> bool:
        """Whether two settings agree: equal, or each its model's layer number or number of layers."""
        if isinstance(theirs, float) and isinstance(ours, float):
            return math.isclose(theirs, ours, rel_tol=1e-12)
        return theirs == ours or (theirs, ours) in ((layer, own), (layer + 1, own + 1), (self.count, len(self.layers)))

    def _options(self, name: str, value: Any) -> Iterator[Any]:
        """Candidate values of a setting for the chosen layers; none if it does not look like a per-layer setting."""
        if FOREIGN.search(name):
            return
        if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            yield {kind(own): value[key] for own, layer in enumerate(self.layers)
                   for kind, key in ((int, layer), (str, str(layer))) if key in value}
        if isinstance(value, str) and "pattern" in name and len(value) == self.count:
            yield "".join(value[layer] for layer in self.layers)
        if not isinstance(value, (list, tuple)):
            return
        numbers = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < self.count for one in value)
        numbers = numbers and len(set(value)) == len(value) and bool(NUMBERED.search(name))
        if len(value) == self.count:
            yield [value[layer] for layer in self.layers]
        if numbers and value:
            yield [own for own, layer in enumerate(self.layers) if layer in value]
        if value and all(isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[1], int) for one in value):
            each = [kind for pattern, times in value for _ in range(times) for kind in pattern]
            if len(each) == self.count:
                yield [[[each[layer]], 1] for layer in self.layers]
        if 1 < len(value) < self.count and all(isinstance(one, str) for one in value):  # a pattern repeated cyclically
            yield value
            yield [value[layer % len(value)] for layer in self.layers]

    def _counts_layers(self, name: str) -> bool:
        value = self.values[name]
        return (isinstance(value, int) and not isinstance(value, bool) and name != self.count_name
                and bool(COUNTED.search(name)) and not FOREIGN.search(name) and not SIZES.search(name))

    def _counts(self, value: int) -> list[int]:
        """Candidate values of a count or period, first how many chosen layers it counts from the start or the end."""
        before = sum(layer < value for layer in self.layers)
        after = sum(layer >= self.count - value for layer in self.layers)
        return list(dict.fromkeys([before, after, *range(len(self.layers) + 2)]))

    def _descend(self, options: dict[str, Sequence[Any]]) -> None:
        """Coordinate descent: try other values of each setting in turn, and keep those that reduce the differences."""
        for name, found in options.items():
            for value in found:
                self._try({name: value})

    def _together(self) -> None:
        """Try pairs of settings: a period with its offset, or with a list of exceptions to it."""
        counts = [name for name in self.values if self._counts_layers(name)]
        lists = [name for name, value in self.values.items() if NUMBERED.search(name) and (
            value is None or isinstance(value, (list, tuple))) and not FOREIGN.search(name)]
        for name, value, listed in product(counts, (1, 2), lists):
            if self.least and name != listed:
                self._try_toggled({name: value}, listed)
        every = {name: 1 for name in counts if PERIODS.search(name)}
        for (one, other), base in product(combinations(counts, 2), ({}, every)):
            if one.split("_")[0] == other.split("_")[0]:
                for values in product(range(len(self.layers) + 2), repeat=2):
                    self._try({**base, one: values[0], other: values[1]})

    def _try_toggled(self, changed: dict[str, Any], listed: str) -> None:
        """Try these changes, with the layers that then still differ added to or removed from a list of exceptions."""
        lines = self.differences({**self.best, **changed})[1]
        other = {int(line.rsplit(" as layer ", 1)[1].split()[0]) for line in lines if " as layer " in line}
        self._try({**changed, listed: sorted(set(self.best.get(listed) or ()) ^ other)})

    def _try(self, changed: dict[str, Any]) -> None:
        if not self.least or self.tried >= MOST_TRIED or all(self.best.get(key) == changed[key] for key in changed):
            return
        self.tried += 1
        values = {**self.best, **changed}
        found = self.differences(values)[0]
        if found < self.least:
            self.best, self.least = values, found


def blocks_of(config: PretrainedConfig) -> dict[str, list[dict[str, Any]]]:
    """Describe each block of a model: classes of modules, shapes of tensors and plain settings, by name.

    The result has one list of blocks for each list of modules in the model, by its name.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return {name: [_like(block) for block in model.get_submodule(name)] for name in block_lists(model)}


def block_lists(model: nn.Module) -> list[str]:
    """Names of the outermost module lists that have one module per layer."""
    count, found = model.config.num_hidden_layers, []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not any(
                name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _like(block: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        found[f"{path}()"] = type(module).__name__
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found |= {f"{path}.{name}.shape": tuple(tensor.shape) for name, tensor in tensors}
        found |= {f"{path}.{name}".lstrip("."): value for name, value in vars(module).items()
                  if not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple, type(None)))
                  and not re.search("layer_(idx|id|number|index)", name) and name != "training"}
    return found
