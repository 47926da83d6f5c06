"""What a report says of early exits: a table and a picture of what each threshold saves, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.run.folder import RunFolder, read_json
from trainer.run.held_out import FIGURES
from trainer.run.report_plots import new_figure, save_figure

FOLDER, PICTURE = "student-early-exit", "early-exits.png"
ABOUT = (
    "An input leaves after the first block whose exit gives its most probable answer at least the probability of the "
    "threshold; in the last row none does. Blocks and arithmetic are shares of the whole model's: arithmetic counts "
    "multiplications with matrices of weights, those of the exits on the way, and of a language model those that fill "
    "the cache of the blocks that a token skips. Thresholds at which inputs leave as at the one before are left out.\n")


def exit_section(folder: RunFolder) -> list[str]:
    """The section on early exits of a run that has some; else nothing. Draws the picture."""
    file = folder.path / FOLDER / "exits.json"
    if not file.exists():
        return []
    found = read_json(file)
    curve = found["curve"]
    of = "accuracy" if "accuracy" in curve[0] else "bits_per_byte"
    _draw(curve, of, float(found["threshold"]), folder.path / PICTURE)
    layers = [int(layer) for layer in found["layers"]]
    rows = [f"| threshold | blocks | arithmetic | {FIGURES[of].words} | "
            + " | ".join(f"leave after {layer}" for layer in layers) + " | go through |",
            "|---|---:|---:|---:|" + "---:|" * (len(layers) + 1)]
    chosen = [one["threshold"] == found["threshold"] for one in curve]
    rows += [_row(one, of, mine) for one, before, mine in zip(curve, [None, *curve], chosen, strict=False)
             if mine or one["threshold"] > 1 or before is None or one["exits"] != before["exits"]]
    return ["## Early exits\n", ABOUT, *rows, "", f"![{FIGURES[of].words} by blocks computed]({PICTURE})\n"]


def _row(one: dict[str, Any], of: str, chosen: bool) -> str:
    threshold = "none leaves" if one["threshold"] > 1 else f"{one['threshold']:g}"
    cells = [f"**{threshold}**" if chosen else threshold, f"{one['blocks']:.1%}", f"{one['flops']:.1%}",
             FIGURES[of].shown(one[of]), *(f"{share:.1%}" for share in one["exits"])]
    return f"| {' | '.join(cells)} |"


def _draw(curve: list[dict[str, Any]], of: str, threshold: float, file: Path) -> None:
    """Plot the figure of each threshold against the share of blocks that is computed."""
    figure, axes = new_figure("Early exits", "share of blocks computed", f"{FIGURES[of].words} on held-out data")
    axes.plot([one["blocks"] for one in curve], [one[of] for one in curve], color="#c2410c", marker="o", markersize=4)
    for one in curve:
        if one["threshold"] == threshold or one["threshold"] > 1:
            words = "none leaves" if one["threshold"] > 1 else f"{threshold:g}"
            axes.annotate(words, (one["blocks"], one[of]), textcoords="offset points", xytext=(6, -12), fontsize=8)
    axes.set_xlim(0, 1.12)
    save_figure(figure, file)
