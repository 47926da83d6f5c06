"""What of a teacher stays in memory during a step, and how its vocabulary compares with its student's: from shapes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PretrainedConfig

from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.teacher_targets import (
    HiddenTargets,
    LogitTargets,
    SampledTargets,
    SharedVocabulary,
    Targets,
    TopTargets,
)
from strategies.memory.ledger import parameter_bytes
from strategies.memory.residency import Residency
from trainer.data.batches import Batch
from trainer.distributed.rank_memory import RankSetup
from trainer.errors import UserError
from trainer.experiment.model_nodes import Teacher
from trainer.models.build import DTYPES
from trainer.models.model_origin import skeleton
from trainer.models.rope_by_document import by_document


class TeacherHead(nn.Module):
    """The output head of a teacher whose hidden states are cached; nothing else of the teacher is needed."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


def resident_teacher(teacher: Teacher | None, config: PretrainedConfig | None) -> nn.Module | None:
    """The part of the teacher that is resident in a step: all of it, its head, or nothing (None).

    To be called under `FakeTensorMode`.

    Args:
        teacher: the teacher's settings; None if the objective does not use a teacher.
    """
    if config is None or teacher is None:
        return None
    dtype = DTYPES[teacher.dtype]
    if teacher.targets.asks_teacher:
        trust = teacher.trust_remote_code
        return by_document(skeleton(config, dtype, trust, "teacher")).eval().requires_grad_(False)
    if teacher.targets.source == "hidden":
        return TeacherHead(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))
    return None


def example_targets(teacher: Teacher | None, temperature: float, config: PretrainedConfig | None, batch: Batch,
                    head: nn.Module | None) -> Targets | None:
    """Example targets shaped like those from a cache, on the batch's device; None if the teacher is live or absent."""
    if config is None or teacher.targets.asks_teacher:
        return None
    asked, positions = teacher.targets, batch["targets"]
    if asked.source == "logits":
        return LogitTargets(torch.zeros(*positions.shape, config.num_labels, device=positions.device))
    if asked.source == "hidden":
        dtype = DTYPES[teacher.dtype]
        return HiddenTargets(torch.zeros(*positions.shape, config.hidden_size, dtype=dtype, device=positions.device),
                             Head(head.weight, head.bias))
    many = min(asked.draws if asked.source == "samples" else asked.k, config.vocab_size)
    ids = torch.zeros(*positions.shape, many, dtype=torch.long, device=positions.device)
    if asked.source == "samples":
        return SampledTargets(ids, torch.zeros_like(ids, dtype=torch.float32), torch.zeros_like(
            ids, dtype=torch.float32), temperature)
    return TopTargets(ids, torch.zeros_like(ids, dtype=torch.float32), torch.zeros_like(
        positions, dtype=torch.float32), temperature)


def live(teacher: nn.Module | None) -> nn.Module | None:
    """The teacher, if it is a live model; None if only its head is there, or nothing."""
    return None if isinstance(teacher, TeacherHead) else teacher


def rank_residency(setup: RankSetup, student: nn.Module, teacher: nn.Module | None, on_gpu: bool) -> Residency:
    """What the first rank holds resident. A teacher's head is replicated on every rank."""
    held = setup.residency(student, live(teacher), on_gpu)
    if not isinstance(teacher, TeacherHead):
        return held
    return replace(held, parts={**held.parts, "others": parameter_bytes(teacher)})


def apart(ours: int, theirs: int, student: PretrainedConfig, teacher: PretrainedConfig) -> SharedVocabulary | None:
    """The token columns of each head where the vocabularies are unrelated; None if these are all columns of both."""
    all_of_both = ours == student.vocab_size and theirs == teacher.vocab_size
    return None if all_of_both else SharedVocabulary(ours, teacher_size=theirs)


def sizes(student: PretrainedConfig, teacher: PretrainedConfig | None, tokens: int | None = None,
          theirs: int | None = None) -> SharedVocabulary | None:
    """The shared vocabulary, as far as shapes can tell; None if it is all columns of both heads.

    Args:
        tokens: number of tokens of the tokenizer, if known; heads may be padded to more.
        theirs: number of tokens of the teacher's own tokenizer, if the vocabularies are compared without shared tokens.
    """
    if teacher is None:
        return None
    if theirs is not None:
        return apart(min(student.vocab_size, tokens or student.vocab_size), min(teacher.vocab_size, theirs), student,
                     teacher)
    least = min(student.vocab_size, teacher.vocab_size, tokens or student.vocab_size)
    return None if least == student.vocab_size == teacher.vocab_size else SharedVocabulary(least)


def check_sizes(settings: Teacher | None, student: PretrainedConfig, teacher: PretrainedConfig | None,
                tokens: int | None = None) -> None:
    """Raise `UserError` if the teacher's targets are cached by token id and the vocabularies differ in size.

    Args:
        tokens: the tokenizer's, if known; heads may be padded beyond them, each to a size of its own.
    """
    by_number = settings is not None and settings.targets.source in ("samples", "top_k")
    padded = teacher is not None and tokens is not None and tokens <= min(student.vocab_size, teacher.vocab_size)
    if by_number and not padded and sizes(student, teacher) is not None:
        raise UserError("teacher.targets.source", "student and teacher have vocabularies of different sizes",
                        value=settings.targets.source, way_out="use `live` or `hidden`")
