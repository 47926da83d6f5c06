"""A run from start to finish: data, teacher, student, control, receipt, report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from strategies.sharding.network import NETWORKS, network_of
from trainer.data.classified_preview import classified_preview
from trainer.data.data_preview import preview
from trainer.data.dataset import PreparedData, for_each_source, prepare_text
from trainer.data.sources import check_path
from trainer.data.tokenizers import tokenizer_origin
from trainer.distributed.launch import check_engine, start
from trainer.distributed.rank_group import RankGroup
from trainer.distributed.topology import Topology
from trainer.early_checks import (
    check_early,
    check_shapes_early,
    check_tokenizer_origin,
    configs_of,
    next_start,
    vocabulary_of,
)
from trainer.errors import UserError
from trainer.evaluate.check_tasks import check_prompts, check_tasks
from trainer.experiment.data_nodes import source_names
from trainer.experiment.experiment import Experiment
from trainer.experiment.load import Source
from trainer.experiment.plain_yaml import read_values
from trainer.files import fingerprint, write_atomically
from trainer.models.build import DTYPES, quiet_libraries
from trainer.models.language_part import check_places
from trainer.planning.plan import Plan, Plans, check_batch
from trainer.planning.scaling import ENGINES, scale, scale_json, show_scale
from trainer.planning.show_plan import plan_json, show_plan
from trainer.preparation import Launched, prepare
from trainer.run.folder import RunFolder, training_identity
from trainer.run.hints import hints
from trainer.run.metrics import read_lines
from trainer.run.report import write_report
from trainer.run.run_status import RunStatus, check_free
from trainer.run.working import working
from trainer.starting_student import cut_first
from trainer.student.compare_student import compare, rebuilt
from trainer.student.early_exits import ExitModel, write_early_exits
from trainer.student.export_student import check_tokenizer, check_written, end_answers, write_others
from trainer.student.judge_student import judge_run, models_of
from trainer.student.quantize_student import check_calibration, finalize_student
from trainer.student.remake import changes_files, changes_tasks, remake
from trainer.student.weight_digests import check_digests, digests_in_training, save_digests
from trainer.student.write_student import logits_to_compare, write_student
from trainer.teacher.exit_losses import take_exits


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
        look, origin = preview, None
        if not experiment.data.is_language:
            look = classified_preview
        if experiment.data.task != "image_classification":
            origin = tokenizer_origin(experiment.data.tokenizer, experiment.with_weights)
        data = look(experiment.data, origin, Path(experiment.run.cache))
        show = (source, plan, data, next_start(experiment))
        print(plan_json(*show)) if as_json else show_plan(*show)


def planned(source: Source) -> Plan:
    """The plan of an experiment on the device that is there, or on that of `memory`, without writing any file.

    Raises:
        UserError: a mistake that shows from shapes alone, or a budget that cannot be met.
    """
    quiet_libraries()
    experiment = source.experiment
    vocabulary = vocabulary_of(experiment)
    for_each_source(experiment.data, lambda _, part: check_path(part.path, "data.path"))
    teacher, student = configs_of(experiment, vocabulary, offline=True)
    device = experiment.memory.device or ("cuda" if torch.cuda.is_available() else "cpu")
    topology = Topology.launched(device)
    if experiment.memory.processes is not None:
        topology = replace(topology, data_parallel=experiment.memory.processes)
    check_engine(experiment.sharding, experiment.optimizer, topology)
    check_shapes_early(experiment, teacher, student, topology)
    check_tasks(experiment.evaluate)
    check_tokenizer_origin(experiment)
    with working(experiment.name, "planning memory", to_stderr=True):  # standard output may be read as JSON
        return Plans().resolve(experiment, topology, teacher, student)


def scaled(source: Source, ranks: Sequence[int], engines: str | None, network: str | None, gbits: float | None,
           as_json: bool) -> None:
    """Show predicted step time and bytes for numbers of ranks; see `trainer.planning.scaling`.

    Args:
        engines: names separated by commas.
        network: name of one; None for that of `memory.device`.
        gbits: gigabits per second of a rank between nodes, if not the network's.
    """
    quiet_libraries()
    experiment = source.experiment
    if experiment.stages:
        raise UserError("stages", "steps are predicted for one experiment, and these are several",
                        way_out="write one stage as an experiment of its own")
    names = [] if engines is None else engines.split(",")
    for name in names:
        if name not in ENGINES:
            raise UserError("--engines", "there is no such engine", value=name,
                            way_out=f"one of {', '.join(ENGINES)}")
    if gbits is not None and not gbits > 0:
        raise UserError("--gbits", "this has to be more than 0", value=gbits, way_out="leave it out, or give more")
    found = network_of(experiment.memory.device or "") if network is None else NETWORKS[network]
    found = found if gbits is None else replace(found, between=gbits * 1e9 / 8)
    teacher, student = configs_of(experiment, vocabulary_of(experiment), offline=True)
    with working(experiment.name, "predicting steps", to_stderr=True):
        rows = scale(experiment, teacher, student, ranks, found, names)
    print(scale_json(rows, found)) if as_json else show_scale(rows, found, experiment.memory.device or "")


def run_experiment(source: Source, last: bool = True) -> Path:
    """Run an experiment, or resume it, and return its run folder.

    Args:
        source: the experiment.
        last: whether the processes part afterwards; False if they run another one together.

    Raises:
        UserError: a mistake in the experiment or its data; in this case only the cache has been written to.
        RunFailed: training or the comparison failed; checkpoints are kept.
    """
    folder = RunFolder(source.experiment.folder)
    with RunStatus(source.experiment.name, folder, lambda: folder.check(source.experiment)):
        return _run(source, folder, last)


def _run(source: Source, folder: RunFolder, last: bool) -> Path:
    quiet_libraries()
    experiment = source.experiment
    folder.check(experiment)
    if int(os.environ.get("RANK", 0)) == 0:
        check_free(folder)
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
        _part(accelerator, last)
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
    anew = done is not None or changes_files(again)
    if experiment.uses_teacher and experiment.report.control and (anew or not control.student.exists()):
        anew = True  # exported as the student is
        asked, lone = (one.as_control(str(folder.control)) for one in (source.experiment, experiment))
        with working(experiment.name, "training", quiet=True, model="control", folder=str(control.path)):
            train_one(asked, lone, control, control.student, how, text)
    if accelerator.is_main_process:
        if done is None:
            remake(experiment, folder, text, again, accelerator.device)
        else:
            compare(experiment, folder, done.logits, done.exported, text, accelerator.device)
            check_written(folder, done.failed)
    if anew or changes_tasks(again):
        _judge(experiment, folder, text, how, anew)
    if accelerator.is_main_process:
        if done is None:
            folder.adopt(source.experiment)
        with working(experiment.name, "writing the report"):
            write_report(folder.path)
        for hint in hints(folder):
            say(f"{experiment.name}: hint: {hint}")
        say(f"{experiment.name}: done, see {folder.report}")
    _part(accelerator, last)
    return folder.path


def _part(accelerator: Accelerator, last: bool) -> None:
    """End what a run has used: all of it, or all but the group of processes, which run another one together."""
    if last:
        accelerator.end_training()
        return
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    AcceleratorState._reset_state()  # the next run may have another engine


@dataclass(frozen=True)
class Begun:
    """An experiment that is ready to train: its data is prepared, and its teacher, if any, has weights."""

    experiment: Experiment
    how: Launched
    text: PreparedData


def with_teacher(experiment: Experiment) -> Experiment:
    """The experiment with a teacher that has weights, before other runs of the same processes; raises as `begin`."""
    quiet_libraries()
    how = Launched(*start(experiment))
    # No stage has the budget to keep that this experiment would have; its teacher has.
    free = experiment.model_copy(update={"memory": experiment.memory.model_copy(update={"budget": None})})
    ready = _with_teacher(experiment, how, _read(free, how))
    _part(how.accelerator, last=False)
    return ready


def begin(experiment: Experiment, how: Launched) -> Begun:
    """Check an experiment, read and tokenize its data, and train its teacher if that has no weights yet.

    Raises:
        UserError: a mistake in the experiment or its data; in this case only the cache has been written to.
        RunFailed: the training of the teacher failed.
    """
    text = _read(experiment, how)
    ready = _with_teacher(experiment, how, text)
    return Begun(cut_first(ready, how, text, RunFolder(experiment.folder)), how, text)


def _read(experiment: Experiment, how: Launched) -> PreparedData:
    """Check an experiment, and read and tokenize its data."""
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
    _, shape = configs_of(experiment, text.vocabulary)
    if experiment.data.is_language:
        check_places({"teacher": experiment.teacher, "student": experiment.student}, text)
    check_calibration(experiment, shape, text)
    check_prompts(experiment.evaluate, text.tokenizer)
    for note in check_tokenizer(experiment.export, text, getattr(shape, "vocab_size", 0)):
        say(f"{name}  {note}")
    return text


def train_one(asked: Experiment, experiment: Experiment, folder: RunFolder, student: Path, how: Launched,
              text: PreparedData) -> Trained:
    """Train one student to its last step, export it to the folder `student`, and free its memory.

    `asked` is the experiment as recorded in its run folder; `experiment` is the same with a teacher that has weights.
    """
    loop, accelerator = prepare(asked, experiment, folder, how, text), how.accelerator
    loop.train()
    trained, exported, failed = torch.empty(0), torch.empty(0), []
    with working(experiment.name, "hashing the weights"):
        digests = digests_in_training(loop.engine, accelerator.device, loop.frozen_digests)
    if accelerator.is_main_process:
        _keep_measured(folder)
        whole = loop.whole()
        exits = take_exits(whole)
        check_digests(digests, whole, "the student, put together after training,")
        save_digests(folder.digests, digests)
        if experiment.data.is_language:
            end_answers(whole, text.tokenizer, experiment.data)
        model = finalize_student(experiment, whole, text, folder)
        with working(experiment.name, "writing the student"):
            write_student(student, whole, model, experiment.student, experiment.export, experiment.form, text)
            trained, exported = logits_to_compare(whole, model, experiment.student, experiment.export, text)
        if exits is not None:
            write_early_exits(experiment.name, experiment.objective.early_exits, experiment.export, folder, student,
                              ExitModel.of(model, exits, DTYPES[experiment.export.dtype], text, loop.plan.micro_batch))
        failed = write_others(experiment, folder, model, text)
    loop.release()
    accelerator.wait_for_everyone()
    return Trained(trained, exported, failed)


def _judge(experiment: Experiment, folder: RunFolder, text: PreparedData, how: Launched, anew: bool) -> None:
    """Judge the models of the run on its tasks, if it has some.

    Args:
        anew: whether the models are others than those that were judged before.
    """
    accelerator, asked = how.accelerator, experiment.evaluate
    if accelerator.is_main_process and (anew or not asked.tasks):
        folder.evaluation.unlink(missing_ok=True)
    if not asked.tasks:
        return
    models = models_of(experiment.teacher, experiment.student, experiment.export, experiment.form.trust, folder, text,
                       accelerator.device, lambda: rebuilt(experiment, folder, folder.student, text, final=False))
    judge_run(asked, folder.evaluation, models, RankGroup(accelerator, how.topology, experiment.run.timeout),
              experiment.training.micro_batch * experiment.data.sequence_length, experiment.name)


def _keep_measured(folder: RunFolder) -> None:
    """Write the highest memory of a training into a file of its own."""
    lines = [line for line in read_lines(folder.metrics) if "memory_peak" in line]
    if lines:
        peak, kind = max(line["memory_peak"] for line in lines), lines[-1]["memory_kind"]
        write_atomically(folder.measured, json.dumps({"memory_peak": peak, "kind": kind}, indent=2) + "\n")


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
        if folder.experiment.exists():  # begun by another experiment, under whose name it goes on
            own = own.model_copy(update={"name": read_values(folder.experiment)[0].get("name", own.name)})
        with working(experiment.name, "training", quiet=True, model="teacher", folder=str(folder.path)):
            train_one(own, own, folder, folder.student, how, text)
    else:
        how.say(f"{experiment.name}: teacher from the cache, {folder.path}")
    teacher = experiment.teacher.model_copy(update={"path": str(folder.student), "train": None, "architecture": None})
    return experiment.model_copy(update={"teacher": teacher})
