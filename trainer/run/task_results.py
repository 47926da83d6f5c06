"""What the models of a run reached on tasks, for its report and model card: tables and a picture of intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.run.folder import RunFolder, read_json
from trainer.run.markdown import block, code, plain

COLORS = {"teacher": "#6b7280", "student": "#c2410c", "student before rounding": "#d97706", "control": "#2563eb"}
LOWER = ("bits_per_byte", "word_perplexity", "byte_perplexity", "perplexity")


def evaluation_of(folder: RunFolder) -> dict[str, Any] | None:
    """The content of `evaluation.json`; None for a run without tasks."""
    return read_json(folder.evaluation) if folder.evaluation.exists() else None


def task_section(folder: RunFolder) -> list[str]:
    """Section of the report on tasks, with its picture; nothing for a run without them."""
    found = evaluation_of(folder)
    picture = folder.path / "tasks.png"
    picture.unlink(missing_ok=True)
    if found is None:
        return []
    if len(found["models"]) > 1:
        plot_tasks(found, picture)
    written = [line for model, tasks in found.get("written", {}).items() for task, shown in tasks.items()
               for line in _written(model, task, shown[:1])]
    return ["## Tasks\n", *task_tables(found),
            "In brackets are 95% intervals: of a share Wilson's, of bits per byte by a bootstrap over records. "
            "Differences are on the same records, by Newcombe's method or a bootstrap; an interval without zero says "
            "that two models differ. Answers are the most probable tokens, whatever a model's own settings for "
            "generation say.\n",
            *(["![tasks](tasks.png)\n"] if picture.exists() else []), *written]


def task_tables(found: dict[str, Any]) -> list[str]:
    """A table of what each model reached, side by side, and one of how the others differ from the teacher."""
    parts = [*_table(found, found["models"], "records", signed=False), ""]
    return [*parts, *_table(found, found["differences"], "less the teacher's", signed=True), ""] \
        if found["differences"] else parts


def panels(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Each metric of each task."""
    return [(task, metric) for task in found["tasks"] for metric in dict.fromkeys(
        name for tasks in found["models"].values() for name in tasks.get(task, {}))]


def _table(found: dict[str, Any], of: dict[str, Any], corner: str, signed: bool) -> list[str]:
    rows = [f"| task | {corner} | {' | '.join(of)} |", f"|---|---:|{'---:|' * len(of)}"]
    for task, metric in panels(found):
        words = metric.replace("_", " ") + ", lower is better" * (metric.partition(".")[0] in LOWER)
        count = "" if signed else found["tasks"][task].get("records", "")
        cells = [_with_interval(of[model].get(task, {}).get(metric), signed) for model in of]
        rows.append(f"| {code(task)}: {plain(words)} | {count} | {' | '.join(cells)} |")
    return rows


def _with_interval(one: dict[str, float] | None, signed: bool) -> str:
    form = "+.4f" if signed else ".4f"
    if one is None:
        return ""
    return f"{one['value']:{form}}" + (f" [{one['low']:{form}}, {one['high']:{form}}]" if "low" in one else "")


def _written(model: str, task: str, shown: list[dict[str, Any]]) -> list[str]:
    return [f"**{plain(model)}** on line {one['line']} of {code(task)}, where {code(str(one['right']))} is right: "
            f"{code(str(one['found'])) if one['found'] else 'nothing'} is found\n\n{block(one['written'].strip())}\n"
            for one in shown]


def plot_tasks(found: dict[str, Any], file: Path) -> None:
    """Plot each metric of each task with its intervals, a model below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = panels(found)
    figure, every = pyplot.subplots(len(shown), 1, figsize=(7, 0.9 + 0.9 * len(shown)), layout="constrained",
                                    squeeze=False)
    for axes, (task, metric) in zip(every[:, 0], shown, strict=True):
        models = [model for model in found["models"] if metric in found["models"][model].get(task, {})]
        for row, model in enumerate(models):
            one = found["models"][model][task][metric]
            ends = [one.get("low", one["value"]), one.get("high", one["value"])]
            axes.plot(ends, [row, row], color=COLORS.get(model, "black"), linewidth=2)
            axes.plot([one["value"]], [row], "o", color=COLORS.get(model, "black"))
        axes.set_yticks(range(len(models)), models)
        axes.invert_yaxis()
        axes.set_title(f"{task}: {metric.replace('_', ' ')}", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
