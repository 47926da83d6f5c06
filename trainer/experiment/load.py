"""Read an `Experiment` from a YAML file and dotted overrides, and keep track of where each value was set."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.node import Node
from trainer.experiment.plain_yaml import Duplicate, Key, composed, constructed, problem_with, read_values


@dataclass(frozen=True)
class Source:
    """An experiment, and the place where each of its values was set.

    Attributes:
        experiment: the validated experiment.
        file: path of the YAML file.
        origins: key as a tuple of names -> `file:line`, or the override that set it.
    """

    experiment: Experiment
    file: str
    origins: dict[Key, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """`file:line`, `override` or `default` for a dotted key; an unset key has the origin of its nearest parent."""
        return nearest_origin(self.origins, tuple(key.split(".")) if key else (), "default")


def read_experiment(file: str | Path, overrides: Sequence[str] = (), places: Mapping[str, str] | None = None
                    ) -> Source:
    """Read and validate an experiment.

    Args:
        file: path of the YAML file.
        overrides: `dotted.key=value` strings; each value is parsed as YAML.
        places: override -> the place where it is written, for messages; without one, they show the override itself.

    Raises:
        ExperimentErrors: all mistakes found, each with its key, `file:line` or override, value and suggested fix.
    """
    values, origins = read_values(Path(file))
    for override in overrides:
        place = (places or {}).get(override) or place_of(override)
        try:
            _apply(override, values, origins, place)
        except UserError as error:
            raise ExperimentErrors([error], {}, place) from error
    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        raise ExperimentErrors(mistakes(error), origins, str(file)) from error
    return Source(experiment, str(file), origins)


def _name_of(key: str) -> str:
    """The last part of a dotted key."""
    return key.rpartition(".")[2]


def place_of(override: str) -> str:
    """What messages say in the place of file and line for what an override has set."""
    return f"override `{override if len(override) <= 200 else override[:197] + '...'}`"


def mistakes(error: ValidationError, root: type[Node] = Experiment) -> list[UserError]:
    """Pydantic's errors on the values of a node such as an experiment, one for each key, reworded for users."""
    return [_explain(entry, root) for entry in _distinct(error)]


def describe(error: UserError, origins: dict[Key, str], fallback: str) -> str:
    """Format the message for one error: its place, key and value, what is wrong, and how to fix it."""
    key = tuple(error.key.split(".")) if error.key else ()
    place = nearest_origin(origins, key, fallback)
    head = f"{place}: {error.key}" if error.key else place
    if error.has_value:
        head += f"{' =' if error.key else ':'} {_show(error.value)}"
    return f"{head}: {error.problem}" + (f"\n  -> {error.way_out}" if error.way_out else "")


def nearest_origin(origins: dict[Key, str], key: Key, fallback: str) -> str:
    """Where a key was set, or else the nearest node that encloses it, or else `fallback`."""
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    return fallback


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _apply(override: str, values: dict[str, Any], origins: dict[Key, str], place: str) -> None:
    """Apply one `dotted.key=value` override to the values read from the file, in place."""
    name, value = read_override(override, place)
    key = tuple(name.split("."))
    node: Any = values
    for depth, part in enumerate(key[:-1], 1):
        at = _index(node, part)
        if not isinstance(node[at] if isinstance(node, list) else node.get(at), (dict, list)):
            node[at] = {}  # a null or missing node becomes an empty one
            origins[key[:depth]] = place
        node = node[at]
    node[_index(node, key[-1])] = value
    for older in [known for known in origins if known[:len(key)] == key]:
        del origins[older]
    origins |= {key: place} | {(*key, *inner): place for inner in _inner_keys(value)}


def _index(node: Any, part: str) -> Any:
    """A name of a mapping, or the number of an item that a list has.

    Raises:
        UserError: the list has no such item.
    """
    if not isinstance(node, list):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError("", f"`{part}` is not an item of a list of {len(node)}", way_out="items are numbered from 0")
    return int(part)


def read_override(override: str, place: str, example: str = "optimizer.lr=1e-4") -> tuple[str, Any]:
    """Key and value of a `dotted.key=value` string, the value read as YAML.

    Args:
        override: the string.
        place: where it is written, for messages.
        example: one that would do.

    Raises:
        ExperimentErrors: it is none.
    """
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ExperimentErrors([UserError("", "an override is written key=value", way_out=f"for example {example}")],
                               {}, place)
    if not text.strip():
        raise ExperimentErrors([UserError("", "the value is missing", way_out=f"for example {name}=1; {name}=null is "
                                          "the value null")], {}, place)
    try:
        root = composed(text)
        return name, None if root is None else constructed(root, (), "", {})
    except (yaml.YAMLError, Duplicate) as problem:
        what = "a key stands twice" if isinstance(problem, Duplicate) else problem_with(problem, text)[0]
        raise ExperimentErrors([UserError("", f"the value is not valid YAML: {what}", value=text,
                                          way_out="quote it for the shell and for YAML")], {}, place) from problem


def _inner_keys(value: Any) -> list[Key]:
    if not isinstance(value, dict):
        return []
    return [(name, *inner) for name in value for inner in [(), *_inner_keys(value[name])]]


# ---- pydantic's errors, reworded for users

def _distinct(error: ValidationError) -> list[dict[str, Any]]:
    """The first error per location: pydantic reports one for each variant of a union such as `int | None`."""
    seen: dict[Key, dict[str, Any]] = {}
    for entry in error.errors():
        seen.setdefault(tuple(str(part) for part in entry["loc"]), dict(entry))
    return list(seen.values())


def _explain(entry: dict[str, Any], root: type[Node]) -> UserError:
    key = ".".join(str(part) for part in entry["loc"])
    cause = entry.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        own = ".".join(part for part in (key, cause.key) if part)
        explained = UserError(own, cause.problem, way_out=cause.way_out)
        explained.has_value, explained.value = cause.has_value, cause.value
        return explained
    if entry["type"] == "extra_forbidden":
        if key.rpartition(".")[2] in ("chosen", "rejected"):
            return UserError(key, "preferences are not learned: there is no loss on pairs of answers",
                             value=entry["input"], way_out="to fine-tune on the chosen answers alone, name them in "
                             "`data.messages`, in `data.response` beside `data.prompt`, or in `data.text`")
        return UserError(key, "no such key", value=entry["input"], way_out=_nearest_key(key, root))
    if entry["type"] == "missing":
        return UserError(key, "this key is required", way_out=f"it means: {_help(key, root)}")
    if entry["type"] in ("model_type", "model_attributes_type"):
        node = _node(key, root)
        names = list(node.model_fields) if node else []
        path = "path" in names and isinstance(entry["input"], str)
        name = key.rpartition(".")[2]
        if entry["input"] is None and "weight" in names:
            return UserError(key, "it cannot be null", value=None,
                             way_out=f"to go without, write {name}: {{weight: 0}}")
        return UserError(key, "expected keys of its own, not a single value", value=entry["input"],
                         way_out=f"write {'' if name.isdigit() else f'{name}: '}{{path: {entry['input']}}}" if path
                         else f"its keys are {', '.join(names)}")
    if entry["type"] == "string_pattern_mismatch":
        return UserError(key, "only letters, digits, '.', '_' and '-' can be used, beginning with a letter or digit",
                         value=entry["input"], way_out=f"it means: {_help(key, root)}")
    if entry["type"] == "literal_error" and isinstance(entry["input"], str):
        names = re.findall(r"'([^']*)'", entry["ctx"]["expected"])
        meant = ELSEWHERE_VALUES.get(entry["input"].lower().replace("-", "_"))
        if near := [meant] if meant in names else difflib.get_close_matches(entry["input"], names, 1, 0.5):
            return UserError(key, f"must be {entry['ctx']['expected']}", value=entry["input"],
                             way_out=f"did you mean `{near[0]}`?")
    message = entry["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    message = message.replace("a valid tuple", "a list")
    if _name_of(key) == "weight" and entry["type"] == "greater_than" and "sources" in key:
        return UserError(key, message, value=entry["input"], way_out="remove the source, or give it a weight above 0")
    meaning = _help(key, root)
    return UserError(key, message, value=entry["input"], way_out=f"it means: {meaning}" if meaning else "")


ELSEWHERE = {
    "learning_rate": "optimizer.lr", "adam_beta1": "optimizer.betas", "max_grad_norm": "training.clip",
    "num_train_epochs": "training.epochs", "num_epochs": "training.epochs", "max_steps": "training.steps",
    "per_device_train_batch_size": "training.micro_batch", "micro_batch_size": "training.micro_batch",
    "gradient_accumulation_steps": "training.batch_size", "train_batch_size": "training.batch_size",
    "max_length": "data.sequence_length", "max_seq_length": "data.sequence_length",
    "sequence_len": "data.sequence_length", "block_size": "data.sequence_length",
    "lr_scheduler_type": "schedule.shape", "warmup_ratio": "schedule.warmup", "warmup_steps": "schedule.warmup",
    "bf16": "precision.dtype", "fp16": "precision.dtype", "save_steps": "training.checkpoint_every",
    "save_total_limit": "training.keep_checkpoints", "eval_steps": "training.evaluate_every",
    "logging_steps": "run.log_every", "report_to": "run.trackers", "output_dir": "run.folder",
    "model_name_or_path": "student.path", "dataset": "data.path", "datasets": "data.sources",
    "metric_for_best_model": "training.keep_best", "load_best_model_at_end": "training.keep_best",
    "metric": "training.keep_best", "early_stopping_patience": "training.early_stopping",
    "num_labels": "data.class_names", "id2label": "data.class_names", "label2id": "data.class_names",
}
"""What transformers, TRL and axolotl call it, and the key here."""
ELSEWHERE_VALUES = {
    "text_classification": "sequence_classification", "sentiment_analysis": "sequence_classification",
    "kl": "forward_kl", "kld": "forward_kl", "kl_divergence": "forward_kl", "kl_div": "forward_kl", "rkl": "reverse_kl",
    "js": "jsd", "js_divergence": "jsd",
    "ner": "token_classification", "language_modeling": "causal_lm", "text_generation": "causal_lm",
}
"""What others call a value, in lower case with underscores, and the value here."""


def _nearest_key(key: str, root: type[Node]) -> str:
    """Suggest the valid key that the user probably meant, at this level or elsewhere in the tree."""
    parts = key.split(".")
    if root is Experiment and parts[-1] in ELSEWHERE:
        return f"did you mean `{ELSEWHERE[parts[-1]]}`?"
    siblings = _node(".".join(parts[:-1]), root)
    names = list(siblings.model_fields) if siblings else []
    near = difflib.get_close_matches(parts[-1], names, 1, 0.6) or \
        [name for name in names if name in parts[-1] or parts[-1] in name]
    if near:
        return f"did you mean `{'.'.join([*parts[:-1], near[0]])}`?"
    everywhere = {name.rsplit(".", 1)[-1]: name for name in all_keys(root)}
    near = difflib.get_close_matches(parts[-1], everywhere, 1, 0.75)
    if near:
        return f"did you mean `{everywhere[near[0]]}`?"
    return f"the keys here are {', '.join(names)}" if names else "see train.py --help"


def all_keys(node: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Map each dotted key below a node to its pydantic field, with nodes before their children."""
    keys: dict[str, Any] = {}
    for name, info in node.model_fields.items():
        keys[prefix + name] = info
        inner = node_of(info.annotation)
        if inner is not None:
            keys |= all_keys(inner, f"{prefix}{name}.")
    return keys


def node_of(annotation: Any) -> type[Node] | None:
    """The `Node` class in an annotation such as `Teacher | None`, or None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := node_of(part))), None)
    return None


def item_node_of(annotation: Any) -> type[Node] | None:
    """The `Node` class of the items in an annotation such as `tuple[DataSource, ...] | None`; None if there is none."""
    if get_origin(annotation) is tuple:
        return node_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := item_node_of(part))), None)
    return None


def _node(key: str, root: type[Node]) -> type[Node] | None:
    if not key:
        return root
    info = _field(key, root)
    if key.rpartition(".")[2].isdigit():
        info = _field(key.rpartition(".")[0], root)
        return item_node_of(info.annotation) if info else None
    return node_of(info.annotation) if info else None


def _field(key: str, root: type[Node]) -> Any:
    """The pydantic field of a dotted key, which may lead through an item of a list; None if there is none."""
    above, _, name = key.rpartition(".")
    if above.rpartition(".")[2].isdigit() and (node := _node(above, root)) is not None:
        return node.model_fields.get(name)
    return all_keys(root).get(key)


def _help(key: str, root: type[Node]) -> str:
    info = _field(key, root)
    if info is None:  # an item of a list: use the help text of the list
        info = all_keys(root).get(key.rpartition(".")[0])
    return (info.description or "") if info else ""
