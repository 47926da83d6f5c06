"""Experiment nodes for the two models: teacher and student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer.errors import UserError
from trainer.experiment.adapter_nodes import Adapter, check_adapter_quantization
from trainer.experiment.node import Dtype, Node, PathName, Positive
from trainer.experiment.pruning_nodes import Prune
from trainer.experiment.quantization_nodes import Quantization
from trainer.experiment.sparsity_nodes import Sparsity, check_sparse_quantization


class TeacherTraining(Node):
    """How to train a teacher that has no weights yet: once, with the experiment's own data, batches and schedule."""

    steps: Positive = 500
    """Optimizer steps of the teacher's own training."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Peak learning rate of the teacher's own training."""


class Model(Node):
    """A causal language model, given by a hub id or local folder (`path`) or by its dimensions (`architecture`)."""

    path: PathName | None = None
    """Hub id or local folder holding `config.json` and safetensors weights."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    architecture: dict[str, Any] | None = None
    """Config values as in transformers, with `model_type`; given beside `path`, they let `--dry-run` work offline."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model; when false, no code from the model's files is executed."""

    @model_validator(mode="after")
    def _model_type(self) -> Model:
        if self.architecture is not None and not isinstance(self.architecture.get("model_type"), str):
            raise UserError(
                "architecture", "the dimensions lack `model_type`", value=self.architecture,
                way_out="name the transformers architecture, for example `model_type: llama`",
            )
        return self


class Targets(Node):
    """Where the teacher's targets come from: the teacher itself at every step, or a cache that is written once."""

    source: Literal["live", "hidden", "samples", "top_k", "logits"] = "live"
    """live: run the teacher at every step; else cache its hidden states, samples, top-k; logits: of classifiers."""
    draws: Positive = 50
    """Tokens sampled from the teacher at each position, for `samples`."""
    k: Positive = 64
    """Most probable tokens kept at each position, for `top_k`; all others are merged into one more class."""
    path: PathName | None = None
    """Folder of the cache; null: inside `run.cache`, one folder per teacher, tokenizer and data set."""
    until: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Warm start: cached targets until this fraction of the run's steps, then the teacher itself; null: all of it."""

    @model_validator(mode="after")
    def _cached(self) -> Targets:
        if self.path is not None and self.source == "live":
            raise UserError("path", "a live teacher has no cache", value=self.path,
                            way_out="set `source` to hidden, samples or top_k, or leave it out")
        if self.until is not None and self.source not in ("samples", "top_k"):
            raise UserError("until", "a warm start is from targets in a cache", value=self.until,
                            way_out="set `source` to samples or top_k, or leave it out")
        return self

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher itself is asked at some step, so that it is in memory."""
        return self.source == "live" or self.until is not None

    def warm_steps(self, steps: int) -> int:
        """How many of a run's steps, the first ones, use cached targets."""
        return 0 if self.source == "live" else steps if self.until is None else round(self.until * steps)


Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ExtraTeacher(Model):
    """Another model that the student learns from, beside the teacher."""

    weight: Share = 1.0
    """Its share of the divergence, relative to those of the others."""
    dtype: Dtype = "float32"
    """Dtype in which its weights are held."""

    @model_validator(mode="after")
    def _has_weights(self) -> ExtraTeacher:
        if self.path is None:
            raise UserError("path", "another teacher has weights of its own", way_out="name a hub id or local folder")
        return self


class Teacher(Model):
    """The large model that the student learns from."""

    dtype: Dtype = "float32"
    """Dtype in which the teacher's weights are held."""
    from_student: bool = False
    """The teacher is the student as it starts, frozen and in full precision; `path` is then the student's."""
    train: TeacherTraining | None = None
    """Train the teacher from its `architecture` first, when it has no `path`."""
    targets: Targets = Targets()
    """Where the teacher's targets come from."""
    weight: Share = 1.0
    """Its share of the divergence, relative to those of `others`."""
    others: tuple[ExtraTeacher, ...] = ()
    """More teachers: the divergence is the sum of those from each, by weights that are scaled to sum to 1."""
    take_turns: bool = False
    """Hold one of several live teachers on the device at a time, and the others in host memory; slower."""

    @model_validator(mode="after")
    def _several(self) -> Teacher:
        if self.weight != 1 and not self.others:
            raise UserError("weight", "there is one teacher, which has all of the divergence", value=self.weight,
                            way_out="set objective.divergence.weight instead, or name `others`")
        if self.take_turns and not self.others:
            raise UserError("take_turns", "there is one teacher", value=True, way_out="leave it out, or name `others`")
        if self.take_turns and self.targets.source != "live":
            raise UserError("take_turns", "cached teachers are not asked in training", value=True,
                            way_out="leave it out, or use targets.source live")
        return self

    @property
    def shares(self) -> list[float]:
        """The share of each teacher, of this one first; they sum to 1."""
        weights = [self.weight, *(one.weight for one in self.others)]
        return [weight / sum(weights) for weight in weights]

    @property
    def each_other(self) -> list[Teacher]:
        """Each of `others` as a teacher alone."""
        path = self.targets.path
        return [Teacher(**one.model_dump(exclude={"weight"}), targets=self.targets.model_copy(update={
            "path": path and f"{path}/other-{number}"})) for number, one in enumerate(self.others)]

    @model_validator(mode="after")
    def _one_source(self) -> Teacher:
        if self.from_student:
            if self.train is not None or self.architecture is not None and self.path is None:
                raise UserError("from_student", "the teacher is the student as it starts, and has an origin of its own",
                                value=True, way_out="remove `from_student`, or `architecture` and `train`")
            return self
        if self.path is None and self.architecture is None:
            raise UserError("", "the teacher has neither `path` nor `architecture`",
                            way_out="name a hub id or local folder in `path`, or give `architecture` and `train`")
        if self.path is None and self.train is None:
            raise UserError("train", "a teacher made from its `architecture` alone has random weights",
                            way_out="add `train: {steps: 500}` to train it first, or name its weights in `path`")
        if self.path is not None and self.train is not None:
            raise UserError("train", "the teacher has weights (`path`) and is also to be trained from scratch",
                            way_out="remove `path` or `train`")
        return self


ORIGINS = ("path", "revision", "architecture", "from_teacher", "from_run")  # keys of a student's origin


class Student(Model):
    """The small model that is trained and exported."""

    from_teacher: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Start from these layers of the teacher (0 is the first), with its embeddings and head; all: the whole teacher."""
    from_run: PathName | None = None
    """Start from the trained weights of another run: its folder (newest checkpoint), or one of its checkpoints."""
    prune: Prune | None = None
    """Cut heads, channels, width, layers or experts of the student before it is trained; null cuts nothing."""
    sparsity: Sparsity | None = None
    """Set a share of the student's weights to zero, and keep them so; null keeps all of them."""
    quantization: Quantization | None = None
    """Quantize the student's weights and export them bit-packed; null keeps full precision."""
    adapter: Adapter | None = None
    """Train adapters on the student's weights, which are frozen; null trains the weights themselves."""

    @model_validator(mode="after")
    def _one_source(self) -> Student:
        if self.from_teacher is not None and (self.path or self.architecture):
            raise UserError("from_teacher", "the student has two origins: layers of the teacher, and its own model",
                            way_out="keep either `from_teacher` or `path`/`architecture`")
        if self.from_run is not None and (self.from_teacher is not None or self.path or self.architecture):
            raise UserError("from_run", "the student has two origins: another run, and "
                            f"{'layers of the teacher' if self.from_teacher is not None else 'its own model'}",
                            value=self.from_run, way_out="keep one of `from_run`, `from_teacher` and "
                            "`path`/`architecture`; a run brings its student's architecture and tokenizer")
        if isinstance(self.from_teacher, tuple) and (
                not self.from_teacher or sorted(set(self.from_teacher)) != list(self.from_teacher)):
            raise UserError("from_teacher", "the layers must be listed once each, in rising order",
                            value=list(self.from_teacher), way_out="for example `from_teacher: [0, 2, 5]`, or `all`")
        if self.from_teacher is None and not self.path and not self.architecture and not self.from_run:
            raise UserError("", "the student has no origin",
                            way_out="give `from_teacher` (layers), `path` (weights), `from_run` (the student of "
                            "another run) or `architecture` (dimensions)")
        return self

    @model_validator(mode="after")
    def _pruned(self) -> Student:
        if self.prune is not None and self.from_teacher is None and self.path is None and self.from_run is None:
            raise UserError("prune", "the student has random weights, of which none is better than another",
                            value=self.prune.model_dump(exclude_defaults=True), way_out="give it a `path`, "
                            "`from_teacher` or `from_run`, or write the smaller numbers into `architecture`")
        return self

    @model_validator(mode="after")
    def _adapted(self) -> Student:
        if self.adapter is not None and self.from_teacher is None and self.path is None and self.from_run is None:
            raise UserError("adapter", "the student has random weights, which an adapter would leave as they are",
                            value=self.adapter.kind, way_out="give it a `path` or `from_teacher`, or remove `adapter`")
        if self.adapter is not None and self.from_run is not None:
            raise UserError("from_run", "an adapter's base comes from files of its own", value=self.from_run,
                            way_out="name the exported student of that run in `path`")
        if self.adapter is not None:
            check_adapter_quantization(self.adapter, self.quantization)
        return self

    @model_validator(mode="after")
    def _sparse(self) -> Student:
        asked = self.sparsity
        if asked is None:
            return self
        check_sparse_quantization(asked, self.quantization)
        if not asked.is_gradual and self.from_teacher is None and not self.path and not self.from_run and (
                asked.method != "lottery"):
            raise UserError("sparsity.method", f"the student has random weights, and {asked.method} "
                            f"{'keeps zeros of' if asked.method == 'keep' else 'prunes'} weights that were trained",
                            value=asked.method, way_out="give it a `path`, `from_teacher` or `from_run`, or prune in "
                            "training: magnitude with a `schedule`, or movement")
        if self.adapter is not None and asked.is_gradual:
            raise UserError("sparsity.method", "the weights beneath an adapter are frozen, and none is pruned in "
                            "training", value=asked.method, way_out="use magnitude without `schedule`, wanda or "
                            "sparsegpt, which prune before training, or remove `adapter`")
        return self

    @property
    def teacher_layers(self) -> tuple[int, ...] | None:
        """The layers of the teacher that it starts from; None with another origin, or if it starts from all of it."""
        return self.from_teacher if isinstance(self.from_teacher, tuple) else None

    def starting_from(self, path: str) -> Student:
        """The same with another origin: the model in a local folder."""
        return self.model_copy(update={**dict.fromkeys(ORIGINS), "path": path})

    @property
    def is_cut(self) -> bool:
        """Whether something is cut from it before it is trained."""
        return self.prune is not None or (self.sparsity is not None and self.sparsity.is_one_shot)

    @property
    def is_sparse(self) -> bool:
        """Whether weights of it are zero and stay so."""
        return self.sparsity is not None

    def is_final(self, step: int, steps: int) -> bool:
        """Whether it has the bits and the zeros that are exported at a step of a run, counted from 0."""
        return (self.quantization is None or self.quantization.has_final_bits(step, steps)) and (
            self.sparsity is None or self.sparsity.has_final_sparsity(step, steps))

    @property
    def is_whole_teacher(self) -> bool:
        """Whether it starts as the teacher itself."""
        return self.from_teacher == "all"
