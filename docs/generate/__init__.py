"""The parts of the documents that are written by code: `python -m docs.generate`.

A part stands between two comments in a page, and is replaced there:

    <!-- python -m docs.generate NAME -->
    <!-- end -->

A test makes every part again and compares, so a page is never older than what it describes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.tables import ROOT, with_tables
from docs.generate.command_lines import command_lines
from docs.generate.configuration import configuration, sweep_file
from docs.generate.packages import diagram, import_table
from docs.generate.python_api import python_api

PARTS: dict[str, Callable[[], str | None]] = {
    "command-lines": command_lines,
    "configuration": configuration,
    "sweep-file": sweep_file,
    "python-api": python_api,
    "diagram": diagram,
    "imports": import_table,
}
MARKED = re.compile(r"(<!-- python -m docs\.generate (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> Iterator[Path]:
    """The README and every page of the documents."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def with_parts(page: str) -> str:
    """A page with its generated parts and its tables of results made again."""
    def again(found: re.Match) -> str:
        made = PARTS[found["name"]]()
        return found[0] if made is None else f"{found[1]}{made}\n{found[3]}"

    return with_tables(MARKED.sub(again, page))
