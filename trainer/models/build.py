"""Teacher and student as models with weights, or as empty models of the same shapes."""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from strategies.adapters.frozen_weights import check_base
from strategies.adapters.low_rank import attach, check_installed, target_names
from strategies.common.generation_settings import load_generation_settings
from strategies.common.model_tasks import task_of
from strategies.common.stored_weights import Experts, all_layers, as_matrix, multiplies
from strategies.distillation.losses.fused_head import LogitShape, logit_shape
from strategies.export.hf.transformers_folder import check_folder, must_be_alike
from strategies.export.sizes import exported_bytes, header_bound
from strategies.export.weight_reads import weight_reads
from strategies.quantization.qat import prepare
from trainer.errors import UserError, error_context
from trainer.experiment.experiment import Experiment, StudentForm
from trainer.experiment.model_nodes import Model, Student, Teacher
from trainer.experiment.quantization_nodes import Quantization
from trainer.experiment.run_paths import model_of_run
from trainer.model_files import stored_dtypes
from trainer.models.architecture_keys import set_token
from trainer.models.configs import reach_model
from trainer.models.fitted_inputs import fitting_inputs
from trainer.models.full_precision import check_share, ignored, without_place
from trainer.models.language_part import check_alone
from trainer.models.model_origin import dense, learn_padding, loading, method_of, note, skeleton
from trainer.models.quantized_base import check_quantized_base, given_numbers
from trainer.models.rope_by_document import by_document
from trainer.models.task_heads import auto_class, know_padding
from trainer.models.teacher_layers import fill_from_layers, needed, paired_lists
from trainer.models.tied_weights import kept_apart

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_teacher(teacher: Teacher, config: PretrainedConfig) -> nn.Module:
    """The teacher, frozen and in evaluation mode."""
    assert teacher.path is not None, "an untrained teacher is made first"
    return by_document(load_frozen(teacher, "teacher", config, DTYPES[teacher.dtype]))


def load_frozen(model: Model, key: str, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model with its weights, frozen and in evaluation mode, as transformers itself uses it."""
    return _load(model, key, config, dtype).eval().requires_grad_(False)


class Weights(Protocol):
    """The trained weights of another run."""

    def load(self, model: nn.Module) -> None:
        """Load all weights of a model in full precision."""

    def load_scales(self, model: nn.Module) -> None:
        """Load the learned scales of a quantized model, if there are any that fit."""


def build_student(experiment: Experiment, config: PretrainedConfig, teacher: nn.Module | None,
                  tokenizer: PreTrainedTokenizerBase, other: Weights | None = None) -> nn.Module:
    """The student with fp32 weights, with fake quantization if it is trained that way.

    Args:
        other: the weights that `student.from_run` names.
    """
    student = experiment.student
    torch.manual_seed(experiment.seed)  # so that every process draws the same weights
    know_padding(config, tokenizer)
    if student.path is not None:
        model = _load(student, "student", config, torch.float32)
        _freeze_again(model, experiment.form.trust)
    elif other is not None:
        model = from_config(config, experiment.form.trust)
        other.load(model)
        load_generation_settings(model_of_run(student.from_run), model)
    elif student.is_whole_teacher:
        assert experiment.teacher is not None
        model = _load(experiment.teacher, "teacher", config, torch.float32)
        _freeze_again(model, experiment.form.trust)
    else:
        if task_of(config) == "causal_lm":
            config.eos_token_id = tokenizer.eos_token_id
            set_token(config, "bos_token_id", tokenizer.bos_token_id, tokenizer.eos_token_id)
            # The embedding of `pad_token_id` gets no gradient. A padding token that also ends sequences has to be
            # trained.
            same = tokenizer.pad_token_id == tokenizer.eos_token_id
            set_token(config, "pad_token_id", None if same else tokenizer.pad_token_id, tokenizer.pad_token_id)
        model = from_config(config, experiment.form.trust)
        if (layers := student.teacher_layers) is not None:
            assert teacher is not None
            weights = _precise(experiment.teacher, layers, teacher, model)
            fill_from_layers(model, weights, teacher.config, layers, experiment.data.sequence_length)
    by_document(learn_padding(model))
    if student.quantization is not None and student.quantization.trained:
        quantize(experiment.form, model)
        if other is not None:
            other.load_scales(model)
    if student.adapter is not None:
        torch.manual_seed(experiment.seed)
        adapt(experiment.form, model)
    return model.train()


def _precise(asked: Teacher, layers: Sequence[int], teacher: nn.Module, student: nn.Module) -> dict[str, torch.Tensor]:
    """The teacher weights that the student takes over, in fp32.

    If the stored weights are wider than `teacher.dtype`, they are loaded again, so that they are not rounded to it.
    """
    assert asked.path is not None
    with error_context(
        "student.from_teacher", value=list(layers), way_out="give the student a `path` or an `architecture`"
    ):
        lists = paired_lists(teacher, student)
    if asked.dtype == "float32" or stored_dtypes(asked.path) <= {DTYPES[asked.dtype]}:
        return {name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in needed(teacher.state_dict(), lists, layers).items()}
    return needed(_load(asked, "teacher", teacher.config, torch.float32).state_dict(), lists, layers)


def layers_above(student: Student, teacher: Teacher | None, config: PretrainedConfig | None) -> nn.Module | None:
    """The teacher whose layers are the base of a student's adapter, loaded; None if it has another base."""
    if student.teacher_layers is None:
        return None
    assert teacher is not None and config is not None, "the experiment checks that layers come from a teacher"
    return build_teacher(teacher, config)


def empty_student(form: StudentForm, config: PretrainedConfig) -> nn.Module:
    """A student of this shape with arbitrary weights, with fake quantization if it is trained that way.

    Raises:
        UserError: a layer cannot be quantized.
    """
    model = from_config(config, form.trust)
    if form.quantization is not None and form.quantization.trained:
        quantize(form, model)
    if form.adapter is not None:
        adapt(form, model)
    return model


def adapt(form: StudentForm, model: nn.Module) -> None:
    """Freeze a student and put the adapters of its form on its layers, in place.

    Raises what `check_adapter` raises.
    """
    check_adapter(form, model)
    assert form.adapter is not None
    attach(model, form.adapter.build(), given_numbers(form, model) if form.adapter.is_exported else None)


def check_adapter(form: StudentForm, model: nn.Module) -> None:
    """Check that a student can have the adapters of its form; shapes are enough.

    Raises:
        UserError: a target is no layer that can have one, or what they need is not installed.
    """
    asked = form.adapter
    assert asked is not None
    with error_context("student.adapter.kind", value=asked.kind, way_out="pip install 'limbeck[adapters]'"):
        check_installed()
    with error_context("student.adapter.targets", value=None if asked.targets is None else list(asked.targets),
                       way_out="name linear layers as they end, such as q_proj; or leave it out for all of them"):
        names = target_names(model, asked.targets)
        if passed := sorted(set(names) & weight_reads(model).used):
            raise ValueError(f"the weight of {passed[0]} is computed with past the layer by the model's own code, "
                             "which would not see an adapter")
    with error_context("student.adapter.base", value=asked.base, way_out="use float32 or bfloat16; nf4 needs "
                       "pip install 'limbeck[adapters]'"):
        check_base(asked.base, ((name, model.get_submodule(name)) for name in names))
    if asked.is_exported:
        check_quantized_base(form, model)


def from_config(config: PretrainedConfig, trust: bool = False) -> nn.Module:
    """A model of this shape in fp32, with random weights.

    Raises:
        UserError: the model cannot be built, or, under `FakeTensorMode`, not from shapes alone.
    """
    return by_document(learn_padding(skeleton(config, torch.float32, trust)))


def export_skeleton(form: StudentForm, config: PretrainedConfig) -> nn.Module:
    """A student of this shape as it will be exported, even if it is quantized only after training.

    If bits are chosen per layer within a budget, every layer has the fewest.

    Raises:
        UserError: as in `empty_student`; or the byte budget is too small, or layers that must share one bit width
            rule out a choice per layer.
    """
    model, asked = empty_student(form.merged, config), form.quantization
    if asked is not None and not asked.trained:
        fewest = {"bits": min(asked.choices)} if asked.budget is not None else {}
        quantize(form, model, asked.model_copy(update=fewest))
        if asked.budget is not None and len(set(asked.choices)) > 1 and (alike := must_be_alike(model)):
            raise UserError("student.quantization.budget", f"bits are chosen layer by layer, and transformers reads "
                            f"{alike} only with the same numbers as others", value=asked.budget,
                            way_out="give `bits` in place of a budget")
        if asked.budget is not None and (least := exported_bytes(model, DTYPES[form.dtype])
                                         + header_bound(model, asked.parts)) > asked.bytes:
            raise UserError("student.quantization.budget", f"with {min(asked.choices)} bits in every layer the student "
                            f"still takes {least:,} bytes on disk", value=asked.budget,
                            way_out=f"allow {least}, or offer fewer bits in `choices`; with `bits` in place of a "
                            "budget, `embeddings: true` makes all of it small")
    return model


def quantize(form: StudentForm, model: nn.Module, asked: Quantization | None = None) -> None:
    """Prepare the student's layers for quantization-aware training, in place.

    Raises:
        UserError: a layer cannot be quantized as asked, with a way out; or too much would stay in full precision.
    """
    asked = asked or form.quantization
    assert asked is not None
    dtype = DTYPES[form.dtype]
    inputs = math.gcd(*(as_matrix(layer).shape[1] for _, layer in all_layers(model)
                        if multiplies(layer) or isinstance(layer, Experts)))
    fitting = ", ".join(str(size) for size in range(8, inputs + 1) if inputs % size == 0) or "null"
    key = "group_size" if asked.group_size and inputs % asked.group_size else "ignore"
    with error_context(f"student.quantization.{key}", value=getattr(asked, key),
               way_out=f"group sizes that fit every layer: {fitting}" if key == "group_size" else
               "name layers as they are called, with * for any part, for example ignore: ['*.0.*']"):
        left = without_place(model, asked, dtype)
        prepare(model, asked.build(dtype), ignored(asked, left), asked.rules(dtype), embeddings=asked.embeddings,
                activations=asked.activations and asked.activations.build())
    with error_context(
        "student.quantization",
        way_out="name those layers in `ignore`, quantize them otherwise, or leave `quantization` out",
    ):
        check_folder(model)
    check_share(model, asked, dtype, left)


def _load(model: Model, key: str, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    origin = reach_model(AutoConfig, model, key)
    with redirect_stderr(io.StringIO()) if method_of(origin) else nullcontext():  # hides their progress bars
        loaded, info = reach_model(auto_class(config), model, key, dtype=dtype, use_safetensors=True,
                              output_loading_info=True, **loading(origin, config))
    if task_of(config) != "causal_lm":
        return fitting_inputs(_with_head(loaded, info, model, key))
    if info["missing_keys"]:  # transformers would initialize them randomly
        raise UserError(f"{key}.path", f"the weights lack {len(info['missing_keys'])} tensors, for example "
                        f"{sorted(info['missing_keys'])[0]}", value=model.path,
                        way_out="name a complete causal language model")
    # Of a multimodal or quantized model, some tensors are left out on purpose.
    if info["unexpected_keys"] and type(config) is type(origin) and method_of(origin) is None:
        note(f"{key}: {len(info['unexpected_keys'])} tensors of its files belong to no part of the model that its "
             f"config.json describes, and are left out, for example {sorted(info['unexpected_keys'])[0]}")
    if (apart := kept_apart(loaded)) is not None:  # not noticed when the configuration was read
        raise UserError(f"{key}.path", f"its files keep a {apart} of its own, and its config.json says that there is "
                        "none", value=model.path, way_out="write `tie_word_embeddings: false` in its config.json")
    if method_of(origin) is None:
        if type(config) is not type(origin):
            check_alone(loaded, origin, key, model.path)
    else:
        with redirect_stderr(io.StringIO()):
            loaded = dense(loaded, config, dtype, model.trust_remote_code, key)
    return loaded


def _with_head(loaded: nn.Module, info: dict[str, Any], model: Model, key: str) -> nn.Module:
    """A classifier with weights; only a student's head may be new, and it is said.

    Raises:
        UserError: other weights are missing.
    """
    missing = sorted(info["missing_keys"])
    body = [name for name in missing if name.startswith(f"{loaded.base_model_prefix}.")
            and not name.startswith(f"{loaded.base_model_prefix}.pooler.")]
    if body or (missing and key == "teacher"):
        raise UserError(f"{key}.path", f"the weights lack {len(missing)} tensors, for example {(body or missing)[0]}",
                        value=model.path, way_out="name a complete model of this task" if body else
                        "name a teacher that is trained for this task: train it first, as the student of a run of its "
                        "own with this model as `student.path`")
    if missing:
        note(f"{key}: {len(missing)} tensors of its head are new and begin with random weights, for example "
             f"{missing[0]}")
    return loaded


def _freeze_again(loaded: nn.Module, trust: bool) -> None:
    """Freeze parameters that the architecture does not train, such as Pegasus' sinusoidal positions.

    transformers loses their `requires_grad=False` when it loads a model.
    """
    with torch.device("meta"):
        fresh = skeleton(loaded.config, torch.float32, trust)
    frozen = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    for name, parameter in loaded.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def shape_of(model: nn.Module) -> LogitShape | None:
    """How a model scales and caps its logits; None if unknown, or for a classifier: full logits are then computed."""
    if task_of(model.config) != "causal_lm":
        return None
    try:
        return logit_shape(model)
    except ValueError as error:
        logging.getLogger(__name__).warning("%s; its logits are made, which takes more memory", error)
        return None


def quiet_libraries() -> None:
    """Silence progress bars and log messages of the libraries below; warnings that matter go through our own logger."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not torch.cuda.is_available():  # otherwise DeepSpeed logs its guess whenever Accelerate looks for it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # At every step DeepSpeed uses names of torch.distributed that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
