"""The report of an experiment in stages: bytes against quality, from the teacher to the last student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.run.held_out import FIGURES, main_figure
from trainer.run.markdown import plain
from trainer.run.metrics import readable
from trainer.run.report_plots import COLORS, new_figure, save_figure
from trainer.stages.stage_record import StagesFolder

ABOUT = (
    "Each stage starts from the student of the one before. Bytes are those of the weight files; every figure is of the "
    "exported files, loaded by `transformers` in a fresh process, on held-out data. *Cut* is the student right after "
    "cutting, before any training. A round marked *not kept* made the student worse than its stage allows.\n")


def write_stages_report(path: Path) -> Path:
    """Write `report.md` and `stages.png` of a folder of stages, from its record; returns the report.

    Raises:
        UserError: not all stages are finished.
    """
    folder = StagesFolder(path)
    record = folder.read()
    if (done := len(record["stages"])) < folder.planned or not done:
        raise UserError("", f"{done} of {folder.planned} stages of {path} are finished, and a report is of all",
                        way_out="start its command again")
    results = [one for stage in record["stages"] for one in stage["made"]]
    last = [one for one in results if one["kept"]][-1]
    name, figure = _figure_of(last)
    teacher = record["teacher"]
    draw_stages(record, folder.picture)
    parts = [
        f"# {plain(record['name'])}\n", _verdict(teacher, last, name), "",
        "## Stages\n", _table(record, name), "", ABOUT,
        f"![bytes against {figure.words}](stages.png)\n",
        *_elsewhere(results),
        "The student is in `student/`; each stage has a folder of its own, with its plan, checkpoints, receipt and "
        "report.\n",
        "Run it again: `accelerate launch train.py --config experiment.yaml run.folder=...` with the "
        "`experiment.yaml` in this folder.\n",
    ]
    write_atomically(folder.report, "\n".join(parts))
    return folder.report


def _figure_of(last: dict[str, Any]) -> tuple[str, Any]:
    name = main_figure(last["student"]["figures"])
    return name, FIGURES[name]


def _verdict(teacher: dict[str, Any] | None, last: dict[str, Any], name: str) -> str:
    student, figure = last["student"], FIGURES[name]
    size = f"The last student takes {readable(student['bytes_on_disk'])} on disk, with {figure.words} " \
           f"{figure.shown(student['figures'][name])} on held-out data."
    if teacher is None:
        return size
    return f"{size} It is {teacher['bytes_on_disk'] / student['bytes_on_disk']:.1f} times smaller than the teacher, " \
           f"which has {figure.shown(teacher[name])}: {_difference(name, student['figures'][name], teacher[name])}."


def _difference(name: str, value: float, than: float) -> str:
    """A difference in words: points of a share, else the number."""
    return f"{100 * (value - than):+.2f} points" if FIGURES[name].share else f"{value - than:+.4f}"


def _table(record: dict[str, Any], name: str) -> str:
    teacher, figure = record["teacher"], FIGURES[name]
    rows = [f"| stage | parameters | bytes | smaller | {figure.words} | beside the teacher | steps | seconds |",
            "|---|---:|---:|---:|---:|---:|---:|---:|"]
    if teacher is not None:
        rows.append(f"| teacher | {teacher['parameters']:,} | {teacher['bytes_on_disk']:,} | 1.0x | "
                    f"{figure.shown(teacher[name])} | | | |")

    def row(label: str, values: dict[str, Any], value: float, steps: str, seconds: str) -> str:
        times = "" if teacher is None else f"{teacher['bytes_on_disk'] / values['bytes_on_disk']:.1f}x"
        beside = "" if teacher is None else _difference(name, value, teacher[name])
        return (f"| {label} | {values['parameters']:,} | {values['bytes_on_disk']:,} | {times} | {figure.shown(value)} "
                f"| {beside} | {steps} | {seconds} |")

    for stage in record["stages"]:
        for one in stage["made"]:
            if one["cut"] is not None and one["steps"]:
                rows.append(row(f"{one['label']}, *cut*", one["cut"], one["cut"][name], "", ""))
            label = one["label"] if one["kept"] else f"{one['label']}, *not kept*"
            rows.append(row(label, one["student"], one["student"]["figures"][name], f"{one['steps']:,}",
                            f"{one['seconds']:.0f}"))
    return "\n".join(rows)


def _elsewhere(results: list[dict[str, Any]]) -> list[str]:
    found = [f"- {one['label']}, for {name}: {size:,} bytes" for one in results for name, size in one[
        "runtimes"].items()]
    return ["## For other runtimes\n", *found, ""] if found else []


def draw_stages(record: dict[str, Any], file: Path) -> None:
    """Draw bytes (logarithmic) against quality, from the teacher by way of all stages."""
    results = [one for stage in record["stages"] for one in stage["made"]]
    name, of = _figure_of([one for one in results if one["kept"]][-1])
    figure, axes = new_figure("Bytes against quality", "MiB on disk (logarithmic)", f"{of.words} on held-out data")
    axes.set_xscale("log")
    changed = [one for stage in record["stages"] if stage["kind"] != "export" for one in stage["made"]]
    way, labeled = [], False
    if (teacher := record["teacher"]) is not None:
        way.append((teacher["bytes_on_disk"] / 2**20, teacher[name]))
        axes.scatter(*way[0], s=60, color=COLORS["teacher"], zorder=3)
        axes.annotate("teacher", way[0], textcoords="offset points", xytext=(2, -6), fontsize=8, rotation=-35,
                      va="top")
    for one in changed:
        point = (one["student"]["bytes_on_disk"] / 2**20, one["student"]["figures"][name])
        if one["cut"] is not None and one["steps"]:
            axes.scatter(one["cut"]["bytes_on_disk"] / 2**20, one["cut"][name], s=36, facecolors="none",
                         edgecolors=COLORS["student"], zorder=3, label=None if labeled else "cut, not healed yet")
            labeled = True
        axes.scatter(*point, s=50, color=COLORS["student"] if one["kept"] else "none",
                     edgecolors=COLORS["student"], marker="o" if one["kept"] else "X", zorder=3)
        axes.annotate(one["label"].rpartition("/")[2], point, textcoords="offset points", xytext=(2, -6), fontsize=8,
                      rotation=-35, va="top")
        way += [point] if one["kept"] else []
    axes.plot(*zip(*way, strict=True), color=COLORS["student"], alpha=0.5, linewidth=1)
    if labeled:
        axes.legend(frameon=False)
    axes.invert_xaxis()
    axes.margins(x=0.15, y=0.2)
    save_figure(figure, file)
