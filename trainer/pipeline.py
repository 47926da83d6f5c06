"""A run from start to finish: data, teacher, student, control, receipt, report."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig

from strategies.adapters.low_rank import base_of
from strategies.export.hf.transformers_folder import write_model_files
from trainer import checkpoints
from trainer.checkpoints import WarmStart, check_space, planned_bytes
from trainer.data.batches import model_inputs
from trainer.data.data_preview import preview
from trainer.data.dataset import PreparedData, for_each_source, prepare_text
from trainer.data.sources import check_path
from trainer.data.tokenizers import known_size, tokenizer_origin, vocabulary_size
from trainer.distributed.launch import check_engine, start
from trainer.distributed.rank_memory import RankSetup
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.experiment.data_nodes import source_names
from trainer.experiment.experiment import Experiment
from trainer.experiment.load import Source
from trainer.files import fingerprint, write_atomically
from trainer.models.build import (
    build_student,
    build_teacher,
    check_adapter,
    export_skeleton,
    from_config,
    quiet_libraries,
)
from trainer.models.configs import check_shapes, student_config, teacher_config
from trainer.models.language_part import check_places
from trainer.models.model_trials import check_causal, check_early_causal, check_packing, check_padding, check_positions
from trainer.models.router_balance import balancing_weight
from trainer.models.teacher_layers import try_layers
from trainer.planning.plan import Plan, Plans, check_batch, count_steps
from trainer.planning.show_plan import plan_json, show_plan
from trainer.planning.step_memory import example_batch
from trainer.run.folder import RunFolder, training_identity
from trainer.run.hints import hints
from trainer.run.metrics import console, read_lines
from trainer.run.report import write_report
from trainer.run.run_status import RunStatus
from trainer.run.trackers import start_trackers
from trainer.run.working import working
from trainer.student.compare_student import compare
from trainer.student.export_student import check_runtimes, check_tokenizer, check_written, end_answers, write_others
from trainer.student.quantize_student import check_calibration, finalize_student
from trainer.student.remake import changes_files, remake
from trainer.student.weight_digests import check_digests, digests_in_training, save_digests
from trainer.student.write_student import logits_to_compare, write_student
from trainer.teacher.intermediate_losses import attach_projections, check_intermediate
from trainer.teacher.target_cache import cached_targets
from trainer.teacher.vocabularies import match_vocabularies
from trainer.training.loop import TrainLoop

ALONE = Topology()


@dataclass(frozen=True)
class Trained:
    """The outcome of a training, on the main process.

    Attributes:
        logits: (rows, length, vocabulary) logits of the trained model on held-out rows.
        exported: the same with weights in the dtype of the export.
        failed: runtimes other than transformers that the export failed for, each with the reason.
    """

    logits: torch.Tensor
    exported: torch.Tensor
    failed: list[str]


def dry_run(source: Source, as_json: bool) -> None:
    """Show what would run, and what the first records of local data are, without leaving any file."""
    plan = planned(source)
    if int(os.environ.get("RANK", 0)) == 0:
        experiment = source.experiment
        data = preview(experiment.data, tokenizer_origin(experiment.data.tokenizer, experiment.with_weights))
        print(plan_json(source, plan, data)) if as_json else show_plan(source, plan, data)


def planned(source: Source) -> Plan:
    """The plan of an experiment on the device that is there, or on that of `memory`, without writing any file.

    Raises:
        UserError: a mistake that shows from shapes alone, or a budget that cannot be met.
    """
    quiet_libraries()
    experiment = source.experiment
    vocabulary = known_size(experiment.data.tokenizer, experiment.with_weights)
    for_each_source(experiment.data, lambda _, part: check_path(part.path, "data.path"))
    teacher, student = _configs(experiment, vocabulary, offline=True)
    device = experiment.memory.device or ("cuda" if torch.cuda.is_available() else "cpu")
    topology = Topology.launched(device)
    if experiment.memory.processes is not None:
        topology = replace(topology, data_parallel=experiment.memory.processes)
    check_engine(experiment.sharding, experiment.optimizer, topology)
    _check_shapes_early(experiment, teacher, student)
    tokenizer_origin(experiment.data.tokenizer, experiment.with_weights)
    with working(experiment.name, "planning memory", to_stderr=True):  # standard output may be read as JSON
        return Plans().resolve(experiment, topology, teacher, student)


def run_experiment(source: Source) -> Path:
    """Run an experiment, or resume it, and return its run folder.

    Raises:
        UserError: a mistake in the experiment or its data; in this case only the cache has been written to.
        RunFailed: training or the comparison failed; checkpoints are kept.
    """
    folder = RunFolder(source.experiment.folder)
    with RunStatus(source.experiment.name, folder, lambda: folder.check(source.experiment)):
        return _run(source, folder)


def _run(source: Source, folder: RunFolder) -> Path:
    quiet_libraries()
    experiment = source.experiment
    folder.check(experiment)
    accelerator, topology = start(experiment)
    how = Launched(accelerator, topology)
    say = how.say
    values = experiment.model_dump(mode="json")
    more, again = folder.longer(values), folder.afterwards(values) if folder.finished else []
    if folder.finished and not more and not again:
        say(f"{folder.path} is finished: see {folder.report}. To train it for longer, raise training.steps (or "
            "training.epochs); to run it again, choose another run.folder or remove it.")
        if changed := [key for key in folder.changed(values) if not key.startswith("run.")]:
            say(f"not used, since it is finished: {', '.join(changed)}")
        return folder.path
    if again and not more:
        say(f"{folder.path} is trained; what {', '.join(again)} changes is made again, and nothing is trained")
    begun = begin(experiment, how)
    experiment, text, done = begun.experiment, begun.text, None
    if not again or more:
        with working(experiment.name, "training", quiet=True, model="student", folder=str(folder.path)):
            done = train_one(source.experiment, experiment, folder, folder.unverified, how, text)
    elif accelerator.is_main_process:
        folder.lock(wait=False)
    control = RunFolder(folder.control)
    needs = done is not None or changes_files(again) or not control.student.exists()
    if experiment.uses_teacher and experiment.report.control and needs:  # exported as the student is
        asked, lone = (one.as_control(str(folder.control)) for one in (source.experiment, experiment))
        with working(experiment.name, "training", quiet=True, model="control", folder=str(control.path)):
            train_one(asked, lone, control, control.student, how, text)
    if accelerator.is_main_process:
        if done is None:
            remake(experiment, folder, text, again, accelerator.device)
            folder.adopt(source.experiment)
        if done is not None:
            compare(experiment, folder, done.logits, done.exported, text, accelerator.device)
            check_written(folder, done.failed)
        with working(experiment.name, "writing the report"):
            write_report(folder.path)
        for hint in hints(folder):
            say(f"{experiment.name}: hint: {hint}")
        say(f"{experiment.name}: done, see {folder.report}")
    accelerator.end_training()
    return folder.path


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


@dataclass(frozen=True)
class Begun:
    """An experiment that is ready to train: its data is prepared, and its teacher, if any, has weights."""

    experiment: Experiment
    how: Launched
    text: PreparedData


def begin(experiment: Experiment, how: Launched) -> Begun:
    """Check an experiment, read and tokenize its data, and train its teacher if that has no weights yet.

    Raises:
        UserError: a mistake in the experiment or its data; in this case only the cache has been written to.
        RunFailed: the training of the teacher failed.
    """
    accelerator, say, name = how.accelerator, how.say, experiment.name
    check_batch(experiment.training, experiment.optimizer, how.topology)
    with working(name, "planning memory", at_once=experiment.memory.bytes is not None):
        check_early(experiment, how.topology, how.plans)
    say(f"{name}: {how.topology.ranks} process(es) on {accelerator.device.type}, {experiment.precision.dtype}")
    with working(name, f"reading and tokenizing {', '.join(source_names(experiment.data))}", at_once=True), \
            accelerator.main_process_first():
        text = prepare_text(experiment)
    for note in text.notes:
        say(f"{name}  {note}")
    _, shape = _configs(experiment, vocabulary_size(text.tokenizer))
    check_places({"teacher": experiment.teacher, "student": experiment.student}, text)
    check_calibration(experiment, shape, text)
    for note in check_tokenizer(experiment.export, text, shape.vocab_size):
        say(f"{name}  {note}")
    return Begun(_with_teacher(experiment, how, text), how, text)


def check_early(experiment: Experiment, topology: Topology = ALONE, plans: Plans | None = None) -> None:
    """Raise `UserError` for mistakes that show before any data is read, tokenized or trained on."""
    vocabulary = known_size(experiment.data.tokenizer, experiment.with_weights)
    teacher, student = _configs(experiment, vocabulary)
    count_steps(experiment, None)
    _check_shapes_early(experiment, teacher, student)
    tokenizer_origin(experiment.data.tokenizer, experiment.with_weights)
    own = None
    if experiment.teacher is not None and experiment.teacher.train is not None:
        own = experiment.as_teacher("")
        count_steps(own, None)
    if experiment.memory.device is not None and not torch.cuda.is_available():
        raise UserError("memory.device", "a run is on the device that is there, which is no GPU",
                        value=experiment.memory.device, way_out="leave it out, or add --dry-run to plan for it")
    plans = plans or Plans()
    if experiment.memory.bytes is not None:
        plans.step(experiment, topology, teacher, student)
        if own is not None:
            plans.step(own, topology, *_configs(own, vocabulary))


def _check_shapes_early(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig) -> None:
    """Raise `UserError` for models whose shapes alone show that the student could not learn or be exported."""
    if teacher is not None:
        check_early_causal(experiment.teacher, "teacher", teacher)
    if experiment.student.from_teacher is None:
        check_early_causal(experiment.student, "student", student)
    elif not experiment.teacher.trust_remote_code:
        try_layers(teacher, experiment.student.from_teacher, experiment.data.sequence_length)
    with torch.device("meta"):
        if experiment.student.adapter is not None:
            check_adapter(experiment.student.adapter, from_config(student, experiment.form.trust))
        check_runtimes(experiment.export, experiment.form, export_skeleton(experiment.form, student))


def train_one(asked: Experiment, experiment: Experiment, folder: RunFolder, student: Path, how: Launched,
              text: PreparedData) -> Trained:
    """Train one student to its last step, export it to the folder `student`, and free its memory.

    `asked` is the experiment as recorded in its run folder; `experiment` is the same with a teacher that has weights.
    """
    loop, accelerator = prepare(asked, experiment, folder, how, text), how.accelerator
    loop.train()
    trained, exported, failed = torch.empty(0), torch.empty(0), []
    with working(experiment.name, "hashing the weights"):
        digests = digests_in_training(loop.engine, accelerator.device)
    if accelerator.is_main_process:
        _keep_measured(folder)
        whole = loop.whole()
        check_digests(digests, whole, "the student, put together after training,")
        save_digests(folder.digests, digests)
        end_answers(whole, text.tokenizer, experiment.data)
        model = finalize_student(experiment, whole, text, folder)
        with working(experiment.name, "writing the student"):
            write_student(student, whole, model, experiment.student, experiment.export, text)
            trained, exported = logits_to_compare(whole, model, experiment.student, experiment.export, text)
        failed = write_others(experiment, folder, model, text)
    loop.release()
    accelerator.wait_for_everyone()
    return Trained(trained, exported, failed)


def _keep_measured(folder: RunFolder) -> None:
    """Write the highest memory of a training into a file of its own."""
    lines = [line for line in read_lines(folder.metrics) if "memory_peak" in line]
    if lines:
        peak, kind = max(line["memory_peak"] for line in lines), lines[-1]["memory_kind"]
        write_atomically(folder.measured, json.dumps({"memory_peak": peak, "kind": kind}, indent=2) + "\n")


def prepare(asked: Experiment, experiment: Experiment, folder: RunFolder, how: Launched, text: PreparedData
            ) -> TrainLoop:
    """Plan a run, build and check its models, claim its folder, and resume from its last checkpoint."""
    folder.check(asked)
    accelerator, name = how.accelerator, experiment.name
    teacher_shape, student_shape = shapes = _configs(experiment, vocabulary_size(text.tokenizer))
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
        if (experiment.uses_teacher and not experiment.teacher_is_base) or experiment.student.from_teacher is not None:
            teacher = build_teacher(experiment.teacher, teacher_shape)
        student = build_student(experiment, student_shape, teacher, text.tokenizer, other)
        if experiment.teacher_is_base:
            teacher = base_of(student)
        attach_projections(experiment.objective, experiment.seed, student, teacher_shape)
    with working(name, "trying the models on small inputs"):
        _try_out(experiment, teacher, student)
    related = match_vocabularies(experiment, text, student_shape, teacher_shape if experiment.uses_teacher else None)
    if related[0] is not None and related[0].student is not None and experiment.teacher.targets.source in (
            "samples", "top_k"):
        raise UserError("teacher.targets.source", "student and teacher have their common tokens in other places",
                        value=experiment.teacher.targets.source, way_out="use `live` or `hidden`")
    if experiment.uses_teacher and experiment.teacher.targets.source != "live":
        teacher = cached_targets(experiment, accelerator, text, teacher, related[0])
    with working(name, "trying the plan on the student"):
        plan = _tried(plan, experiment, shapes, student, how)
    if (more := folder.longer(asked.model_dump(mode="json"))):
        _say_longer(how, asked, folder, plan, more)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.claim(_with_revisions(asked, teacher_shape, student_shape), {**plan.to_dict(), **text.described})
        write_model_files(folder.model, student, text.tokenizer)
    accelerator.wait_for_everyone()
    with working(name, "placing the models"):
        loop = TrainLoop(experiment, plan, folder, accelerator, text, student, teacher, teacher_shape, related)
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
    batch = example_batch(plan.micro_batch, experiment.data.sequence_length, experiment.data.packing,
                          how.accelerator.device)
    precision = experiment.precision.build(how.accelerator.device.type)

    def run() -> None:
        with precision.autocast():
            student.train()(**model_inputs(batch))

    found = plan.step.refuted(student, run)
    return how.plans.without(plan, experiment, *shapes, found) if found else plan


def _try_out(experiment: Experiment, teacher: nn.Module | None, student: nn.Module) -> None:
    """Raise `UserError` for models that cannot learn from these rows, because they see later tokens or other documents.

    Each model is run on small inputs to find out.
    """
    length = experiment.data.sequence_length
    for key, model in (("teacher", teacher), ("student", student)):
        if model is None:
            continue
        if experiment.objective.attention_maps is not None:
            model.set_attn_implementation("eager")  # as in training with `objective.attention_maps`
        check_causal(model, key, length, getattr(experiment, key).path)
        check_positions(model, key, getattr(experiment, key).path)
        check_padding(model, key, length)
        if experiment.data.packing:
            check_packing(model, key, length)


def _configs(experiment: Experiment, vocabulary: int | None, offline: bool = False
             ) -> tuple[PretrainedConfig | None, PretrainedConfig]:
    """Model configurations of teacher and student, checked against each other and against the tokenizer."""
    teacher = teacher_config(experiment.teacher, vocabulary, offline)
    student = student_config(experiment.student, teacher, vocabulary, offline)
    check_shapes(experiment, teacher, student, vocabulary)
    check_intermediate(experiment.objective, student, teacher)
    balancing_weight(experiment.objective, student)
    return teacher, student


def _with_teacher(experiment: Experiment, how: Launched, text: PreparedData) -> Experiment:
    """The experiment with a teacher that has weights: a teacher without is trained once, and cached."""
    if experiment.teacher is None or experiment.teacher.train is None:
        return experiment
    identity = [training_identity(experiment.as_teacher("")), text.identity]
    folder = RunFolder(Path(experiment.run.cache) / "teachers" / fingerprint(identity))
    accelerator = how.accelerator
    if accelerator.is_main_process and not folder.student.exists():
        with working(experiment.name, "waiting for another run that trains the same teacher"):
            folder.lock(wait=True)
    accelerator.wait_for_everyone()
    if not folder.student.exists():
        own = experiment.as_teacher(str(folder.path))
        with working(experiment.name, "training", quiet=True, model="teacher", folder=str(folder.path)):
            train_one(own, own, folder, folder.student, how, text)
    else:
        how.say(f"{experiment.name}: teacher from the cache, {folder.path}")
    teacher = experiment.teacher.model_copy(update={"path": str(folder.student), "train": None, "architecture": None})
    return experiment.model_copy(update={"teacher": teacher})


def _with_revisions(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig) -> Experiment:
    """The experiment with each hub model pinned to its commit, so that it loads the same after a branch has moved."""
    for key, config in (("teacher", teacher), ("student", student)):
        model, commit = getattr(experiment, key), getattr(config, "_commit_hash", None)
        if model is not None and model.path is not None and commit:
            experiment = experiment.model_copy(update={key: model.model_copy(update={"revision": commit})})
    return experiment
