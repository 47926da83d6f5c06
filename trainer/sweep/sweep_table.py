"""The result of a sweep as a table: one row for each setting, with mean and range over its seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from trainer.sweep.sweep_metrics import ALWAYS, METRICS
from trainer.sweep.sweep_record import RunRecord, SweepRecord


@dataclass(frozen=True)
class Row:
    """A setting and what its runs found.

    Attributes:
        runs: its runs, one for each seed.
        found: value of the metric of each finished run.
    """

    runs: tuple[RunRecord, ...]
    found: tuple[float, ...]

    @property
    def label(self) -> str:
        """Name of the setting."""
        return self.runs[0].label

    @property
    def values(self) -> dict[str, Any]:
        """What the setting varies."""
        return self.runs[0].values

    @property
    def by_seed(self) -> dict[int, float]:
        """Seed -> value of the metric, for the finished runs."""
        return dict(zip((run.seed for run in self.runs if run.state == "finished"), self.found, strict=True))

    @property
    def mean(self) -> float:
        """Mean of the metric over the finished runs."""
        return mean(self.found)

    def figure(self, name: str) -> float | None:
        """Mean of another figure over the finished runs."""
        known = [run.figures[name] for run in self.runs if name in run.figures]
        return mean(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """As plain data; `sd` is the sample standard deviation, None below two runs."""
        summary = {"mean": self.mean, "least": min(self.found), "greatest": max(self.found),
                   "sd": stdev(self.found) if len(self.found) > 1 else None} if self.found else {}
        return {"label": self.label, "values": self.values, "finished": len(self.found), "of": len(self.runs),
                **summary}


def rows_of(record: SweepRecord) -> list[Row]:
    """A row for each setting, best first; settings that found nothing come last, in the order of the sweep."""
    by_label: dict[str, list[RunRecord]] = {}
    for run in record.runs:
        by_label.setdefault(run.label, []).append(run)
    rows = [Row(tuple(runs), tuple(run.figures[record.metric] for run in runs if run.state == "finished"))
            for runs in by_label.values()]
    sign = -1 if METRICS[record.metric].highest else 1
    return sorted(rows, key=lambda row: sign * row.mean if row.found else float("inf"))


def table(record: SweepRecord) -> str:
    """The table in Markdown, in columns that line up in a terminal, too."""
    rows = rows_of(record)
    several = any(len(row.runs) > 1 for row in rows)
    others = [name for name in ALWAYS if name != record.metric]
    head = [*(_cell(record.keys[key]) for key in record.keys), *([] if record.keys else ["setting"]), record.metric,
            *(["least to greatest", "behind the best"] if several else []),
            *(name.replace("_", " ") for name in others), "runs"]
    lines = [head]
    for row in rows:
        named = [_value(row.values[key]) if key in row.values else "" for key in record.keys]
        lines.append([*named, *([] if record.keys else [row.label]), number(row.mean) if row.found else "none",
                      *([_range(row.found, number), _range(gaps(rows[0], row, record.metric), _signed)]
                        if several else []), *(number(row.figure(name)) for name in others),
                      _states(row)])
    return _aligned(lines, left=max(1, len(record.keys)))


def verdict(record: SweepRecord) -> str:
    """What the table says, in a sentence or two; while runs are missing, that they are."""
    rows, metric = [row for row in rows_of(record) if row.found], METRICS[record.metric]
    said = "" if record.finished else f"Not finished: {record.progress}. "
    if not rows:
        return said + "No run has finished yet, so there is nothing to compare."
    best = rows[0]
    said += f"{'Best' if record.finished else 'Best so far'}: {_cell(best.label)}, {record.metric} " \
            f"{number(best.mean)} ({metric.better})"
    if len(rows) == 1:
        return f"{said}."
    return f"{said}; next {_cell(rows[1].label)}, {number(rows[1].mean)}. {_apart(best, rows[1], record.metric)}"


def _apart(best: Row, other: Row, metric: str) -> str:
    """Whether a setting is better than another on each seed that both have run on.

    Seed by seed, since a seed moves all settings alike: it decides order of the data, and a teacher trained by the run.
    """
    behind = gaps(best, other, metric)
    if len(behind) < 2:
        return "They share no more than one seed, so how much of the difference is chance is not known."
    if min(behind) <= 0:
        lost = sum(gap <= 0 for gap in behind)
        return (f"On {lost} of the {len(behind)} seeds that both ran on it is not the better one, so chance may be all "
                "that is between them.")
    return (f"It is better on each of the {len(behind)} seeds that both ran on, by {_range(behind, _short)}; if "
            f"the two were equal, one of them would still win on every seed with probability "
            f"{0.5 ** (len(behind) - 1):.2g}.")


def gaps(best: Row, other: Row, metric: str) -> list[float]:
    """How far a setting is behind the best one, on each seed that both have finished; below zero where it is ahead."""
    first, second, sign = best.by_seed, other.by_seed, 1 if METRICS[metric].highest else -1
    return [sign * (first[seed] - second[seed]) for seed in first if seed in second and other is not best]


def failures(record: SweepRecord) -> str:
    """A line for each run that failed, with its last words, and for each that was stopped."""
    lines = [f"- {run.title} failed: {_cell(run.said or 'it left no word')} (see {run.log})" if run.state == "failed"
             else f"- {run.title} was stopped, and goes on when the sweep is started again"
             for run in record.runs if run.state in ("failed", "stopped")]
    return "\n".join(lines)


def markdown(record: SweepRecord) -> str:
    """The whole page `sweep.md`."""
    metric = METRICS[record.metric]
    parts = [f"# {record.name}", f"{record.experiment}, {record.progress}.", verdict(record), table(record),
             f"{record.metric}: {metric.meaning}; {metric.better}. Each row is a setting; its figures are means over "
             "the runs that finished, one for each seed, and their range is from the least to the greatest. How far it "
             "is behind the best setting is told seed by seed, least to greatest, since a seed moves all settings "
             "alike."]
    if failed := failures(record):
        parts += ["## Not finished", failed]
    return "\n\n".join([*parts, "![results](sweep.png)"]) + "\n"


def number(value: float | None) -> str:
    """A figure, short enough for a table."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.5g}"


def _range(values: Sequence[float], shown: Callable[[float], str]) -> str:
    return f"{shown(min(values))} to {shown(max(values))}" if values else ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + _short(value)


def _states(row: Row) -> str:
    done = f"{len(row.found)} of {len(row.runs)}"
    rest = {state: sum(run.state == state for run in row.runs) for state in ("failed", "stopped", "running", "waiting")}
    return ", ".join([done, *(f"{count} {state}" for state, count in rest.items() if count)])


def _value(value: Any) -> str:
    return _cell(value if isinstance(value, str) else json.dumps(value))


def _cell(text: str) -> str:
    """Text from a file, on one line and without what Markdown would read in it."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table; all columns but the first `left` and the last are numbers, and stand to the right."""
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    plain = [column < left or column == len(widths) - 1 for column in range(len(widths))]
    rule = [("-" * width if text else "-" * (width - 1) + ":") for width, text in zip(widths, plain, strict=True)]
    rows = [[cell.ljust(width) if text else cell.rjust(width)
             for cell, width, text in zip(line, widths, plain, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))
