"""The root of the experiment tree, and the experiments derived from one: its teacher's training and its control."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from trainer.errors import UserError
from trainer.experiment.adapter_nodes import Adapter
from trainer.experiment.data_nodes import Data
from trainer.experiment.evaluate_nodes import Evaluate
from trainer.experiment.exit_nodes import check_exits_fit
from trainer.experiment.model_nodes import Student, Teacher
from trainer.experiment.node import Dtype, Node
from trainer.experiment.nodes import Export, Memory, Optimizer, Precision, Run, Schedule, Sharding, Training
from trainer.experiment.objective_nodes import INSIDE, Divergence, Objective
from trainer.experiment.quantization_nodes import Quantization
from trainer.experiment.report_node import Report
from trainer.experiment.run_paths import STUDENT, model_of_run, within
from trainer.experiment.scheduled import highest, lowest, moves
from trainer.experiment.sparsity_nodes import check_sparse_run
from trainer.experiment.stage_nodes import Stage
from trainer.experiment.task_checks import check_best, check_classification, check_language


@dataclass(frozen=True)
class StudentForm:
    """What determines the modules of a student, in addition to its model configuration.

    Attributes:
        quantization: quantization of its layers; None for full precision.
        dtype: dtype of scales and unquantized weights in its exported file.
        trust: whether Python code that ships with its model, or with its teacher's, may run.
        adapter: adapters on its layers, while it is trained; None if its own weights are trained.
    """

    quantization: Quantization | None
    dtype: Dtype
    trust: bool
    adapter: Adapter | None = None

    @property
    def merged(self) -> StudentForm:
        """The form without adapters, in which a student is exported."""
        return replace(self, adapter=None)


class Experiment(Node):
    """One experiment as the user requests it; what is derived from it is in the `Plan`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    """Name of the experiment and of its run folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of weight initialization, dropout and data order."""
    teacher: Teacher | None = None
    """The large model that the student learns from; null fine-tunes the student alone."""
    student: Student
    """The small model that is trained and exported."""
    data: Data = Data()
    """The training data."""
    objective: Objective = Objective()
    """The loss that the student minimizes."""
    optimizer: Optimizer = Optimizer()
    """The optimizer and its hyperparameters."""
    schedule: Schedule = Schedule()
    """The learning-rate schedule."""
    training: Training
    """How long and in which batches."""
    precision: Precision = Precision()
    """Compute dtype of forward and backward."""
    sharding: Sharding = Sharding()
    """How the student is sharded over processes."""
    memory: Memory = Memory()
    """The memory budget of a training step."""
    export: Export = Export()
    """The exported student."""
    evaluate: Evaluate = Evaluate()
    """Tasks that the models are judged on."""
    report: Report = Report()
    """What the report compares."""
    run: Run = Run()
    """Where the run is kept and how it logs."""
    stages: tuple[Stage, ...] = ()
    """Make the student in several stages, one after the other, each with settings of its own."""

    @model_validator(mode="after")
    def _whole(self) -> Experiment:
        if self.teacher is not None and self.teacher.from_student:
            object.__setattr__(self, "teacher", self._student_as_teacher(self.teacher))
        if self.teacher is None and self.student.from_teacher is not None:
            raise UserError("student.from_teacher", "there is no teacher to take layers from",
                            value=list(layers) if (layers := self.student.teacher_layers) else "all",
                            way_out="add `teacher`, or give the student a `path`")
        check_best(self.data, self.training.keep_best)
        if self.data.is_language:
            check_language(self.teacher)
        else:
            check_classification(self.data, self.objective, self.student, self.teacher, self.export)
            self._no_tasks_of_language()
        objective, weight = self.objective, highest(self.objective.divergence.weight)
        if self.teacher is None and weight:
            raise UserError("objective.divergence.weight", "there is no teacher to learn from", value=weight,
                            way_out="add `teacher`, or remove `objective.divergence.weight`")
        if (idle := objective.idle_at(self.teacher is not None)) is not None:
            moment = f" at {idle:.0%} of the run" if objective.scheduled else ""
            raise UserError("objective.cross_entropy", f"every weight of the objective is zero{moment}",
                            value=objective.cross_entropy, way_out="set it or `divergence.weight` above zero")
        if self.teacher is not None and self.teacher.targets.source != "live":
            self._cached()
        if self.teacher is not None and self.teacher.others:
            self._several_teachers()
        if objective.has_intermediate:
            self._looks_inside()
        if self.training.steps == 0:
            self._as_it_is()
        if self.student.from_run is not None and within(self.student.from_run, self.folder):
            raise UserError("student.from_run", "this is the run itself", value=self.student.from_run,
                            way_out="remove it: a run that is started again goes on from its newest checkpoint; or "
                            "choose another run.folder or name")
        if objective.on_policy is not None:
            self._on_policy()
        self._judged()
        if self.optimizer.in_backward:
            self._steps_in_backward()
        if self.student.adapter is not None:
            self._adapter_sharded(self.student.adapter)
        if self.export.adapter == "separate":
            self._adapter_alone()
        check_exits_fit(objective.early_exits, steps=self.training.steps, engine=self.sharding.engine,
                        on_policy=objective.on_policy is not None,
                        adapter_alone=self.export.adapter == "separate", trust=self.form.trust)
        if self.student.sparsity is not None:
            check_sparse_run(self.student.sparsity, self.training.steps, self.sharding.engine,
                             self.optimizer.in_backward, self.student.adapter is not None, self.export.adapter)
        return self

    def _student_as_teacher(self, teacher: Teacher) -> Teacher:
        """The teacher that is the student as it starts, with the student's path."""
        student, way_out = self.student, "or remove `teacher.from_student` and name a teacher in `teacher.path`"
        if student.from_teacher is not None:
            raise UserError("teacher.from_student", "the student is made of the teacher's layers, and the teacher of "
                            "the student", value=True, way_out=f"give the student a `path`, {way_out}")
        if student.from_run is not None:
            raise UserError("teacher.from_student", "the weights of a run's checkpoint are no model that can be loaded "
                            "beside the student", value=True, way_out="name the exported student of that run in "
                            f"`student.path`: {model_of_run(student.from_run).parent / STUDENT}")
        if student.path is None:
            raise UserError("teacher.from_student", "the student starts with random weights, from which nothing can "
                            "be learned", value=True, way_out=f"give the student a `path`, {way_out}")
        if teacher.path not in (None, student.path):
            raise UserError("teacher.path", "the teacher is the student as it starts (`teacher.from_student`), which "
                            f"is {student.path}", value=teacher.path, way_out="keep one of the two")
        return teacher.model_copy(update={name: getattr(student, name) for name in (
            "path", "revision", "architecture", "trust_remote_code")})

    def _as_it_is(self) -> None:
        """Check that a student which is not trained has weights already."""
        student = self.student
        if student.path is None and student.from_teacher is None and student.from_run is None:
            raise UserError("training.steps", "nothing is trained, and a student made from its `architecture` alone "
                            "has random weights", value=0, way_out="name its weights in `student.path` or "
                            "`student.from_run`, or train it for some steps")
        if student.quantization is not None and student.quantization.trained:
            raise UserError("student.quantization.method", "qat is part of training, and nothing is trained",
                            value=student.quantization.method, way_out="use gptq or rtn, or train for some steps")
        if student.adapter is not None:
            raise UserError("student.adapter", "nothing is trained, and so is no adapter", value=student.adapter.kind,
                            way_out="leave it out, or train for some steps")

    def _adapter_sharded(self, adapter: Adapter) -> None:
        """Reject engines that cannot shard a base or its adapters."""
        sharding = self.sharding
        if adapter.base not in {"fsdp2": ("float32", "bfloat16"), "zero": ("float32",)}.get(
                sharding.engine or "", (adapter.base,)):
            raise UserError("student.adapter.base", f"{sharding.engine} casts numbers of one kind, and this base has "
                            "several", value=adapter.base, way_out="use float32 (fsdp2 takes bfloat16, too), or engine "
                            "ddp, where each process holds the base, small as it is")

    def _adapter_alone(self) -> None:
        """Reject settings with which an adapter cannot be exported without its base."""
        student, way_out = self.student, "or set export.adapter: merged"
        if student.adapter is None:
            raise UserError("export.adapter", "the student has no adapter", value="separate",
                            way_out="add `student.adapter`, or leave it out")
        if student.path is None and not student.adapter.is_exported:
            raise UserError("export.adapter", "its base is nowhere but in this run: layers of the teacher",
                            value="separate", way_out=f"give the student a `path`, {way_out}")
        if student.quantization is not None and not student.adapter.is_exported:
            raise UserError("student.quantization", "an adapter alone is not quantized",
                            way_out="set student.adapter.base: quantized, with which the quantized base is exported "
                            f"beside it, or remove it, {way_out}")
        if student.quantization is not None and student.quantization.layers:
            raise UserError("student.quantization.layers", "a base beneath an adapter is loaded dequantized, and "
                            "transformers then takes all its layers for the same", value=[
                                one.match for one in student.quantization.layers],
                            way_out=f"leave it out, with those layers in student.quantization.ignore, {way_out}")
        if self.export.to:
            raise UserError("export.to", "other runtimes read no adapters", value=list(self.export.to),
                            way_out=f"leave it out, {way_out}")

    def _on_policy(self) -> None:
        """Check what on-policy distillation requires: a live teacher with a divergence, and unsharded weights."""
        way_out = "or remove objective.on_policy"
        if self.teacher is None or lowest(self.objective.divergence.weight) == 0:
            raise UserError("objective.on_policy", "nobody judges what the student writes",
                            way_out=f"add `teacher` with a divergence, {way_out}")
        if not self.teacher.targets.asks_teacher:
            raise UserError("teacher.targets.source", "what the student will write is in no cache",
                            value=self.teacher.targets.source, way_out="use `live`, or set teacher.targets.until, from "
                            f"which on the student writes, {way_out}")
        if self.sharding.engine in ("fsdp2", "zero"):
            raise UserError("sharding.engine", "the student writes with whole weights only", value=self.sharding.engine,
                            way_out=f"use ddp, {way_out}")

    def _several_teachers(self) -> None:
        """Reject settings with which only one teacher can be asked."""
        assert self.teacher is not None, "the others are beside it"
        if self.objective.divergence.weight == 0:
            raise UserError("teacher.others", "the objective compares nothing with what they say",
                            way_out="set objective.divergence.weight above zero, or remove them")
        if self.sharding.engine in ("fsdp2", "zero") and (
                self.teacher.targets.asks_teacher or self.teacher.targets.source == "hidden"):
            raise UserError("teacher.others", f"{self.sharding.engine} shards one teacher", way_out="use ddp or none, "
                            "cache samples or top_k of each (teacher.targets.source), or keep one teacher")
        if self.teacher.take_turns and self.objective.has_intermediate:
            raise UserError("teacher.take_turns", "losses on what is inside of the first teacher need it all the time",
                            value=True, way_out="leave it out, or remove objective.features and its like")
        if self.teacher.take_turns and self.teacher_is_base:
            raise UserError("teacher.take_turns", "the first teacher is the base of the student's adapter, which is "
                            "needed all the time", value=True, way_out="leave it out, or give the teacher another "
                            "dtype than the base, with which it has weights of its own")
        if self.teacher.train is not None:
            raise UserError("teacher.others", "a teacher that is trained by the run is the only one",
                            way_out="train it first, and name it in `teacher.path`")

    def _no_tasks_of_language(self) -> None:
        """Reject tasks of language models for a classifier, which is judged on its held-out rows."""
        if names := [task.name for task in self.evaluate.tasks]:
            raise UserError("evaluate.tasks", f"language models are judged on these, and the task is {self.data.task}",
                            value=names, way_out="remove `evaluate`: accuracy, macro F1 and calibration of classifiers "
                            "are measured on data.validation")

    def _judged(self) -> None:
        """Check what tasks in training require: a metric that exists, and whole weights where the student writes."""
        best, every = self.training.keep_best, self.evaluate.every
        if best is not None and "." in best:
            self.evaluate.check_best(best)
        writes = next((task.name for task in self.evaluate.in_training if task.generates), None)
        if every is not None and writes is not None and self.sharding.engine in ("fsdp2", "zero"):
            raise UserError("evaluate.every", f"in task {writes} the student writes, with whole weights only, and "
                            f"{self.sharding.engine} shards them", value=every, way_out="leave it out, so that the "
                            "task is judged when the run ends; or use ddp")

    def _looks_inside(self) -> None:
        """Check what losses on intermediate activations require: a live teacher, and visible attention."""
        name = next(name for name in INSIDE if getattr(self.objective, name) is not None)
        if self.teacher is None:
            raise UserError(f"objective.{name}", "there is no teacher to learn from",
                            way_out="add `teacher`, or remove it")
        if self.teacher.targets.source != "live":
            raise UserError(f"objective.{name}", "a cache holds what the teacher says, not what is inside of it",
                            way_out="use teacher.targets.source live, or remove it")
        for name in ("values", "attention_maps"):
            if getattr(self.objective, name) is not None and self.memory.budget is not None:
                raise UserError(f"objective.{name}", "blocks that are recomputed by a plan do not show their attention",
                                way_out="remove it, or memory.budget")

    def _cached(self) -> None:
        """Reject settings for which a cache of teacher targets does not suffice."""
        assert self.teacher is not None, "nothing else is cached"
        source, name = self.teacher.targets.source, self.objective.divergence.name
        if source not in ("hidden", "logits") and moves(temperature := self.objective.divergence.temperature):
            raise UserError("objective.divergence.temperature", f"{source} are cached at one temperature",
                            value=temperature, way_out="use one number, or teacher.targets.source live or hidden")
        if self.data.streaming:
            raise UserError("teacher.targets.source", "a stream's rows are made anew each time, and have no cache",
                            value=source, way_out="use `live`, or set data.streaming: false")
        if source == "samples" and name != "forward_kl":
            raise UserError("objective.divergence.name", "tokens drawn from the teacher serve forward_kl only",
                            value=name, way_out="use teacher.targets.source hidden or top_k, or forward_kl")
        if source != "hidden" and name == "uld":
            raise UserError("objective.divergence.name", "uld needs whole distributions", value=name,
                            way_out="use teacher.targets.source live")

    def _steps_in_backward(self) -> None:
        """Reject settings that need all gradients at once, which `optimizer.in_backward` never has."""
        training, way_out = self.training, "or leave optimizer.in_backward out"
        if training.clip is not None:
            raise UserError("training.clip", "the norm of all gradients is not known when the first weight is updated "
                            "in backward", value=training.clip, way_out=f"set it to null, {way_out}")
        if self.precision.dtype == "fp16":
            raise UserError("precision.dtype", "fp16 must see all gradients before it knows whether its loss scale was "
                            "too large", value="fp16", way_out=f"use bf16, {way_out}")

    @property
    def folder(self) -> str:
        """The run folder."""
        return self.run.folder or f"runs/{self.name}"

    @property
    def uses_teacher(self) -> bool:
        """Whether any loss term needs the teacher's outputs."""
        objective = self.objective
        return self.teacher is not None and self.training.steps != 0 and (
            objective.build(True).needs_teacher or objective.has_intermediate)

    @property
    def by_other_teachers(self) -> list[Experiment]:
        """This experiment with each of the other teachers in the place of its own; none if no teacher is used."""
        others = self.teacher.each_other if self.teacher is not None and self.uses_teacher else []
        student = self.student.model_copy(update={"from_teacher": None})  # whose layers are those of the first
        return [self.model_copy(update={"teacher": one, "student": student}) for one in others]

    @property
    def others_with_weights(self) -> list[tuple[str, str, str | None]]:
        """(key, path, revision) of the other teachers; see `with_weights`."""
        return [(f"teacher.others.{number}.path", str(one.path), one.revision)
                for number, one in enumerate(() if self.teacher is None else self.teacher.others)]

    @property
    def form(self) -> StudentForm:
        """What determines the student's modules, in addition to its model configuration."""
        teacher, student = self.teacher, self.student
        trust = student.trust_remote_code or (student.from_teacher is not None and teacher is not None
                                              and teacher.trust_remote_code)
        return StudentForm(student.quantization, self.export.dtype, trust, student.adapter)

    @property
    def teacher_is_base(self) -> bool:
        """Whether the live teacher is the very base of the student's adapter, so that they can share their weights."""
        teacher, student = self.teacher, self.student
        if teacher is None or student.adapter is None or not self.uses_teacher or student.path is None or (
                student.is_cut):
            return False
        return (teacher.path, teacher.revision, teacher.trust_remote_code, teacher.dtype, teacher.targets.source) == (
            student.path, student.revision, student.trust_remote_code, student.adapter.base, "live"
        ) and self.sharding.engine in (None, "none", "ddp")

    @property
    def with_weights(self) -> list[tuple[str, str, str | None]]:
        """(key, path, revision) of the models loaded with weights, each of which has its own vocabulary."""
        run = self.student.from_run
        brought = [] if run is None else [("student.from_run", str(model_of_run(run)), None)]
        return brought + [(f"{key}.path", model.path, model.revision)
                          for key, model in (("student", self.student), ("teacher", self.teacher))
                          if model is not None and model.path]

    def from_cut(self, folder: Path) -> Experiment:
        """The experiment whose student starts from a cut that has been made; itself if its student is not cut."""
        if not self.student.is_cut:
            return self
        return self.model_copy(update={"student": self.student.starting_from(str(folder)).model_copy(update={
            "prune": None, "trust_remote_code": self.form.trust})})

    def as_teacher(self, folder: str) -> Experiment:
        """The experiment that trains this one's teacher: same data, full precision, and no teacher of its own."""
        assert self.teacher is not None and self.teacher.train is not None
        by_task = "." in (self.training.keep_best or "")
        return self.model_copy(update={
            "name": f"{self.name}-teacher",
            "teacher": None,
            "student": Student(architecture=self.teacher.architecture),
            "objective": Objective(),
            "optimizer": self.optimizer.model_copy(update={"lr": self.teacher.train.lr}),
            "training": self.training.model_copy(update={
                "steps": self.teacher.train.steps, "epochs": None,
                **(dict.fromkeys(("keep_best", "early_stopping", "min_delta")) if by_task else {})}),
            "evaluate": Evaluate(),
            "schedule": self.schedule.model_copy(update={"restarts": ()}),
            "export": Export(),
            "report": self.report.model_copy(update={"control": False}),
            "run": self.run.model_copy(update={"folder": folder, "trackers": ()}),
        })

    def as_control(self, folder: str) -> Experiment:
        """The control experiment: the same student on the same tokens, without distillation.

        Its loss is cross-entropy alone, plus the routers' balancing loss. The teacher stays in the tree, because the
        student may start from its layers, but no loss term uses it.
        """
        return self.model_copy(update={
            "name": f"{self.name}-control",
            "objective": Objective(divergence=Divergence(weight=0.0), balancing=self.objective.balancing),
            "export": self.export.model_copy(update={"to": ()}),
            "report": self.report.model_copy(update={"control": False}),
            "run": self.run.model_copy(update={"folder": folder, "trackers": ()}),
        })

