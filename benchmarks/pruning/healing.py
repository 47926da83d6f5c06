"""A student cut out of its teacher beside the same shape from random weights, and beside some of the teacher's layers.

    python -m benchmarks.pruning.healing DATA_FOLDER [--seeds 3] [--json FILE] [--folder FOLDER]

Data, models and recipe are those of `benchmarks.distillation.students`. A teacher is trained once. Then for each seed
students of one shape learn from it by forward KL alone, on the same tokens: cut out of the teacher by activations
(`student.prune`), from random weights for as many steps, for twice and for four times as many; and, beside them, whole
layers of the teacher (`student.from_teacher`), whose bytes are others. `untrained` is a student before its first step.
Reports mean and standard deviation over seeds, whichever way they fall. With `--folder` runs are kept, and a command
that was interrupted goes on when it is given again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

import limbeck
from benchmarks.distillation import students
from benchmarks.distillation.students import ALONE, TEACHER, spread
from benchmarks.quickstart import machine, show
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_lines

# By size of the models: what is left of the teacher, and its layers that are taken whole.
CUTS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "small": ({"width": 96, "mlp": 256, "layers": 3}, [0, 2, 5]),
    "tiny": ({"width": 64, "mlp": 160, "layers": 2}, [0, 3])}
WAYS = {"cut": "cut out of the teacher", "layers": "layers of the teacher", "random": "random weights",
        "random, 2x": "random weights, twice the tokens", "random, 4x": "random weights, four times the tokens"}


def main(arguments: list[str] | None = None) -> int:
    """Train teacher and students, print the table, and write what was found."""
    chosen = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as room:
        rows = train_all(chosen, chosen.folder or Path(room))
    settings = {name: value for name, value in vars(chosen).items() if name not in ("data", "folder", "json", "taught")}
    found = {"settings": settings, "machine": machine(), "rows": rows, "summary": summary(rows)}
    show(table(found), found, chosen.json)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line: that of `benchmarks.distillation.students`."""
    made = students.parser()
    made.description = __doc__
    return made


def train_all(chosen: argparse.Namespace, room: Path) -> list[dict]:
    """The teacher's row, and one for each seed and way."""
    room.mkdir(parents=True, exist_ok=True)
    rows = [trained(TEACHER, 0, chosen, room)]
    for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
        rows += [trained(way, seed, chosen, room) for way in WAYS]
    return rows


def trained(way: str, seed: int, chosen: argparse.Namespace, room: Path) -> dict:
    """Train one model by its experiment; its figures after the last step, and before the first where it was cut."""
    name = f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    file = room / f"{name}.yaml"
    values = experiment(way, seed, chosen, room)
    values |= {"name": name, "run": values["run"] | {"folder": str(room / name)}}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    folder = RunFolder(limbeck.run(limbeck.read_experiment(file)))
    held_out = [line["held_out"] for line in read_lines(folder.metrics) if "held_out" in line]
    cut = folder.cut / "prune.json"
    receipt = json.loads(folder.receipt.read_text())
    print(f"{way}, seed {seed}: {held_out[-1]['bits_per_byte']:.4f} bits per byte", flush=True)
    return {"way": way, "seed": seed, "bits_per_byte": held_out[-1]["bits_per_byte"],
            "untrained": json.loads(cut.read_text())["held_out"]["bits_per_byte"] if cut.exists() else None,
            "parameters": receipt["parameters"], "bytes_on_disk": receipt["bytes_on_disk"],
            "steps": values["training"]["steps"]}


def experiment(way: str, seed: int, chosen: argparse.Namespace, room: Path) -> dict[str, Any]:
    """What a person would write into a file for this model."""
    if way == TEACHER:
        return students.experiment(TEACHER, seed, chosen, room)
    teacher, (cut, layers) = str(RunFolder(room / f"{TEACHER}-0").student), CUTS[chosen.size]
    values = students.experiment("kl_alone", seed, chosen, room) | {
        "teacher": {"path": teacher}, "objective": ALONE}
    steps = chosen.steps * {"random, 2x": 2, "random, 4x": 4}.get(way, 1)
    values["training"] = values["training"] | {"steps": steps, "evaluate_every": steps, "checkpoint_every": steps}
    values["student"] = {"cut": {"from_teacher": "all", "prune": cut}, "layers": {"from_teacher": layers}}.get(
        way) or {"architecture": shape_of(room, seed)}
    return values


def shape_of(room: Path, seed: int) -> dict[str, Any]:
    """The dimensions of the student that was cut."""
    config = AutoConfig.from_pretrained(room / f"cut-{seed}" / "cut")
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings")
    return {key: getattr(config, key) for key in keys}


def summary(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation over seeds, for each way."""
    found = []
    for way in dict.fromkeys(one["way"] for one in rows):
        own = [one for one in rows if one["way"] == way]
        untrained = [one["untrained"] for one in own if one["untrained"] is not None]
        found.append({"way": way, "seeds": len(own), "bits_per_byte": spread([one["bits_per_byte"] for one in own]),
                      "untrained": spread(untrained) if untrained else None,
                      **{name: own[0][name] for name in ("parameters", "bytes_on_disk", "steps")}})
    return found


def table(found: dict) -> str:
    """The summary as a Markdown table."""
    lines = ["| the student starts as | steps | parameters | held-out bits per byte (sd) | before any step |",
             "|---|---:|---:|---:|---:|"]
    for one in found["summary"]:
        value = one["bits_per_byte"]
        spread_ = f" ({value['sd']:.4f})" if one["seeds"] > 1 else ""
        before = "" if one["untrained"] is None else f"{one['untrained']['mean']:.4f}"
        lines.append(f"| {WAYS.get(one['way'], 'the teacher')} | {one['steps']:,} | {one['parameters']:,} | "
                     f"{value['mean']:.4f}{spread_} | {before} |")
    lines.append(f"\n{found['settings']['seeds']} seeds; a step has {found['settings']['batch']} sequences of "
                 f"{found['settings']['length']} tokens.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
