"""Bytes of a sparse model: as a safetensors file, compressed by gzip, and as a Deep Compression archive.

    python -m benchmarks.pruning.bytes_on_disk --model FOLDER [--json FILE] [--blocks 4]

The blocks' layers of the model are pruned by magnitude, and some of the students also quantized to 4 bits (rounded to
nearest, groups of 64). Only these layers are counted. Bounds are those of any code: a share z of zeros anywhere costs
at least H(z) bits a weight for the positions, an N:M pattern log2(M choose N) / M, and to each comes the entropy of the
values that are not zero.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.rematerialization.frontier import machine
from strategies.export.archive.archive_file import read_archive, write_archive
from strategies.pruning.unstructured.prune_once import one_shot
from strategies.quantization.post_training import quantize
from strategies.quantization.quantizer import WeightQuantizer

ASKED: tuple[dict[str, Any] | None, ...] = (
    None, {"sparsity": 0.5}, {"sparsity": 0.7}, {"sparsity": 0.9}, {"pattern": "2:4"})
LEVELS = 5  # bits of the archive's codebooks, for weights that are not quantized


def main(arguments: list[str] | None = None) -> int:
    """Prune, write, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder of transformers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    options = parser.parse_args(arguments)
    blocks = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).model.layers[:options.blocks]
    rows = [row(blocks, asked, bits) for bits in (None, 4) for asked in ASKED]
    result = {"command": " ".join(["python -m benchmarks.pruning.bytes_on_disk", *sys.argv[1:]]),
              "machine": machine("cpu"), "rows": rows}
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def row(blocks: nn.Module, asked: dict[str, Any] | None, bits: int | None) -> dict[str, Any]:
    """Prune a copy of the blocks, perhaps quantize it, and write it in each form."""
    model = copy.deepcopy(blocks)
    if asked is not None:
        one_shot(model, None, method="magnitude", ignore=(), **asked)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.ndim == 2}
    count = sum(weight.numel() for weight in weights.values())
    file = save(weights)
    found = {"pattern": "dense" if asked is None else str(next(iter(asked.values()))), "bits": bits, "weights": count,
             "safetensors": len(file), "gzip": len(gzip.compress(file, 6))}
    if bits is not None:
        quantize(model, None, WeightQuantizer(bits, 64, torch.bfloat16), method="rtn", ignore=())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.archive"
        report = write_archive(path, model, LEVELS)
        back = read_archive(path)
    kept = all(not back[name][weight == 0].any() for name, weight in weights.items())
    return {**found, "archive": report.bytes, "bound": bound(back, weights, asked, bits), "zeros_kept": kept}


def bound(back: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], asked: dict[str, Any] | None,
          bits: int | None) -> int:
    """Bytes of positions and values at their entropy, with bf16 scales of quantized groups; names and codebooks apart.

    Positions are those of the pruned weights. A weight that is kept may still be rounded to zero.
    """
    total = 0.0
    for name, weight in weights.items():
        kept = (weight != 0).numpy()
        share, values = kept.mean(), back[name].float().numpy()
        if asked is not None and "pattern" in asked:
            n, m = map(int, asked["pattern"].split(":"))
            total += kept.size * math.log2(math.comb(m, n)) / m
        elif 0 < share < 1:
            total -= kept.size * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
        total += kept.sum() * _entropy(_codes(values, bits)[kept.reshape(-1)]) + (
            16 * kept.size / 64 if bits is not None else 0)
    return math.ceil(total / 8)


def _codes(values: numpy.ndarray, bits: int | None) -> numpy.ndarray:
    """Values, or the whole numbers behind those of quantized groups, up to the sign of their scale."""
    if bits is None:
        return values.reshape(-1)
    groups = values.reshape(-1, 64)
    largest = numpy.abs(groups).max(1, keepdims=True)
    return numpy.round(groups / numpy.where(largest == 0, 1, largest) * 2 ** (bits - 1)).reshape(-1)


def _entropy(values: numpy.ndarray) -> float:
    counts = numpy.unique(values, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * numpy.log2(shares)).sum())


def table(rows: list[dict[str, Any]]) -> str:
    """Bits a weight, as Markdown."""
    lines = ["| zeros | values | safetensors | gzip -6 | archive | bound | archive / bound |",
             "|---|---|---:|---:|---:|---:|---:|"]
    for one in rows:
        per = {key: 8 * one[key] / one["weights"] for key in ("safetensors", "gzip", "archive", "bound")}
        values = f"{one['bits']}-bit integers" if one["bits"] else "32 shared values"
        lines.append(f"| {one['pattern']} | {values} | " + " | ".join(
            f"{per[key]:.2f}" for key in per) + f" | {per['archive'] / per['bound']:.3f} |")
    return "\n".join(lines) + "\n\nIn bits a weight; the safetensors file, and so what gzip makes of it, is bf16."


if __name__ == "__main__":
    raise SystemExit(main())
