"""Configurations of teacher and student: shapes without weights, checked against each other and the tokenizer."""

from __future__ import annotations

import copy
import difflib
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from trainer.errors import UserError, error_context
from trainer.experiment.experiment import Experiment
from trainer.experiment.model_nodes import Model, Student, Teacher
from trainer.experiment.run_paths import check_run, model_of_run
from trainer.model_files import MOST_LAYERS, check_files, first_line, last_line, too_deep
from trainer.models.architecture_keys import OF_A_FILE, check_arrived, model_values, without_foreign_ids
from trainer.models.layer_settings import with_layers
from trainer.models.model_origin import language_model
from trainer.models.pruned_config import pruned_config
from trainer.models.task_heads import LANGUAGE, Task, classifier
from trainer.models.teacher_layers import refused
from trainer.models.tied_weights import settle_tying


def teacher_config(teacher: Teacher | None, vocabulary: int | None, offline: bool = False, task: Task = LANGUAGE
                   ) -> PretrainedConfig | None:
    """The teacher's configuration, or None without a teacher."""
    return None if teacher is None else _config(teacher, "teacher", vocabulary, offline, task)


def student_config(student: Student, teacher: PretrainedConfig | None, vocabulary: int | None, offline: bool = False,
                   task: Task = LANGUAGE) -> PretrainedConfig:
    """The student's configuration: its own, that of the run it starts from, or its teacher's; as cut, if it is cut."""
    return pruned_config(student.prune, _origin_config(student, teacher, vocabulary, offline, task))


def _origin_config(student: Student, teacher: PretrainedConfig | None, vocabulary: int | None, offline: bool,
                   task: Task) -> PretrainedConfig:
    if student.from_run is not None:
        check_run(student.from_run)
        student = student.model_copy(update={"path": str(model_of_run(student.from_run)), "from_run": None})
    if student.from_teacher is None:  # without a tokenizer, assume as many tokens as the teacher has
        return _config(student, "student", vocabulary or getattr(teacher, "vocab_size", None), offline, task)
    assert teacher is not None, "the experiment checks that layers come from a teacher"
    if student.teacher_layers is None:
        return copy.deepcopy(teacher)
    layers = getattr(teacher, "num_hidden_layers", None)
    if layers is None:  # such as a byte latent transformer, which has several stacks
        raise UserError("student.from_teacher", f"a {teacher.model_type} model has several stacks of layers, and no "
                        "one number of them", value=list(student.teacher_layers),
                        way_out="give the student a `path` or an `architecture`")
    if max(student.teacher_layers) >= layers:
        raise UserError("student.from_teacher", f"the teacher has layers 0 to {layers - 1}",
                        value=list(student.teacher_layers), way_out=f"choose from 0 to {layers - 1}")
    try:
        return with_layers(teacher, student.teacher_layers)[0]
    except ValueError as error:
        raise refused(teacher, student.teacher_layers, str(error)) from error


def check_shapes(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig,
                 tokens: int | None) -> None:
    """Raise `UserError` if the models, the tokenizer and the sequence length do not fit together."""
    brings = teacher is not None and experiment.teacher.path is not None and experiment.teacher.train is None
    if experiment.data.task == "image_classification":
        return
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


def _config(model: Model, key: str, vocabulary: int | None, offline: bool, task: Task = LANGUAGE) -> PretrainedConfig:
    """A model's configuration: from its folder or the hub if reachable, else from the YAML; the two must agree."""
    written = _architecture(model, key, vocabulary) if model.architecture else None
    if model.path is None or (offline and written is not None and not Path(model.path).is_dir()):
        assert written is not None, "the experiment checks that a model has an origin"
        return without_foreign_ids(_for_task(written, model, key, task))
    loaded = reach_model(AutoConfig, model, key)
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
    return without_foreign_ids(_for_task(loaded, model, key, task))


def _for_task(config: PretrainedConfig, model: Model, key: str, task: Task) -> PretrainedConfig:
    return language_model(config, model, key) if task.is_language else classifier(config, model, key, task)


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


HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # NAME or OWNER/NAME


def reach_model(auto: Any, model: Model, key: str, **options: Any) -> Any:
    """Call `from_pretrained` of an auto class, and turn any failure into one clear `UserError`."""
    folder = Path(model.path)
    local = folder.is_absolute() or model.path.startswith(".") or not HUB_ID.fullmatch(model.path)
    near = _near_folder(folder)
    if not folder.is_dir() and (local or near and "/" not in model.path):
        raise UserError(f"{key}.path", "there is no such folder", value=model.path, way_out=
                        f"did you mean {near}? A model of the hub is OWNER/NAME" if near else
                        "name an existing folder or a hub id")
    check_files(model.path, f"{key}.path")
    try:
        return auto.from_pretrained(model.path, revision=model.revision or "main",
                                    trust_remote_code=model.trust_remote_code, **options)
    except Exception as error:  # foreign files can make transformers raise anything
        raise UserError(f"{key}.path", f"cannot load this model: {first_line(error)}", value=model.path,
                        way_out=_load_hint(folder, near, error)) from error


def _near_folder(folder: Path) -> Path | None:
    """A model beside a folder that is not there, with nearly its name."""
    if folder.exists() or not folder.parent.is_dir():
        return None
    models = [one.name for one in folder.parent.iterdir() if (one / "config.json").is_file()]
    found = difflib.get_close_matches(folder.name, models, 1, 0.8)
    return folder.parent / found[0] if found else None


def _load_hint(folder: Path, near: Path | None, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "the model brings its own code; set `trust_remote_code: true` if you have read it and trust it"
    if folder.is_dir() and list(folder.glob("*.bin")) and not list(folder.glob("*.safetensors")):
        return "the folder has pickled weights only; convert them to safetensors, nothing else is loaded"
    if folder.is_dir():
        return "the folder must hold config.json and whole safetensors files (with git, `git lfs pull` fetches them)"
    return f"did you mean the folder {near}?" if near else "check the name and the network, or name a local folder"
