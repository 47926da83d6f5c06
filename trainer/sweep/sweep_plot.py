"""The picture of a sweep: each run a dot, the mean of each setting, and its range over the seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.sweep.sweep_metrics import METRICS
from trainer.sweep.sweep_record import SweepRecord
from trainer.sweep.sweep_table import Row, rows_of

MOST_LINES, MOST_ROWS, MOST_PANELS = 8, 30, 6
DOT, SPREAD = "#c2410c", "#6b7280"


def draw_sweep(record: SweepRecord, file: Path) -> None:
    """Draw the finished runs: along a number that is varied, a panel for each key of a search, else a row each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows_of(record) if row.found]
    axis = _axis(record, rows)
    if record.searched:
        keys = list(record.keys)[:MOST_PANELS]
        figure, panels = pyplot.subplots(1, len(keys), figsize=(max(5, 3.5 * len(keys)), 3.8), sharey=True,
                                         squeeze=False, layout="constrained")
        for key, panel in zip(keys, panels[0], strict=True):
            _panel(panel, key, rows)
        first = panels[0][0]
    else:
        figure, first = pyplot.subplots(figsize=(7.5, 4 if axis else 1.4 + 0.32 * min(len(rows), MOST_ROWS)),
                                        layout="constrained")
        _lines(first, axis, record, rows) if axis else _dots(first, rows)
    said = f"{record.metric} ({METRICS[record.metric].better})"
    first.set_ylabel(said) if axis or record.searched else first.set_xlabel(said)
    figure.suptitle(record.name if record.finished else f"{record.name}: {record.progress}", fontsize=11)
    for panel in figure.axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _axis(record: SweepRecord, rows: list[Row]) -> str | None:
    """The key to draw along: the one with the most different numbers, unless the rest makes too many lines."""
    numbers = {key: {row.values[key] for row in rows} for key in record.keys
               if all(_is_number(row.values.get(key)) for row in rows)}
    key = max(numbers, key=lambda one: len(numbers[one]), default=None)
    if key is None or len(numbers[key]) < 2 or len({_others(row, key, record) for row in rows}) > MOST_LINES:
        return None
    return key


def _lines(panel: Any, axis: str, record: SweepRecord, rows: list[Row]) -> None:
    """A line along `axis` for each combination of the other keys, with bars from the least to the greatest."""
    for other in sorted({_others(row, axis, record) for row in rows}):
        line = sorted((row for row in rows if _others(row, axis, record) == other), key=lambda row: row.values[axis])
        at, means = [row.values[axis] for row in line], [row.mean for row in line]
        below = [row.mean - min(row.found) for row in line]
        above = [max(row.found) - row.mean for row in line]
        drawn = panel.errorbar(at, means, yerr=[below, above], marker="o", markersize=4, capsize=3, label=other)
        for seed in sorted({seed for row in line for seed in row.by_seed}):
            points = [(row.values[axis], row.by_seed[seed]) for row in line if seed in row.by_seed]
            panel.plot(*zip(*points, strict=True), ".-", linewidth=0.7, alpha=0.4, color=drawn[0].get_color())
    panel.set_xlabel(f"{axis}; thick: means, with bars from the least to the greatest; thin: single seeds", fontsize=9)
    _scale(panel, [row.values[axis] for row in rows])
    if len(record.keys) > 1:
        panel.legend(frameon=False, fontsize=8)


def _dots(panel: Any, rows: list[Row]) -> None:
    """A row for each setting, best on top."""
    shown = rows[:MOST_ROWS]
    for place, row in enumerate(shown):
        panel.plot([min(row.found), max(row.found)], [place, place], color=SPREAD, linewidth=2, alpha=0.5)
        panel.scatter(row.found, [place] * len(row.found), s=14, alpha=0.6, color=DOT)
        panel.scatter([row.mean], [place], marker="|", s=120, color=DOT)
    if not shown:
        panel.set_title("no run has finished", fontsize=9)
        return
    left = f" (best {MOST_ROWS} of {len(rows)})" if len(rows) > MOST_ROWS else ""
    panel.set(ylim=(len(shown) - 0.5, -0.5), title=f"each dot a run, the bar its setting's mean{left}")
    panel.title.set_fontsize(9)
    panel.set_yticks(range(len(shown)), [row.label[:48] for row in shown], fontsize=8)


def _panel(panel: Any, key: str, rows: list[Row]) -> None:
    """All settings of a search along one of its keys."""
    values = [row.values[key] for row in rows]
    names = sorted({json.dumps(value) for value in values})
    at = values if all(map(_is_number, values)) else [names.index(json.dumps(value)) for value in values]
    panel.scatter(at, [row.mean for row in rows], s=18, alpha=0.7, color=DOT)
    if rows:
        panel.scatter(at[:1], [rows[0].mean], s=90, facecolors="none", edgecolors=DOT)
    panel.set_xlabel(f"{key}; the best is circled", fontsize=9)
    if at is values:
        _scale(panel, values)
        if all(isinstance(value, int) for value in values) and len(names) <= MOST_LINES:
            panel.set_xticks(sorted({*values}))
    else:
        panel.set_xticks(range(len(names)), [name[:20] for name in names], fontsize=8)


def _scale(panel: Any, values: list[float]) -> None:
    """A logarithmic axis where the values span a factor of ten or more."""
    if values and min(values) > 0 and max(values) / min(values) >= 9:
        panel.set_xscale("log")


def _others(row: Row, axis: str, record: SweepRecord) -> str:
    return ", ".join(f"{record.keys[key]} {row.values.get(key, '-')}" for key in record.keys if key != axis)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
