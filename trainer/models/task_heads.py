"""The tasks that models are made for: transformers' classes of them, and what a configuration says of a task."""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from strategies.common.model_tasks import task_of
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data
from trainer.experiment.model_nodes import Model
from trainer.models.architecture_keys import set_token

AUTO = {"causal_lm": AutoModelForCausalLM, "sequence_classification": AutoModelForSequenceClassification,
        "token_classification": AutoModelForTokenClassification,
        "image_classification": AutoModelForImageClassification}
MAPPINGS: dict[str, Any] = {
    "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING, "sequence_classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token_classification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "image_classification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING}
COMMON = {"sequence_classification": ("bert", "distilbert", "modernbert"), "image_classification": (
    "vit", "resnet", "mobilenet_v2"), "token_classification": ("bert", "distilbert", "modernbert")}


@dataclass(frozen=True)
class Task:
    """What models are made for.

    Attributes:
        name: as in `data.task`.
        classes: names of the classes in their order; none for causal language models.
        channels: of images.
        size: height and width of images in pixels.
    """

    name: str = "causal_lm"
    classes: tuple[str, ...] = ()
    channels: int = 3
    size: int = 224

    @classmethod
    def of(cls, data: Data, classes: tuple[str, ...]) -> Task:
        """From the settings of the data, and the names of its classes."""
        return cls(data.task, classes, data.images.channels, data.images.size)

    @property
    def is_language(self) -> bool:
        """Whether models predict the next token of text."""
        return self.name == "causal_lm"


LANGUAGE = Task()


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' auto class for the task of a configuration."""
    return AUTO[task_of(config)]


def classifier(config: PretrainedConfig, model: Model, key: str, task: Task) -> PretrainedConfig:
    """The configuration of a classifier: with its classes by name, and the class of the model that has its head.

    Args:
        config: of the model, whatever head its files have.
        model: as the experiment names it, under `key`.

    Raises:
        UserError: transformers has no such classifier, or the model's own classes are others.
    """
    value = model.path or config.model_type
    where = f"{key}.path" if model.path else f"{key}.architecture.model_type"
    if type(config) not in MAPPINGS[task.name]:
        others = [name for name, mapping in MAPPINGS.items() if type(config) in mapping]
        near = difflib.get_close_matches(config.model_type, [one.model_type for one in MAPPINGS[task.name]], 1, 0.6)
        such = ", ".join(dict.fromkeys([*near, *COMMON[task.name]]))
        raise UserError(where, f"transformers has no {config.model_type} model for {task.name}", value=value,
                        way_out=f"use a model such as {such}" + (f", or set data.task: {others[0]}" if others else ""))
    made = MAPPINGS[task.name][type(config)]
    made = made[0] if isinstance(made, tuple) else made
    trained = task_of(config) == task.name and model.path is not None
    if trained:
        check_classes(config, task, where, value)
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(task.classes))
    config.label2id = {name: number for number, name in enumerate(task.classes)}
    config.architectures = [made.__name__]
    if task.name != "image_classification" and getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0  # without, decoders tell no end of a text; see `know_padding`
    config.problem_type = "single_label_classification" if task.name == "sequence_classification" else None
    if task.name == "image_classification":
        _for_images(config, model, key, task, trained)
    return config


def check_writes(config: Any, where: str, value: str) -> None:
    """Raise `UserError` if a configuration, or what has its `architectures`, is that of a classifier.

    transformers would load it as a language model, too, and its head would be of random weights, or its embeddings.
    """
    if (task := task_of(config)) != "causal_lm":
        raise UserError(where, f"this is a classifier, {config.architectures[0]}, and no language model", value=value,
                        way_out=f"name a language model; classifiers are trained and measured with data.task: {task}")


def know_padding(config: PretrainedConfig | None, tokenizer: Any) -> None:
    """Give the configuration of a classifier of texts the padding token of the tokenizer that its rows are padded with.

    Decoders answer at the last token that is no padding, and most are published without a padding token.

    Args:
        config: None, and that of another model, is left as it is.
        tokenizer: that of the run, or what prepares images.
    """
    if config is not None and task_of(config) in ("sequence_classification", "token_classification"):
        set_token(config, "pad_token_id", tokenizer.pad_token_id, tokenizer.pad_token_id)


def check_classes(config: PretrainedConfig, task: Task, where: str, value: Any) -> None:
    """Raise `UserError` if a trained classifier has other classes than the data, or has them in another order."""
    theirs = [config.id2label[number] for number in sorted(config.id2label)]
    unnamed = theirs == [f"LABEL_{number}" for number in range(len(theirs))]
    if len(theirs) == len(task.classes) and (unnamed or tuple(theirs) == task.classes):
        return
    if set(theirs) == set(task.classes):
        raise UserError("data.class_names", f"{value} has the same classes in another order", value=list(task.classes[
            :8]), way_out=f"write them as it has them: data.class_names: [{', '.join(map(str, theirs))}]")
    lacking = [name for name in task.classes if name not in theirs]
    near = difflib.get_close_matches(lacking[0], map(str, theirs), 1) if lacking else []
    hint = f": {lacking[0]!r} is none of its own" + (f" (it has {near[0]!r})" if near else "") if lacking else ""
    raise UserError(where, f"it tells {len(theirs)} classes apart and the data has {len(task.classes)}, which cannot "
                    f"be compared{hint}", value=value, way_out="name a model trained on these classes, or data with "
                    "the model's; a student that is to learn them anew starts from a model without such a head")


def _for_images(config: PretrainedConfig, model: Model, key: str, task: Task, trained: bool) -> None:
    """Give a configuration the channels of the images, and their size where it has none yet.

    Raises:
        UserError: a model with weights was made for others.
    """
    for name, ours in (("num_channels", task.channels), ("image_size", task.size)):
        theirs = getattr(config, name, None)
        asked = name in (model.architecture or {})
        if theirs is None and name == "image_size":
            config.image_size = ours  # convolutional nets do not all say it; exports and those who read it need it
        if theirs is None or theirs == ours or (name == "image_size" and isinstance(theirs, (list, tuple)) and set(
                theirs) == {ours}):
            continue
        if name == "image_size" and not hasattr(config, "patch_size"):
            config.image_size = ours  # convolutions take any size: what is written is for those who read it
        elif model.path is None and not asked:
            setattr(config, name, ours)
        else:
            own = {"num_channels": "channels", "image_size": "size"}[name]
            raise UserError(f"data.images.{own}", f"the {key} takes images of {name} {theirs}", value=ours,
                            way_out=f"set data.images.{own}: {theirs}" + ("" if model.path else
                                                                         f", or {key}.architecture.{name}: {ours}"))
