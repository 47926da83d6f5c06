"""Predicted and measured loss in quality from post-training quantization, in common units."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from strategies.distillation.losses.response import IGNORED
from trainer.data.dataset import PreparedData
from trainer.experiment.plain_yaml import read_values
from trainer.files import write_atomically
from trainer.run.folder import RunFolder, read_json
from trainer.run.held_out import FIGURES, main_figure
from trainer.run.metrics import console, read_lines

SMALL = 1e-4  # bits per byte, or share of accuracy: the last digit that is shown of them


@dataclass(frozen=True)
class RoundingCost:
    """What post-training quantization did to the held-out bits per byte, or to the accuracy of a classifier.

    Attributes:
        what: what was done, in words.
        before: the figure of the student in training that is exported.
        after: that of the exported file.
        figure: `bits_per_byte` or `accuracy`.
    """

    what: str
    before: float
    after: float
    figure: str = "bits_per_byte"

    @property
    def worse(self) -> float:
        """By how much the figure became worse."""
        return (self.before - self.after) if FIGURES[self.figure].higher else (self.after - self.before)

    @property
    def share(self) -> float:
        """The loss as a share of the figure before."""
        return self.worse / self.before if self.before else 0.0

    def __str__(self) -> str:
        figure = FIGURES[self.figure]

        def much(change: float) -> str:
            return f"{100 * change:.2f} points of {figure.words}" if figure.share else f"{change:.4f} {figure.words}"

        before = f"({figure.shown(self.before)} before)"
        if abs(self.worse) < SMALL:
            return f"{self.what} cost less than {much(SMALL)} {before}"
        return f"{self.what} cost {much(self.worse)} {before}" if self.worse > 0 else \
            f"{self.what} cost nothing: it is {much(-self.worse)} better {before}"


def rounding_cost(folder: RunFolder, values: dict[str, Any] | None = None) -> RoundingCost | None:
    """What quantization after training cost; None if the student was not quantized so, or nothing measured it.

    Args:
        values: those of the experiment, where the folder has not adopted them yet.
    """
    values = values or read_values(folder.experiment)[0]
    asked, before = values["student"].get("quantization"), _before(folder)
    if asked is None or asked["method"] == "qat" or values["export"].get("adapter") == "separate":
        return None
    if before is None or not folder.comparison.exists():
        return None
    found = read_json(folder.comparison)["student"]
    figure = main_figure(found)
    return RoundingCost(_in_words(asked), before, found[figure], figure)


def _in_words(asked: dict[str, Any]) -> str:
    if asked.get("budget"):
        return "rounding within the budget"
    bits = asked.get("bits") or 4
    size = f"{bits} bit{'s' * (bits > 1)}" if asked["kind"] == "int" else asked["kind"]
    return f"rounding to {size}{' (and otherwise in some layers)' if asked.get('layers') else ''}"


def _before(folder: RunFolder) -> float | None:
    """Held-out bits per byte, or accuracy, of the student that is exported, as it was before it was quantized."""
    step = read_json(folder.best).get("step") if folder.best.exists() else None
    lines = reversed(read_lines(folder.metrics) if folder.metrics.exists() else [])
    return next((line["held_out"][main_figure(line["held_out"])] for line in lines
                 if "held_out" in line and step in (None, line["step"])), None)


def keep_together(folder: RunFolder, together: float, text: PreparedData) -> None:
    """Add the divergence with all layers quantized (nats per token) and the tokens per byte to `allocation.json`."""
    tokens = int((text.held_out["targets"] != IGNORED).sum())
    rate = tokens / max(1, int(text.held_out["bytes"].sum()))
    write_atomically(folder.allocation, json.dumps(
        {**read_json(folder.allocation), "together": together, "tokens_per_byte": rate}, indent=2) + "\n")


def rises(folder: RunFolder) -> list[tuple[str, float | None, float]]:
    """(description, nats per token, bits per byte) of the predictions and, after the comparison, of the measurement.

    Predictions are divergences from the unquantized student, in nats per token of the calibration rows; they are
    converted to bits per byte with the tokens per byte of the held-out text. The measurement is the increase in bits
    per byte on the held-out set from the student at the end of its training to the exported student.
    """
    found = read_json(folder.allocation)
    rate = found.get("tokens_per_byte")
    if rate is None:
        return []
    rows = [(what, nats, nats * rate / math.log(2)) for what, nats in (
        ("predicted: sum of layers alone, each rounded to nearest, on rows that calibrated", found["chosen"]["rise"]),
        ("predicted: all layers together, on those rows", found["together"]))]
    before = _before(folder)
    if before is None or not folder.comparison.exists() or "bits_per_byte" not in read_json(folder.comparison)[
            "student"]:
        return rows
    bits = read_json(folder.comparison)["student"]["bits_per_byte"] - before
    return [*rows, ("**measured**: held-out text, exported against not quantized", bits * math.log(2) / rate, bits)]


def say_rise(folder: RunFolder, values: dict[str, Any]) -> None:
    """Print what quantization after training cost, and what was predicted of bits chosen within a budget.

    Args:
        values: those of the experiment, as plain data.
    """
    name, asked = values["name"], values["student"].get("quantization") or {}
    if (cost := rounding_cost(folder, values)) is not None:
        console.print(f"{name}: {cost}")
    if asked.get("budget") and folder.allocation.exists():
        for what, nats, bits in rises(folder):
            console.print(f"{name}: {what.replace('*', '')}: {nats:.3g} nats a token, {bits:.3g} bits a byte")
