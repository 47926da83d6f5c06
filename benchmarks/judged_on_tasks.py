"""A pretrained model and its half-depth student on GSM8K, judged here and by lm-evaluation-harness side by side.

    python -m benchmarks.judged_on_tasks --model FOLDER --data FOLDER [--steps N] [--limit N] [--json FILE]

`--model` is a folder with SmolLM2-135M, or another causal language model; `--data` one with `gsm8k_train.jsonl` and
`gsm8k_test.jsonl`, with `question` and `answer` in each line. A student of every other layer of the model learns the
answers to training questions from it. Then both are judged on test questions:

- held-out loss: bits per byte of the answers after their questions, as the run measures it of its held-out rows;
- `texts`: bits per byte of whole answers;
- `numbers`: the right final number against three wrong ones, made from it: ten more, twice as much, and one less;
- `answers`: the last number of a generated answer equals that of the right one.

The harness judges the same loaded models on the same records through task files that are written here. Needs the extra
`eval`. `largest_gap` is the largest difference between a figure of ours and of the harness.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

import limbeck
from benchmarks.quickstart import machine, show
from trainer.evaluate.extraction import extracted
from trainer.experiment.evaluate_nodes import Task
from trainer.run.folder import RunFolder

PROMPT = "Question: {question}\nAnswer:"
METRICS = {"texts": {"bits_per_byte": "bits_per_byte"},
           "numbers": {"accuracy": "acc", "accuracy_per_character": "acc_norm"},
           "answers": {"exact_match": "exact_match.last-number"}}
HARNESS = {
    "texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{answer}}",
              "metric_list": [{"metric": "bits_per_byte"}]},
    "numbers": {"output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_choice": "choices", "doc_to_target": "right",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "answers": {"output_type": "generate_until", "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_target": "{{right}}", "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [","]}],
                "filter_list": [{"name": "last-number", "filter": [
                    {"function": "regex", "regex_pattern": r"(\d[\d,]*)", "group_select": -1},
                    {"function": "take_first"}]}]},
}


def main(arguments: list[str] | None = None) -> int:
    """Train the student, judge both models, print the table, and write what was found."""
    chosen = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as room:
        folder = chosen.folder or Path(room)
        folder.mkdir(parents=True, exist_ok=True)
        rows = judged(chosen, folder)
    settings = {name: value for name, value in vars(chosen).items() if name not in ("data", "model", "folder", "json")}
    found = {"settings": settings, "model": chosen.model.name, "machine": machine(), **rows}
    show(table(found), found, chosen.json)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--steps", type=int, default=12, help="of the student")
    made.add_argument("--length", type=int, default=192, help="tokens of a sequence")
    made.add_argument("--limit", type=int, default=24, help="records of `texts` and `numbers`")
    made.add_argument("--answers", type=int, default=8, help="generated answers")
    made.add_argument("--new-tokens", type=int, default=64, help="of a generated answer")
    made.add_argument("--folder", type=Path, help="where the run is kept; by default it is removed")
    made.add_argument("--json", type=Path)
    return made


def judged(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the experiment; returns what both models reached."""
    records = write_records(chosen, folder)
    layers = list(range(0, AutoConfig.from_pretrained(chosen.model).num_hidden_layers, 2))
    values = {
        "name": "half", "teacher": {"path": str(chosen.model)}, "student": {"from_teacher": layers},
        "data": {"path": str(chosen.data / "gsm8k_train.jsonl"), "prompt": "question", "response": "answer",
                 "sequence_length": chosen.length, "max_documents": 512,
                 "validation": {"path": str(chosen.data / "gsm8k_test.jsonl"), "rows": 8}},
        "optimizer": {"lr": 3e-4}, "report": {"control": False, "sample_tokens": 1},
        "training": {"steps": chosen.steps, "batch_size": 4, "micro_batch": 4, "evaluate_every": chosen.steps},
        "evaluate": {"tasks": tasks(chosen, records, write_harness(records, folder / "harness", chosen.new_tokens))},
        "run": {"folder": str(folder / "run"), "cache": str(folder / "cache")},
    }
    file = folder / "half.yaml"
    file.write_text(yaml.safe_dump(values))
    run = RunFolder(limbeck.run(limbeck.read_experiment(file)))
    held_out, at_end = (json.loads(path.read_text()) for path in (run.comparison, run.evaluation))
    rows = [{"model": model, "layers": layers_of, "task": task, "metric": metric,
             **at_end["models"][model][task][metric],
             "harness": at_end["models"][model][f"harness-{task}"][theirs]["value"],
             "records": at_end["tasks"][task]["records"],
             "from_the_teacher": at_end["differences"].get(model, {}).get(task, {}).get(metric)}
            for model, layers_of in (("teacher", 2 * len(layers)), ("student", len(layers)))
            for task, metrics in METRICS.items() for metric, theirs in metrics.items()]
    return {"rows": rows, "held_out": {model: held_out[model]["bits_per_byte"] for model in ("teacher", "student")},
            "largest_gap": max(abs(row["value"] - row["harness"]) for row in rows), "seconds": at_end["seconds"]}


def tasks(chosen: argparse.Namespace, records: Path, harness: Path) -> list[dict[str, Any]]:
    """The tasks of both, on the same records."""
    path, most = str(records), {"texts": chosen.limit, "numbers": chosen.limit, "answers": chosen.answers}
    own = [{"name": "texts", "kind": "perplexity", "path": path, "text": "answer"},
           {"name": "numbers", "kind": "multiple_choice", "path": path, "prompt": PROMPT, "answer": "right"},
           {"name": "answers", "kind": "exact_match", "path": path, "prompt": PROMPT, "answer": "right",
            "extract": "last_number", "max_new_tokens": chosen.new_tokens}]
    theirs = [{"name": f"harness-{name}", "kind": "harness", "path": str(harness), "trust_remote_code": True}
              for name in most]
    return [{**task, "limit": most[task["name"].removeprefix("harness-")]} for task in [*own, *theirs]]


def write_records(chosen: argparse.Namespace, folder: Path) -> Path:
    """The first test questions, each with its right number among three wrong ones."""
    count = Task(name="count", kind="exact_match", path="-", extract="last_number")
    lines = (chosen.data / "gsm8k_test.jsonl").read_text().splitlines()[:max(chosen.limit, chosen.answers)]
    file = folder / "records.jsonl"
    with file.open("w") as handle:
        for number, line in enumerate(lines):
            record = json.loads(line)
            right = extracted(count, record["answer"])
            choices = wrong_numbers(right)
            choices.insert(number % 4, right)
            handle.write(json.dumps({**record, "right": right, "choices": choices}) + "\n")
    return file


def wrong_numbers(right: str) -> list[str]:
    """Three numbers beside the right one: ten more, twice as much, one less; one that is there already is raised."""
    found: list[str] = []
    value = Decimal(right)
    for wrong in (value + 10, 2 * value, value - 1):
        while format(wrong.normalize(), "f") in (right, *found):
            wrong += 3
        found.append(format(wrong.normalize(), "f"))
    return found


def write_harness(records: Path, folder: Path, new_tokens: int) -> Path:
    """The same tasks as task files of lm-evaluation-harness."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, settings in HARNESS.items():
        more = {"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": new_tokens}} if name == "answers" else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({
            "task": f"harness-{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(records)}},
            "test_split": "test", **settings, **more}, sort_keys=False))
    return folder


def table(found: dict) -> str:
    """What both models reached, beside the harness's figures."""
    lines = ["| GSM8K | records | teacher | harness | half-depth student | harness | less the teacher's |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    rows = {(row["model"], row["task"], row["metric"]): row for row in found["rows"]}
    words = {"texts": "answers read", "numbers": "right number of four", "answers": "answer written"}
    for task, metrics in METRICS.items():
        for metric in metrics:
            teacher, student = (rows[model, task, metric] for model in ("teacher", "student"))
            apart = student["from_the_teacher"]
            lines.append(
                f"| {words[task]}: {metric.replace('_', ' ')} | {teacher['records']} | {_interval(teacher)} | "
                f"{teacher['harness']:.4f} | {_interval(student)} | {student['harness']:.4f} | "
                f"{_interval(apart, '+.3f')} |")
    held = found["held_out"]
    lines += ["", f"Held-out answers after their questions: {held['teacher']:.4f} bits per byte of the teacher, "
              f"{held['student']:.4f} of the student after {found['settings']['steps']} steps. Of all figures, the "
              f"largest difference from the harness's is {found['largest_gap']:.2g}."]
    return "\n".join(lines)


def _interval(row: dict, form: str = ".3f") -> str:
    return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


if __name__ == "__main__":
    raise SystemExit(main())
