"""Predicted and measured loss in quality from post-training quantization, in common units."""

from __future__ import annotations

import json
import math

from strategies.distillation.losses.response import IGNORED
from trainer.data.dataset import PreparedData
from trainer.files import write_atomically
from trainer.run.folder import RunFolder, read_json
from trainer.run.metrics import console, read_lines


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
    before = next((line["held_out"]["bits_per_byte"] for line in reversed(read_lines(folder.metrics))
                   if "held_out" in line), None)
    if before is None or not folder.comparison.exists():
        return rows
    bits = read_json(folder.comparison)["student"]["bits_per_byte"] - before
    return [*rows, ("**measured**: held-out text, exported against not quantized", bits * math.log(2) / rate, bits)]


def say_rise(name: str, folder: RunFolder) -> None:
    """Print predictions and measurement, if the bits of the layers were chosen within a budget."""
    if folder.allocation.exists():
        for what, nats, bits in rises(folder):
            console.print(f"{name}: {what.replace('*', '')}: {nats:.3g} nats a token, {bits:.3g} bits a byte")
