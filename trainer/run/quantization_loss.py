"""What quantizing after training was predicted to cost, and what it cost on held-out text, in one unit."""

from __future__ import annotations

import json
import math

from strategies.distillation.losses.response import IGNORED
from trainer.data.dataset import PreparedData
from trainer.files import write_atomically
from trainer.run.folder import RunFolder, read_json
from trainer.run.metrics import console, read_lines


def keep_together(folder: RunFolder, together: float, text: PreparedData) -> None:
    """Write how far all layers together move predictions (nats a token) beside what was allotted, and tokens a byte."""
    tokens = int((text.held_out["targets"] != IGNORED).sum())
    rate = tokens / max(1, int(text.held_out["bytes"].sum()))
    write_atomically(folder.allocation, json.dumps(
        {**read_json(folder.allocation), "together": together, "tokens_per_byte": rate}, indent=2) + "\n")


def rises(folder: RunFolder) -> list[tuple[str, float | None, float]]:
    """(what, nats a token, bits a byte) of predictions and, where there is a comparison, of held-out text.

    Predictions are divergences from the student before, in nats a token of the rows that calibrated it; in bits a byte
    they are of text with as many tokens a byte as the held-out one. What is measured is how many more bits of it the
    exported student needs than the student did at the end of its training.
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
    """Print what was predicted beside what was measured, where bits were allotted."""
    if folder.allocation.exists():
        for what, nats, bits in rises(folder):
            console.print(f"{name}: {what.replace('*', '')}: {nats:.3g} nats a token, {bits:.3g} bits a byte")
