"""Nodes of the experiment tree: each key a user can set, with its one-line help text, default and limits.

A node that describes one object also builds it, for example `experiment.optimizer.build(model)`. Heavy imports stay
inside `build`, so that reading, checking and explaining an experiment takes a fraction of a second.
"""

from __future__ import annotations

import difflib
from math import ceil
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from strategies.memory.units import parse_bytes
from trainer.errors import UserError, error_context
from trainer.experiment.node import Bytes, DeviceName, Dtype, Fraction, Node, PathName, Positive, Weight

if TYPE_CHECKING:  # pragma: no cover - imported for annotations only
    import torch

    from trainer.experiment.lr_schedule import LearningRate
    from trainer.experiment.precision import MixedPrecision


class Optimizer(Node):
    """The optimizer; norms, biases and embeddings get no weight decay."""

    name: Literal["adamw", "lamb", "adafactor", "muon", "adamw8bit"] = "adamw"
    """adamw (fused), lamb and adafactor (correct on sharded weights too), muon, or adamw8bit (bitsandbytes)."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of the first and second moments; muon uses the first as its momentum, adafactor uses neither."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Added to the denominator for stability; null: 1e-6 for lamb, 1e-8 for others. Adafactor has its own."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay, applied to matrices other than embeddings."""
    in_backward: bool = False
    """Update each weight during backward and free its gradient, so that not all exist at once; engines none, fsdp2."""

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        from strategies.optimizers.by_name import build

        with error_context("optimizer.name", value=self.name,
                   way_out="pip install 'limbeck[adamw8bit]', or use adamw or adafactor"):
            return build(model, self.name, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


class Schedule(Node):
    """The learning-rate schedule, counted in optimizer steps regardless of the number of processes."""

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up; `wsd` is constant, then decays linearly over the last `decay` fraction of the run."""
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    """Linear warm-up: a fraction of the run when below 1, a number of steps otherwise."""
    decay: Fraction = 0.2
    """Fraction of the run over which `wsd` decays."""
    final: Fraction = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    restarts: tuple[Positive, ...] = ()
    """Steps after which the schedule begins anew, with its warm-up, over the steps up to the next one or the end."""

    @model_validator(mode="after")
    def _rising(self) -> Schedule:
        if sorted(set(self.restarts)) != list(self.restarts):
            raise UserError("restarts", "the steps must be listed once each, in rising order",
                            value=list(self.restarts), way_out="for example `restarts: [1000, 2000]`")
        return self

    def build(self, peak: float, steps: int) -> LearningRate:
        from trainer.experiment.lr_schedule import LearningRate

        return LearningRate(peak=peak, steps=steps, shape=self.shape, warmup=self.warmup, decay=self.decay,
                            final=self.final, restarts=self.restarts)


class LossScale(Node):
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2)."""

    initial: Annotated[float, Field(gt=0)] = 65536.0
    """Loss scale at the first step."""
    growth_interval: Positive = 2000
    """Consecutive steps without overflow after which the scale doubles; an overflow halves it and skips the step."""


class Precision(Node):
    """Compute dtype of forward and backward; weights and their updates stay fp32 (survey eq. 24)."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, bf16, or fp16 with dynamic loss scaling; works the same on CPU and GPU."""
    loss_scale: LossScale = LossScale()
    """Dynamic loss scaling, used by fp16 only."""

    def build(self, device_type: str) -> MixedPrecision:
        from trainer.experiment.precision import MixedPrecision

        return MixedPrecision(self.dtype, device_type, initial_scale=self.loss_scale.initial,
                              growth_interval=self.loss_scale.growth_interval)


def _best(name: str) -> str:
    if name not in HELD_OUT and "." not in name:
        meant = SHORT.get(name.lower())
        near = [meant] if meant else difflib.get_close_matches(name, HELD_OUT, 1, 0.5)
        raise UserError("", f"no evaluation has such a value: it is one of {', '.join(HELD_OUT)}, or of a task of "
                        "`evaluate`", value=name, way_out=f"did you mean `{near[0]}`?" if near else
                        "write a task and its metric with a dot, for example gsm8k.exact_match")
    return name


# Values of an evaluation on held-out data: of language models, of both, and of classifiers.
HELD_OUT = ("bits_per_byte", "cross_entropy", "accuracy", "macro_f1", "calibration_error")
# What other tools call them.
SHORT = {"f1": "macro_f1", "f1_macro": "macro_f1", "ece": "calibration_error", "acc": "accuracy",
         "bpb": "bits_per_byte", "loss": "cross_entropy", "eval_loss": "cross_entropy",
         "perplexity": "cross_entropy", "ppl": "cross_entropy"}
Best = Annotated[str, AfterValidator(_best)]


class Training(Node):
    """How long to train, in which batches, and how often to evaluate and save."""

    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps; 0 quantizes and exports the model as it is; null: as many as `epochs` needs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data, when `steps` is null; the last step may have fewer rows, so that all are seen equally."""
    batch_size: Positive = 32
    """Sequences per optimizer step, over all processes."""
    micro_batch: Positive = 8
    """Sequences per forward pass in one process; gradient accumulation makes up the rest of the batch."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Maximum gradient norm, over all weights; null does not clip."""
    evaluate_every: Positive = 100
    """Optimizer steps between evaluations on the held-out set."""
    checkpoint_every: Positive = 200
    """Optimizer steps between checkpoints; the last step always writes one."""
    keep_checkpoints: Positive = 2
    """Checkpoints to keep; an older one is removed only after a newer one is safely written."""
    keep_best: Best | None = None
    """Export the best: accuracy, macro_f1, calibration_error, bits_per_byte, cross_entropy, TASK.METRIC; null: last."""
    early_stopping: Positive | None = None
    """End training after this many evaluations in a row that do not improve `keep_best`; null trains all steps."""
    min_delta: Weight | None = None
    """How much better a value must be to count as improvement for `early_stopping`; null: any amount."""
    background_saves: bool = True
    """Sync, hash and commit checkpoint files while training continues; what is saved is the same."""
    nonfinite_limit: Positive = 5
    """Stop the run after this many consecutive steps with a non-finite loss or gradient; each is skipped."""

    @model_validator(mode="after")
    def _length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise UserError("steps", "give exactly one of `steps` and `epochs`", value=self.steps,
                            way_out="for example `steps: 1000` with `epochs` left out")
        if self.batch_size % self.micro_batch:
            raise UserError("micro_batch", f"micro_batch must divide batch_size ({self.batch_size})",
                            value=self.micro_batch, way_out=f"try {divisors(self.batch_size)}")
        return self

    @model_validator(mode="after")
    def _improvement(self) -> Training:
        if self.early_stopping is not None and self.keep_best is None:
            raise UserError("early_stopping", "nothing says what has to improve", value=self.early_stopping,
                            way_out="add `keep_best: bits_per_byte`, or accuracy of a classifier, which also exports "
                            "the best evaluation's student")
        if self.min_delta is not None and self.early_stopping is None:
            raise UserError("min_delta", "it is for `early_stopping`, which is not given", value=self.min_delta,
                            way_out="add `early_stopping: 3`, or leave it out")
        return self

    def saves(self, steps: int) -> int:
        """The most checkpoints that a run of this many steps writes."""
        evaluations = 0 if self.keep_best is None else ceil(steps / self.evaluate_every)
        return ceil(steps / self.checkpoint_every) + evaluations

    def seen(self, rows: int) -> int | None:
        """Rows seen in all epochs together, for `rows` rows per epoch; None if the number of steps is given instead."""
        return None if self.epochs is None else max(1, ceil(self.epochs * rows - 1e-6))  # as a float, 0.1 * 30 > 3


class Offload(Node):
    """What to offload from the device to the CPU."""

    parameters: bool = False
    """Offload weights: with engine fsdp2 also gradients and optimizer state; with engine zero, stage 3 only."""
    optimizer: bool = False
    """Offload optimizer state and fp32 weights, and run the optimizer step on the CPU; engine zero only."""


class Sharding(Node):
    """How the student, its gradients and its optimizer state are sharded over processes; a teacher is sharded too."""

    engine: Literal["none", "ddp", "fsdp2", "zero"] | None = None
    """none: one process; ddp: replicas; fsdp2: shards; zero: DeepSpeed; null: ddp with several processes, else none."""
    stage: Literal[1, 2, 3] | None = None
    """zero: 1 shards optimizer state, 2 also gradients, 3 (default) also weights; fsdp2: 3, or 2 to all-gather once."""
    offload: Offload = Offload()
    """What to offload to the CPU."""
    bucket: Bytes = None
    """Size of a communication bucket of ddp and zero; null: 25MiB for ddp, the largest block for zero."""

    @model_validator(mode="after")
    def _possible(self) -> Sharding:
        if self.stage is not None and (self.engine not in ("fsdp2", "zero") or (self.engine, self.stage) == (
                "fsdp2", 1)):
            raise UserError("stage", f"engine {self.engine or 'null'} has no such stage", value=self.stage,
                            way_out="use `engine: zero`, or leave it out (fsdp2 has 2 and 3)")
        if self.offload.parameters and not (self.engine == "fsdp2" or (self.engine == "zero" and self.zero_stage == 3)):
            raise UserError("offload.parameters", f"engine {self.engine or 'null'} keeps weights where it computes",
                            value=True, way_out="use `engine: fsdp2`, or zero with `stage: 3`")
        if self.offload.optimizer and self.engine != "zero":
            way_out = "`offload: {parameters: true}` takes it along" if self.engine == "fsdp2" else "use `engine: zero`"
            raise UserError("offload.optimizer", f"engine {self.engine or 'null'} keeps it where its weights are",
                            value=True, way_out=way_out)
        return self

    def named(self, processes: int) -> str:
        """The engine: the one configured, or the default for this number of processes."""
        return self.engine or ("ddp" if processes > 1 else "none")

    def words(self, processes: int) -> str:
        """Human-readable description of how the student is sharded."""
        engine = self.named(processes)
        stage = {"zero": f" stage {self.zero_stage}", "fsdp2": "" if self.reshards else " stage 2"}.get(engine, "")
        away = [name for name in ("parameters", "optimizer") if getattr(self.offload, name)]
        return engine + stage + (f", {' and '.join(away)} on the CPU" if away else "")

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage; 3 by default."""
        return self.stage or 3

    @property
    def reshards(self) -> bool:
        """Whether FSDP2 frees the gathered weights of a block between its forward and its backward."""
        return self.stage != 2

    @property
    def bucket_bytes(self) -> int:
        """Size of a communication bucket in bytes."""
        return 25 * 2**20 if self.bucket is None else parse_bytes(self.bucket)


class Memory(Node):
    """The memory budget of a training step in each process, everything included, and how plans are made to meet it."""

    budget: Bytes = None
    """Peak memory, such as 6GiB; null: nine tenths of `device` if one is named, else no limit and no recomputation."""
    device: DeviceName | None = None
    """Device to plan a dry run for; null plans for the one that is present."""
    processes: Positive | None = None
    """Processes to plan a dry run for, one per device, over all nodes; a run must be launched with as many."""
    solver: Literal["auto", "exact"] = "auto"
    """auto: search, with a proven optimality gap; exact: Checkmate's MILP, for blocks of at most 28 operations."""
    compile: bool | Literal["auto"] = False
    """Compile planned blocks with Inductor (needs a C++ compiler); auto: only if it pays within the first 50 steps."""
    reserve: Bytes = None
    """Bytes of the budget that plans leave free for memory that they cannot foresee; null leaves none."""
    exceeded: Literal["warn", "stop"] = "warn"
    """When a measured step exceeds the budget: print a warning (warn), or save and end with exit code 3 (stop)."""

    @model_validator(mode="after")
    def _device_holds_it(self) -> Memory:
        if self.budget is not None and self.device is not None:
            from strategies.rematerialization.price.costs import DEVICES

            memory = DEVICES[self.device].memory
            if parse_bytes(self.budget) > memory:
                raise UserError("budget", f"a {self.device} has {memory:,} bytes", value=self.budget,
                                way_out="leave a tenth of them for what CUDA and its libraries hold: "
                                        f"{memory * 9 // 10}, which is the default with memory.device")
        return self

    @property
    def bytes(self) -> int | None:
        """The budget in bytes."""
        if self.budget is None and self.device is not None:
            from strategies.rematerialization.price.costs import DEVICES

            return DEVICES[self.device].memory * 9 // 10
        return None if self.budget is None else parse_bytes(self.budget)


class Export(Node):
    """The exported student: a transformers folder, with integer weights packed in the compressed-tensors format."""

    dtype: Dtype = "float32"
    """Dtype of the weights that are not quantized, and of the scales."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-5
    """Largest logit difference allowed between training and the reloaded file, relative to the largest logit."""
    adapter: Literal["merged", "separate"] | None = None
    """With `student.adapter`: the adapter alone, as peft reads it (separate), or merged into the base; null: merged."""
    license: Annotated[str, Field(min_length=1)] | None = None
    """License for the model card, as the hub names it (apache-2.0); null: that of a local base model, if it has one."""
    to: tuple[Literal["onnx", "gguf", "ctranslate2", "executorch"], ...] = ()
    """Runtimes to export for as well, llama.cpp as gguf; `limbeck export RUN --to onnx` does it later."""
    readers: tuple[Literal["llama-cpp", "openvino"], ...] = ()
    """Further runtimes that must read these files, each with a receipt: llama-cpp of gguf, openvino of onnx."""


class Run(Node):
    """Where a run is kept and how it logs; nothing here changes what is learned."""

    folder: PathName | None = None
    """Run folder; null: `runs/<name>`. A run that is started again on the same folder resumes."""
    cache: PathName = "runs/cache"
    """Folder shared between runs: tokenized data, trained tokenizers and teachers, schedules solved for blocks."""
    log_every: Positive = 10
    """Optimizer steps between log lines (metrics.jsonl has every step)."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers to log to as well, through Accelerate."""
    threads: Positive | None = None
    """CPU threads per process; null divides the machine's cores among its processes, whatever OMP_NUM_THREADS is."""
    timeout: Positive = 600
    """Seconds at one point of a step before several processes end as stuck; must exceed any batch or checkpoint."""


def divisors(number: int) -> str:
    """The divisors of `number`, comma-separated, for messages."""
    return ", ".join(str(candidate) for candidate in range(1, number + 1) if number % candidate == 0)
