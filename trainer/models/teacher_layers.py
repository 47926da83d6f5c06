"""Fills a student with some of its teacher's layers, and verifies that it computes the teacher without the others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig

from trainer.errors import UserError
from trainer.model_files import last_line
from trainer.models.layer_settings import block_lists, other_layers, with_layers
from trainer.models.model_trials import SHORT, SMALL, trial_states, tried_lengths
from trainer.models.rope_by_document import by_document
from trainer.models.task_heads import auto_class

EQUAL, ROUNDED = 1e-6, 1e-4  # tolerances, relative to the largest hidden state: for equal and for rescaled weights
KEY = "student.from_teacher"


def fill_from_layers(student: nn.Module, weights: Mapping[str, torch.Tensor], teacher: PretrainedConfig,
                     layers: tuple[int, ...], length: int) -> None:
    """Load a student with the weights of some of its teacher's layers, and verify it by running both models.

    Args:
        student: an fp32 model with `len(layers)` blocks.
        weights: fp32 weights of the teacher, by the teacher's names; weights of the other blocks may be missing.
        teacher: the teacher's configuration.
        layers: the teacher's layers to take, in ascending order.
        length: tokens of the longest row.

    Raises:
        UserError: the student does not compute what the teacher computes with its other blocks skipped.
    """
    try:
        _fill(student, weights, teacher, layers, length)
    except ValueError as error:
        raise refused(teacher, layers, str(error)) from error


def try_layers(teacher: PretrainedConfig, layers: tuple[int, ...], length: int) -> None:
    """Verify a choice of layers with random weights, if the teacher is small enough; raises like `fill_from_layers`."""
    try:
        _try(teacher, layers, length)
    except ValueError as error:
        raise refused(teacher, layers, str(error)) from error


def refused(teacher: PretrainedConfig, layers: tuple[int, ...], problem: str) -> UserError:
    """The error for layers that do not make a student; it suggests similar layers that were tried and do, if any."""
    way_out = "give the student a `path` or an `architecture`"
    for other in other_layers(teacher.num_hidden_layers, layers):
        try:
            if _try(teacher, other, SHORT):
                way_out = f"take {list(other)}, for example, or {way_out}"
                break
        except ValueError:
            continue
    return UserError(KEY, f"these layers of a {teacher.model_type} model do not make a model of their own: {problem}",
                     value=list(layers), way_out=way_out)


def _try(teacher: PretrainedConfig, layers: tuple[int, ...], length: int) -> bool:
    """Try these layers with random weights; False if the teacher is too large for that, True if they pass.

    Raises:
        ValueError: they fail.
    """
    config, _ = with_layers(teacher, layers)
    with torch.device("meta"):
        many = sum(one.numel() for one in auto_class(teacher).from_config(copy.deepcopy(teacher)).parameters())
    if many > SMALL:
        return False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        whole = auto_class(teacher).from_config(copy.deepcopy(teacher), dtype=torch.float32)
        for weight in whole.parameters():
            if weight.ndim > 1:  # as large as trained weights: with values near 0 differences would not show
                weight.normal_(std=min(1.0, 2 / weight.shape[-1] ** 0.5))
        student = auto_class(config).from_config(config, dtype=torch.float32)
    _fill(student, whole.state_dict(), teacher, layers, length)
    return True


def _fill(student: nn.Module, weights: Mapping[str, torch.Tensor], teacher: PretrainedConfig, layers: tuple[int, ...],
          length: int) -> None:
    """`fill_from_layers` with a plain `ValueError` for its errors."""
    with init_empty_weights(include_buffers=False):  # the student's class, which may be code that comes with the model
        whole = type(student)._from_config(copy.deepcopy(teacher), dtype=torch.float32)
    lists = paired_lists(whole, student)
    try:
        student.load_state_dict(_renamed(weights, student.state_dict(), lists, layers, teacher.num_hidden_layers))
    except RuntimeError as error:
        raise ValueError(f"its weights are others ({last_line(error)})") from error
    folded = _fold(student, lists[0], layers)
    if len(layers) == teacher.num_hidden_layers:
        return
    if len(lists) != 1:
        raise ValueError(f"they are spread over {len(lists)} lists of modules, so that it cannot be shown what the "
                         "model is without some of them")
    whole.load_state_dict(weights, strict=False, assign=True)
    off = _difference(by_document(whole.eval()), by_document(student), lists[0], layers, length)
    if off > (ROUNDED if folded else EQUAL):
        lines = with_layers(teacher, layers)[1] or ["what they compute depends on the number of the layer"]
        raise ValueError(f"{lines[0]}, and no setting says otherwise; hidden states differ by {off:.2g} of the largest "
                         "from those of the teacher with its other layers left out")


def paired_lists(teacher: nn.Module, student: nn.Module) -> list[str]:
    """Names of the module lists with one module per layer that both models have.

    Raises:
        ValueError: there is none.
    """
    theirs, ours = block_lists(teacher), block_lists(student)
    found = [name for name in theirs if name in ours]
    if not found:
        raise ValueError(f"the {teacher.config.num_hidden_layers} layers of {type(teacher).__name__} are no list of "
                         "modules")
    return found


def needed(weights: Mapping[str, torch.Tensor], lists: list[str], layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The weights of these layers, and all weights outside the layers."""
    def number(name: str) -> int | None:
        prefix = next((f"{one}." for one in lists if name.startswith(f"{one}.")), None)
        return None if prefix is None else int(name[len(prefix):].partition(".")[0])

    return {name: tensor for name, tensor in weights.items() if number(name) in (None, *layers)}


def _renamed(weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], lists: list[str],
             layers: tuple[int, ...], count: int) -> dict[str, torch.Tensor]:
    """The weights under the student's names; tensors outside the blocks that stack a part per layer are sliced."""
    taken: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        prefix = next((f"{one}." for one in lists if name.startswith(f"{one}.")), None)
        if prefix is None:
            taken[name] = _parts(tensor, wanted[name].shape, layers, count) if name in wanted else tensor
            continue
        number, _, rest = name[len(prefix):].partition(".")
        if int(number) in layers:
            taken[f"{prefix}{layers.index(int(number))}.{rest}"] = tensor
    return taken


def _parts(tensor: torch.Tensor, shape: torch.Size, layers: tuple[int, ...], count: int) -> torch.Tensor:
    """Slice a tensor that stacks one part per layer along some dimension down to the given layers."""
    for dim, (theirs, ours) in enumerate(zip(tensor.shape, shape, strict=True)):
        if theirs != ours and theirs * len(layers) == ours * count:
            each = tensor.unflatten(dim, (count, theirs // count))
            tensor = each.index_select(dim, torch.tensor(layers, device=tensor.device)).flatten(dim, dim + 1)
    return tensor


def _fold(student: nn.Module, name: str, layers: tuple[int, ...]) -> bool:
    """Fold constants that depend on a layer's number into its weights; returns whether there were any.

    GPT-2 with `scale_attn_by_inverse_layer_idx` divides attention scores by the layer's number, counted from 1.
    """
    if not getattr(student.config, "scale_attn_by_inverse_layer_idx", False):
        return False
    for own, layer in enumerate(layers):
        queries = student.get_submodule(name)[own].attn.c_attn
        with torch.no_grad():
            queries.weight[:, :student.config.hidden_size] *= (own + 1) / (layer + 1)
            queries.bias[:student.config.hidden_size] *= (own + 1) / (layer + 1)
    return True


@torch.no_grad()
def _difference(whole: nn.Module, student: nn.Module, name: str, layers: tuple[int, ...], length: int) -> float:
    """Largest difference from the hidden states of the whole model with its other blocks skipped, over the maximum."""
    mode, largest = student.training, 0.0
    student.eval()
    containers: dict[int, Any] = {}
    hooks = [block.register_forward_hook(lambda _, __, output, own=own: containers.__setitem__(own, output))
             for own, block in enumerate(student.get_submodule(name))]
    try:
        for size in tried_lengths(student, length):
            ours = trial_states(student, size)
            for number, block in enumerate(whole.get_submodule(name)):
                if number not in layers:
                    block.forward = MethodType(_skipping(containers[0]), block)
            theirs = trial_states(whole, size)
            largest = max(largest, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)))
    except Exception as error:  # foreign model code with some of its blocks skipped can fail in any way
        raise ValueError(f"the teacher does not run without its other layers ({type(error).__name__}: "
                         f"{last_line(error)})") from error
    finally:
        student.train(mode)
        for hook in hooks:
            hook.remove()
    return largest


def _skipping(output: Any) -> Any:
    """A forward for a skipped block: returns its hidden states unchanged, in the container type of `output`."""
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, (tuple, list)):
            return hidden
        return type(output)([hidden, *[None] * (len(output) - 1)])

    return forward
