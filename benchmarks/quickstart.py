"""The quickstart's student with and without its teacher, over several seeds.

    python -m benchmarks.quickstart [--seeds 3] [--json FILE] [key=value ...]

Each seed has its own teacher, student and control (the same student on the same tokens without a teacher); the
held-out text and the tokenizer are the same for all. Reports mean and spread, whichever way it falls.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
MODELS = ("teacher", "student", "control")


def main() -> None:
    """Run every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        rows = [one_seed(seed, Path(room), arguments.config, arguments.overrides) for seed in range(arguments.seeds)]
    result = {"command": " ".join(["python -m benchmarks.quickstart", *sys.argv[1:]]), "machine": machine(),
              "rows": rows, "summary": summary(rows)}
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def one_seed(seed: int, room: Path, config: str, overrides: list[str]) -> dict:
    """A whole run with its own seed; returns bits per byte and bytes of each model."""
    folder = room / f"seed-{seed}"
    started = time.perf_counter()
    command = [sys.executable, "-m", "accelerate.commands.launch", "train.py", "--config", config, f"seed={seed}",
               f"run.folder={folder}", f"run.cache={room / 'cache'}", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds = time.perf_counter() - started
    found = json.loads((folder / "comparison.json").read_text())
    receipt = json.loads((folder / "student" / "receipt.json").read_text())
    print(f"seed {seed}: " + ", ".join(f"{name} {found[name]['bits_per_byte']:.4f}" for name in MODELS), flush=True)
    return {"seed": seed, "seconds": seconds, "largest_logit_difference": receipt["largest_difference"],
            **{f"{name}_{figure}": found[name][figure] for name in MODELS
               for figure in ("bits_per_byte", "bytes_on_disk")}}


def summary(rows: list[dict]) -> dict:
    """Mean and standard deviation over seeds, and of the difference of student and control seed by seed."""
    def spread(values: list[float]) -> dict:
        return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}

    result = {name: spread([row[f"{name}_bits_per_byte"] for row in rows]) for name in MODELS}
    result["control_minus_student"] = spread(
        [row["control_bits_per_byte"] - row["student_bits_per_byte"] for row in rows])
    result["times_smaller"] = rows[0]["teacher_bytes_on_disk"] / rows[0]["student_bytes_on_disk"]
    return result


def table(result: dict) -> str:
    """The result as a Markdown table."""
    rows, means = result["rows"], result["summary"]
    lines = ["| model | bytes on disk | bits per byte, mean of "
             f"{len(rows)} seeds | standard deviation |", "|---|---:|---:|---:|"]
    for name in MODELS:
        lines.append(f"| {name} | {rows[0][f'{name}_bytes_on_disk']:,} | {means[name]['mean']:.4f} | "
                     f"{means[name]['sd']:.4f} |")
    gain = means["control_minus_student"]
    lines.append(f"\nThe teacher's help, seed by seed: {gain['mean']:+.4f} bits per byte saved (sd {gain['sd']:.4f}); "
                 f"the student is {means['times_smaller']:.1f} times smaller than its teacher.")
    return "\n".join(lines)


def show(table: str, found: dict, file: Path | None) -> None:
    """Print what a benchmark found, and write it as JSON where a file is asked for."""
    print("\n" + table)
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n")


def machine() -> dict:
    """What the figures were measured on."""
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "accelerate", "compressed-tensors")}}


if __name__ == "__main__":
    main()
