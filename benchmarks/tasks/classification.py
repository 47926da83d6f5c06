"""Classifiers a fraction of their teacher's size, with and without it, in full precision, 8 and 4 bits.

    python -m benchmarks.tasks.classification TASK [--data FOLDER] [--seeds 3] [--json FILE] [--folder FOLDER]

TASK is `banking77` (77 intents of a bank's customers: FOLDER holds `banking77_train.jsonl` and `banking77_test.jsonl`,
with `text` and `label` in each line), `digits-vit` or `digits-resnet` (scikit-learn's handwritten digits). A teacher is
trained once. Then for each seed and size a student learns the same rows from the same first weights, with the teacher
and alone. For texts these are the teacher's and five rewritings of each, in which words are left out or exchanged: the
teacher says what it makes of them, and the student that learns alone has the label of the original. Both students are
rounded to 8 bits without another training, and trained for some more steps in 4 bits, the taught one with its teacher.
Each is exported for transformers and ONNX Runtime; accuracy is that of the receipts, of files that a fresh process has
reloaded, on all test rows. Reports mean and standard deviation over seeds, whichever way they fall; the teacher has one
seed. With `--folder` runs are kept, and a command that was interrupted goes on when it is given again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import limbeck
from benchmarks.quickstart import machine, show
from trainer.run.folder import RunFolder

BERT = {"model_type": "bert", "max_position_embeddings": 64}
TINY = BERT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # no room to memorize anything
VIT = {"model_type": "vit", "patch_size": 2}
RESNET = {"model_type": "resnet", "layer_type": "basic", "downsample_in_first_stage": False}
# Dimensions by task: of the teacher, and of students of about a quarter, a tenth and a 25th of its bytes.
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "banking77": {
        "teacher": BERT | {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6,
                           "intermediate_size": 384},
        "1/4": BERT | {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192},
        "1/10": TINY | {"hidden_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 88},
        "1/25": TINY | {"hidden_size": 22, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 44}},
    "digits-vit": {
        "teacher": VIT | {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
                          "intermediate_size": 192},
        "1/4": VIT | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
        "1/10": VIT | {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80},
        "1/25": VIT | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}},
    "digits-resnet": {
        "teacher": RESNET | {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2]},
        "1/4": RESNET | {"embedding_size": 16, "hidden_sizes": [16, 48, 80], "depths": [1, 1, 1]},
        "1/10": RESNET | {"embedding_size": 16, "hidden_sizes": [16, 32, 48], "depths": [1, 1, 1]},
        "1/25": RESNET | {"embedding_size": 8, "hidden_sizes": [8, 20, 32], "depths": [1, 1, 1]}}}
REWRITINGS = 5
SIZES = ("1/4", "1/10", "1/25")
BITS = {"fp32": None, "8 bits": {"method": "rtn", "bits": 8}, "4 bits": {"method": "qat", "bits": 4}}
RUNTIMES = {"transformers": "student", "onnx": "student-onnx"}


def main(arguments: list[str] | None = None) -> int:
    """Train teacher and students, print the table, and write what was found."""
    chosen = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as room:
        rows = train_all(chosen, chosen.folder or Path(room))
    settings = {name: value for name, value in vars(chosen).items() if name not in ("data", "folder", "json")}
    found = {"settings": settings, "machine": machine(), "rows": rows, "summary": summary(rows)}
    show(table(found), found, chosen.json)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("task", choices=list(SHAPES), metavar="TASK", help=", ".join(SHAPES))
    made.add_argument("--data", type=Path, default=Path("."), help="folder of banking77's files")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    made.add_argument("--teacher-steps", type=int, default=1500)
    made.add_argument("--steps", type=int, default=5000, help="of a student")
    made.add_argument("--lr", type=float, default=3e-3, help="of a student; a quarter of it in 4 bits")
    made.add_argument("--more-steps", type=int, default=200, help="of a student in 4 bits")
    made.add_argument("--batch", type=int, default=64, help="rows of a step")
    made.add_argument("--threads", type=int, help="of a run; by default one for each core")
    made.add_argument("--folder", type=Path, help="where runs are kept; by default they are removed")
    made.add_argument("--json", type=Path)
    return made


# ---- runs

def train_all(chosen: argparse.Namespace, room: Path) -> list[dict]:
    """The teacher's row, and one for each seed, size, way to learn and number format."""
    room.mkdir(parents=True, exist_ok=True)
    rows = [row("teacher", "teacher", "fp32", 0, run(chosen, room, "teacher", alone(chosen, room)))]
    for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
        for size in chosen.sizes:
            for way in ("taught", "alone"):
                name = f"{size.replace('/', '-')}-{way}-{seed}"
                origin = run(chosen, room, name, student(chosen, room, seed, size, way))
                for numbers, quantization in BITS.items():
                    folder = origin if quantization is None else run(
                        chosen, room, f"{name}-{numbers[0]}-bits",
                        again(chosen, room, seed, way, origin, quantization))
                    rows.append(row(size, way, numbers, seed, folder))
                    print(f"{size} {way} {numbers}, seed {seed}: {rows[-1]['accuracy']['transformers']:.2%}, "
                          f"{rows[-1]['bytes_on_disk']:,} bytes", flush=True)
    return rows


def run(chosen: argparse.Namespace, room: Path, name: str, values: dict[str, Any]) -> RunFolder:
    """Carry out one experiment, unless that is done."""
    file = room / f"{name}.yaml"
    values = {"name": name, **values, "run": {"folder": str(room / name), "cache": str(room / "cache"),
                                              "log_every": 500, "threads": chosen.threads}}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return RunFolder(limbeck.run(limbeck.read_experiment(file)))


def row(size: str, way: str, numbers: str, seed: int, folder: RunFolder) -> dict:
    """The figures of one exported student."""
    found = {name: json.loads(file.read_text()) for name, place in RUNTIMES.items()
             if (file := folder.path / place / "receipt.json").exists()}
    return {"size": size, "way": way, "numbers": numbers, "seed": seed,
            "bytes_on_disk": found["transformers"]["bytes_on_disk"],
            "accuracy": {name: one["accuracy"] for name, one in found.items()},
            "macro_f1": found["transformers"]["macro_f1"],
            "calibration_error": found["transformers"]["calibration_error"], "rows": found["transformers"]["rows"]}


def alone(chosen: argparse.Namespace, room: Path) -> dict[str, Any]:
    """The teacher's own training."""
    return {"student": {"architecture": SHAPES[chosen.task]["teacher"]},
            **settings_of(chosen, room, {"train_vocabulary": 3000}),
            "training": training(chosen, chosen.teacher_steps), "report": {"control": False}}


def student(chosen: argparse.Namespace, room: Path, seed: int, size: str, way: str) -> dict[str, Any]:
    """A student with its teacher, or alone."""
    return {"seed": seed, "student": {"architecture": SHAPES[chosen.task][size]}, **settings_of(chosen, room),
            "optimizer": {"lr": chosen.lr}, **(by_teacher(room) if way == "taught" else {}),
            "training": training(chosen, chosen.steps), "report": {"control": False}, "export": {"to": ["onnx"]}}


def again(chosen: argparse.Namespace, room: Path, seed: int, way: str, origin: RunFolder,
          quantization: dict[str, Any]) -> dict[str, Any]:
    """A trained student in fewer bits: rounded as it is, or trained on in them."""
    steps = 0 if quantization["method"] == "rtn" else chosen.more_steps
    values = settings_of(chosen, room)
    values["optimizer"] = {"lr": chosen.lr / 4}
    teacher = by_teacher(room) if way == "taught" and steps else {}
    return {"seed": seed, "student": {"from_run": str(origin.path), "quantization": quantization | of_task(chosen)},
            **values, **teacher, "training": training(chosen, steps), "report": {"control": False},
            "export": {"to": ["onnx"]}}


def of_task(chosen: argparse.Namespace) -> dict[str, Any]:
    """What of a student is quantized: embeddings, too, which are most of a small classifier of texts."""
    return {"embeddings": True, "ignore": []} if chosen.task == "banking77" else {"ignore": []}


def by_teacher(room: Path) -> dict[str, Any]:
    """The teacher, whose scores are written once, and what its student minimizes."""
    return {"teacher": {"path": str(RunFolder(room / "teacher").student), "targets": {"source": "logits"}},
            "objective": {"cross_entropy": 0.0, "divergence": {"weight": 1.0, "temperature": 2.0}}}


def settings_of(chosen: argparse.Namespace, room: Path, tokenizer: dict[str, Any] | None = None) -> dict[str, Any]:
    """Data and learning rate; texts with a tokenizer of their own, or else with the teacher's."""
    if chosen.task == "banking77":
        given = chosen.data / "banking77_train.jsonl"
        return {"optimizer": {"lr": 1e-3}, "data": {
            "task": "sequence_classification", "path": str(given if tokenizer else rewritten(given, room)),
            "validation": {"path": str(chosen.data / "banking77_test.jsonl"), "rows": 4000}, "sequence_length": 32,
            "tokenizer": tokenizer or {"path": str(RunFolder(room / "teacher").student)}}}
    digits(room)
    return {"optimizer": {"lr": 2e-3}, "data": {
        "task": "image_classification", "path": str(room / "digits_train.npz"),
        "validation": {"path": str(room / "digits_test.npz"), "rows": 1000}, "images": {"size": 8, "channels": 1}}}


def rewritten(given: Path, room: Path) -> Path:
    """A file with the texts and five rewritings of each: one word of eight left out, one exchanged for any other."""
    file, generator = room / "rewritten.jsonl", random.Random(0)
    if file.exists():
        return file
    rows = [json.loads(line) for line in given.read_text().splitlines()]
    words = [word for row in rows for word in row["text"].split()]
    lines = list(rows)
    for row in rows * REWRITINGS:
        kept = [(word, generator.random()) for word in row["text"].split()]
        text = [generator.choice(words) if drawn < 1 / 4 else word for word, drawn in kept if drawn > 1 / 8]
        lines.append({"text": " ".join(text) or row["text"], "label": row["label"]})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def digits(room: Path) -> None:
    """scikit-learn's digits as two archives, a fifth of them to test on."""
    from sklearn.datasets import load_digits

    known, order = load_digits(), np.random.default_rng(0).permutation(1797)
    for name, part in (("train", order[:1437]), ("test", order[1437:])):
        if not (room / f"digits_{name}.npz").exists():
            np.savez(room / f"digits_{name}.npz", images=(known.images[part] / 16).astype(np.float32),
                     labels=known.target[part])


def training(chosen: argparse.Namespace, steps: int) -> dict[str, Any]:
    """The length of a training."""
    return {"steps": steps, "batch_size": chosen.batch, "micro_batch": chosen.batch, "evaluate_every": max(1, steps),
            "checkpoint_every": max(1, steps), "keep_checkpoints": 1}


# ---- what was found

def summary(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation over seeds, for each size, way to learn and number format."""
    found = []
    for key in dict.fromkeys((one["size"], one["way"], one["numbers"]) for one in rows):
        own = [one for one in rows if (one["size"], one["way"], one["numbers"]) == key]
        accuracies = {name: [one["accuracy"][name] for one in own if name in one["accuracy"]] for name in RUNTIMES}
        found.append({
            "size": key[0], "way": key[1], "numbers": key[2], "seeds": len(own),
            "bytes_on_disk": max(one["bytes_on_disk"] for one in own),
            "accuracy": {name: statistics.mean(values) for name, values in accuracies.items() if values},
            "spread": statistics.stdev(accuracies["transformers"]) if len(own) > 1 else 0.0,
            "unequal": sum(abs(one["accuracy"]["transformers"] - one["accuracy"]["onnx"]) > 1e-9 for one in own
                           if "onnx" in one["accuracy"]),
            "calibration_error": statistics.mean(one["calibration_error"] for one in own)})
    return found


def table(found: dict) -> str:
    """The table of a result."""
    every = found["summary"]
    teacher = next(one for one in every if one["size"] == "teacher")
    lines = [f"| {found['settings']['task']} | learned | numbers | bytes | smaller | accuracy | beside the teacher "
             "| ONNX Runtime | calibration error |", "|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for one in every:
        accuracy, onnx = one["accuracy"]["transformers"], one["accuracy"].get("onnx")
        spread = f" ± {one['spread']:.2%}" if one["seeds"] > 1 else ""
        lines.append(
            f"| {one['size']} | {'' if one is teacher else one['way']} | {one['numbers']} | {one['bytes_on_disk']:,} | "
            f"x{teacher['bytes_on_disk'] / one['bytes_on_disk']:.1f} | {accuracy:.2%}{spread} | "
            f"{100 * (accuracy - teacher['accuracy']['transformers']):+.2f} | "
            f"{'' if onnx is None else f'{onnx:.2%}'} | {one['calibration_error']:.2%} |")
    unequal, seeds = sum(one["unequal"] for one in every), max(one["seeds"] for one in every)
    said = "" if seeds == 1 else f"; ± is the standard deviation over {seeds} seeds, rows without it have one"
    lines.append(f"\nAccuracies of {'all files are equal' if not unequal else f'{unequal} files differ'} in both "
                 f"runtimes{said}.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
