"""Safe reader for untrusted YAML: plain values with the line of each key, no code execution, bounded memory."""

from __future__ import annotations

import difflib
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ExperimentErrors, UserError

LARGEST_FILE = 1_000_000  # bytes, and characters after alias expansion; an experiment is a page or two
MOST_VALUES, DEEPEST = 10_000, 64  # after alias expansion
LONGEST_NUMBER = 100  # digits; converting very long numbers takes a noticeable time
Key = tuple[str, ...]


def read_values(file: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """Read the plain values of an untrusted YAML file, and the place of each key.

    Returns:
        The values, and a map from each key (a tuple of names) to its `file:line`.

    Raises:
        ExperimentErrors: the file cannot be read or does not hold `key: value` pairs; names the line if it is known.
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
        root = composed(text)
        if root is None:
            raise fail("the file is empty", "see configs/quickstart.yaml for an experiment")
        if not isinstance(root, yaml.MappingNode):
            raise fail("the file holds no `key: value` pairs", "see configs/quickstart.yaml for an experiment")
        origins: dict[Key, str] = {}
        return constructed(root, (), str(file), origins), origins
    except Duplicate as error:
        raise fail(f"{'.'.join(error.key)}: the key stands twice", "remove one of the two", error.line) from error
    except yaml.YAMLError as error:
        what, line = problem_with(error, text)
        raise fail(f"not valid YAML: {what}", "indent with spaces, not tabs" if "'\\t'" in what else
                   "check the indentation and quotes around this line; only plain values are read", line) from error


def _text(file: Path) -> str:
    """Read a regular file as text; pipes and devices are refused, since reading them might never end."""
    kind = file.stat().st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise ValueError("this is not a file but a pipe or a device")
    with file.open("rb") as handle:
        content = handle.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"the file is over {LARGEST_FILE:,} bytes, too large for an experiment")
    return content.decode("utf-8")


def problem_with(error: yaml.YAMLError, text: str) -> tuple[str, int | None]:
    """A description of a YAML error, and its line number if it has one."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {chr(error.character)!r} cannot be in it", text.count("\n", 0, error.position) + 1
    mark = getattr(error, "problem_mark", None)
    return getattr(error, "problem", None) or str(error), mark.line + 1 if mark else None


class Duplicate(Exception):
    """Raised for a key that occurs twice in a mapping."""

    def __init__(self, key: Key, line: int):
        super().__init__()
        self.key, self.line = key, line


class _Loader(yaml.SafeLoader):
    """A `SafeLoader` that limits the nesting depth, far below Python's recursion limit."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise _wrong(f"nested too deeply, over {DEEPEST} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def composed(text: str) -> yaml.Node | None:
    """Parse a text into YAML nodes, within the size limits even after alias expansion; None if it is empty.

    Raises:
        yaml.YAMLError: the text is not YAML, or is too large or too deep.
    """
    root = yaml.compose(text, Loader=_Loader)
    if root is not None:
        _measure(root, {})
    return root


def _measure(node: yaml.Node, known: dict[int, tuple[int, int, int] | None]) -> tuple[int, int, int]:
    """(values, characters, levels) of a node after alias expansion; `known` caches results, None while in progress."""
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


def constructed(node: yaml.Node, key: Key, file: str, origins: dict[Key, str]) -> Any:
    """Convert a node at `key` to a plain value, and add the places of the keys below it to `origins`.

    Raises:
        yaml.YAMLError: a tag or a value is not plain.
        Duplicate: a key occurs twice.
    """
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise _wrong(f"the tag {_tag(node)} is not read", node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*key, str(index))] = f"{file}:{item.start_mark.line + 1}"
        return [constructed(item, (*key, str(index)), file, origins) for index, item in enumerate(node.value)]
    result: dict[str, Any] = {}
    for name_node, value_node in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            raise _wrong("a key that is not one value", name_node.start_mark)
        name = str(_scalar(name_node))
        if name in result:
            raise Duplicate((*key, name), name_node.start_mark.line + 1)
        origins[(*key, name)] = f"{file}:{name_node.start_mark.line + 1}"
        result[name] = constructed(value_node, (*key, name), file, origins)
    return result


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """Convert a scalar node; dates stay text."""
    kind = node.tag.rpartition(":")[2]
    if node.tag.startswith("tag:yaml.org,2002:") and kind in ("str", "timestamp", "value"):
        # YAML 1.1 reads 1e-4 as text, since it has no decimal point; users mean a number.
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
