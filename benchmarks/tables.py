"""Puts the tables of `benchmarks/results/` into the README: `python -m benchmarks.tables`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.quickstart import table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- python -m benchmarks.tables -->\n", "<!-- end -->"


def with_tables(readme: str) -> str:
    """The README with its tables made from the result files."""
    result = json.loads((ROOT / "benchmarks" / "results" / "quickstart-cpu.json").read_text())
    body = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(body, lambda _: f"{BEGIN}{table(result)}\n{END}", readme, flags=re.DOTALL)


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(with_tables(file.read_text()))
