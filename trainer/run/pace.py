"""The figures of a run: what its metrics say about a step, its speed, the time left, and the time lost besides."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

RECENT = 100  # steps that the speed of the next ones is taken from
OUTLIERS = 2  # slowest of these steps that never count: a first one, which compiles, and one that is measured
KINDS = {"loss": "training", "held_out": "evaluating", "tasks": "judging", "checkpoint": "saving"}  # by what it holds


class Pace:
    """How fast a run goes, from its metrics.

    Time lost is the time of evaluations and of writing checkpoints, as a share of what these and the steps took
    together; that of earlier starts of the run counts too.

    Args:
        steps: steps of the whole run.
        evaluate_every, save_every: steps from one evaluation or checkpoint to the next; both also follow the last step.
        judge_every: the same of evaluations on tasks; None if there are none.
    """

    def __init__(self, steps: int, evaluate_every: int, save_every: int, judge_every: int | None = None) -> None:
        self.steps, self._every = steps, {"evaluating": evaluate_every, "saving": save_every}
        if judge_every is not None:
            self._every["judging"] = judge_every
        self.step = 0
        self._seconds = dict.fromkeys(("training", *self._every, "judging"), 0.0)
        self._recent = {kind: deque(maxlen=RECENT if kind == "training" else 5) for kind in self._seconds}

    def add(self, record: Mapping[str, Any]) -> None:
        """Take note of a record of metrics.jsonl."""
        kind = next((kind for key, kind in KINDS.items() if key in record), None)
        seconds = record.get("seconds")
        if kind == "training":
            self.step = record["step"]
        if kind is not None and isinstance(seconds, int | float) and seconds >= 0:
            self._seconds[kind] += seconds
            self._recent[kind].append(float(seconds))

    def start(self) -> None:
        """Forget the speed of earlier starts, which may have been on another machine; time lost stays."""
        for seconds in self._recent.values():
            seconds.clear()

    def share(self, kind: str) -> float:
        """The share of the time that went into "evaluating" or "saving"."""
        return self._seconds[kind] / max(sum(self._seconds.values()), 1e-9)

    @property
    def left(self) -> float | None:
        """Seconds until the last step is done, evaluated and saved; None before the second step."""
        if len(self._recent["training"]) < 2:
            return None
        recent = sorted(self._recent["training"])
        usual = recent[:max(1, len(recent) - OUTLIERS - len(recent) // 20)]
        seconds = (self.steps - self.step) * sum(usual) / len(usual)
        return seconds + sum(self._due(kind) * _mean(self._recent[kind]) for kind in self._every)

    def _due(self, kind: str) -> int:
        """How often something that is done every few steps and after the last one is still to be done."""
        if self.step >= self.steps:
            return 0
        return math.ceil(self.steps / self._every[kind]) - self.step // self._every[kind]


def figures(record: Mapping[str, Any], pace: Pace) -> list[str]:
    """The figures of a step for a person, the most important ones first."""
    if record.get("loss") is None:
        return ["no target tokens", *_time_left(pace)]
    parts = [f"loss {float(record['loss']):.4f}", f"lr {record.get('learning_rate', 0):.1e}", *_speed(record),
             *_time_left(pace), *_lost(pace)]
    if record.get("loss_scale", 1) != 1:
        parts.append(f"scale {record['loss_scale']:g} ({record['skipped']} skipped)")
    if "memory_peak" in record:
        parts.append(f"{record['memory_kind']} peak {readable(record['memory_peak'])}")
    if record.get("gradient_norm") is not None:
        parts.append(f"grad norm {float(record['gradient_norm']):.3g}")
    return parts


def fitting(parts: Sequence[str], columns: int) -> str:
    """As many of the parts, from the first on, as fit into a line; always the first."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > columns:
            break
        line += f"  {part}"
    return line


def _speed(record: Mapping[str, Any]) -> list[str]:
    seconds, learned = record.get("seconds"), record.get("tokens", 0)
    if not seconds:
        return []
    if "rows" in record:  # of a classifier
        return [f"{record['rows'] / seconds:,.0f} rows/s"]
    if "tokens_seen" not in record:  # of an earlier version
        return [f"{learned / seconds:,.0f} tokens/s"]
    return [f"{record['tokens_seen'] / seconds:,.0f} tokens/s ({learned / seconds:,.0f} learned)"]


def _time_left(pace: Pace) -> list[str]:
    return [] if pace.left is None else [f"{duration(pace.left)} left"]


def _lost(pace: Pace) -> list[str]:
    kinds = ("eval", "evaluating"), ("tasks", "judging"), ("save", "saving")
    shares = [f"{word} {pace.share(kind):.0%}" for word, kind in kinds if pace.share(kind) >= 0.005]
    return [", ".join(shares)] if shares else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def duration(seconds: float) -> str:
    """Format seconds in at most two units: "41s", "3m12s", "2h05m", "3d04h"."""
    whole = round(seconds)
    for unit, size, smaller in (("d", 86400, "h"), ("h", 3600, "m"), ("m", 60, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size * {'d': 24, 'h': 60, 'm': 60}[unit] // size:02d}{smaller}"
    return f"{whole}s"


def readable(count: float) -> str:
    """Format a number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def readable_beside(count: int, other: int) -> str:
    """Format a number of bytes that is shown beside another one: with every byte if both read the same."""
    return readable(count) + (f" ({count:,} bytes)" if readable(count) == readable(other) else "")
