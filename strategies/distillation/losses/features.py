"""Feature distillation: hidden states drawn to the teacher's, as sums over tokens, and the projections between widths.

All is at least fp32, whatever the dtype of the hidden states. What is at a position that does not count is not looked
at, be it NaN. Gradients reach the student alone.

Compare like with like: of transformers' `output_hidden_states`, number 0 is the embeddings and block i's output is
number i + 1, but in language models (Llama, GPT-2) the last has already been through the final norm. That is fine where
both models' last are paired. `recorder` gives what blocks put out, before any final norm.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

NAME = "distillation_projections"


def squared_error_sum(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """||student - teacher||^2 / width, summed over tokens that count (survey eq. 17).

    FitNets (Romero et al. 2015, eq. 3) takes 1/2 ||.||^2 instead: width / 2 times this.

    Args:
        student: (..., width) hidden states with gradient, projected where the widths differ.
        teacher: (..., width).
        kept: (...) bool, the tokens that count.

    Raises:
        ValueError: widths or positions that do not fit, or a mask that is not bool.
    """
    check_alike(student, teacher, kept)
    apart = wide(student) - wide(teacher.detach())
    return apart.masked_fill(~kept[..., None], 0).square().mean(-1).sum()


def cosine_distance_sum(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """1 - cos(student, teacher), summed over tokens that count.

    Written as 1/2 ||s/||s|| - t/||t|| ||^2, which is the same and loses no digits where the two are close. A vector of
    zeros has no direction: from another it is 1/2 away, and from another of zeros 0.

    Args:
        student: (..., width) hidden states with gradient, projected where the widths differ.
        teacher: (..., width).
        kept: (...) bool, the tokens that count.

    Raises:
        ValueError: widths or positions that do not fit, or a mask that is not bool.
    """
    check_alike(student, teacher, kept)
    ours, theirs = (unit(wide(x).masked_fill(~kept[..., None], 0)) for x in (student, teacher.detach()))
    return (ours - theirs).square().sum() / 2


class _Projection(nn.Module):
    """A linear map in fp32; a module of its own, so that what gathers weights for it sees it called."""

    def __init__(self, student_width: int, teacher_width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(teacher_width, student_width))
        nn.init.uniform_(self.weight, -student_width**-0.5, student_width**-0.5, generator=generator)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with full_precision(hidden):
            return F.linear(wide(hidden), wide(self.weight))


class Projections(nn.Module):
    """A learned linear map from the student's width to the teacher's for each layer that learns (FitNets, eq. 3).

    Where the widths agree there are none, and hidden states pass unchanged. Products are made in fp32, also under
    autocast and whatever the dtype of the weights, so that a bf16 student near its teacher keeps its gradient.

    They learn with the student and are no part of it: `attach` before its optimizer is made, `detach_from` before it
    is saved.

    Args:
        pairs: (student layer, teacher layer), as from `layer_map`.
        student_width, teacher_width: of the hidden states.
        seed: of the first weights, uniform in +-1/sqrt(student_width). They are made on the CPU, and the global
            generators are not touched.
        always: project also where the widths agree.
    """

    def __init__(self, pairs: Iterable[tuple[int, int]], student_width: int, teacher_width: int, seed: int = 0, *,
                 always: bool = False) -> None:
        super().__init__()
        self.layers = tuple(layer for layer, _ in pairs)
        self.by_layer = nn.ModuleDict()
        if student_width == teacher_width and not always:
            return
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            self.by_layer[str(layer)] = _Projection(student_width, teacher_width, generator)

    def forward(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """Hidden states (..., student width) of a layer of the student, as (..., teacher width).

        Raises:
            ValueError: a layer that is not one of `layers`.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer} of the student is in no pair; in pairs are "
                             f"{', '.join(map(str, self.layers))}")
        return self.by_layer[str(layer)](hidden) if str(layer) in self.by_layer else hidden

    def attach(self, student: nn.Module) -> None:
        """Make them a submodule of the student: they go with it to a device, into an optimizer and a checkpoint.

        Raises:
            ValueError: the student has some already.
        """
        if hasattr(student, NAME):
            raise ValueError(f"{type(student).__name__} has a submodule {NAME}; remove it with Projections.detach_from")
        student.add_module(NAME, self)

    @staticmethod
    def detach_from(student: nn.Module) -> Projections:
        """Remove them from the student, and return them.

        Raises:
            ValueError: the student has none.
        """
        if not hasattr(student, NAME):
            raise ValueError(f"{type(student).__name__} has no submodule {NAME}; put one there with Projections.attach")
        projections = getattr(student, NAME)
        delattr(student, NAME)
        return projections


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_precision(tensor: torch.Tensor) -> torch.autocast:
    """Within the context, autocast does not turn products of fp32 tensors into bf16."""
    return torch.autocast(tensor.device.type, enabled=False)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., width) of length 1 in the same direction; zeros stay zeros, with a finite gradient."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(length > 0, length, 1)


def check_alike(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor) -> None:
    """Raise a ValueError unless the two are hidden states of one shape (..., width) and `kept` masks them."""
    check_positions(student, teacher, kept)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"student and teacher are {student.shape[-1]} and {teacher.shape[-1]} wide; project the "
                         "student's hidden states with Projections")


def check_positions(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor) -> None:
    """Raise a ValueError unless the two are (..., width) of the same positions and `kept` masks them."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student and teacher of shapes {tuple(student.shape)} and {tuple(teacher.shape)} are not of "
                         "the same positions; run both on the same batch")
    check_mask("kept", kept, tuple(student.shape[:-1]))


def check_mask(name: str, mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless the mask is bool and of this shape."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {mask.dtype}: it is a mask of bool, make it one with {name}.bool()")
    if mask.shape != shape:
        raise ValueError(f"{name} of shape {tuple(mask.shape)} does not mask positions of shape {shape}")
