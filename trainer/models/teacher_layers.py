"""A student made of some layers of its teacher: their weights, and the proof that it is the teacher without the others.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from trainer.errors import UserError
from trainer.model_files import last_line
from trainer.models.layer_settings import block_lists, other_layers, with_layers
from trainer.models.model_trials import SHORT, SMALL, trial_states, tried_lengths
from trainer.models.rope_by_document import by_document

EQUAL, ROUNDED = 1e-6, 1e-4  # of the largest hidden state: the same sums, and sums of weights that were rewritten
KEY = "student.from_teacher"


def fill_from_layers(student: nn.Module, weights: Mapping[str, torch.Tensor], teacher: PretrainedConfig,
                     layers: tuple[int, ...], length: int) -> None:
    """Fill a student of `len(layers)` blocks with its teacher's weights, and show that it computes what is left of it.

    Args:
        student: of `len(layers)` blocks, fp32.
        weights: fp32 weights of the teacher by their names there; those of other blocks need not be among them.
        teacher: its configuration.
        layers: which of its layers, in rising order.
        length: tokens of the longest row.

    Raises:
        UserError: the student would not be the teacher with its other blocks left out.
    """
    try:
        _fill(student, weights, teacher, layers, length)
    except ValueError as error:
        raise refused(teacher, layers, str(error)) from error


def try_layers(teacher: PretrainedConfig, layers: tuple[int, ...], length: int) -> None:
    """The same before there are weights, for a teacher that is small enough to be made for it; see there."""
    try:
        _try(teacher, layers, length)
    except ValueError as error:
        raise refused(teacher, layers, str(error)) from error


def refused(teacher: PretrainedConfig, layers: tuple[int, ...], problem: str) -> UserError:
    """What is said of layers that do not make a student, with others that were found to, if there are some."""
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
    """Whether the teacher is small enough for these layers to be tried with random weights, which they have passed.

    Raises:
        ValueError: they have not.
    """
    config, _ = with_layers(teacher, layers)
    with torch.device("meta"):
        many = sum(one.numel() for one in AutoModelForCausalLM.from_config(copy.deepcopy(teacher)).parameters())
    if many > SMALL:
        return False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(teacher), dtype=torch.float32)
        for weight in whole.parameters():
            if weight.ndim > 1:  # as if trained: what is near 0 tells nothing apart
                weight.normal_(std=min(1.0, 2 / weight.shape[-1] ** 0.5))
        student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(student, whole.state_dict(), teacher, layers, length)
    return True


def _fill(student: nn.Module, weights: Mapping[str, torch.Tensor], teacher: PretrainedConfig, layers: tuple[int, ...],
          length: int) -> None:
    """`fill_from_layers`, whose mistakes are plain ones."""
    with init_empty_weights(include_buffers=False):  # of the student's class, which may come with the model
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
    """Names of the lists of modules that have one for each layer, in both models.

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
    """Weights of these layers, and all outside of layers."""
    def number(name: str) -> int | None:
        prefix = next((f"{one}." for one in lists if name.startswith(f"{one}.")), None)
        return None if prefix is None else int(name[len(prefix):].partition(".")[0])

    return {name: tensor for name, tensor in weights.items() if number(name) in (None, *layers)}


def _renamed(weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], lists: list[str],
             layers: tuple[int, ...], count: int) -> dict[str, torch.Tensor]:
    """Weights under the student's names; of those outside of blocks that have a part for each layer, its parts."""
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
    """The parts of some layers along the dimension in which a tensor has one for each."""
    for dim, (theirs, ours) in enumerate(zip(tensor.shape, shape, strict=True)):
        if theirs != ours and theirs * len(layers) == ours * count:
            each = tensor.unflatten(dim, (count, theirs // count))
            tensor = each.index_select(dim, torch.tensor(layers, device=tensor.device)).flatten(dim, dim + 1)
    return tensor


def _fold(student: nn.Module, name: str, layers: tuple[int, ...]) -> bool:
    """Move constants that depend on a layer's number into weights; whether there were any.

    GPT-2 with `scale_attn_by_inverse_layer_idx` divides scores by the number of the layer, counted from 1.
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
    """How far hidden states are from those of the whole model without its other blocks, as a share of the largest."""
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
    except Exception as error:  # other people's code with some of its blocks left out
        raise ValueError(f"the teacher does not run without its other layers ({type(error).__name__}: "
                         f"{last_line(error)})") from error
    finally:
        student.train(mode)
        for hook in hooks:
            hook.remove()
    return largest


def _skipping(output: Any) -> Any:
    """A block's forward that hands its hidden states on, in a container as a block's output is one."""
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, (tuple, list)):
            return hidden
        return type(output)([hidden, *[None] * (len(output) - 1)])

    return forward
