"""Classifiers cut out of their teacher, healed and quantized in stages, from half to two hundredths of its bytes.

    python -m benchmarks.pruning.fiftieth TASK [--data FOLDER] [--seeds 3] [--json FILE] [--folder FOLDER]

TASK is `banking77`, `digits-vit` or `digits-resnet`, with the data and teachers of `benchmarks.tasks.classification`.
For each seed and size one experiment with `stages`: the teacher is cut to the size and healed by learning from itself
as it was (`prune`), trained on in few bits with the same teacher (`quantize`), and written for ONNX Runtime (`export`).
Bytes are those of the weight files beside the fp32 teacher's; accuracies those of the receipts, of files that a fresh
process has reloaded, on all test rows, after each stage. `cut` is the student before any healing. With `--beside`, the
same shape from random weights learns from the same teacher for as many steps, and is quantized in the same way.
Reports mean and standard deviation over seeds, whichever way they fall; the teacher has one seed. With `--folder` runs
are kept, and a command that was interrupted goes on when it is given again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

import limbeck
from benchmarks.quickstart import machine, show
from benchmarks.tasks.classification import RUNTIMES, alone, run, settings_of, training
from trainer.run.folder import RunFolder

# What is left of the teacher, and in how many bits.
CUTS: dict[str, dict[str, tuple[dict[str, Any], int]]] = {
    "banking77": {
        "1/2": ({"heads": 4, "width": 128, "mlp": 256}, 8),
        "1/4": ({"heads": 3, "width": 96, "mlp": 128, "layers": 2}, 4),
        "1/8": ({"heads": 2, "width": 64, "mlp": 32, "layers": 2}, 4),
        "1/15": ({"heads": 1, "width": 32, "mlp": 64, "layers": 2}, 4),
        "1/15, 2 bits": ({"heads": 1, "width": 32, "mlp": 64, "layers": 2}, 2)},
    "digits-vit": {
        "1/2": ({"heads": 3, "width": 72, "mlp": 128}, 8),
        "1/6": ({"heads": 2, "width": 48, "mlp": 96, "layers": 3}, 4),
        "1/13": ({"heads": 2, "width": 48, "mlp": 48, "layers": 2}, 4),
        "1/25": ({"heads": 1, "width": 24, "mlp": 48, "layers": 2}, 4)},
    "digits-resnet": {
        "1/2": ({"channels": 0.75}, 8), "1/4": ({"channels": 0.5}, 8), "1/14": ({"channels": 0.25}, 8),
        "1/28": ({"channels": 0.1875}, 8),
        "1/50": ({"channels": 0.125}, 8)}}
STAGES = {"1-prune": "healed", "2-quantize": "quantized", "3-export": "exported"}


def main(arguments: list[str] | None = None) -> int:
    """Train the teacher, run all stages, print the table, and write what was found."""
    chosen = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as room:
        rows = run_all(chosen, chosen.folder or Path(room))
    settings = {name: value for name, value in vars(chosen).items() if name not in ("data", "folder", "json")}
    found = {"settings": settings, "machine": machine(), "rows": rows, "summary": summary(rows)}
    show(table(found), found, chosen.json)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("task", choices=list(CUTS), metavar="TASK", help=", ".join(CUTS))
    made.add_argument("--data", type=Path, default=Path("."), help="folder of banking77's files")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--sizes", nargs="+", help="of the task; by default all")
    made.add_argument("--teacher-steps", type=int, default=1500)
    made.add_argument("--steps", type=int, default=3000, help="of healing")
    made.add_argument("--lr", type=float, default=3e-3, help="of healing; a quarter of it in few bits")
    made.add_argument("--more-steps", type=int, default=300, help="in few bits")
    made.add_argument("--batch", type=int, default=64, help="rows of a step")
    made.add_argument("--beside", action="store_true", help="the same shapes from random weights as well")
    made.add_argument("--threads", type=int, help="of a run; by default one for each core")
    made.add_argument("--folder", type=Path, help="where runs are kept; by default they are removed")
    made.add_argument("--json", type=Path)
    return made


# ---- runs

def run_all(chosen: argparse.Namespace, room: Path) -> list[dict]:
    """The teacher's row, and those of each stage for each seed and size."""
    room.mkdir(parents=True, exist_ok=True)
    teacher = run(chosen, room, "teacher", alone(chosen, room))
    rows = [row("teacher", "", "teacher", 0, teacher)]
    for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
        for size in chosen.sizes or CUTS[chosen.task]:
            rows += stages_of(chosen, room, seed, size, "cut")
            if chosen.beside:
                rows += stages_of(chosen, room, seed, size, "random")
    return rows


def stages_of(chosen: argparse.Namespace, room: Path, seed: int, size: str, start: str) -> list[dict]:
    """Run one experiment in stages, and read what each has made."""
    name = f"{size.replace('/', '-').replace(', ', '-').replace(' ', '-')}-{start}-{seed}"
    file, folder = room / f"{name}.yaml", room / name
    values = {"name": name, **experiment(chosen, room, seed, size, start), "run": {
        "folder": str(folder), "cache": str(room / "cache"), "log_every": 500, "threads": chosen.threads}}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    limbeck.run(limbeck.read_experiment(file))
    found = []
    for stage in sorted(one for one in folder.iterdir() if one.is_dir() and one.name[0].isdigit()):
        run_ = RunFolder(stage)
        if (record := run_.cut / "prune.json").exists():
            cut = json.loads(record.read_text())
            found.append({"size": size, "start": start, "stage": "cut", "seed": seed,
                          "bytes_on_disk": cut["bytes_on_disk"], "accuracy": {
                              "transformers": cut["held_out"]["accuracy"]}})
        kind = stage.name.partition("-")[2]
        if kind != "export":
            found.append(row(size, start, {"prune": "healed", "distill": "healed"}.get(kind, "quantized"), seed, run_))
    found[-1] |= {"accuracy": row(size, start, "quantized", seed, run_)["accuracy"]}
    print(f"{name}: " + ", ".join(f"{one['stage']} {one['accuracy']['transformers']:.2%} in "
                                  f"{one['bytes_on_disk']:,} bytes" for one in found), flush=True)
    return found


def experiment(chosen: argparse.Namespace, room: Path, seed: int, size: str, start: str) -> dict[str, Any]:
    """What a person would write: the teacher, and the stages by which it becomes small."""
    teacher, (cut, bits) = str(RunFolder(room / "teacher").student), CUTS[chosen.task][size]
    values = settings_of(chosen, room)
    values["data"] = {name: value for name, value in values["data"].items() if name != "tokenizer"}
    first: dict[str, Any] = {"prune": {"student.prune": cut, "training": training(chosen, chosen.steps)}}
    student: dict[str, Any] = {"from_teacher": "all"}
    if start == "random":
        first = {"distill": {"training": training(chosen, chosen.steps)}}
        student = {"architecture": shape_of(Path(teacher), room, size)}
        if chosen.task == "banking77":
            values["data"]["tokenizer"] = {"path": teacher}
    quantization = {"method": "qat", "bits": bits, "ignore": []} | (
        {"embeddings": True} if chosen.task == "banking77" else {})
    return {"seed": seed, **values, "teacher": {"path": teacher, "targets": {"source": "logits"}}, "student": student,
            "objective": {"cross_entropy": 0.0, "divergence": {"weight": 1.0, "temperature": 2.0}},
            "optimizer": {"lr": chosen.lr}, "training": training(chosen, chosen.steps), "stages": [
                first, {"quantize": {"student.quantization": quantization, "optimizer.lr": chosen.lr / 4,
                                     "training": training(chosen, chosen.more_steps)}},
                {"export": {"export.to": ["onnx"]}}]}


def shape_of(teacher: Path, room: Path, size: str) -> dict[str, Any]:
    """The dimensions of the cut student of the same size, as its configuration says them."""
    name = size.replace("/", "-").replace(", ", "-").replace(" ", "-")
    cut = next(room.glob(f"{name}-cut-*/1-prune/cut"))
    config, theirs = (AutoConfig.from_pretrained(one) for one in (cut, teacher))
    same = AutoConfig.for_model(config.model_type).to_dict()
    keys = {key for key, value in config.to_dict().items() if value != same.get(key) or value != getattr(
        theirs, key, None)} - {"architectures", "id2label", "label2id", "transformers_version", "dtype", "torch_dtype",
                               "problem_type", "_name_or_path", "num_labels"}
    return {"model_type": config.model_type, **{key: config.to_dict()[key] for key in sorted(keys)
                                                if key != "model_type"}}


def row(size: str, start: str, stage: str, seed: int, folder: RunFolder) -> dict:
    """The figures of one exported student."""
    found = {name: json.loads(file.read_text()) for name, place in RUNTIMES.items()
             if (file := folder.path / place / "receipt.json").exists()}
    return {"size": size, "start": start, "stage": stage, "seed": seed,
            "bytes_on_disk": found["transformers"]["bytes_on_disk"],
            "accuracy": {name: one["accuracy"] for name, one in found.items()}}


# ---- what was found

def summary(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation over seeds, for each size, start and stage."""
    found = []
    for key in dict.fromkeys((one["size"], one["start"], one["stage"]) for one in rows):
        own = [one for one in rows if (one["size"], one["start"], one["stage"]) == key]
        accuracies = [one["accuracy"]["transformers"] for one in own]
        found.append({
            "size": key[0], "start": key[1], "stage": key[2], "seeds": len(own),
            "bytes_on_disk": max(one["bytes_on_disk"] for one in own), "accuracy": statistics.mean(accuracies),
            "spread": statistics.stdev(accuracies) if len(own) > 1 else 0.0,
            "unequal": sum(abs(one["accuracy"]["transformers"] - one["accuracy"]["onnx"]) > 1e-9
                           for one in own if "onnx" in one["accuracy"]),
            "in_onnx": sum("onnx" in one["accuracy"] for one in own)})
    return found


def table(found: dict) -> str:
    """The curve of a task as a table, smallest last."""
    teacher, *rest = found["summary"]
    lines = [f"| {found['settings']['task']} | start | bytes | smaller | accuracy | beside the teacher |",
             "|---|---|---:|---:|---:|---:|",
             f"| teacher | | {teacher['bytes_on_disk']:,} | x1.0 | {teacher['accuracy']:.2%} | |"]
    for one in sorted(rest, key=lambda one: -one["bytes_on_disk"]):
        spread = f" ± {one['spread']:.2%}" if one["seeds"] > 1 else ""
        lines.append(
            f"| {one['size']}, {one['stage']} | {one['start']} | {one['bytes_on_disk']:,} | "
            f"x{teacher['bytes_on_disk'] / one['bytes_on_disk']:.1f} | {one['accuracy']:.2%}{spread} | "
            f"{100 * (one['accuracy'] - teacher['accuracy']):+.2f} |")
    files, unequal = sum(one["in_onnx"] for one in rest), sum(one["unequal"] for one in rest)
    lines.append(f"\nOf {files} students in ONNX Runtime {unequal} have another accuracy there than in transformers.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
