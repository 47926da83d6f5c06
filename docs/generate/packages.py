"""Who imports whom: the packages of the code and the arrows between them, read from the imports themselves."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.tables import ROOT

HOMES = ("trainer", "strategies")


def package_imports() -> dict[str, set[str]]:
    """For each package of `trainer` and `strategies`, the packages that its modules import.

    A package is a folder right below one of the two; modules beside those folders are named one by one.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for home in HOMES:
        for file in sorted((ROOT / home).rglob("*.py")):
            own = _package(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
            if own == home:
                continue
            found[own] |= {_package(module) for module in _imported(file)} - {own, *HOMES}
    return dict(sorted(found.items()))


def diagram() -> str:
    """The arrows as a Mermaid flowchart, without those that follow from others and without what all import."""
    found = package_imports()
    # Of those that have a place in the picture: `trainer.__version__`, for one, is no module.
    common = _common(found)
    shown = {name: (others & found.keys()) - common for name, others in found.items() if name not in common}
    lines = ["```mermaid", "flowchart TB"]
    for home in HOMES:
        names = [name for name in shown if name.startswith(f"{home}.")]
        lines += [f"  subgraph {home}", *(f"    {_node(name)}[{name.partition('.')[2]}]" for name in names), "  end"]
    lines += [f"  {_node(name)} --> {_node(other)}" for name, other in reduced(shown)]
    return "\n".join([*lines, "```"])


def reduced(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The fewest of the arrows, taken in order, along which everything is reached that all of them reach."""
    left = {name: set(others) for name, others in arrows.items()}
    for name in sorted(left):
        for other in sorted(left[name]):
            left[name].discard(other)
            if other not in reached(left, name):
                left[name].add(other)
    return [(name, other) for name in sorted(left) for other in sorted(left[name])]


def reached(arrows: dict[str, set[str]], start: str) -> set[str]:
    """What arrows lead to from `start`."""
    found, waiting = set(), [start]
    while waiting:
        for other in arrows.get(waiting.pop(), set()) - found:
            found.add(other)
            waiting.append(other)
    return found


def import_table() -> str:
    """The same as a table, with nothing left out."""
    rows = ["| package | imports |", "|---|---|"]
    for name, others in package_imports().items():
        rows.append(f"| `{name}` | {', '.join(f'`{other}`' for other in sorted(others)) or 'nothing of ours'} |")
    return "\n".join(rows)


def _common(found: dict[str, set[str]]) -> set[str]:
    """Modules beside the folders: errors and small files that everything may use."""
    return {name for name in found if not (ROOT / Path(*name.split("."))).is_dir() and "pipeline" not in name
            and "cli" not in name}


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(HOMES))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in HOMES:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _package(module: str) -> str:
    """`trainer.data` of `trainer.data.rows.Rows`; `trainer.errors` of `trainer.errors.UserError`."""
    return ".".join(module.split(".")[:2])


def _node(name: str) -> str:
    return name.replace(".", "_")
