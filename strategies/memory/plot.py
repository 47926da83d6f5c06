"""Plot planned and measured memory over one training step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

_COLORS = {"planned": "#2563eb", "measured": "#c2410c", "budget": "#111827"}
_SHORTEST = 0.04  # least share of the plot's width for a phase
_MOST_POINTS = 4000  # most points of a curve, more than the plot has pixel columns


@dataclass(frozen=True)
class Curve:
    """Bytes over one step.

    Attributes:
        points: [changes, 2] of position (ascending, any unit) and bytes from there on.
        marks: (name, position) of the beginning of each phase, in order.
    """

    points: numpy.ndarray
    marks: tuple[tuple[str, float], ...] = ()


def curve(recorded: Any) -> Curve:
    """The curve of a `LiveBytes` or a `Measured`, in which each change of memory is one unit of progress.

    Time cannot be the unit, since for a plan nothing was run. Changes too small to be visible, like those of an
    optimizer's scalars, do not advance the position. If a mark occurs several times, the last one counts: with gradient
    accumulation, the other micro-batches come before the last `forward`.
    """
    timeline = numpy.asarray(recorded.timeline, dtype=numpy.int64)
    values = timeline[:, -1] if timeline.ndim == 2 else timeline
    if not len(values):
        return Curve(numpy.zeros((0, 2)))
    seen = numpy.abs(numpy.diff(values, prepend=values[0])) >= values.max() / _MOST_POINTS
    positions = numpy.cumsum(seen)
    marks = {name: float(positions[index - 1]) if index else 0.0 for name, index in recorded.marks}
    return Curve(numpy.stack([positions, values], axis=1), tuple(sorted(marks.items(), key=lambda mark: mark[1])))


def thinned(found: Curve, points: int) -> numpy.ndarray:
    """Downsample a curve to [at most 2 x points, 2] by the maximum of each interval, so that no peak is lost."""
    step = max(1, len(found.points) // points)
    return numpy.array([(found.points[begin, 0], found.points[begin:begin + step, 1].max())
                        for begin in range(0, len(found.points), step)]).reshape(-1, 2)


def draw_step(planned: Curve | None, measured: Curve | None, budget: int | None, path: Path | str) -> Path:
    """Write a PNG (1080 x 540 pixels) of memory over the progress of one step and return its path.

    Phases that both curves mark are aligned, each stretched to the same width. Peaks are labeled.

    Args:
        planned, measured: None, or a curve without points, is left out.
        budget: bytes, drawn as a horizontal line.
        path: the file, which is replaced.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {name: found for name, found in (("planned", planned), ("measured", measured))
              if found is not None and len(found.points)}
    phases = shared_phases(list(curves.values()))
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for name, found in curves.items():
        _plot(axes, name, progress(found, phases), found.points[:, 1])
    if budget is not None:
        axes.axhline(budget / 2**20, color=_COLORS["budget"], linestyle="--", linewidth=1.2,
                     label=f"budget: {_readable(budget)}")
    _finish(axes, phases)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return Path(path)


def shared_phases(curves: list[Curve]) -> dict[str, float]:
    """The beginning of each phase in the plot, from 0 to 1; empty unless all curves have the same marks in order.

    A phase gets the mean of its shares in all curves, so that one with many small changes does not squeeze the others,
    and at least a visible width.
    """
    if not curves:
        return {}
    names = [name for name, _ in curves[0].marks]
    if len(set(names)) < len(names) or any([name for name, _ in found.marks] != names for found in curves):
        return {}
    begins = [float(numpy.mean([_share(found, found.marks[index][1]) for found in curves]))
              for index in range(len(names))]
    widths = numpy.diff([0.0, *begins, 1.0])
    widths[1:] = numpy.maximum(widths[1:], _SHORTEST)
    places = numpy.cumsum(widths / widths.sum())
    return {name: float(place) for name, place in zip(names, places, strict=False)}


def progress(found: Curve, phases: dict[str, float]) -> numpy.ndarray:
    """Positions [changes] from 0 to 1 in the plot, interpolated linearly within each phase.

    A curve that begins with its first phase begins where that phase does.
    """
    knots = [(_share(found, position), phases[name]) for name, position in found.marks if name in phases]
    if not knots or knots[0][0] > 0:
        knots.insert(0, (0.0, 0.0))
    knots.append((1.0, 1.0))
    here, there = zip(*knots, strict=True)
    return numpy.interp([_share(found, position) for position in found.points[:, 0]], here, there)


def _share(found: Curve, position: float) -> float:
    first, last = found.points[0, 0], found.points[-1, 0]
    return float((position - first) / (last - first)) if last > first else 0.0


def _plot(axes: Any, name: str, positions: numpy.ndarray, values: numpy.ndarray) -> None:
    mebibytes, top = values / 2**20, int(numpy.argmax(values))
    kept = _thinned(values)
    axes.plot(positions[kept], mebibytes[kept], drawstyle="steps-post", color=_COLORS[name], linewidth=1.4,
              linestyle="-" if name == "measured" else (0, (4, 1.5)),  # distinguishable without color
              label=f"{name}: peak {_readable(int(values[top]))}")
    axes.plot(positions[top], mebibytes[top], marker="o" if name == "measured" else "s", markersize=7,
              markerfacecolor="none", color=_COLORS[name])


def _thinned(values: numpy.ndarray) -> numpy.ndarray:
    """Indices of a curve's points to draw: all, or the maximum of each of many equal intervals, so no peak is lost."""
    if len(values) <= _MOST_POINTS:
        return numpy.arange(len(values))
    stretches = numpy.array_split(numpy.arange(len(values)), _MOST_POINTS)
    return numpy.array([stretch[numpy.argmax(values[stretch])] for stretch in stretches])


def _finish(axes: Any, phases: dict[str, float]) -> None:
    for name, position in phases.items():
        axes.axvline(position, color="#9ca3af", linewidth=0.8)
        axes.annotate(name, (position, 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
                      textcoords="offset points", fontsize=9, color="#4b5563")
    axes.set(xlabel="progress of the step", ylabel="MiB", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.margins(y=0.08)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def _readable(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
