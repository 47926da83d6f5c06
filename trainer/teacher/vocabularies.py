"""Matches the vocabularies of student and teacher: which tokens they share, and how the teacher reads a batch."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from strategies.distillation.losses.teacher_targets import SharedVocabulary
from strategies.distillation.tokenizers.input_adapters import (
    SpanAlignedInputs,
    TeacherInputAdapter,
    TokenIdRemap,
    identity_adapter,
)
from strategies.distillation.tokenizers.shared_vocabulary import align, same_roles
from strategies.distillation.tokenizers.span_alignment import SpanAligner
from trainer.data.dataset import PreparedData
from trainer.data.rows import StreamedRows
from trainer.data.tokenizers import own_tokenizer, vocabulary_size
from trainer.errors import UserError, error_context
from trainer.experiment.experiment import Experiment
from trainer.experiment.model_nodes import Student, Teacher
from trainer.experiment.objective_nodes import Objective
from trainer.teacher.resident_teacher import apart

LONGER = 2  # how many times the student's sequence length the teacher may need for the same text


def match_vocabularies(
    experiment: Experiment, text: PreparedData, student: PretrainedConfig, teacher: PretrainedConfig | None
) -> tuple[SharedVocabulary | None, TeacherInputAdapter]:
    """The shared vocabulary (None if it is all columns of both heads), and the adapter for the teacher's input.

    Checks made with the data guarantee already that the tokenizers are the same, or that the objective can handle two.

    Raises:
        UserError: the vocabularies cannot be compared in the way that the objective asks for.
    """
    if teacher is None:
        return None, identity_adapter
    if experiment.teacher.path is None or experiment.student.from_teacher is not None:
        return real_tokens(text.tokenizer, student, teacher), identity_adapter
    other = own_tokenizer(experiment.teacher.path, experiment.teacher.revision)
    if other is None:
        return real_tokens(text.tokenizer, student, teacher), identity_adapter
    if experiment.objective.divergence.name == "uld":
        length = experiment.data.sequence_length
        reads = _by_spans(experiment.objective, experiment.teacher, length, text.tokenizer, other)
        return _apart(text.tokenizer, student, other, teacher), reads
    if text.tokenizer.get_vocab() == other.get_vocab():
        return real_tokens(text.tokenizer, student, teacher), identity_adapter
    with error_context(
        "teacher.path", value=experiment.teacher.path, way_out="choose a teacher of the student's family"
    ):
        found = align(text.tokenizer.get_vocab(), other.get_vocab(), student.vocab_size, teacher.vocab_size,
                      same_roles(text.tokenizer, other))
    ids = torch.arange(len(found.to_teacher))
    moved = (found.to_teacher >= 0) & (found.to_teacher != ids)
    if not moved.any() and teacher.vocab_size >= vocabulary_size(text.tokenizer):
        return found.common, identity_adapter
    _check_cache(experiment.teacher, "other numbers for the same tokens")
    _check_known(text, found.to_teacher)
    return found.common, TokenIdRemap(found.to_teacher)


def check_places_of_tokens(teacher: Teacher | None, common: SharedVocabulary | None) -> None:
    """Raise `UserError` if targets are cached by token id, and student and teacher number their tokens differently."""
    if common is not None and common.student is not None and teacher.targets.source in ("samples", "top_k"):
        raise UserError("teacher.targets.source", "student and teacher have their common tokens in other places",
                        value=teacher.targets.source, way_out="use `live` or `hidden`")


def reads_alike(teacher: Teacher, student: Student, text: PreparedData) -> bool:
    """Whether the teacher reads the student's token ids unchanged, so that it can be evaluated on the same rows."""
    if teacher.path is None or student.from_teacher is not None:
        return True
    other = own_tokenizer(teacher.path, teacher.revision)
    return other is None or other.get_vocab() == text.tokenizer.get_vocab()


def real_tokens(tokenizer: PreTrainedTokenizerBase, student: PretrainedConfig, teacher: PretrainedConfig
                ) -> SharedVocabulary | None:
    """The head columns that belong to tokens, where both models share a tokenizer; None if these are all of both heads.

    Heads may be padded with columns that belong to no token. These are never trained, but a softmax over all columns
    would give them probability, and a different one in each model.
    """
    sizes = student.vocab_size, teacher.vocab_size
    numbers = _numbers(tokenizer, min(sizes))
    if not torch.equal(numbers, torch.arange(len(numbers))):
        return SharedVocabulary(len(numbers), numbers, numbers)
    return None if len(numbers) == sizes[0] == sizes[1] else SharedVocabulary(len(numbers))


def _apart(tokenizer: PreTrainedTokenizerBase, student: PretrainedConfig, other: PreTrainedTokenizerBase,
           teacher: PretrainedConfig) -> SharedVocabulary | None:
    """The columns of each head that belong to tokens of its own tokenizer; None if these are all of both heads."""
    ours, theirs = _numbers(tokenizer, student.vocab_size), _numbers(other, teacher.vocab_size)
    if not all(torch.equal(numbers, torch.arange(len(numbers))) for numbers in (ours, theirs)):
        return SharedVocabulary(len(ours), ours, theirs)
    return apart(len(ours), len(theirs), student, teacher)


def _numbers(tokenizer: PreTrainedTokenizerBase, rows: int) -> torch.Tensor:
    """The ids of a tokenizer below `rows`, ascending."""
    return torch.tensor(sorted({one for one in tokenizer.get_vocab().values() if one < rows}))


def _by_spans(
    objective: Objective, teacher: Teacher, length: int, tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
) -> TeacherInputAdapter:
    if objective.has_intermediate:
        raise UserError("objective.divergence.name", "with another tokenizer hidden states are of other positions, and "
                        "cannot be compared", value="uld", way_out="remove objective.features, relations and values")
    _check_cache(teacher, "another tokenizer")
    with error_context("objective.divergence.name", value="uld", way_out="use a teacher of the student's family"):
        return SpanAlignedInputs(SpanAligner(tokenizer, other, LONGER * length))


def _check_cache(teacher: Teacher, what: str) -> None:
    if teacher.targets.source != "live":
        raise UserError("teacher.targets.source", f"a teacher with {what} is asked at every step",
                        value=teacher.targets.source, way_out="use `live`")


def _check_known(text: PreparedData, to_teacher: torch.Tensor) -> None:
    """Raise `UserError` if the text has tokens that the teacher does not have."""
    if isinstance(text.train, StreamedRows):
        return  # a stream cannot be searched in advance
    used = torch.from_numpy(text.train.token_counts(len(to_teacher)) > 0)
    unknown = torch.argwhere(used[:len(to_teacher)] & (to_teacher < 0))
    if len(unknown):
        token = text.tokenizer.convert_ids_to_tokens(int(unknown[0, 0]))
        raise UserError("teacher.path", f"the text has {len(unknown)} tokens that the teacher does not know, for "
                        f"example {token!r}", way_out="use another teacher, or objective.divergence.name uld")
