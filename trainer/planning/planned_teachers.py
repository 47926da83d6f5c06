"""The teachers of a planned step beside the first, and what of all of them is on a device at its peak: from shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from strategies.distillation.losses.fused_head import LogitShape
from strategies.distillation.losses.teacher_targets import Targets
from strategies.distillation.several_teachers import OtherTeacher
from strategies.memory.ledger import parameter_bytes
from trainer.data.batches import Batch
from trainer.data.tokenizers import apart_size, known_size
from trainer.experiment.experiment import Experiment
from trainer.models.configs import teacher_config
from trainer.models.task_heads import Task
from trainer.teacher.other_teachers import of_other
from trainer.teacher.resident_teacher import check_sizes, example_targets, live, resident_teacher, sizes


@dataclass(frozen=True)
class PlannedOthers:
    """The other teachers of a planned step; to be made under `FakeTensorMode`.

    Attributes:
        judges: as the loss needs them.
        resident: what of each stays in memory.
        targets: makes example targets for a batch; None if they are live.
    """

    judges: list[OtherTeacher]
    resident: list[nn.Module]
    targets: Callable[[Batch], list[Targets]] | None

    @classmethod
    def of(cls, experiment: Experiment, student: PretrainedConfig) -> PlannedOthers:
        """Those of an experiment."""
        each = experiment.by_other_teachers
        language = experiment.data.is_language
        task = Task.of(experiment.data, () if language else tuple(student.id2label.values()))
        configs = [teacher_config(one.teacher, None, offline=True, task=task) for one in each]
        held = [resident_teacher(one.teacher, config) for one, config in zip(each, configs, strict=True)]
        tokens = known_size(experiment.data.tokenizer, experiment.with_weights) if language else None
        judges = []
        for number, (one, config, model) in enumerate(zip(each, configs, held, strict=True)):
            common = None
            if language:
                with of_other(number):
                    check_sizes(one.teacher, student, config, tokens)
                common = sizes(student, config, tokens, apart_size(
                    one.teacher, one.student, one.objective.divergence.name))
            judges.append(OtherTeacher(experiment.teacher.shares[number + 1], live(model),
                                       LogitShape() if language else None, common))

        def targets(batch: Batch) -> list[Targets]:
            temperature = experiment.objective.divergence.temperature
            return [example_targets(one.teacher, temperature, config, batch, model)
                    for one, config, model in zip(each, configs, held, strict=True)]

        cached = not all(one.teacher.targets.asks_teacher for one in each)
        return cls(judges, [one for one in held if one is not None], targets if cached else None)


def together(first: nn.Module | None, others: Sequence[nn.Module], take_turns: bool) -> nn.Module | None:
    """What of all teachers is on a device at the peak of a step: all, or the largest where they take turns."""
    every = [one for one in (first, *others) if one is not None]
    if take_turns:
        every = sorted(every, key=parameter_bytes)[-1:]
    return None if not every else every[0] if len(every) == 1 else nn.ModuleList(every)
