"""Hints for a finished run: settings that would pay, each with what it would save, computed from the run's files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trainer.experiment.plain_yaml import read_values
from trainer.run.folder import RunFolder, read_json
from trainer.run.held_out import FIGURES, main_figure
from trainer.run.metrics import read_lines
from trainer.run.quantization_loss import RoundingCost, rounding_cost

MOST = 3
PAYS = 0.10  # least share of the file that a hint about its size has to save
ROUNDED = 0.03  # least share by which rounding has to raise held-out bits per byte for a hint about it
WORSE = 0.01  # least relative rise of held-out bits per byte after their lowest value
FULL = 0.6  # rows that are less full than this waste steps
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I8": 1, "F8_E4M3": 1, "I64": 8, "U8": 1, "F64": 8, "BOOL": 1}

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def hints(folder: RunFolder) -> list[str]:
    """At most three settings that would pay for the run in a folder, the largest savings first."""
    values, config = read_values(folder.experiment)[0], folder.student / "config.json"
    shape = read_json(config) if config.exists() else {}
    cost = rounding_cost(folder, values)
    costly = cost is not None and cost.share > ROUNDED
    found = [*(_about_rounding(values, cost, folder, shape) if cost is not None and costly else ()),
             *_about_size(values, list(_tensors(folder.student)), shape, costly), *_about_the_best_step(values, folder),
             *_about_rows(values, folder)]
    return found[:MOST]


def _about_rounding(values: dict[str, Any], cost: RoundingCost, folder: RunFolder, config: dict[str, Any]
                    ) -> Iterator[str]:
    """Which better rounding could win back what the one of now costs, where the settings allow it."""
    asked, ways = values["student"]["quantization"], []
    if asked["method"] == "rtn" and asked["kind"] == "int" and _enough_text(asked, folder, config):
        ways.append("student.quantization.method: gptq, without another training")
    static = not (asked.get("activations") or {"dynamic": True}).get("dynamic", True)
    if not (asked.get("smooth") or asked.get("budget") or static or values["student"].get("adapter")):
        more = " that trains for some steps" if read_json(folder.plan)["steps"] == 0 else ""
        ways.append(f"{'method: qat' if ways else 'student.quantization.method: qat'}, in a new run{more}")
    if ways:
        yield f"{cost}, {cost.share:.0%} more: {', or '.join(ways)}, may win back a part of it"


def _enough_text(asked: dict[str, Any], folder: RunFolder, config: dict[str, Any]) -> bool:
    """Whether GPTQ, which needs as many tokens as a layer has inputs, would find them in the rows of the run."""
    notes = [str(note) for note in read_json(folder.plan).get("text", [])]
    found = [(int(rows.replace(",", "")), int(length), float(full)) for rows, length, full in re.findall(
        r"([\d,]+) rows of (\d+) tokens, ([\d.]+)% full", " ".join(notes))]
    widest = max(config.get("intermediate_size") or 0, config.get("hidden_size") or 0)
    tokens = sum(rows * length * full / 100 for rows, length, full in found)
    enough = min(tokens, asked["calibration_rows"] * max((length for _, length, _ in found), default=0))
    return not found or enough >= widest


def _tensors(student: Path) -> Iterator[Tensor]:
    for file in sorted(student.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - it is no dictionary
                    part = weights.get_slice(name)
                    yield name, part.get_dtype(), tuple(part.get_shape())
        except (OSError, SafetensorError):
            return


def _bytes(tensor: Tensor) -> int:
    return WIDTHS.get(tensor[1], 0) * prod(tensor[2])


def _about_size(values: dict[str, Any], tensors: list[Tensor], config: dict[str, Any], costly: bool = False
                ) -> Iterator[str]:
    """What would make the weight file smaller by more than a tenth, in one line.

    Args:
        tensors: those of the weight file.
        config: the student's configuration, with the rows of its embeddings and of its head.
        costly: whether rounding costs much already, so that rounding more is no advice.
    """
    if values["export"].get("adapter") == "separate":  # it is neither quantized nor rounded, and small
        return
    asked, dtype, total = values["student"].get("quantization"), values["export"]["dtype"], sum(map(_bytes, tensors))
    wide = [tensor for tensor in tensors if tensor[1] in ("F32", "BF16", "F16")]
    rows = [tensor for tensor in wide if len(tensor[2]) == 2 and tensor[2][0] == config.get("vocab_size")]
    inner = [tensor for tensor in wide if len(tensor[2]) == 2 and tensor not in rows]
    saved = {
        "student.quantization: {method: rtn, bits: 8}": _saved(inner, 8) if asked is None else 0,
        "student.quantization.embeddings: true": 0 if costly else _saved_by_embeddings(rows, asked, config),
        "export.dtype: bfloat16": sum(map(_bytes, wide)) / 2 if dtype == "float32" else 0}
    ways = {key: saving / total for key, saving in saved.items() if saving > PAYS * total}
    if not ways:
        return
    of_rows = asked is not None and "student.quantization.embeddings: true" in ways
    share = sum(map(_bytes, rows if of_rows else wide)) / total
    again = "in a new run, since the student is trained quantized" if asked and asked["method"] == "qat" else \
        "without another training"
    yield (f"{share:.0%} of this file are {dtype.replace('float32', 'fp32')} {'embeddings' if of_rows else 'weights'}: "
           f"{' or '.join(f'{key} (saves {part:.0%} of the file)' for key, part in ways.items())}, {again}")


def _saved(tensors: list[Tensor], bits: float) -> float:
    """Bytes that fewer bits for each number of some tensors save."""
    return sum(max(0.0, 1 - bits / (8 * WIDTHS[tensor[1]])) * _bytes(tensor) for tensor in tensors)


def _saved_by_embeddings(embeddings: list[Tensor], asked: dict[str, Any] | None, config: dict[str, Any]) -> float:
    """Bytes that `quantization.embeddings` would save, or 0 where a folder could not hold such embeddings.

    A head that is not tied to the embeddings is quantized by `ignore`, not by this. With quantized activations, layers
    of several kinds, or matrices that are stored (inputs, outputs), as in GPT-2, which are loaded dequantized although
    they have no zero points, transformers could not load the embeddings. A budget has its own size whatever is in it.
    """
    if asked is None:
        return 0.0
    turned = asked.get("symmetric", True) and (config.get("quantization_config") or {}).get("dequantize")
    other = any(asked.get(key) for key in ("embeddings", "activations", "layers", "budget"))
    if turned or other or asked.get("kind", "int") != "int":
        return 0.0
    scale = 32 / asked["group_size"] if asked.get("group_size") else 0.0
    return _saved([tensor for tensor in embeddings if not any(
        fnmatchcase(tensor[0].removesuffix(".weight"), pattern) for pattern in asked["ignore"])],
        (asked.get("bits") or 4) + scale)


def _about_the_best_step(values: dict[str, Any], folder: RunFolder) -> Iterator[str]:
    found = [(line["held_out"], line["step"]) for line in read_lines(folder.metrics) if "held_out" in line]
    if values["training"].get("keep_best") is not None or not found:
        return
    name = main_figure(found[-1][0])
    figure, sign = FIGURES[name], -1 if FIGURES[name].higher else 1
    curve = [(sign * held_out[name], step) for held_out, step in found]
    if curve[-1][0] - min(curve)[0] > WORSE * abs(min(curve)[0]):
        value, step = min(curve)
        was = "was highest" if figure.higher else "were lowest"
        yield (f"held-out {figure.words} {was} at step {step} ({figure.shown(sign * value)}, and "
               f"{figure.shown(sign * curve[-1][0])} at the end): training.keep_best: {name} exports the best "
               "evaluation's student, in a new run")


def _about_rows(values: dict[str, Any], folder: RunFolder) -> Iterator[str]:
    notes = " ".join(str(note) for note in read_json(folder.plan).get("text", []))
    full = re.search(r"([\d.]+)% full", notes)
    if full and not values["data"].get("packing", True) and float(full[1]) / 100 < FULL:
        yield (f"rows are {full[1]}% full: with data.packing: true the same text takes about that share of the steps, "
               "in a new run")
