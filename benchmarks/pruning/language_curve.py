"""A language model made small in stages on GSM8K, beside the usual way: whole layers of it, and 4 bits.

    python -m benchmarks.pruning.language_curve --model FOLDER --data FOLDER [--seeds 1] [--json FILE] [--folder FOLDER]

`--model` is a folder with SmolLM2-135M, or another causal language model; `--data` one with `gsm8k_train.jsonl` and
`gsm8k_test.jsonl`, with `question` and `answer` in each line. For each size of `CUTS` two experiments with `stages`
learn the same answers for as many steps from the model: one cuts channels, width and layers out of it by activations
(`student.prune`), the other keeps whole layers, spread evenly (`student.from_teacher`), of about as many bytes. Both
are then rounded to 4 bits by GPTQ, embeddings included. Each stage's held-out loss is that of the exported files on
answers to test questions; `numbers` is the right final number against three wrong ones, of the last student. Bytes are
those of the weight files beside the model's in fp32. Reported whichever way they fall; few steps, as a CPU affords.
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
from benchmarks.judged_on_tasks import PROMPT, write_records
from benchmarks.quickstart import machine, show
from trainer.stages.stage_record import StagesFolder

# By name: what is left of the model when it is cut, and the share of its layers that is kept whole beside it.
CUTS: dict[str, tuple[dict[str, Any], float]] = {
    "2/3": ({"layers": 0.8, "mlp": 0.75, "multiple_of": 64}, 0.63),
    "1/2": ({"layers": 0.6, "mlp": 0.6, "multiple_of": 64}, 0.4),
    "1/4": ({"layers": 0.5, "mlp": 0.5, "width": 0.5, "multiple_of": 64}, 0.07)}
STARTS = {"cut": "cut", "layers": "whole layers"}


def main(arguments: list[str] | None = None) -> int:
    """Run all experiments, print the table, and write what was found."""
    chosen = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as room:
        rows = run_all(chosen, chosen.folder or Path(room))
    settings = {name: value for name, value in vars(chosen).items() if name not in ("data", "model", "folder", "json")}
    found = {"settings": settings, "model": chosen.model.name, "machine": machine(), "rows": rows}
    show(table(found), found, chosen.json)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--sizes", nargs="+", choices=list(CUTS), default=list(CUTS))
    made.add_argument("--steps", type=int, default=40, help="of healing")
    made.add_argument("--lr", type=float, default=6e-4)
    made.add_argument("--batch", type=int, default=4, help="sequences of a step")
    made.add_argument("--length", type=int, default=192, help="tokens of a sequence")
    made.add_argument("--held-out", type=int, default=16, help="rows of held-out answers")
    made.add_argument("--limit", type=int, default=48, help="records of the multiple choice")
    made.add_argument("--calibration", type=int, default=24, help="rows for scores and GPTQ")
    made.add_argument("--threads", type=int, help="of a run; by default one for each core")
    made.add_argument("--folder", type=Path, help="where runs are kept; by default they are removed")
    made.add_argument("--json", type=Path)
    return made


def run_all(chosen: argparse.Namespace, room: Path) -> list[dict]:
    """A row for the model, and one for each seed, size, start and stage."""
    room.mkdir(parents=True, exist_ok=True)
    records = write_records(argparse.Namespace(data=chosen.data, limit=chosen.limit, answers=1), room)
    rows: list[dict] = []
    for seed in range(chosen.seeds):
        for size in chosen.sizes:
            for start in STARTS:
                rows += one(chosen, room, records, seed, size, start)
    teacher = next(row for row in rows if row["stage"] == "teacher")
    return [teacher, *(row for row in rows if row["stage"] != "teacher")]


def one(chosen: argparse.Namespace, room: Path, records: Path, seed: int, size: str, start: str) -> list[dict]:
    """Run one experiment in stages, and read what each has made."""
    name = f"{size.replace('/', '-')}-{start}-{seed}"
    file, folder = room / f"{name}.yaml", room / name
    file.write_text(yaml.safe_dump({"name": name, **experiment(chosen, records, seed, size, start), "run": {
        "folder": str(folder), "cache": str(room / "cache"), "log_every": 10, "threads": chosen.threads}},
        sort_keys=False))
    limbeck.run(limbeck.read_experiment(file))
    record, judged = StagesFolder(folder).read(), json.loads((folder / "3-export" / "evaluation.json").read_text())
    common = {"size": size, "start": start, "seed": seed}
    rows = [{**common, "stage": "teacher", "bytes_on_disk": record["teacher"]["bytes_on_disk"],
             "bits_per_byte": record["teacher"]["bits_per_byte"],
             "numbers": judged["models"]["teacher"]["numbers"]["accuracy"]["value"]}]
    for stage, (made,) in ((stage["kind"], stage["made"]) for stage in record["stages"][:2]):
        if made["cut"] is not None:
            rows.append({**common, "stage": "cut", "bytes_on_disk": made["cut"]["bytes_on_disk"],
                         "bits_per_byte": made["cut"]["bits_per_byte"]})
        rows.append({**common, "stage": "quantized" if stage == "quantize" else "healed",
                     "bytes_on_disk": made["student"]["bytes_on_disk"],
                     "bits_per_byte": made["student"]["figures"]["bits_per_byte"]})
    rows[-1]["numbers"] = judged["models"]["student"]["numbers"]["accuracy"]["value"]
    print(f"{name}: " + ", ".join(f"{row['stage']} {row['bits_per_byte']:.4f}" for row in rows), flush=True)
    return rows


def experiment(chosen: argparse.Namespace, records: Path, seed: int, size: str, start: str) -> dict[str, Any]:
    """What a person would write: the model, and the stages by which it becomes small."""
    cut, share = CUTS[size]
    layers = AutoConfig.from_pretrained(chosen.model).num_hidden_layers
    count = max(2, round(share * layers))
    whole = sorted({round(number * (layers - 1) / (count - 1)) for number in range(count)})
    quantization = {"method": "gptq", "bits": 4, "group_size": 32, "embeddings": True, "ignore": [],
                    "calibration_rows": chosen.calibration}
    training = {"steps": chosen.steps, "batch_size": chosen.batch, "micro_batch": chosen.batch,
                "evaluate_every": chosen.steps, "checkpoint_every": chosen.steps, "keep_checkpoints": 1}
    first = {"prune": {"student.prune": {**cut, "calibration_rows": chosen.calibration}, "training": training}} \
        if start == "cut" else {"distill": {}}
    return {
        "seed": seed, "teacher": {"path": str(chosen.model)},
        "student": {"from_teacher": "all" if start == "cut" else whole},
        "data": {"path": str(chosen.data / "gsm8k_train.jsonl"), "prompt": "question", "response": "answer",
                 "sequence_length": chosen.length, "max_documents": 2000,
                 "validation": {"path": str(chosen.data / "gsm8k_test.jsonl"), "rows": chosen.held_out}},
        "objective": {"cross_entropy": 0.3, "divergence": {"weight": 0.7, "temperature": 1.0}},
        "optimizer": {"lr": chosen.lr}, "training": training, "report": {"sample_tokens": 1},
        "stages": [first, {"quantize": {"student.quantization": quantization}},
                   {"export": {"evaluate.tasks": [{
                       "name": "numbers", "kind": "multiple_choice", "path": str(records), "prompt": PROMPT,
                       "answer": "right", "limit": chosen.limit}]}}]}


def table(found: dict) -> str:
    """The curve as a table, by size, start and stage; mean over seeds."""
    teacher, *rest = found["rows"]
    lines = ["| GSM8K | start | bytes | smaller | bits per byte of answers | right number of four |",
             "|---|---|---:|---:|---:|---:|",
             f"| {found['model']}, fp32 | | {teacher['bytes_on_disk']:,} | x1.0 | {teacher['bits_per_byte']:.4f} | "
             f"{teacher['numbers']:.1%} |"]
    for size, start, stage in dict.fromkeys((row["size"], row["start"], row["stage"]) for row in rest):
        own = [row for row in rest if (row["size"], row["start"], row["stage"]) == (size, start, stage)]
        value = statistics.mean(row["bits_per_byte"] for row in own)
        numbers = f"{statistics.mean(row['numbers'] for row in own):.1%}" if "numbers" in own[0] else ""
        lines.append(f"| {size}, {stage} | {STARTS[start]} | {own[0]['bytes_on_disk']:,} | "
                     f"x{teacher['bytes_on_disk'] / own[0]['bytes_on_disk']:.1f} | {value:.4f} | {numbers} |")
    settings = found["settings"]
    lines.append(f"\n{settings['steps']} steps of {settings['batch']} sequences of {settings['length']} tokens; "
                 f"{settings['seeds']} seed(s); {settings['limit']} records of the multiple choice.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
