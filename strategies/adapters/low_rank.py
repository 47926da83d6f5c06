"""Low-rank adapters on linear layers, by peft: LoRA (Hu et al. 2021, arXiv 2106.09685) and DoRA (Liu et al. 2024).

The layers are replaced inside the model, whose own class stays (`base_layer`, `lora_A.default` and so on join the names
of its parameters). DoRA (arXiv 2402.09353) learns the length of each row of a weight beside its direction.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.pytorch_utils import Conv1D

from strategies.adapters.frozen_weights import GivenNumbers, check_base, store_base
from strategies.common.stored_weights import experts_of
from strategies.common.weight_file import save_weights

NAME = "default"  # of the adapter within peft


@dataclass(frozen=True)
class LowRank:
    """Settings of an adapter.

    Attributes:
        kind: lora or dora.
        rank: columns of the two factors.
        alpha: the product of the factors is multiplied by alpha / rank.
        dropout: share of a layer's inputs that are zeroed on their way into the adapter.
        targets: names of layers, whole or the last parts of them; None for all linear layers except the head.
        base: numbers that the frozen weights are held in: float32, bfloat16, int8, nf4 or quantized.
    """

    kind: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    base: str = "float32"


def attach(model: nn.Module, asked: LowRank, given: GivenNumbers | None = None) -> nn.Module:
    """Freeze a model, and put adapters on its linear layers, in place; returns the same model.

    The first factors are random numbers of torch's generator, the second ones zero: the model computes the same as its
    base.

    Args:
        given: the numbers of a `quantized` base.

    Raises:
        ValueError: a target is no layer of the model or cannot have an adapter, the base's numbers do not fit the
            layers, or a library is missing.
    """
    check_installed()
    names = target_names(model, asked.targets)
    check_base(asked.base, ((name, model.get_submodule(name)) for name in names))
    model.requires_grad_(False)
    layers = [model.get_submodule(name) for name in names]
    with _on_meta(model, layers) if detect_fake_mode() is not None else nullcontext():
        for turned in (False, True):
            if part := [name for name, layer in zip(names, layers, strict=True) if isinstance(layer, Conv1D) is turned]:
                inject(model, part, asked, turned)
    store_base(model, asked.base, [f"{name}.base_layer" for name in names], given)
    for name in names if asked.kind == "dora" else ():
        _begin_length(model.get_submodule(name))
    return model


def inject(model: nn.Module, names: Sequence[str], asked: LowRank, turned: bool) -> None:
    """Replace layers by those of peft with an adapter; `turned` if their weights are (inputs, outputs)."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(
        r=asked.rank, lora_alpha=asked.alpha, lora_dropout=asked.dropout, target_modules=list(names),
        use_dora=asked.kind == "dora", fan_in_fan_out=turned), model, NAME)


@contextmanager
def _on_meta(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, layers of fake tensors have tensors on the meta device, and so have adapters made for them.

    Afterwards both are fake again. peft moves its adapters to their layer in a way that fake tensors do not allow.
    """
    device = layers[0].weight.device
    before = [dict(layer._parameters) for layer in layers]
    with unset_fake_temporarily(), torch.device("meta"):
        for layer, held in zip(layers, before, strict=True):
            layer._parameters.update({key: None if tensor is None else nn.Parameter(
                torch.empty(tensor.shape, dtype=tensor.dtype), False) for key, tensor in held.items()})
        yield
    for layer, held in zip(layers, before, strict=True):
        layer._parameters.update(held)
    for module in model.modules():
        for key, tensor in module._parameters.items():
            if tensor is not None and tensor.device.type == "meta":
                module._parameters[key] = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


@torch.no_grad()
def _begin_length(layer: Any) -> None:
    """Set DoRA's lengths to those of the rows as they are held, so that the adapted model begins as its base."""
    weight = layer.get_base_layer().weight.float()
    layer.lora_magnitude_vector[NAME].weight.copy_(
        torch.linalg.norm(weight.T if layer.fan_in_fan_out else weight, dim=1))


def check_installed() -> None:
    """Raise `ValueError` if peft is missing."""
    if find_spec("peft") is None:
        raise ValueError("peft, whose adapters these are, is not installed")


def target_names(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Whole names of the layers that get an adapter.

    Raises:
        ValueError: a target matches no layer, or one that cannot have an adapter: an embedding, the output head, the
            weights of experts that are one tensor.
    """
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    able = [name for name, module in linear.items() if module is not head]
    if targets is None:
        if not able:
            raise ValueError("the model has no linear layer besides its head")
        return able
    chosen: set[str] = set()
    for target in targets:
        found = {name for name in able if _is(name, target)}
        if not found:
            raise ValueError(_why_not(model, target, able, linear))
        chosen |= found
    return [name for name in able if name in chosen]


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _why_not(model: nn.Module, target: str, able: Sequence[str], linear: dict[str, nn.Module]) -> str:
    """Why a target has no layer, in words."""
    if any(_is(name, target) for name in linear):
        return (f"{target!r} is the output head, which has no adapter: its weight may be the embeddings' too, and a "
                "merge would change both")
    stacked = [f"{name}.{key}" for name, module in model.named_modules() for key in experts_of(module)]
    if any(_is(name, target) or _is(name.rpartition(".")[0], target) for name in stacked):
        return f"{target!r} is one tensor of all experts of a block, and adapters are for linear layers"
    if any(_is(name, target) for name, _ in model.named_modules()):
        return f"{target!r} is no linear layer"
    ends = list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in able))
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in able))
    near = difflib.get_close_matches(target, [*last, *ends, *able], 3, 0.5)
    return f"no layer is called {target!r}; " + (f"near to it: {', '.join(near)}" if near else
                                                 f"there are {', '.join(last[:12])}")


# ---- the base alone, and base and adapter as one

def base_of(model: nn.Module) -> nn.Module:
    """The base of a model with adapters: modules of its own, with the very same tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return _without(copy.deepcopy(model, memo)).eval()


@torch.no_grad()
def merged(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Load into a plain model of the same shape the weights that base and adapter have together, in fp32.

    Args:
        model: with adapters; not changed.
        plain: a model of the same configuration without adapters.

    Raises:
        ValueError: a merged weight is not finite.
    """
    weights = dict(bare(model, plain).named_parameters())
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            weight = _together(layer)
            if not weight.isfinite().all():
                raise ValueError(f"the merged weight of {name} is not finite")
            weights[f"{name}.weight"].copy_(weight)
    return plain


@torch.no_grad()
def bare(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Load into a plain model of the same shape the weights that the base has without its adapters, in fp32."""
    weights, seen = dict(plain.named_parameters()), dict(plain.named_buffers())
    for name, layer in base_of(model).named_modules():
        if "weight" in vars(type(layer)) or isinstance(getattr(layer, "weight", None), torch.Tensor):
            _take(weights.get(f"{name}.weight"), layer.weight)
        for key, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            if tensor is not None and key != "weight":
                _take(weights.get(f"{name}.{key}".strip("."), seen.get(f"{name}.{key}".strip("."))), tensor)
    return plain


def _take(target: torch.Tensor | None, value: torch.Tensor) -> None:
    if target is not None:
        target.copy_(value)


def _together(layer: Any) -> torch.Tensor:
    """The weight that a layer with an adapter multiplies with, by peft's own merge into an fp32 copy of the layer."""
    base = layer.get_base_layer()
    alone = copy.deepcopy(layer, {id(base): _Weight(base)})
    alone.merge()
    return alone.get_base_layer().weight.data


class _Weight(nn.Module):
    """A weight in fp32, as a base layer for peft to merge into."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().float().clone(), requires_grad=False)
        self.bias = None


def _without(model: nn.Module) -> nn.Module:
    """The model with the layers beneath its adapters in their places."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if hasattr(child, "lora_A"):
                parent._modules[key] = child.get_base_layer()
    model.__dict__.pop("peft_config", None)
    return model


def write_adapter(folder: Path, model: nn.Module, base: str, revision: str | None = None) -> None:
    """Write the adapter alone, as peft reads it: `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        base: hub id or folder of the base's weights.
        revision: of the hub id.
    """
    from peft import get_peft_model_state_dict

    config = copy.copy(model.peft_config[NAME])
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    config.task_type = "CAUSAL_LM"
    state = get_peft_model_state_dict(model, adapter_name=NAME)
    save_weights({f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
