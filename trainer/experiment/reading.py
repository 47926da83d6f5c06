"""From a YAML file and dotted overrides to an `Experiment`, remembering where every value was written."""

from __future__ import annotations

import difflib
import re
import stat
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.node import Node
from trainer.experiment.tree import Experiment

LARGEST_FILE = 1_000_000  # bytes, and characters once aliases are written out; an experiment is a page or two
MOST_VALUES, DEEPEST = 10_000, 64  # once aliases are written out
LONGEST_NUMBER = 100  # digits; larger ones take a time of their own to convert
Key = tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """An experiment with the place each of its values was written."""

    experiment: Experiment
    file: str
    origins: dict[Key, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """`file:line`, `override` or `default` for a dotted key; a key nobody wrote answers for its nearest parent."""
        return nearest_origin(self.origins, tuple(key.split(".")) if key else (), "default")


def read_experiment(file: str | Path, overrides: list[str] = ()) -> Source:
    """Read an experiment.

    Args:
        file: path of the YAML file.
        overrides: `dotted.key=value` strings; values are read as YAML.

    Raises:
        ExperimentErrors: every mistake found, each naming key, `file:line` or override, value and way out.
    """
    values, origins = read_values(Path(file))
    for override in overrides:
        _apply(override, values, origins)
    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        raise ExperimentErrors([_explain(entry) for entry in _distinct(error)], origins, str(file)) from error
    return Source(experiment, str(file), origins)


def describe(error: UserError, origins: dict[Key, str], fallback: str) -> str:
    """One message for one mistake: place, key, value, what is wrong, what to do."""
    key = tuple(error.key.split(".")) if error.key else ()
    place = nearest_origin(origins, key, fallback)
    head = f"{place}: {error.key}" if error.key else place
    if error.has_value:
        head += f" = {_show(error.value)}"
    return f"{head}: {error.problem}" + (f"\n  -> {error.way_out}" if error.way_out else "")


def nearest_origin(origins: dict[Key, str], key: Key, fallback: str) -> str:
    """The place a key was written, or that of the nearest node around it."""
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    return fallback


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


# ---- YAML, with the line of every key

def read_values(file: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """The plain values of a YAML file, whoever wrote it, and the place of each key.

    Raises:
        ExperimentErrors: it cannot be read, or is not `key: value` pairs; with the line where that can be known.
    """
    def fail(problem: str, way_out: str, line: int | None = None) -> ExperimentErrors:
        return ExperimentErrors([UserError("", problem, way_out=way_out)], {}, f"{file}:{line}" if line else str(file))

    try:
        text = _text(file)
    except OSError as error:
        known = [str(path) for path in Path("configs").glob("*.yaml")]
        near = difflib.get_close_matches(str(file), known, 1, 0.75)
        hint = f"did you mean {near[0]}?" if near else "pass the path of an experiment file with --config"
        raise fail(f"cannot read this file ({error.strerror})", hint) from error
    except UnicodeDecodeError as error:
        raise fail("the file is not UTF-8 text", "pass a YAML file",
                   error.object.count(b"\n", 0, error.start) + 1) from error
    except ValueError as error:
        raise fail(str(error), "pass an experiment file; see configs/ for examples") from error
    try:
        root = _composed(text)
        if root is None:
            raise fail("the file is empty", "see configs/quickstart.yaml for an experiment")
        if not isinstance(root, yaml.MappingNode):
            raise fail("the file holds no `key: value` pairs", "see configs/quickstart.yaml for an experiment")
        origins: dict[Key, str] = {}
        return _construct(root, (), str(file), origins), origins
    except _Duplicate as error:
        raise fail(f"{'.'.join(error.key)}: the key stands twice", "remove one of the two", error.line) from error
    except yaml.YAMLError as error:
        what, line = _problem(error, text)
        raise fail(f"not valid YAML: {what}", "indent with spaces, not tabs" if "'\\t'" in what else
                   "check the indentation and quotes around this line; only plain values are read", line) from error


def _text(file: Path) -> str:
    """The text of a regular file: a pipe could be waited for for ever, and a device have no end."""
    kind = file.stat().st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise ValueError("this is not a file but a pipe or a device")
    with file.open("rb") as handle:
        content = handle.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"the file is over {LARGEST_FILE:,} bytes, too large for an experiment")
    return content.decode("utf-8")


def _problem(error: yaml.YAMLError, text: str) -> tuple[str, int | None]:
    """What is wrong, and in which line."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {chr(error.character)!r} cannot be in it", text.count("\n", 0, error.position) + 1
    mark = getattr(error, "problem_mark", None)
    return getattr(error, "problem", None) or str(error), mark.line + 1 if mark else None


class _Duplicate(Exception):
    def __init__(self, key: Key, line: int):
        super().__init__()
        self.key, self.line = key, line


class _Loader(yaml.SafeLoader):
    """Goes no deeper into a text than an experiment does, long before Python would give up."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise _wrong(f"nested too deeply, over {DEEPEST} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _composed(text: str) -> yaml.Node | None:
    """The nodes of a text, which are few also with every alias written out."""
    root = yaml.compose(text, Loader=_Loader)
    if root is not None:
        _measure(root, {})
    return root


def _measure(node: yaml.Node, known: dict[int, tuple[int, int, int] | None]) -> tuple[int, int, int]:
    """Values, characters and levels of a node with its aliases written out, each of them measured once."""
    if id(node) in known:
        if known[id(node)] is None:
            raise _wrong("an alias that contains itself", node.start_mark)
        return known[id(node)]
    known[id(node)] = None
    parts = node.value if isinstance(node, yaml.SequenceNode) else () if isinstance(node, yaml.ScalarNode) else [
        part for pair in node.value for part in pair]
    inner = [_measure(part, known) for part in parts]
    values = 1 + sum(one[0] for one in inner)
    characters = len(node.value) if isinstance(node, yaml.ScalarNode) else sum(one[1] for one in inner)
    levels = 1 + max((one[2] for one in inner), default=0)
    if values > MOST_VALUES or characters > LARGEST_FILE or levels > DEEPEST:
        raise _wrong("too many values (aliases of aliases?)", node.start_mark)
    known[id(node)] = values, characters, levels
    return known[id(node)]


def _wrong(what: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, what, mark)


def _construct(node: yaml.Node, key: Key, file: str, origins: dict[Key, str]) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise _wrong(f"the tag {_tag(node)} is not read", node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*key, str(index))] = f"{file}:{item.start_mark.line + 1}"
        return [_construct(item, (*key, str(index)), file, origins) for index, item in enumerate(node.value)]
    result: dict[str, Any] = {}
    for name_node, value_node in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            raise _wrong("a key that is not one value", name_node.start_mark)
        name = str(_scalar(name_node))
        if name in result:
            raise _Duplicate((*key, name), name_node.start_mark.line + 1)
        origins[(*key, name)] = f"{file}:{name_node.start_mark.line + 1}"
        result[name] = _construct(value_node, (*key, name), file, origins)
    return result


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """A single value; what YAML takes for a date is text."""
    kind = node.tag.rpartition(":")[2]
    if node.tag.startswith("tag:yaml.org,2002:") and kind in ("str", "timestamp", "value"):
        # YAML 1.1 takes 1e-4 for text, since it has no point; people mean a number.
        if node.style is None and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", node.value):
            return float(node.value)
        if "\0" in node.value or re.search("[\ud800-\udfff]", node.value):
            raise _wrong("a character that no text has", node.start_mark)
        return node.value
    if kind not in ("int", "float", "bool", "null"):
        raise _wrong(f"the tag {_tag(node)} is not read", node.start_mark)
    if len(node.value) > LONGEST_NUMBER:
        raise _wrong(f"a number of {len(node.value):,} digits", node.start_mark)
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, LookupError) as error:
        raise _wrong(f"{node.value!r} is not of the type {_tag(node)}", node.start_mark) from error


def _tag(node: yaml.Node) -> str:
    return node.tag.replace("tag:yaml.org,2002:", "!!")


def _apply(override: str, values: dict[str, Any], origins: dict[Key, str]) -> None:
    """Write one `dotted.key=value` into the values read from the file."""
    name, equals, text = override.partition("=")
    place = f"override `{override if len(override) <= 200 else override[:197] + '...'}`"
    if not equals or not name:
        raise ExperimentErrors([UserError("", "an override is written key=value",
                                          way_out="for example optimizer.lr=1e-4")], {}, place)
    key = tuple(name.split("."))
    if not text.strip():
        raise ExperimentErrors([UserError("", "the value is missing", way_out=f"for example {name}=1; {name}=null is "
                                          "the value null")], {}, place)
    try:
        root = _composed(text)
        value = None if root is None else _construct(root, (), "", {})
    except (yaml.YAMLError, _Duplicate) as problem:
        what = "a key stands twice" if isinstance(problem, _Duplicate) else _problem(problem, text)[0]
        raise ExperimentErrors([UserError("", f"the value is not valid YAML: {what}", value=text,
                                          way_out="quote it for the shell and for YAML")], {}, place) from problem
    node = values
    for depth, part in enumerate(key[:-1], 1):
        if not isinstance(node.get(part), dict):  # a null or missing node becomes one that can be filled
            node[part] = {}
            origins[key[:depth]] = place
        node = node[part]
    node[key[-1]] = value
    for older in [known for known in origins if known[:len(key)] == key]:
        del origins[older]
    origins |= {key: place} | {(*key, *inner): place for inner in _inner_keys(value)}


def _inner_keys(value: Any) -> list[Key]:
    if not isinstance(value, dict):
        return []
    return [(name, *inner) for name in value for inner in [(), *_inner_keys(value[name])]]


# ---- pydantic's errors in a person's words

def _distinct(error: ValidationError) -> list[dict[str, Any]]:
    """Errors without the variants of one union, which pydantic lists one by one (`int | None`)."""
    seen: dict[Key, dict[str, Any]] = {}
    for entry in error.errors():
        seen.setdefault(tuple(str(part) for part in entry["loc"]), entry)
    return list(seen.values())


def _explain(entry: dict[str, Any]) -> UserError:
    key = ".".join(str(part) for part in entry["loc"])
    cause = entry.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        own = ".".join(part for part in (key, cause.key) if part)
        explained = UserError(own, cause.problem, way_out=cause.way_out)
        explained.has_value, explained.value = cause.has_value, cause.value
        return explained
    if entry["type"] == "extra_forbidden":
        return UserError(key, "no such key", value=entry["input"], way_out=_nearest_key(key))
    if entry["type"] == "missing":
        return UserError(key, "this key is required", way_out=f"it means: {_help(key)}")
    if entry["type"] in ("model_type", "model_attributes_type"):
        names = list(_node(key).model_fields) if _node(key) else []
        path = "path" in names and isinstance(entry["input"], str)
        return UserError(key, "expected keys of its own, not a single value", value=entry["input"],
                         way_out=f"write {key.rpartition('.')[2]}: {{path: {entry['input']}}}" if path
                         else f"its keys are {', '.join(names)}")
    if entry["type"] == "string_pattern_mismatch":
        return UserError(key, "only letters, digits, '.', '_' and '-' can be used, beginning with a letter or digit",
                         value=entry["input"], way_out=f"it means: {_help(key)}")
    if entry["type"] == "literal_error" and isinstance(entry["input"], str):
        names = re.findall(r"'([^']*)'", entry["ctx"]["expected"])
        if near := difflib.get_close_matches(entry["input"], names, 1, 0.5):
            return UserError(key, f"must be {entry['ctx']['expected']}", value=entry["input"],
                             way_out=f"did you mean `{near[0]}`?")
    message = entry["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    meaning = _help(key)
    return UserError(key, message, value=entry["input"], way_out=f"it means: {meaning}" if meaning else "")


def _nearest_key(key: str) -> str:
    """Name the valid key that a person probably meant, here or elsewhere in the tree."""
    parts = key.split(".")
    siblings = _node(".".join(parts[:-1]))
    names = list(siblings.model_fields) if siblings else []
    near = difflib.get_close_matches(parts[-1], names, 1, 0.6) or \
        [name for name in names if name in parts[-1] or parts[-1] in name]
    if near:
        return f"did you mean `{'.'.join([*parts[:-1], near[0]])}`?"
    everywhere = {name.rsplit(".", 1)[-1]: name for name in all_keys(Experiment)}
    near = difflib.get_close_matches(parts[-1], everywhere, 1, 0.75)
    if near:
        return f"did you mean `{everywhere[near[0]]}`?"
    return f"the keys here are {', '.join(names)}" if names else "see train.py --help"


def all_keys(node: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted key below a node with its pydantic field, nodes before what they hold."""
    keys: dict[str, Any] = {}
    for name, info in node.model_fields.items():
        keys[prefix + name] = info
        inner = node_of(info.annotation)
        if inner is not None:
            keys |= all_keys(inner, f"{prefix}{name}.")
    return keys


def node_of(annotation: Any) -> type[Node] | None:
    """The `Node` class in an annotation such as `Teacher | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := node_of(part))), None)
    return None


def _node(key: str) -> type[Node] | None:
    if not key:
        return Experiment
    info = all_keys(Experiment).get(key)
    return node_of(info.annotation) if info else None


def _help(key: str) -> str:
    info = all_keys(Experiment).get(key)
    if info is None:  # an item of a list: explain the list
        info = all_keys(Experiment).get(key.rpartition(".")[0])
    return (info.description or "") if info else ""
