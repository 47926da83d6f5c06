"""Students of one teacher beside the same student without it: what each way to learn from a teacher is worth.

    python -m benchmarks.distillation.students DATA_FOLDER [--seeds 3] [--json FILE] [--folder FOLDER]

DATA_FOLDER holds `gsm8k_train.jsonl` and `gsm8k_test.jsonl`, with `question` and `answer` in each line. A teacher and
its tokenizer are trained once. Then for each seed the same small Llama learns the answers on the same tokens: without a
teacher, and in each of the ways of `TAUGHT`. All figures are of the answers of test questions. Unless its recipe says
otherwise, a student that is taught has the cross-entropy with weight 0.3 and the divergence with 0.7, at temperature 1,
in whatever form the teacher's targets are. `equal compute` is the student without a teacher for as many more steps as
the teacher's forward passes would pay for, at 6 operations for a weight of the student and token, and 2 for one of the
teacher (Kaplan et al. 2020). Reports mean and standard deviation over seeds, whichever way they fall; `saved` is what a
student is ahead of the one without a teacher that has the same seed. With `--folder` runs are kept, and a command that
was interrupted goes on when it is given again; `seconds` are then of the last one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import limbeck
from benchmarks.quickstart import machine, show
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_lines

CONTROL, TEACHER, LONGER = "no teacher", "teacher", "equal compute"
FIGURES = ("bits_per_byte", "cross_entropy")
LLAMA = {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True}
LARGE = LLAMA | {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
SMALL = LLAMA | {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
# Teacher, student, and the fields of the data. Tiny ones learn answers alone, and rank recipes in a tenth of the time.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "small": (LARGE, SMALL, {"prompt": "question", "response": "answer"}),
    "tiny": (LLAMA | {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
             LLAMA | {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
             {"text": "answer"})}
KL = {"cross_entropy": 0.3, "divergence": {"name": "forward_kl", "weight": 0.7, "temperature": 1.0}}
RAW = {"weight": 0.1, "loss": "mse", "layers": "uniform", "scale": "none", "projections": "random"}
ALONE = {"cross_entropy": 0.0, "divergence": {"name": "forward_kl", "weight": 1.0, "temperature": 1.0}}
JSD = ALONE | {"divergence": {"name": "jsd", "weight": 1.0, "temperature": 1.0, "normalized": True, "share": 0.1}}
START = {"features": {"weight": [[0, 3.0], [0.5, 0.0]]}}
# What a student minimizes, and where its teacher's targets come from.
TAUGHT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "forward_kl": (KL, {"source": "live"}),
    "jsd": (KL | {"divergence": KL["divergence"] | {"name": "jsd", "normalized": False}}, {"source": "live"}),
    "jsd_default": (KL | {"divergence": KL["divergence"] | {"name": "jsd", "normalized": True}}, {"source": "live"}),
    "features": (KL | {"features": RAW}, {"source": "live"}),
    "kl_alone": (ALONE, {"source": "live"}),
    "jsd_normalized": (JSD, {"source": "live"}),
    "kl_features_start": (ALONE | START, {"source": "live"}),
    "jsd_features_start": (JSD | START, {"source": "live"}),
    "hidden": (KL, {"source": "hidden"}),
    "samples": (KL, {"source": "samples", "draws": 50}),
    "top_k": (KL, {"source": "top_k", "k": 64}),
}
TITLES = {TEACHER: "the teacher", CONTROL: "no teacher", LONGER: "no teacher, steps of equal compute",
          "forward_kl": "forward KL", "jsd": "JSD as it is",
          "jsd_default": "JSD, normalized", "features": "forward KL and raw features",
          "kl_alone": "forward KL alone", "jsd_normalized": "normalized JSD alone, share 0.1",
          "kl_features_start": "forward KL alone, features at the start",
          "jsd_features_start": "normalized JSD alone, features at the start",
          "hidden": "forward KL, cached hidden states", "samples": "forward KL, cached samples",
          "top_k": "forward KL, cached top k"}


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
    made.add_argument("data", type=Path, metavar="DATA_FOLDER")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--taught", nargs="+", choices=list(TAUGHT), default=list(TAUGHT))
    made.add_argument("--size", choices=list(SIZES), default="small", help="of the models")
    made.add_argument("--teacher-steps", type=int, default=800)
    made.add_argument("--steps", type=int, default=300, help="of a student")
    made.add_argument("--documents", type=int, default=3000, help="that students learn from; the teacher has all")
    made.add_argument("--vocabulary", type=int, default=2048)
    made.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    made.add_argument("--batch", type=int, default=8, help="sequences of a step")
    made.add_argument("--held-out", type=int, default=128, help="rows of held-out answers")
    made.add_argument("--threads", type=int, help="of a run; by default one for each core")
    made.add_argument("--folder", type=Path, help="where runs are kept; by default they are removed")
    made.add_argument("--json", type=Path)
    return made


# ---- runs

def train_all(chosen: argparse.Namespace, room: Path) -> list[dict]:
    """The teacher's row, and one for each seed and student."""
    room.mkdir(parents=True, exist_ok=True)
    # A run of its own, as `teacher: {train: ...}` makes it: seeds of the students share it, and it has figures.
    rows = [trained(TEACHER, 0, chosen, room)]
    for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
        rows += [trained(student, seed, chosen, room) for student in (CONTROL, LONGER, *chosen.taught)]
    return rows


def trained(student: str, seed: int, chosen: argparse.Namespace, room: Path) -> dict:
    """Train one model by its experiment; its figures on held-out answers after the last step."""
    name = f"{student.replace(' ', '-')}-{seed}"
    file = room / f"{name}.yaml"
    file.write_text(yaml.safe_dump(experiment(student, seed, chosen, room) | {"name": name}, sort_keys=False))
    started = time.perf_counter()
    folder = RunFolder(limbeck.run(limbeck.read_experiment(file)))
    seconds = time.perf_counter() - started
    lines = read_lines(folder.metrics)
    held_out = next(line["held_out"] for line in reversed(lines) if "held_out" in line)
    size = json.loads(folder.receipt.read_text())["bytes_on_disk"]
    print(f"{TITLES[student]}, seed {seed}: {held_out['bits_per_byte']:.4f} bits per byte", flush=True)
    return {"student": student, "seed": seed, **{figure: held_out[figure] for figure in FIGURES},
            "bytes_on_disk": size, "seconds": seconds,
            "seconds_per_step": statistics.median(line["seconds"] for line in lines if "loss" in line)}


def experiment(student: str, seed: int, chosen: argparse.Namespace, room: Path) -> dict[str, Any]:
    """What a person would write into a file for this model."""
    is_teacher, teacher = student == TEACHER, str(RunFolder(folder_of(TEACHER, 0, room)).student)
    steps = chosen.teacher_steps if is_teacher else (
        round(chosen.steps * compute_ratio(chosen)) if student == LONGER else chosen.steps)
    shape = {"vocab_size": chosen.vocabulary, "max_position_embeddings": chosen.length}
    large, small, fields = SIZES[chosen.size]
    data = {"path": str(chosen.data / "gsm8k_train.jsonl"), **fields, "sequence_length": chosen.length,
            "validation": {"path": str(chosen.data / "gsm8k_test.jsonl"), "rows": chosen.held_out}}
    alone = {"tokenizer": {"train_vocabulary": chosen.vocabulary}}
    teacher_targets = {"tokenizer": {"path": teacher}, "max_documents": chosen.documents}
    return {
        "seed": seed, "student": {"architecture": (large if is_teacher else small) | shape},
        "data": data | (alone if is_teacher else teacher_targets), **learning(student, teacher),
        "optimizer": {"lr": 3e-3 if is_teacher else 4e-3}, "schedule": {"final": 0.05},
        "training": {"steps": steps, "batch_size": chosen.batch, "micro_batch": chosen.batch, "evaluate_every": steps,
                     "checkpoint_every": steps},
        "report": {"control": False, "prompt": "There are", "sample_tokens": 8},
        "run": {"folder": str(folder_of(student, seed, room)), "cache": str(room / "cache"), "log_every": 100,
                "threads": chosen.threads}}


def folder_of(student: str, seed: int, room: Path) -> Path:
    """Where a run is."""
    return room / f"{student.replace(' ', '-')}-{seed}"


def learning(student: str, teacher: str) -> dict[str, Any]:
    """The teacher, and what its student minimizes; nothing for a model that has no teacher."""
    if student not in TAUGHT:
        return {}
    objective, targets = TAUGHT[student]
    return {"teacher": {"path": teacher, "targets": targets}, "objective": objective}


def compute_ratio(chosen: argparse.Namespace) -> float:
    """Operations of a step with a live teacher, over those of one without."""
    with torch.device("meta"):
        large, small = (sum(weight.numel() for weight in AutoModelForCausalLM.from_config(AutoConfig.for_model(
            **shape, vocab_size=chosen.vocabulary)).parameters()) for shape in SIZES[chosen.size][:2])
    return 1 + 2 * large / (6 * small)


# ---- what was found

def summary(rows: list[dict]) -> dict[str, dict]:
    """Of each student: mean and standard deviation over seeds of its figures, and of its lead over the control."""
    control = {row["seed"]: row["bits_per_byte"] for row in rows if row["student"] == CONTROL}
    found = {}
    for student in dict.fromkeys(row["student"] for row in rows):
        own = [row for row in rows if row["student"] == student]
        found[student] = {figure: spread([row[figure] for row in own]) for figure in FIGURES}
        found[student]["seconds_per_step"] = statistics.median(row["seconds_per_step"] for row in own)
        if student in (LONGER, *TAUGHT):
            found[student]["saved"] = spread([control[row["seed"]] - row["bits_per_byte"] for row in own])
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation; of a single value the latter is 0."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def table(found: dict) -> str:
    """The summary as a Markdown table."""
    lines = ["| what the student learns from | held-out bits per byte (sd) | cross-entropy, nats per token (sd) | "
             "bits per byte saved, seed by seed (sd) |", "|---|---:|---:|---:|"]
    for student, figures in found["summary"].items():
        shown = [f"{figures[figure]['mean']:.4f} ({figures[figure]['sd']:.4f})" for figure in FIGURES]
        saved = figures.get("saved")
        shown.append(f"{saved['mean']:+.4f} ({saved['sd']:.4f})" if saved else "")
        lines.append(f"| {TITLES[student]} | {' | '.join(shown)} |")
    size = {row["student"]: row["bytes_on_disk"] for row in found["rows"]}
    lines.append(f"\n{found['settings']['seeds']} seeds; {found['settings']['steps']} steps of a student that is "
                 f"{size[TEACHER] / size[CONTROL]:.1f} times smaller than its teacher.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
