"""Before the first step: models built and tried, memory planned, the folder of a run claimed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig

from strategies.adapters.low_rank import base_of
from strategies.distillation.losses.teacher_targets import SharedVocabulary
from strategies.distillation.several_teachers import OtherTeacher
from strategies.distillation.tokenizers.input_adapters import TeacherInputAdapter, identity_adapter
from strategies.export.hf.transformers_folder import write_model_files
from trainer import checkpoints
from trainer.checkpoints import WarmStart, check_space, planned_bytes
from trainer.data.batches import example_batch, model_inputs
from trainer.data.dataset import PreparedData
from trainer.distributed.rank_memory import RankSetup
from trainer.distributed.topology import Topology
from trainer.early_checks import configs_of
from trainer.experiment.experiment import Experiment
from trainer.models.build import build_student, build_teacher, shape_of
from trainer.models.classifier_trials import check_classifier
from trainer.models.configs import teacher_config
from trainer.models.model_trials import check_causal, check_packing, check_padding, check_positions
from trainer.models.task_heads import Task, know_padding
from trainer.planning.plan import Plan, Plans
from trainer.run.folder import RunFolder
from trainer.run.metrics import console
from trainer.run.trackers import start_trackers
from trainer.run.working import working
from trainer.teacher.exit_losses import attach_parts, settle_exits
from trainer.teacher.logit_cache import CachedLogits, cached_logits
from trainer.teacher.other_teachers import Beside, of_other
from trainer.teacher.target_cache import CachedTargets, cached_targets
from trainer.teacher.vocabularies import check_places_of_tokens, match_vocabularies
from trainer.training.loop import TrainLoop
from trainer.training.sparse_training import check_zeros


@dataclass(frozen=True)
class Launched:
    """The processes of a run, and the plans they make.

    Attributes:
        accelerator: the Accelerate object that all processes have joined.
        topology: degrees of parallelism and device.
        plans: plans of all models of the run.
    """

    accelerator: Accelerator
    topology: Topology
    plans: Plans = field(default_factory=Plans)

    def say(self, text: str) -> None:
        """Print a line for the user, on the main process."""
        if self.accelerator.is_main_process:
            console.print(text)


def prepare(asked: Experiment, experiment: Experiment, folder: RunFolder, how: Launched, text: PreparedData
            ) -> TrainLoop:
    """Plan a run, build and check its models, claim its folder, and resume from its last checkpoint."""
    folder.check(asked)
    accelerator, name = how.accelerator, experiment.name
    teacher_shape, student_shape = shapes = configs_of(experiment, text.vocabulary)
    know_padding(teacher_shape, text.tokenizer)
    rows = len(text.train) if hasattr(text.train, "__len__") else None
    with working(name, "planning memory"):
        plan = how.plans.resolve(experiment, how.topology, *shapes, rows, checkpoints.progress(folder.checkpoints))
    assert plan.steps is not None, "the length of the data is known once it is tokenized"
    for note in plan.notes:
        how.say(f"{name}  {note}")
    check_space(folder.checkpoints, planned_bytes(experiment, student_shape, teacher_shape),
                keep=experiment.training.keep_checkpoints, written=experiment.training.saves(plan.steps),
                best=experiment.training.keep_best is not None)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    teacher = None
    other = None if experiment.student.from_run is None else WarmStart(experiment.student)
    with working(name, "loading models"):
        takes_layers = experiment.student.teacher_layers is not None
        if (experiment.uses_teacher and not experiment.teacher_is_base) or takes_layers:
            teacher = build_teacher(experiment.teacher, teacher_shape)
        student = build_student(experiment, student_shape, teacher, text.tokenizer, other)
        if experiment.teacher_is_base:
            teacher = base_of(student)
        check_zeros(experiment.student.sparsity, student)
        attach_parts(experiment.objective, experiment.seed, student, teacher_shape)
    with working(name, "trying the models on small inputs"):
        _try_out(experiment, teacher, student)
        if experiment.objective.early_exits is not None:
            settle_exits(student, shape_of(student))
    related = _related(experiment, text, student_shape, teacher_shape if experiment.uses_teacher else None)
    check_places_of_tokens(experiment.teacher, related[0])
    cached = None
    if experiment.uses_teacher and experiment.teacher.targets.source != "live":
        cached = _cached(experiment, accelerator, text, teacher, related[0])
        teacher = teacher if experiment.teacher.targets.asks_teacher else None
    with working(name, "loading the other teachers"):
        others = _others(experiment, student_shape, text, accelerator)
    with working(name, "trying the plan on the student"):
        plan = _tried(plan, experiment, shapes, student, how)
    if (more := folder.longer(asked.model_dump(mode="json"))):
        _say_longer(how, asked, folder, plan, more)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        pinned = _with_revisions(asked, teacher_shape, student_shape, [one.commit for one in others])
        folder.claim(pinned, {**plan.to_dict(), **text.described})
        write_model_files(folder.model, student, text.tokenizer)
    accelerator.wait_for_everyone()
    with working(name, "placing the models"):
        loop = TrainLoop(experiment, plan, folder, accelerator, text, student, teacher, teacher_shape, related,
                         cached, others)
    if experiment.run.trackers:
        start_trackers(accelerator, experiment.run.trackers, asked.model_dump(mode="json"), folder, loop.state.step)
    return loop


def _say_longer(how: Launched, asked: Experiment, folder: RunFolder, plan: Plan, changed: list[str]) -> None:
    """Say from where to where a run goes on for longer, and with which learning rates."""
    step, then = folder.reached, folder.changed(asked.model_dump(mode="json"))
    before = "; ".join(f"{key} was {then[key][0]} and is {then[key][1]}" for key in changed)
    rate = asked.schedule.build(asked.optimizer.lr, plan.steps)
    begin, end = rate.stretch(step)
    how.say(f"{asked.name}: goes on from step {step:,} to {plan.steps:,} ({before}); what its earlier end made is kept "
            f"in {folder.earlier}")
    if begin != step:
        how.say(f"{asked.name}: learning rates are those of one schedule over steps {begin:,} to {end:,}, so that the "
                f"next is {rate(step):.2e}; `schedule.restarts: {[*asked.schedule.restarts, step]}` warms up and "
                "decays anew from here")


def _tried(plan: Plan, experiment: Experiment, shapes: tuple[PretrainedConfig | None, PretrainedConfig],
           student: nn.Module, how: Launched) -> Plan:
    """Check the captured graphs of the plan against the real student, and plan again without those that differ.

    A block is captured from its shapes; with its weights it may compute something else. Then it keeps all or only its
    input, or, where it cannot run twice either, runs as it is.
    Sharded weights have not been gathered yet at this point, and are not checked.
    """
    if plan.step is None or RankSetup.of(experiment, plan.topology).is_sharded:
        return plan
    student.to(how.accelerator.device)
    batch = example_batch(experiment.data, plan.micro_batch, how.accelerator.device)
    precision = experiment.precision.build(how.accelerator.device.type)

    def run() -> None:
        with precision.autocast():
            student.train()(**model_inputs(batch))

    found = plan.step.refuted(student, run)
    return how.plans.without(plan, experiment, *shapes, found) if found else plan


def _try_out(experiment: Experiment, teacher: nn.Module | None, student: nn.Module | None) -> None:
    """Raise `UserError` for models that cannot learn from these rows, because they see later tokens or other documents.

    Each model is run on small inputs to find out.
    """
    length = experiment.data.sequence_length
    for key, model in (("teacher", teacher), ("student", student)):
        if model is None:
            continue
        if experiment.objective.attention_maps is not None:
            model.set_attn_implementation("eager")  # as in training with `objective.attention_maps`
        if not experiment.data.is_language:
            check_classifier(model, key, experiment.data, getattr(experiment, key).path)
            continue
        check_causal(model, key, length, getattr(experiment, key).path)
        check_positions(model, key, getattr(experiment, key).path)
        check_padding(model, key, length)
        if experiment.data.packs:
            check_packing(model, key, length)


def _others(experiment: Experiment, student: PretrainedConfig, text: PreparedData, accelerator: Accelerator
            ) -> list[Beside]:
    """Load the other teachers, one after the other; of those whose targets are cached, only what that leaves is kept.

    Raises:
        UserError: one of them does not fit the student or the data; what `cached_targets` raises.
    """
    found = []
    for number, one in enumerate(experiment.by_other_teachers):
        with of_other(number):
            config = teacher_config(one.teacher, None, task=Task.of(one.data, text.classes))
            know_padding(config, text.tokenizer)
            model = build_teacher(one.teacher, config)
            _try_out(one, model, None)
            common, reader = _related(one, text, student, config)
            check_places_of_tokens(one.teacher, common)
            live, cached = one.teacher.targets.asks_teacher, None
            if one.teacher.targets.source != "live":
                cached = _cached(one, accelerator, text, model, common)
        judge = OtherTeacher(experiment.teacher.shares[number + 1], model if live else None,
                             shape_of(model) if live else None, common, reader)
        found.append(Beside(judge, cached, getattr(config, "_commit_hash", None)))
    return found


def _related(experiment: Experiment, text: PreparedData, student: PretrainedConfig, teacher: PretrainedConfig | None
             ) -> tuple[SharedVocabulary | None, TeacherInputAdapter]:
    """How the vocabularies of teacher and student are related; classifiers read the same and have the same classes."""
    if not experiment.data.is_language:
        return None, identity_adapter
    return match_vocabularies(experiment, text, student, teacher)


def _cached(experiment: Experiment, accelerator: Accelerator, text: PreparedData, teacher: nn.Module,
            common: SharedVocabulary | None) -> CachedTargets | CachedLogits:
    """The cached targets of a teacher, of the kind that it has."""
    if experiment.teacher.targets.source == "logits":
        return cached_logits(experiment.name, experiment.teacher.targets, experiment.run.cache,
                             experiment.training.micro_batch, accelerator, text, teacher)
    return cached_targets(experiment, accelerator, text, teacher, common)


def _with_revisions(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig,
                    others: Sequence[str | None] = ()) -> Experiment:
    """The experiment with each hub model pinned to its commit, so that it loads the same after a branch has moved.

    Args:
        others: commits of the other teachers, as far as they are loaded.
    """
    for key, config in (("teacher", teacher), ("student", student)):
        model, commit = getattr(experiment, key), getattr(config, "_commit_hash", None)
        if model is not None and model.path is not None and commit:
            experiment = experiment.model_copy(update={key: model.model_copy(update={"revision": commit})})
    if not any(others):
        return experiment
    pinned = tuple(one.model_copy(update={"revision": commit or one.revision})
                   for one, commit in zip(experiment.teacher.others, others, strict=True))
    return experiment.model_copy(update={"teacher": experiment.teacher.model_copy(update={"others": pinned})})
