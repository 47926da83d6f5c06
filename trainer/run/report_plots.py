"""The pictures of a report: losses of a training, and sizes of models against their bits per byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.run.held_out import FIGURES, main_figure

COLORS = {"teacher": "#6b7280", "student": "#c2410c", "control": "#2563eb"}


def ordered(found: dict[str, Any]) -> list[str]:
    """Names of the models of a comparison, in the order in which they are shown."""
    return [name for name in COLORS if name in found]


def new_figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    """A figure with one pair of axes, in the style of all pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    if x == "optimizer step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure as PNG, and free its memory."""
    from matplotlib import pyplot

    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def plot_loss(curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Plot the training cross-entropy, the term that all models share; the whole loss if the student has none."""
    figure, _ = loss_figure(curves)
    save_figure(figure, file)


def loss_figure(curves: dict[str, list[dict[str, Any]]]) -> tuple[Any, Any]:
    """The figure and the axes of that picture."""
    classifies = any("accuracy" in line.get("held_out", ()) for line in curves["student"])
    unit = "nats" if classifies else "nats per token"
    term = "cross_entropy" if any("cross_entropy" in line for line in curves["student"]) else "loss"
    figure, axes = new_figure("Training", "optimizer step", f"{term.replace('_', '-')} ({unit})")
    for name, lines in curves.items():
        points = [(line["step"], line[term]) for line in lines if isinstance(line.get(term), float)]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLORS[name], alpha=0.2, linewidth=1)
            axes.plot(*zip(*_smooth(points), strict=True), color=COLORS[name], label=name)
    axes.legend(frameon=False)
    return figure, axes


def plot_held_out(curves: dict[str, list[dict[str, Any]]], found: dict[str, Any], file: Path) -> None:
    """Plot the bits per byte of each evaluation, or the accuracy, beside the teacher's."""
    of = main_figure(found["student"])
    figure, axes = new_figure("Held-out data", "optimizer step", FIGURES[of].words)
    for name, lines in curves.items():
        points = [(line["step"], line["held_out"][of]) for line in lines if "held_out" in line]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLORS[name], marker="o", markersize=3, label=name)
    if "teacher" in found:
        axes.axhline(found["teacher"][of], color=COLORS["teacher"], linestyle="--", label="teacher")
    axes.legend(frameon=False)
    save_figure(figure, file)


def plot_size(found: dict[str, Any], file: Path) -> None:
    """Plot bytes against bits per byte or accuracy, which compares models: one alone gets no picture."""
    file.unlink(missing_ok=True)
    if len(ordered(found)) < 2:
        return
    figure, _ = sizes_figure(found)
    save_figure(figure, file)


def sizes_figure(found: dict[str, Any]) -> tuple[Any, Any]:
    """The figure and the axes of that picture."""
    of = main_figure(found["student"])
    figure, axes = new_figure("Exported models", "MiB on disk", f"{FIGURES[of].words} on held-out data")
    for name in ordered(found):
        entry = found[name]
        axes.scatter(entry["bytes_on_disk"] / 2**20, entry[of], s=60, color=COLORS[name], label=name,
                     zorder=3)
    axes.set_xlim(left=0)
    axes.margins(y=0.25)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # there are no bits below none
    axes.legend(frameon=False)
    return figure, axes


NAMED = 40  # most classes whose names are written beside a confusion


def plot_confusion(table: list[list[int]], classes: list[str], file: Path) -> None:
    """Draw a classifier's answers by true class, each row as shares of its class."""
    import numpy

    counts = numpy.asarray(table, float)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    figure, axes = new_figure("Answers of the student", "answer", "true class")
    side = min(14.0, max(4.5, 2.5 + 0.28 * len(classes))) if len(classes) <= NAMED else 9.0
    figure.set_size_inches(side + 0.8, side)
    axes.grid(visible=False)
    picture = axes.imshow(shares, cmap="Oranges", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the true class", fraction=0.046)
    if len(classes) <= NAMED:
        short = [name if len(name) <= 24 else name[:23] + "…" for name in classes]
        axes.set_xticks(range(len(classes)), short, rotation=90)
        axes.set_yticks(range(len(classes)), short)
    if len(classes) <= 12:
        for row, column in numpy.ndindex(*counts.shape):
            if counts[row, column]:
                axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", fontsize=8,
                          color="white" if shares[row, column] > 0.6 else "black")
    save_figure(figure, file)


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential moving average over about a thirtieth of the run."""
    weight, value, smoothed = 1 / max(1, len(points) / 30), points[0][1], []
    for step, raw in points:
        value += weight * (raw - value)
        smoothed.append((step, value))
    return smoothed
