"""The Python reference: what `import limbeck` gives, from signatures and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import limbeck

NO_SIGNATURE = ("Experiment", "RunFailed", "Stopped")  # a tree that has a page of its own; plain exceptions
METHODS = {"Trainer": ("train", "evaluate", "student")}  # that are shown beside the class
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")
ENTRY = re.compile(r"^    (\*{0,2}[A-Za-z_]\w*(?:, \*{0,2}\w+)*): (.*)$")


def python_api() -> str:
    """A section for each public name: how it is called, and its docstring."""
    lines: list[str] = []
    for name, (module, attribute) in limbeck._PUBLIC.items():
        shown = getattr(limbeck, name)
        lines += [f"## {name}\n", f"`limbeck.{name}` is `{module}.{attribute}`.\n", *_signature(name, shown),
                  *_docstring(shown)]
        if inspect.isclass(shown) and inspect.isfunction(call := vars(shown).get("__call__")) and call.__doc__:
            lines += [f"### Calling {name}\n", *_signature(re.findall("[A-Z][a-z]+", name)[-1].lower(), call),
                      *_docstring(call)]
        for method in METHODS.get(name, ()):
            lines += [f"### {name}.{method}\n", *_signature(method, getattr(shown, method)),
                      *_docstring(getattr(shown, method))]
    return "\n".join(lines).rstrip()


def _signature(name: str, shown: Any) -> Iterator[str]:
    if name in NO_SIGNATURE:
        return
    signature = inspect.signature(shown)
    kinds = [one for one in signature.parameters.values() if one.name != "self"]
    parameters = [_parameter(one) for one in kinds]
    if (first := next((place for place, one in enumerate(kinds) if one.kind is one.KEYWORD_ONLY), None)) is not None:
        parameters.insert(first, "*")
    returns = "" if inspect.isclass(shown) or signature.return_annotation is inspect.Signature.empty else \
        f" -> {signature.return_annotation}"
    whole = f"{name}({', '.join(parameters)}){returns}"
    wrapped = whole if len(whole) <= 100 else f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){returns}"
    yield f"```text\n{wrapped}\n```\n"


def _parameter(one: inspect.Parameter) -> str:
    annotation = "" if one.annotation is inspect.Parameter.empty else f": {str(one.annotation).strip(chr(39))}"
    if one.default is inspect.Parameter.empty:
        return one.name + annotation
    default = one.default
    if inspect.isfunction(default):
        default = "..." if default.__name__ == "<lambda>" else default.__name__
    elif type(default) is object:
        default = "..."
    else:
        default = repr(default)
    return f"{one.name}{annotation} = {default}"


def _docstring(shown: Any) -> Iterator[str]:
    """A docstring as Markdown: its sections as lists, its indented formulas as code."""
    section = ""
    for part in re.split(r"\n{2,}", inspect.getdoc(shown) or ""):
        first, _, rest = part.partition("\n")
        if (found := SECTION.match(first)) is not None:
            section = found[1]
            yield f"**{section}**\n"
            part = rest
        elif not part.startswith("    "):
            section = ""
        if section:
            yield from (_entry(line, section) for line in part.split("\n"))
        elif part.startswith("    "):
            yield f"```text\n{inspect.cleandoc(part)}\n```"
        else:
            yield part
        yield ""


def _entry(line: str, section: str) -> str:
    found = ENTRY.match(line)
    if found is not None and section != "Returns":
        return f"- `{found[1]}`: {found[2]}"
    return f"  {line.strip()}" if section != "Returns" else line.strip()
