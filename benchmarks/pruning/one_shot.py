"""A language model pruned once, without training: ours beside llm-compressor's SparseGPT and Wanda.

    python -m benchmarks.pruning.one_shot --model FOLDER --data DIR [--json FILE] [--rows 8] [--tokens 512] [--seed 0]

Each contender prunes the same model on the same calibration rows of `tinyshakespeare.txt` in DIR, block by block. The
errors of layers are measured by the same code for each, ||X (W - W_0)^T||^2 / ||X W_0^T||^2, on the inputs X that the
dense model has on calibration rows and on held-out rows. Perplexity is that of held-out rows, of which nothing was
seen. llm-compressor takes part where it is installed. What a JSON has already is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rematerialization.frontier import machine
from strategies.pruning.unstructured.layer_inputs import output_error
from strategies.pruning.unstructured.prunable_layers import prunable
from strategies.pruning.unstructured.prune_once import one_shot

PATTERNS = {"2:4": {"pattern": "2:4"}, "70%": {"sparsity": 0.7}, "50%": {"sparsity": 0.5}}
BATCH = 4  # rows of a forward
CONTENDERS = ("sparsegpt", "llm-compressor sparsegpt", "wanda", "llm-compressor wanda", "magnitude")


def main(arguments: list[str] | None = None) -> int:
    """Prune, measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder of transformers")
    parser.add_argument("--data", type=Path, required=True, help="a folder with tinyshakespeare.txt")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=8, help="calibration rows")
    parser.add_argument("--held-out", type=int, default=16, help="rows that perplexity is measured on")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--seed", type=int, default=0, help="picks the calibration rows")
    parser.add_argument("--only", nargs="*", default=list(PATTERNS), choices=list(PATTERNS))
    options = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    calibration, held_out = split(options)
    result: dict[str, Any] = {
              "command": " ".join(["python -m benchmarks.pruning.one_shot", *sys.argv[1:]]), "machine": machine("cpu"),
              "seed": options.seed, "rows": options.rows, "tokens": options.tokens, "held_out": options.held_out,
              "peer": f"llm-compressor {version('llmcompressor')}" if has_peer() else None,
              "dense": perplexity(model, held_out), "results": []}
    result["results"] = done_before(options.json, result)
    dense = {"calibration": moments(model, calibration), "held_out": moments(model, held_out[:options.rows])}
    for contenders, pattern in itertools.product((CONTENDERS[:2], CONTENDERS[2:]), options.only):
        for contender in contenders:
            if contender.startswith("llm-compressor") and not has_peer() or any(
                    (row["contender"], row["pattern"]) == (contender, pattern) for row in result["results"]):
                continue
            result["results"].append(one(model, contender, pattern, calibration, held_out, dense))
            print(line(result["results"][-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))
    return 0


def done_before(file: Path | None, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The results that an earlier call left in the JSON, where it had the same rows and libraries."""
    before = json.loads(file.read_text()) if file is not None and file.exists() else {}
    same = all(before.get(key) == result[key] for key in ("machine", "seed", "rows", "tokens", "held_out", "peer"))
    return before["results"] if same and before else []


def split(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration rows from the first nine tenths of the text, held-out ones from the last tenth: (rows, tokens)."""
    text = (options.data / "tinyshakespeare.txt").read_text()
    ids = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text)["input_ids"])
    rows = ids[:len(ids) // options.tokens * options.tokens].view(-1, options.tokens)
    end = len(rows) * 9 // 10
    picked = torch.randperm(end, generator=torch.Generator().manual_seed(options.seed))[:options.rows]
    return rows[picked], rows[end:][:options.held_out]


def has_peer() -> bool:
    """Whether llm-compressor is installed."""
    return importlib.util.find_spec("llmcompressor") is not None


def one(model: nn.Module, contender: str, pattern: str, calibration: torch.Tensor, held_out: torch.Tensor,
        dense: dict[str, dict[str, torch.Tensor]]) -> dict:
    """Prune a copy of the model, and measure it."""
    pruned = copy.deepcopy(model)
    begun = time.perf_counter()
    if contender.startswith("llm-compressor"):
        by_peer(pruned, contender.split()[1], pattern, calibration)
    else:
        one_shot(pruned, batches(calibration), method=contender, **PATTERNS[pattern])
    seconds = time.perf_counter() - begun
    names = list(prunable(model))
    weights = {name: (pruned.get_submodule(name).weight, model.get_submodule(name).weight) for name in names}
    with torch.no_grad():
        errors = {kind: {name: output_error(*weights[name], seen[name]) for name in names}
                  for kind, seen in dense.items()}
        zeros = sum(int((weight == 0).sum()) for weight, _ in weights.values())
    return {"contender": contender, "pattern": pattern, "seconds": seconds,
            "sparsity": zeros / sum(weight.numel() for weight, _ in weights.values()),
            "perplexity": perplexity(pruned, held_out), "errors": errors}


def by_peer(model: nn.Module, method: str, pattern: str, calibration: torch.Tensor) -> None:
    """Prune with llm-compressor: its sequential pipeline, one block after the other, and its own defaults."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    asked = PATTERNS[pattern]
    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    recipe = kind(sparsity=asked.get("sparsity", 0.5), mask_structure=asked.get("pattern", "0:0"), targets=["Linear"],
                  ignore=["re:.*lm_head"])
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in calibration], batch_size=BATCH)
    oneshot(model=model, dataset=loader, recipe=recipe, pipeline="sequential",
            num_calibration_samples=len(calibration), max_seq_length=calibration.shape[1])


def batches(rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Keyword arguments of the model."""
    return [{"input_ids": part} for part in rows.split(BATCH)]


@torch.no_grad()
def moments(model: nn.Module, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """X^T X (inputs, inputs) of every layer that is pruned, with the model as it is."""
    found: dict[str, torch.Tensor] = {}

    def see(name: str) -> object:
        def hook(layer: nn.Module, args: tuple) -> None:
            values = args[0].flatten(0, -2)
            found[name] = values.T @ values + found.get(name, 0)
        return hook

    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in prunable(model).items()]
    for batch in batches(rows):
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def perplexity(model: nn.Module, rows: torch.Tensor) -> float:
    """exp of the mean cross-entropy of rows (rows, tokens)."""
    losses = [nn.functional.cross_entropy(model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1),
                                          batch["input_ids"][:, 1:].flatten(), reduction="sum")
              for batch in batches(rows)]
    return math.exp(float(torch.stack(losses).sum()) / rows[:, 1:].numel())


def layers_above(result: dict) -> Iterator[tuple[str, int, int]]:
    """(pattern, layers with a larger error on calibration rows than by llm-compressor's SparseGPT, layers)."""
    for pattern in PATTERNS:
        by = {row["contender"]: row["errors"]["calibration"] for row in result["results"] if row["pattern"] == pattern}
        if {"sparsegpt", "llm-compressor sparsegpt"} <= by.keys():
            ours, theirs = by["sparsegpt"], by["llm-compressor sparsegpt"]
            yield pattern, sum(ours[name] > theirs[name] for name in ours), len(ours)


def line(row: dict) -> str:
    """One row of the table."""
    means = " | ".join(f"{statistics.fmean(row['errors'][kind].values()):.4f}" for kind in ("calibration", "held_out"))
    return (f"| {row['pattern']} | {row['contender']} | {100 * row['sparsity']:.2f}% | {row['perplexity']:.2f} "
            f"| {means} | {row['seconds']:.0f} |")


def table(result: dict) -> str:
    """The results as Markdown."""
    lines = ["| pattern | method | zeros | perplexity | error, calibration rows | held-out rows | seconds |",
             "|---|---|---:|---:|---:|---:|---:|", *map(line, result["results"])]
    lines += [f"\n{pattern}: {above} of {count} layers have a larger error than llm-compressor's SparseGPT."
              for pattern, above, count in layers_above(result)]
    return "\n".join(lines) + f"\n\nPerplexity of the dense model: {result['dense']:.2f}."


if __name__ == "__main__":
    raise SystemExit(main())
