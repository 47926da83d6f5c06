"""Errors of single layers that are pruned once: ours beside llm-compressor's own function for SparseGPT.

    python -m benchmarks.pruning.layer_errors --model FOLDER --data DIR [--json FILE] [--blocks 4 25] [--rows 16]

Each side gets the same weights and the same X^T X of the dense model on calibration rows, and the same code measures
||X (W - W_0)^T||^2 / ||X W_0^T||^2 of both, there and on held-out rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.pruning.one_shot import PATTERNS, moments, split
from benchmarks.rematerialization.frontier import machine
from strategies.pruning.unstructured.layer_inputs import LayerInputs, output_error
from strategies.pruning.unstructured.sparsegpt import sparsegpt
from strategies.pruning.unstructured.sparsity_pattern import Pattern

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def main(arguments: list[str] | None = None) -> int:
    """Prune, measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder of transformers")
    parser.add_argument("--data", type=Path, required=True, help="a folder with tinyshakespeare.txt")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, nargs="*", default=[4, 25])
    parser.add_argument("--rows", type=int, default=16, help="calibration rows, and as many held-out ones")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--seed", type=int, default=0, help="picks the calibration rows")
    options = parser.parse_args(arguments)
    options.held_out = options.rows
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    seen = [moments(model, rows) for rows in split(options)]
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.pruning.layer_errors", *sys.argv[1:]]), "machine": machine("cpu"),
        "rows": options.rows, "tokens": options.tokens, "seed": options.seed,
        "peer": f"llm-compressor {version('llmcompressor')}", "layers": []}
    for name in (f"model.layers.{block}.{layer}" for block in options.blocks for layer in LAYERS):
        result["layers"] += of_layer(name, model.get_submodule(name).weight.detach(), *(one[name] for one in seen))
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


def of_layer(name: str, weight: torch.Tensor, moment: torch.Tensor, held_out: torch.Tensor) -> list[dict[str, Any]]:
    """The errors of both sides with each pattern."""
    found = []
    for pattern, asked in PATTERNS.items():
        sides = {"ours": sparsegpt(weight, LayerInputs.of(moment), Pattern.parse(**asked)),
                 "peer": by_peer(weight, moment, asked)}
        found.append({"layer": name, "pattern": pattern, **{side: {
            "calibration": output_error(pruned, weight, moment), "held_out": output_error(pruned, weight, held_out),
            "sparsity": float((pruned == 0).double().mean())} for side, pruned in sides.items()}})
    return found


def by_peer(weight: torch.Tensor, moment: torch.Tensor, asked: dict[str, Any]) -> torch.Tensor:
    """The weights that llm-compressor's SparseGPT makes, with its defaults; it takes the moment at any scale."""
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    n, m = map(int, asked.get("pattern", "0:0").split(":"))
    return sparsify_weight(layer, {layer: moment.clone() / len(moment)}, asked.get("sparsity", 0.5), n, m, 128, 0.01,
                           False)[1].detach()


def table(result: dict[str, Any]) -> str:
    """The errors as Markdown."""
    lines = ["| layer | pattern | error: ours | llm-compressor | held-out rows: ours | llm-compressor |",
             "|---|---|---:|---:|---:|---:|"]
    for row in result["layers"]:
        lines.append(f"| {row['layer'].removeprefix('model.')} | {row['pattern']} | " + " | ".join(
            f"{row[side][kind]:.4f}" for kind in ("calibration", "held_out") for side in ("ours", "peer")) + " |")
    rows = result["layers"]
    worse = sum(row["ours"][kind] > row["peer"][kind] for row in rows for kind in ("calibration", "held_out"))
    ratios = [row["ours"]["calibration"] / row["peer"]["calibration"] for row in rows]
    return "\n".join(lines) + (f"\n\nOf {2 * len(rows)} errors {worse} are larger than the peer's; on calibration rows "
                               f"they are {min(ratios):.2f} to {max(ratios):.2f} of them.")


if __name__ == "__main__":
    raise SystemExit(main())
