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
from trainer.run.metrics import console, read_lines

SMALL = 1e-4  # bits per byte, the last digit that is shown of them


@dataclass(frozen=True)
class RoundingCost:
    """What post-training quantization did to the held-out bits per byte.

    Attributes:
        what: what was done, in words.
        before: bits per byte of the student in training that is exported.
        after: those of the exported file.
    """

    what: str
    before: float
    after: float

    @property
    def share(self) -> float:
        """The rise as a share of the bits before."""
        return (self.after - self.before) / self.before if self.before else 0.0

    def __str__(self) -> str:
        rise, before = self.after - self.before, f"({self.before:.4f} before)"
        if abs(rise) < SMALL:
            return f"{self.what} cost less than {SMALL:.4f} bits per byte {before}"
        return f"{self.what} cost {rise:.4f} bits per byte {before}" if rise > 0 else \
            f"{self.what} cost nothing: it is {-rise:.4f} bits per byte better {before}"


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
    return RoundingCost(_in_words(asked), before, read_json(folder.comparison)["student"]["bits_per_byte"])


def _in_words(asked: dict[str, Any]) -> str:
    if asked.get("budget"):
        return "rounding within the budget"
    bits = asked.get("bits") or 4
    size = f"{bits} bit{'s' * (bits > 1)}" if asked["kind"] == "int" else asked["kind"]
    return f"rounding to {size}{' (and otherwise in some layers)' if asked.get('layers') else ''}"


def _before(folder: RunFolder) -> float | None:
    """Held-out bits per byte of the student that is exported, as it was before it was quantized."""
    step = read_json(folder.best).get("step") if folder.best.exists() else None
    lines = reversed(read_lines(folder.metrics) if folder.metrics.exists() else [])
    return next((line["held_out"]["bits_per_byte"] for line in lines
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
    if before is None or not folder.comparison.exists():
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
