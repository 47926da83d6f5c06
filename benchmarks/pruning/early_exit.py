"""What early exits save: blocks computed against accuracy, beside the same model without exits and shallower ones.

    python -m benchmarks.pruning.early_exit [TASK] [--data FOLDER] [--seeds 3] [--steps N] [--json FILE]
                                            [--folder FOLDER]

TASK is `digits` (scikit-learn's handwritten digits, a vision transformer of 6 blocks) or `banking77` (77 intents of a
bank's customers, a BERT of 6 blocks; FOLDER holds `banking77_train.jsonl` and `banking77_test.jsonl`). For each seed
four models learn the same rows for as many steps: one with exits after some of its blocks, the same one without, and
two that have as many blocks as lie before an exit. Accuracy is that of the receipts, of files that a fresh process has
reloaded; the curve is that of `exits.json`. Means and standard deviations over seeds, whichever way they fall.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml

import limbeck
from benchmarks.quickstart import machine, show
from benchmarks.tasks.classification import digits
from trainer.run.folder import RunFolder

BLOCKS, LAYERS = 6, (1, 3)
SHAPES: dict[str, dict[str, Any]] = {
    "digits": {"model_type": "vit", "patch_size": 2, "hidden_size": 48, "num_attention_heads": 4,
               "intermediate_size": 96},
    "banking77": {"model_type": "bert", "max_position_embeddings": 64, "hidden_size": 64, "num_attention_heads": 4,
                  "intermediate_size": 128}}
STEPS = {"digits": 800, "banking77": 1500}
EXITS = {"layers": list(LAYERS), "weight": 1.0, "threshold": 0.9}
SHOWN = (0.0, 0.5, 0.7, 0.9, 0.95, 0.98, 1.0, 2.0)  # thresholds in the table
WAYS = {"with exits": BLOCKS, "without exits": BLOCKS, **{f"{layer + 1} blocks": layer + 1 for layer in LAYERS}}


def main(arguments: list[str] | None = None) -> int:
    """Train all models, print the tables, and write what was found."""
    chosen = parser().parse_args(arguments)
    chosen.steps = chosen.steps or STEPS[chosen.task]
    with tempfile.TemporaryDirectory() as room:
        rows = train_all(chosen, chosen.folder or Path(room))
    settings = {name: value for name, value in vars(chosen).items() if name not in ("data", "folder", "json")}
    found = {"settings": settings, "machine": machine(), "rows": rows, "summary": summary(rows)}
    show(table(found), found, chosen.json)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("task", choices=list(SHAPES), metavar="TASK", nargs="?", default="digits",
                      help=", ".join(SHAPES) + "; digits if left out")
    made.add_argument("--data", type=Path, default=Path("."), help="folder of banking77's files")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--steps", type=int, help="of a training")
    made.add_argument("--folder", type=Path, help="where runs are kept; by default they are removed")
    made.add_argument("--json", type=Path)
    return made


def train_all(chosen: argparse.Namespace, room: Path) -> list[dict]:
    """A row for each seed and model."""
    room.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(chosen.seeds):
        for way, blocks in WAYS.items():
            values = experiment(chosen, room, seed, way, blocks)
            file = room / f"{values['name']}.yaml"
            file.write_text(yaml.safe_dump(values, sort_keys=False))
            folder = RunFolder(limbeck.run(limbeck.read_experiment(file)))
            rows.append(row(folder, way, seed))
            print(f"{way}, seed {seed}: {rows[-1]['accuracy']:.2%}", flush=True)
    return rows


def experiment(chosen: argparse.Namespace, room: Path, seed: int, way: str, blocks: int) -> dict[str, Any]:
    """One training."""
    name = f"{chosen.task}-{way.replace(' ', '-')}-{seed}"
    return {"name": name, "seed": seed, "data": data_of(chosen, room), "optimizer": {"lr": 2e-3},
            "student": {"architecture": SHAPES[chosen.task] | {"num_hidden_layers": blocks}},
            **({"objective": {"early_exits": EXITS}} if way == "with exits" else {}),
            "training": {"steps": chosen.steps, "batch_size": 64, "micro_batch": 64, "evaluate_every": chosen.steps,
                         "checkpoint_every": chosen.steps, "keep_checkpoints": 1},
            "report": {"control": False},
            "run": {"folder": str(room / name), "cache": str(room / "cache"), "log_every": 500, "threads": 1}}


def data_of(chosen: argparse.Namespace, room: Path) -> dict[str, Any]:
    """The rows of a task."""
    if chosen.task == "digits":
        digits(room)
        return {"task": "image_classification", "path": str(room / "digits_train.npz"),
                "validation": {"path": str(room / "digits_test.npz"), "rows": 1000},
                "images": {"size": 8, "channels": 1}}
    return {"task": "sequence_classification", "path": str(chosen.data / "banking77_train.jsonl"),
            "validation": {"path": str(chosen.data / "banking77_test.jsonl"), "rows": 4000}, "sequence_length": 32,
            "tokenizer": {"train_vocabulary": 3000}}


def row(folder: RunFolder, way: str, seed: int) -> dict:
    """The figures of one model; its curve if it has exits."""
    exits = folder.student_for("early-exit")
    found = {"way": way, "seed": seed, "accuracy": json.loads(folder.receipt.read_text())["accuracy"]}
    if not exits.exists():
        return found
    receipt = json.loads((exits / "receipt.json").read_text())
    return {**found, "accuracy_at_threshold": receipt["accuracy"], "notes": receipt["notes"],
            "curve": json.loads((exits / "exits.json").read_text())["curve"]}


# ---- what was found

def summary(rows: list[dict]) -> dict[str, Any]:
    """Means and standard deviations over seeds: of each way to train, and of each threshold."""
    ways = {way: _over([one["accuracy"] for one in rows if one["way"] == way]) for way in WAYS}
    curves = [one["curve"] for one in rows if "curve" in one]
    curve = [{"threshold": same[0]["threshold"], **{name: _over([one[name] for one in same])
                                                    for name in ("blocks", "flops", "accuracy")}}
             for same in zip(*curves, strict=True)]
    return {"ways": ways, "curve": curve}


def _over(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0}


def table(found: dict) -> str:
    """The tables of a result."""
    seeds, task = found["settings"]["seeds"], found["settings"]["task"]
    layers = " and ".join(map(str, LAYERS))
    lines = [f"| {task}, exits after blocks {layers} of {BLOCKS} | blocks computed | arithmetic | accuracy |",
             "|---|---:|---:|---:|"]
    for one in (each for each in found["summary"]["curve"] if each["threshold"] in SHOWN):
        name = "nothing leaves" if one["threshold"] > 1 else f"threshold {one['threshold']:g}"
        lines.append(f"| {name} | {_shown(one['blocks'], 1)} | {one['flops']['mean']:.1%} | "
                     f"{_shown(one['accuracy'])} |")
    for way, blocks in list(WAYS.items())[1:]:
        words = "the same model, trained without exits" if blocks == BLOCKS else f"a model of {blocks} blocks"
        lines.append(f"| {words} | {blocks / BLOCKS:.1%} | | {_shown(found['summary']['ways'][way])} |")
    steps = found["settings"]["steps"]
    return "\n".join([*lines, f"\n± is the standard deviation over {seeds} seeds; {steps:,} steps."])


def _shown(one: dict[str, float], digits_: int = 2) -> str:
    return f"{one['mean']:.{digits_}%} ± {one['spread']:.{digits_}%}"


if __name__ == "__main__":
    raise SystemExit(main())
