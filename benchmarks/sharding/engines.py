"""The same 20 steps under every engine on two ranks: losses against one process, and bytes of each rank.

    python -m benchmarks.sharding.engines --json FILE [--steps 20] [--precision fp32]

A small Llama learns the interpreter's own library at one global batch: one process, DDP, FSDP2, ZeRO 1, 2 and 3, each
with AdamW, LAMB and Adafactor; and, by the same engines, the peers' Adafactor (torch) and LAMB (pytorch_optimizer),
whose losses are compared with their own on one process. `loss_difference` is the largest relative one over the steps,
`weight_difference` that of any weight in the end, over the largest. `foretold` is what a dry run says, `measured` the
highest peak of the ranks in the third step; `before` the same of what is there before a step; `state` is a rank's
weights, gradients and optimizer state by the ledger. Documents are short, so that each row holds several and needs a
mask, as plans take for granted; rows of one document take a little less.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import yaml
from safetensors.torch import load_file

from benchmarks.rematerialization.frontier import machine
from benchmarks.sharding.launching import launched
from trainer.distributed.topology import Topology
from trainer.experiment.load import read_experiment
from trainer.models.configs import student_config
from trainer.planning.plan import Plans

LLAMA = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 256,
         "tie_word_embeddings": False}
ENGINES = {"ddp": ["sharding.engine=ddp"], "fsdp2": ["sharding.engine=fsdp2"],
           **{f"zero {stage}": ["sharding.engine=zero", f"sharding.stage={stage}"] for stage in (1, 2, 3)}}
PIECE = 150  # characters of a document
OURS = {"adamw": [], "lamb": ["optimizer.name=lamb", "optimizer.lr=2e-2"],
        "adafactor": ["optimizer.name=adafactor", "optimizer.lr=3e-2"]}
PEERS = {"torch Adafactor": "torch.optim.Adafactor", "pytorch_optimizer Lamb": "pytorch_optimizer.Lamb"}


def documents(folder: Path) -> Path:
    """Short pieces of the interpreter's library, one a line."""
    file = folder / "pieces.jsonl"
    if not file.exists():
        sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
        texts = [source.read_text(encoding="utf-8", errors="replace") for source in sources]
        pieces = [text[start:start + PIECE] for text in texts for start in range(0, min(len(text), 40 * PIECE), PIECE)]
        file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces if piece.strip()))
    return file


def experiment(folder: Path, name: str, steps: int) -> Path:
    """The experiment that all runs share, in a run folder of its own."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({
        "name": name, "student": {"architecture": LLAMA},
        "data": {"path": str(documents(folder)), "sequence_length": 128, "tokenizer": {"train_vocabulary": 2048}},
        "training": {"steps": steps, "batch_size": 4, "micro_batch": 2, "evaluate_every": 1000,
                     "checkpoint_every": 1000}, "schedule": {"warmup": 5},
        "run": {"folder": str(folder / name), "cache": str(folder / "cache"), "threads": 1}}, sort_keys=False))
    return file


def listed(folder: Path, engines: dict[str, list[str]], options: argparse.Namespace) -> list[dict]:
    """All runs under some engines."""
    runs = []
    for engine, how in engines.items():
        for optimizer in (*OURS, *PEERS):
            name = f"{engine}-{optimizer}".replace(" ", "-")
            runs.append({"name": name, "engine": engine, "optimizer": optimizer, "peer": PEERS.get(optimizer),
                         "file": str(experiment(folder, name, options.steps)),
                         "overrides": [*how, *OURS.get(optimizer, []), f"precision.dtype={options.precision}"]})
    return runs


def carried_out(runs: list[dict], folder: Path, processes: int) -> None:
    """Train them one after another, in one process or two, through the launcher."""
    file = folder / f"runs-{processes}.json"
    file.write_text(json.dumps(runs))
    launched(Path(__file__).with_name("sharded_runs.py"), file, processes=processes, check=True)


def row(run: dict, folder: Path, alone: str) -> dict:
    """What came of a run, beside one process alone with the same optimizer."""
    found, one = (json.loads((folder / f"{name}.json").read_text()) for name in (run["name"], alone))
    shown = {"engine": run["engine"], "optimizer": run["optimizer"], "ours": run["peer"] is None}
    if "error" in found:
        return {**shown, "error": found["error"]}
    shown |= {"last_loss": found["loss"][-1], "last_loss_alone": one["loss"][-1], "loss_difference": max(
        abs(a - b) / abs(b) for a, b in zip(found["loss"], one["loss"], strict=True))}
    if run["peer"] is None:
        weights, whole = (load_file(folder / f"{name}.safetensors") for name in (run["name"], alone))
        largest = max(float(tensor.abs().max()) for tensor in whole.values())
        shown["weight_difference"] = max(float((weights[name].flatten() - whole[name].flatten()).abs().max())
                                         for name in whole) / largest
        peaks, base = found["memory"][0]["peaks"], found["memory"][0]["base"]
        peak, before, state = foretold(run)
        shown |= {"measured_bytes": max(peaks), "foretold_bytes": peak, "measured_before_bytes": base,
                  "foretold_before_bytes": before, "state_bytes": state}
    return shown


def foretold(run: dict) -> tuple[int, int, int]:
    """What a dry run says of each of two ranks: the peak, what is there before a step, and model state."""
    asked = read_experiment(run["file"], run["overrides"]).experiment
    config = student_config(asked.student, None, None)
    plan = Plans().resolve(asked, Topology(data_parallel=2), None, config)
    return plan.memory.peak, plan.step.base, plan.ledger.model_state


def table(rows: list[dict]) -> str:
    """Rows as Markdown: ours with bytes, then what peers' optimizers do in the same engines."""
    lines = ["| engine, 2 ranks | optimizer | loss against one process | weights | peak, measured MB | foretold MB | "
             "ratio | before a step, ratio | model state, of DDP's |", "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    whole = {one["optimizer"]: one["state_bytes"] for one in rows if one["engine"] == "ddp" and one["ours"]}
    for one in rows:
        if one["ours"]:
            lines.append(
                f"| {one['engine']} | {one['optimizer']} | {one['loss_difference']:.1e} | "
                f"{one['weight_difference']:.1e} | {one['measured_bytes'] / 1e6:.2f} | "
                f"{one['foretold_bytes'] / 1e6:.2f} | {one['foretold_bytes'] / one['measured_bytes']:.4f} | "
                f"{one['foretold_before_bytes'] / one['measured_before_bytes']:.4f} | "
                f"{one['state_bytes'] / whole[one['optimizer']]:.1%} |")
    for one in rows:
        if not one["ours"]:
            said = (f"does not run: {one['error']}" if "error" in one else f"{one['loss_difference']:.1e} (last loss "
                    f"{one['last_loss']:.3f}, alone {one['last_loss_alone']:.3f})")
            lines.append(f"| {one['engine']} | {one['optimizer']} | {said} | | | | | | |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        single, pairs = listed(folder, {"none": ["sharding.engine=none"]}, options), listed(folder, ENGINES, options)
        carried_out(single, folder, 1)
        carried_out(pairs, folder, 2)
        rows = [row(run, folder, f"none-{run['optimizer']}".replace(" ", "-")) for run in pairs]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine("cpu"), "precision": options.precision,
                                            "steps": options.steps, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
