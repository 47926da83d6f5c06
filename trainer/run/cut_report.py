"""What reports and model cards say of a student that was cut before it was trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trainer.run.folder import RunFolder, read_json
from trainer.run.held_out import FIGURES, in_words, main_figure
from trainer.run.markdown import plain
from trainer.run.metrics import readable

SETTINGS = ("importance", "calibration_rows", "multiple_of", "width_by", "ignore", "schedule")  # how, not what


def cut_section(folder: RunFolder, found: dict[str, Any]) -> list[str]:
    """Lines of a report on the cut of a run; none if nothing was cut.

    Args:
        found: the comparison of its models.
    """
    file = folder.cut / "prune.json"
    if not file.is_file():
        return []
    record = read_json(file)
    held_out = {name: record["held_out"][name] for name in FIGURES if name in record["held_out"]}
    figure = main_figure(found["student"])
    return ["## Cut\n",
            f"Before training, the student was cut from {record['parameters_before']:,} to {record['parameters']:,} "
            f"parameters ({readable(record['bytes_on_disk'])} in fp32){zeros_in_words(record)}; `cut/prune.json` has "
            f"what was kept and why. Right after it, {in_words(held_out, figure)} on held-out data; at the end, "
            f"{in_words(found['student'], figure)}. Reloaded in a fresh process, its logits differed from those in "
            f"memory by {record['difference_reloaded']:.2g} of the largest.\n"]


def zeros_in_words(record: dict[str, Any]) -> str:
    """How many weights a cut has set to zero; nothing if none."""
    if "sparsity" not in record:
        return ""
    layers = record["sparsity"]["layers"].values()
    share = sum(one["sparsity"] * one["weights"] for one in layers) / max(1, sum(one["weights"] for one in layers))
    return f", {share:.1%} of the weights of its layers set to zero"


def cuts_in_words(runs: Iterable[dict[str, Any]]) -> str:
    """What was cut in some runs, the earliest first: "layers 3 and mlp 0.5, then width 96"; empty if nothing was.

    Args:
        runs: values of their experiments, as plain data.
    """
    said = []
    for values in runs:
        parts = [f"{name} {plain(value)}" for key in ("prune", "sparsity") for name, value in (
            values["student"].get(key) or {}).items() if value is not None and name not in SETTINGS
            and not (key == "sparsity" and values["student"][key].get("method") == "keep")]
        if parts:
            said.append(" and ".join(parts))
    return ", then ".join(said)
