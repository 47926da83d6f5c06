"""Feature distillation: losses between hidden states, as sums over tokens, and projections between their widths.

Everything is computed in at least fp32, whatever the dtype of the hidden states. Masked positions have no influence,
even if they hold NaN. Only the student gets gradients.

Compare like with like: in transformers' `output_hidden_states`, entry 0 is the embeddings and entry i + 1 the output of
block i, except that the last entry of a language model (Llama, GPT-2) is taken after the final norm. This is fine if
both models' last entries are paired. `recorder` gives the outputs of blocks, before any final norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

NAME = "distillation_projections"


def squared_error_sum(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """||student - teacher||^2 / width, summed over the tokens in the mask (survey eq. 17).

    FitNets (Romero et al. 2015, eq. 3) uses 1/2 ||.||^2 instead, which is width / 2 times this.

    Args:
        student: (..., width) hidden states with gradient, projected where the widths differ.
        teacher: (..., width).
        kept: (...) bool mask of tokens.

    Raises:
        ValueError: widths or positions do not match, or the mask is not bool.
    """
    check_alike(student, teacher, kept)
    apart = wide(student) - wide(teacher.detach())
    return apart.masked_fill(~kept[..., None], 0).square().mean(-1).sum()


def cosine_distance_sum(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """1 - cos(student, teacher), summed over the tokens in the mask.

    It is computed as 1/2 ||s/||s|| - t/||t|| ||^2, which is the same without cancellation where the two are close. A
    zero vector has no direction: its distance is 1/2 to a nonzero vector, and 0 to another zero vector.

    Args:
        student: (..., width) hidden states with gradient, projected where the widths differ.
        teacher: (..., width).
        kept: (...) bool mask of tokens.

    Raises:
        ValueError: widths or positions do not match, or the mask is not bool.
    """
    check_alike(student, teacher, kept)
    ours, theirs = (unit(wide(x).masked_fill(~kept[..., None], 0)) for x in (student, teacher.detach()))
    return (ours - theirs).square().sum() / 2


class _Projection(nn.Module):
    """A linear map in fp32; a module of its own, so that hooks that gather its weights run when it is called."""

    def __init__(self, student_width: int, teacher_width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(teacher_width, student_width))
        nn.init.uniform_(self.weight, -student_width**-0.5, student_width**-0.5, generator=generator)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with full_precision(hidden):
            return F.linear(wide(hidden), wide(self.weight))


class Projections(nn.Module):
    """Learned linear maps from the student's width to the teacher's, one per paired student layer (FitNets, eq. 3).

    If the widths agree there are no maps, and hidden states pass unchanged. Products are computed in fp32, even under
    autocast and whatever the dtype of the weights, so that a bf16 student close to its teacher keeps its gradient.

    The maps are trained with the student but are not part of it: call `attach` before its optimizer is created, and
    `detach_from` before it is saved.

    Args:
        pairs: (student layer, teacher layer), as from `layer_map`.
        student_width, teacher_width: widths of the hidden states: one for all layers of a model, or one for each, such
            as the channels of a convolutional net's stages.
        seed: of the initial weights, uniform in +-1/sqrt(student_width). They are created on the CPU, and the global
            generators are left unchanged.
        always: project even if the widths agree.
    """

    def __init__(self, pairs: Iterable[tuple[int, int]], student_width: int | Sequence[int],
                 teacher_width: int | Sequence[int], seed: int = 0, *, always: bool = False) -> None:
        super().__init__()
        pairs = tuple(pairs)
        self.layers = tuple(layer for layer, _ in pairs)
        self.by_layer = nn.ModuleDict()
        generator = torch.Generator().manual_seed(seed)
        for mine, other in pairs:
            ours, theirs = (width if isinstance(width, int) else width[layer]
                            for width, layer in ((student_width, mine), (teacher_width, other)))
            if ours != theirs or always:
                self.by_layer[str(mine)] = _Projection(ours, theirs, generator)

    def forward(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """Project hidden states (..., student width) of a student layer to (..., teacher width).

        Raises:
            ValueError: the layer is not one of `layers`.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer} of the student is in no pair; in pairs are "
                             f"{', '.join(map(str, self.layers))}")
        return self.by_layer[str(layer)](hidden) if str(layer) in self.by_layer else hidden

    def attach(self, student: nn.Module) -> None:
        """Register this as a submodule of the student, so that devices, optimizers and checkpoints include it.

        Raises:
            ValueError: the student already has projections.
        """
        if hasattr(student, NAME):
            raise ValueError(f"{type(student).__name__} has a submodule {NAME}; remove it with Projections.detach_from")
        student.add_module(NAME, self)

    @staticmethod
    def detach_from(student: nn.Module) -> Projections:
        """Remove the projections from the student and return them.

        Raises:
            ValueError: the student has none.
        """
        if not hasattr(student, NAME):
            raise ValueError(f"{type(student).__name__} has no submodule {NAME}; put one there with Projections.attach")
        projections = getattr(student, NAME)
        delattr(student, NAME)
        return projections


def as_tokens(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (batch, channels, height, width) as (batch, positions, channels); hidden states of tokens as they are.

    Where one map is larger it is averaged down to the other's height and width, so that positions agree.

    Raises:
        ValueError: one is a map and the other is not.
    """
    if student.ndim != 4 and teacher.ndim != 4:
        return student, teacher
    if student.ndim != teacher.ndim:
        raise ValueError(f"student and teacher of shapes {tuple(student.shape)} and {tuple(teacher.shape)}: one has "
                         "maps and the other tokens, whose positions are not the same")
    size = [min(ours, theirs) for ours, theirs in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return tuple(F.adaptive_avg_pool2d(one, size).flatten(2).mT for one in (student, teacher))  # type: ignore[return-value]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_precision(tensor: torch.Tensor) -> torch.autocast:
    """Context manager that disables autocast, so that products of fp32 tensors stay in fp32."""
    return torch.autocast(tensor.device.type, enabled=False)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., width) scaled to length 1; zero vectors stay zero, with a finite gradient."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(length > 0, length, 1)


def check_alike(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor) -> None:
    """Raise a ValueError unless both are hidden states of the same shape (..., width) and `kept` masks them."""
    check_positions(student, teacher, kept)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"student and teacher are {student.shape[-1]} and {teacher.shape[-1]} wide; project the "
                         "student's hidden states with Projections")


def check_positions(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor) -> None:
    """Raise a ValueError unless both are (..., width) with the same positions and `kept` masks them."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student and teacher of shapes {tuple(student.shape)} and {tuple(teacher.shape)} are not of "
                         "the same positions; run both on the same batch")
    check_mask("kept", kept, tuple(student.shape[:-1]))


def check_mask(name: str, mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless the mask is bool and has this shape."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {mask.dtype}: it is a mask of bool, make it one with {name}.bool()")
    if mask.shape != shape:
        raise ValueError(f"{name} of shape {tuple(mask.shape)} does not mask positions of shape {shape}")
