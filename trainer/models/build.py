"""Builds teacher and student: from a hub id or folder, from dimensions in the YAML, or from a teacher's layers."""

from __future__ import annotations

import copy
import difflib
import io
import logging
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from strategies.common.stored_weights import Experts, all_layers, as_matrix, multiplies
from strategies.distillation.losses.fused_head import LogitShape, logit_shape
from strategies.export.hf.transformers_folder import check_folder, must_be_alike
from strategies.export.sizes import exported_bytes, header_bound
from strategies.quantization.qat import prepare
from trainer.errors import UserError, error_context
from trainer.experiment.experiment import Experiment, StudentForm
from trainer.experiment.nodes import Model, Student, Teacher
from trainer.experiment.quantization_nodes import Quantization
from trainer.model_files import MOST_LAYERS, check_files, first_line, last_line, stored_dtypes, too_deep
from trainer.models.architecture_keys import OF_A_FILE, check_arrived, model_values, set_token, without_foreign_ids
from trainer.models.full_precision import check_share, ignored, without_place
from trainer.models.language_part import check_alone
from trainer.models.layer_settings import with_layers
from trainer.models.model_origin import dense, language_model, learn_padding, loading, method_of, note, skeleton
from trainer.models.rope_by_document import by_document
from trainer.models.teacher_layers import fill_from_layers, needed, paired_lists, refused
from trainer.models.tied_weights import kept_apart, settle_tying

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- configurations: shapes without weights

def teacher_config(teacher: Teacher | None, vocabulary: int | None, offline: bool = False) -> PretrainedConfig | None:
    """The teacher's configuration, or None without a teacher."""
    return None if teacher is None else _config(teacher, "teacher", vocabulary, offline)


def student_config(
    student: Student, teacher: PretrainedConfig | None, vocabulary: int | None, offline: bool = False
) -> PretrainedConfig:
    """The student's configuration: its own, or its teacher's with fewer layers."""
    if student.from_teacher is None:  # without a tokenizer, assume as many tokens as the teacher has
        return _config(student, "student", vocabulary or getattr(teacher, "vocab_size", None), offline)
    assert teacher is not None, "the experiment checks that layers come from a teacher"
    layers = getattr(teacher, "num_hidden_layers", None)
    if layers is None:  # such as a byte latent transformer, which has several stacks
        raise UserError("student.from_teacher", f"a {teacher.model_type} model has several stacks of layers, and no "
                        "one number of them", value=list(student.from_teacher),
                        way_out="give the student a `path` or an `architecture`")
    if max(student.from_teacher) >= layers:
        raise UserError("student.from_teacher", f"the teacher has layers 0 to {layers - 1}",
                        value=list(student.from_teacher), way_out=f"choose from 0 to {layers - 1}")
    try:
        return with_layers(teacher, student.from_teacher)[0]
    except ValueError as error:
        raise refused(teacher, student.from_teacher, str(error)) from error


def check_shapes(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig,
                 tokens: int | None) -> None:
    """Raise `UserError` if the models, the tokenizer and the sequence length do not fit together."""
    brings = teacher is not None and experiment.teacher.path is not None and experiment.teacher.train is None
    if teacher is not None and teacher.vocab_size != student.vocab_size and not brings:
        raise UserError("student", f"the student has a vocabulary of {student.vocab_size:,} tokens and the teacher of "
                        f"{teacher.vocab_size:,}; distillation compares them token by token",
                        way_out="leave `vocab_size` out, or start the student with `from_teacher`")
    for key, config in (("teacher", teacher), ("student", student)):
        if config is None:
            continue
        heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
        if heads and shared and heads % shared:
            raise UserError(f"{key}.architecture.num_key_value_heads", f"{heads} attention heads cannot share {shared} "
                            "evenly", value=shared, way_out=f"use a divisor of {heads}")
        positions = getattr(config, "max_position_embeddings", None)
        if positions and 0 < positions < experiment.data.sequence_length:  # XLNet has -1 for no limit
            raise UserError("data.sequence_length", f"the {key} knows {positions} positions",
                            value=experiment.data.sequence_length, way_out=f"use at most {positions}")
        if tokens and tokens > config.vocab_size and not (key == "teacher" and brings):
            raise _too_many_tokens(experiment, key, config.vocab_size, tokens)


def _too_many_tokens(experiment: Experiment, key: str, rows: int, tokens: int) -> UserError:
    """The error for a tokenizer with more ids than the model has embedding rows, at the key that names either."""
    model, own = getattr(experiment, key), experiment.data.tokenizer
    if key == "student" and model.from_teacher is not None:
        key, model = "teacher", experiment.teacher
    if model.path is None:
        given = "vocab_size" in (model.architecture or {})
        return UserError(f"{key}.architecture" + ".vocab_size" * given, f"the model has {rows:,} tokens and the "
                         f"tokenizer {tokens:,}", value=rows, way_out=f"use at least {tokens:,}"
                         + ", or leave it out" * given)
    blamed, source = ("data.tokenizer.path", own.path) if own.path else (f"{key}.path", model.path)
    larger = f"{Path(model.path).name}-{tokens}"
    return UserError(
        blamed, f"the tokenizer has {tokens:,} tokens, and the model {model.path} rows for {rows:,}", value=source,
        way_out=f"name a copy with more rows as `{key}.path: {larger}`, which this makes:\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({model.path!r})\nmodel.resize_token_embeddings({tokens})\n"
        f"model.save_pretrained({larger!r})\nAutoTokenizer.from_pretrained({source!r}).save_pretrained({larger!r})\n"
        f"  or name a tokenizer of at most {rows:,} tokens as `data.tokenizer.path`")


def _config(model: Model, key: str, vocabulary: int | None, offline: bool) -> PretrainedConfig:
    """A model's configuration: from its folder or the hub if reachable, else from the YAML; the two must agree."""
    written = _architecture(model, key, vocabulary) if model.architecture else None
    if model.path is None or (offline and written is not None and not Path(model.path).is_dir()):
        assert written is not None, "the experiment checks that a model has an origin"
        return without_foreign_ids(language_model(written, model, key))
    loaded = _reach(AutoConfig, model, key)
    if not model.trust_remote_code and "/" in (getattr(loaded, "_attn_implementation", None) or ""):
        raise UserError(f"{key}.path", "its config.json has its attention computed by code from a hub, "
                        f"{loaded._attn_implementation}", value=model.path, way_out="remove `attn_implementation` from "
                        "it, or set `trust_remote_code: true` if you have read that code and trust it")
    settle_tying(loaded, model)
    for name in {*(model.architecture or {})} - OF_A_FILE:
        theirs, ours = getattr(loaded, name, None), getattr(written, name, None)
        if theirs != ours:
            raise UserError(f"{key}.architecture.{name}", f"{model.path} has {theirs!r}", value=ours,
                            way_out=f"write {theirs!r}, or remove `architecture`: `path` has the weights")
    return without_foreign_ids(language_model(loaded, model, key))


def _architecture(model: Model, key: str, vocabulary: int | None) -> PretrainedConfig:
    values = dict(model.architecture or {})
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING.keys(), 1)
        raise UserError(f"{key}.architecture.model_type", "transformers knows no such architecture", value=model_type,
                        way_out=f"did you mean {near[0]!r}?" if near else "for example 'llama'")
    values = model_values(values, CONFIG_MAPPING[model_type], f"{key}.architecture")
    if deep := too_deep(values):
        raise UserError(f"{key}.architecture.{deep}", f"a model has at most {MOST_LAYERS:,} layers",
                        value=values[deep], way_out="use fewer")
    if vocabulary and "vocab_size" not in values:
        has_sections = "text_config" in CONFIG_MAPPING[model_type].sub_configs
        (values.setdefault("text_config", {}) if has_sections else values).setdefault("vocab_size", vocabulary)
    with error_context(
        f"{key}.architecture", value=model.architecture, way_out="see the transformers page of this model"
    ):
        try:
            config = AutoConfig.for_model(model_type, **copy.deepcopy(values))
            check_arrived(config, values, f"{key}.architecture")
            return config
        except UserError:
            raise
        except Exception as error:  # each configuration class validates in its own way
            raise ValueError(f"not a valid {model_type} architecture: {last_line(error)}") from error


def _reach(auto: Any, model: Model, key: str, **options: Any) -> Any:
    """Call `from_pretrained` of an auto class, and turn any failure into one clear `UserError`."""
    folder = Path(model.path)
    if (folder.is_absolute() or model.path.startswith(".")) and not folder.is_dir():
        raise UserError(f"{key}.path", "there is no such folder", value=model.path,
                        way_out="name an existing folder or a hub id")
    check_files(model.path, f"{key}.path")
    try:
        return auto.from_pretrained(model.path, revision=model.revision or "main",
                                    trust_remote_code=model.trust_remote_code, **options)
    except Exception as error:  # foreign files can make transformers raise anything
        raise UserError(f"{key}.path", f"cannot load this model: {first_line(error)}", value=model.path,
                        way_out=_load_hint(folder, error)) from error


def _load_hint(folder: Path, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "the model brings its own code; set `trust_remote_code: true` if you have read it and trust it"
    if folder.is_dir() and list(folder.glob("*.bin")) and not list(folder.glob("*.safetensors")):
        return "the folder has pickled weights only; convert them to safetensors, nothing else is loaded"
    if folder.is_dir():
        return "the folder must hold config.json and whole safetensors files (with git, `git lfs pull` fetches them)"
    return "check the name and the network; `architecture` with `train` needs neither"


# ---- models with weights

def build_teacher(teacher: Teacher, config: PretrainedConfig) -> nn.Module:
    """The teacher, frozen and in evaluation mode."""
    assert teacher.path is not None, "an untrained teacher is made first"
    model = by_document(_load(teacher, "teacher", config, DTYPES[teacher.dtype]))
    return model.eval().requires_grad_(False)


def build_student(experiment: Experiment, config: PretrainedConfig, teacher: nn.Module | None,
                  tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The student with fp32 weights, with fake quantization if it is trained that way."""
    student = experiment.student
    torch.manual_seed(experiment.seed)  # so that every process draws the same weights
    if student.path is not None:
        model = _load(student, "student", config, torch.float32)
        _freeze_again(model, experiment.form.trust)
    else:
        config.eos_token_id = tokenizer.eos_token_id
        set_token(config, "bos_token_id", tokenizer.bos_token_id, tokenizer.eos_token_id)
        # The embedding of `pad_token_id` gets no gradient. A padding token that also ends sequences has to be trained.
        same = tokenizer.pad_token_id == tokenizer.eos_token_id
        set_token(config, "pad_token_id", None if same else tokenizer.pad_token_id, tokenizer.pad_token_id)
        model = from_config(config, experiment.form.trust)
        if student.from_teacher is not None:
            assert teacher is not None
            weights = _precise(experiment.teacher, student.from_teacher, teacher, model)
            fill_from_layers(model, weights, teacher.config, student.from_teacher, experiment.data.sequence_length)
    by_document(learn_padding(model))
    if student.quantization is not None and student.quantization.trained:
        quantize(experiment.form, model)
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


def whole_student(form: StudentForm, like: nn.Module) -> nn.Module:
    """An unsharded student on the CPU, of the same shape as `like`; its weights are still to be loaded."""
    model = empty_student(form, like.config)
    model.generation_config = like.generation_config
    return model.train()


def empty_student(form: StudentForm, config: PretrainedConfig) -> nn.Module:
    """A student of this shape with arbitrary weights, with fake quantization if it is trained that way.

    Raises:
        UserError: a layer cannot be quantized.
    """
    model = from_config(config, form.trust)
    if form.quantization is not None and form.quantization.trained:
        quantize(form, model)
    return model


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
    model, asked = empty_student(form, config), form.quantization
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
    origin = _reach(AutoConfig, model, key)
    with redirect_stderr(io.StringIO()) if method_of(origin) else nullcontext():  # hides their progress bars
        loaded, info = _reach(AutoModelForCausalLM, model, key, dtype=dtype, use_safetensors=True,
                              output_loading_info=True, **loading(origin, config))
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
    """How a model scales and caps its logits; None if unknown, so that full logits have to be computed."""
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

