"""Mistakes in an experiment that show from shapes alone, before data are read or anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from strategies.rematerialization.inductor_choice import INSTALL, missing_compiler
from trainer.data.classified import class_names
from trainer.data.classified_here import class_names_here
from trainer.data.dataset import cache_folder
from trainer.data.tokenizers import known_size, tokenizer_origin
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.evaluate.check_tasks import check_tasks
from trainer.experiment.experiment import Experiment
from trainer.models.build import check_adapter, export_skeleton, from_config
from trainer.models.classifier_trials import check_early_classifier
from trainer.models.configs import check_shapes, student_config, teacher_config
from trainer.models.convolutional_nets import check_convolutional
from trainer.models.model_trials import check_early_causal
from trainer.models.router_balance import balancing_weight
from trainer.models.task_heads import Task
from trainer.models.teacher_layers import try_layers
from trainer.planning.plan import Plans, count_steps
from trainer.run.folder import RunFolder
from trainer.run.run_status import check_free
from trainer.student.export_student import check_runtimes
from trainer.teacher.exit_losses import check_exits
from trainer.teacher.intermediate_losses import check_intermediate
from trainer.teacher.other_teachers import of_other
from trainer.training.sparse_training import check_sparsity

ALONE = Topology()


def task_for(experiment: Experiment, offline: bool = False) -> Task:
    """The task of an experiment; the classes of a classification are read from its data where it does not name them."""
    data = experiment.data
    if data.is_language:
        return Task.of(data, ())
    return Task.of(data, class_names_here(data, Path(experiment.run.cache)) if offline else
                   class_names(data, cache_folder(experiment.run)))


def vocabulary_of(experiment: Experiment) -> int | None:
    """Embedding rows for the tokenizer of an experiment; None if unknown so far, or for images."""
    if experiment.data.task == "image_classification":
        return None
    return known_size(experiment.data.tokenizer, experiment.with_weights)


def check_tokenizer_origin(experiment: Experiment) -> None:
    """Raise `UserError` if nothing says which tokenizer texts are read with."""
    if experiment.data.task != "image_classification":
        tokenizer_origin(experiment.data.tokenizer, experiment.with_weights)


def check_early(experiment: Experiment, topology: Topology = ALONE, plans: Plans | None = None) -> None:
    """Raise `UserError` for mistakes that show before any data is read, tokenized or trained on."""
    vocabulary = vocabulary_of(experiment)
    teacher, student = configs_of(experiment, vocabulary)
    count_steps(experiment, None)
    check_tasks(experiment.evaluate)
    check_shapes_early(experiment, teacher, student, topology)
    check_tokenizer_origin(experiment)
    own = None
    if experiment.teacher is not None and experiment.teacher.train is not None:
        own = experiment.as_teacher("")
        count_steps(own, None)
    if experiment.memory.device is not None and not torch.cuda.is_available():
        raise UserError("memory.device", "a run is on the device that is there, which is no GPU",
                        value=experiment.memory.device, way_out="leave it out, or add --dry-run to plan for it")
    compiles = experiment.memory.compile is True and experiment.memory.bytes is not None
    lacking = missing_compiler("cuda" if topology.on_gpu else "cpu") if compiles else None
    if lacking is not None:
        raise UserError("memory.compile", lacking, value=True, way_out=f"{INSTALL}, or leave memory.compile out")
    plans = plans or Plans()
    if experiment.memory.bytes is not None:
        plans.step(experiment, topology, teacher, student)
        if own is not None:
            plans.step(own, topology, *configs_of(own, vocabulary))


def check_shapes_early(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig,
                       topology: Topology) -> None:
    """Raise `UserError` for models whose shapes alone show that the student could not learn or be exported."""
    if not experiment.data.is_language:
        micro_batch, engine = experiment.training.micro_batch, experiment.sharding.named(topology.ranks)
        check_convolutional(student, experiment.form, micro_batch, engine)
        if experiment.teacher is not None and experiment.teacher.train is not None:
            check_convolutional(teacher, experiment.as_teacher("").form, micro_batch, engine)
    early = check_early_causal if experiment.data.is_language else check_early_classifier
    if teacher is not None:
        early(experiment.teacher, "teacher", teacher)
    layers = experiment.student.teacher_layers
    if layers is None:
        early(experiment.student, "student", student)
    elif not experiment.teacher.trust_remote_code:
        try_layers(teacher, layers, experiment.data.sequence_length)
    with torch.device("meta"):
        exported = export_skeleton(experiment.form, student)
        if experiment.student.adapter is not None:
            check_adapter(experiment.form, from_config(student, experiment.form.trust))
        check_exits(experiment.objective.early_exits, exported)
        check_runtimes(experiment.export, experiment.form, exported)
        check_sparsity(experiment.student.sparsity, from_config(student, experiment.form.trust))


def configs_of(experiment: Experiment, vocabulary: int | None, offline: bool = False
             ) -> tuple[PretrainedConfig | None, PretrainedConfig]:
    """Model configurations of teacher and student, checked against each other and against the tokenizer."""
    task = task_for(experiment, offline)
    teacher = teacher_config(experiment.teacher, vocabulary, offline, task)
    student = student_config(experiment.student, teacher, vocabulary, offline, task)
    check_shapes(experiment, teacher, student, vocabulary)
    _check_others(experiment, student, vocabulary, task, offline)
    check_intermediate(experiment.objective, student, teacher, experiment.memory.bytes is not None)
    balancing_weight(experiment.objective, student)
    return teacher, student


def _check_others(experiment: Experiment, student: PretrainedConfig, tokens: int | None, task: Task,
                  offline: bool = False) -> None:
    """Raise `UserError` for other teachers whose shapes do not fit the student or the tokenizer."""
    for number, one in enumerate(experiment.by_other_teachers):
        with of_other(number):
            config = teacher_config(one.teacher, tokens, offline, task)
            check_shapes(one, config, student, tokens)
            (check_early_causal if task.is_language else check_early_classifier)(one.teacher, "teacher", config)


def next_start(experiment: Experiment) -> str:
    """What would become of the run folder if the experiment was started now; nothing is written."""
    folder, asked = RunFolder(experiment.folder), experiment.model_dump(mode="json")
    try:
        folder.check(experiment)
        check_free(folder)
    except UserError as error:
        return f"refused: {error.problem}; {error.way_out}"
    return f"{folder.path}: {_does(folder, asked)}"


def _does(folder: RunFolder, asked: dict[str, Any]) -> str:
    if not folder.experiment.exists():
        return "a new run"
    if more := folder.longer(asked):
        return f"goes on from step {folder.reached:,} ({', '.join(more)})"
    if not folder.finished:
        return f"resumes at step {folder.reached:,}" if folder.reached else "begins, with no checkpoint yet"
    if again := folder.afterwards(asked):
        return f"is trained; what {', '.join(again)} changes is made again"
    return f"is finished, and nothing is done: see {folder.report}"
