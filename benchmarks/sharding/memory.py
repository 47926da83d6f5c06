"""Bytes of a training step on two ranks, foretold and measured, in both precisions, on the shapes of real models.

    python -m benchmarks.sharding.memory --json FILE [--models ...] [--engines ...] [--batches ...]

The widths and vocabularies are those of published models, whose head weighs more against a block than in models made
for tests; of their blocks there are a few, since those are alike. AdamW, three steps of two rows of 256 tokens, one on
each rank; `accumulated` is the same of four rows in two micro-batches. `foretold` is what a dry run says, `measured`
the highest peak of the ranks in the third step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import yaml

from benchmarks.rematerialization.frontier import machine
from benchmarks.sharding.engines import ENGINES, carried_out, documents, foretold

MODELS = {
    "SmolLM2-135M, 4 of 30 blocks": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048,
        "tie_word_embeddings": True},
    "Pythia-70M, 2 of 6 blocks": {
        "model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2,
        "num_attention_heads": 8, "vocab_size": 50304, "max_position_embeddings": 2048, "tie_word_embeddings": False},
}
ROWS = {"one": 2, "accumulated": 4}  # of a batch, by what its micro-batches are


def listed(folder: Path, options: argparse.Namespace) -> list[dict]:
    """All runs."""
    runs = []
    for model in options.models:
        for engine in options.engines:
            for precision in ("fp32", "bf16"):
                for what in options.batches:
                    name = f"run-{len(runs)}"
                    file = folder / f"{name}.yaml"
                    file.write_text(yaml.safe_dump({
                        "name": name, "student": {"architecture": MODELS[model]},
                        "data": {"path": str(documents(folder)), "sequence_length": 256,
                                 "tokenizer": {"train_vocabulary": 2048}},
                        "training": {"steps": 3, "batch_size": ROWS[what], "micro_batch": 1, "evaluate_every": 1000,
                                     "checkpoint_every": 1000},
                        "run": {"folder": str(folder / name), "cache": str(folder / "cache"), "threads": 1},
                    }, sort_keys=False))
                    runs.append({"name": name, "file": str(file), "model": model, "engine": engine, "what": what,
                                 "precision": precision,
                                 "overrides": [*ENGINES[engine], f"precision.dtype={precision}"]})
    return runs


def row(run: dict, folder: Path) -> dict:
    """What came of a run."""
    (memory,) = json.loads((folder / f"{run['name']}.json").read_text())["memory"]
    peak, before, _ = foretold(run)
    return {**{key: run[key] for key in ("model", "engine", "precision", "what")}, "measured_bytes": max(
        memory["peaks"]), "foretold_bytes": peak, "measured_before_bytes": memory["base"],
        "foretold_before_bytes": before}


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    lines = ["| model | engine, 2 ranks | precision | micro-batches | peak, measured MB | foretold MB | ratio |",
             "|---|---|---|---|---:|---:|---:|"]
    lines += [f"| {one['model']} | {one['engine']} | {one['precision']} | {one['what']} | "
              f"{one['measured_bytes'] / 1e6:.2f} | {one['foretold_bytes'] / 1e6:.2f} | "
              f"{one['foretold_bytes'] / one['measured_bytes']:.4f} |" for one in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--batches", nargs="+", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = listed(folder, options)
        carried_out(runs, folder, 2)
        rows = [row(run, folder) for run in runs]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
