"""How long it takes from a command to what it is for: help, a dry run, the first training step.

    python -m benchmarks.start [--rounds 5] [--json FILE]

Every command is a fresh process on this machine as it is: seconds of the clock and of the processor, medians of the
rounds, after one round that is not counted (it compiles modules and kernels, which are then kept on disk). The first
step is that of a tiny Llama on token ids of a local file, from the command to the line in `metrics.jsonl`; then the run
is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.rematerialization.frontier import machine

ROOT = Path(__file__).parents[1]
GOALS = {"train.py --help": 0.3, "dry run of the quickstart": 4.0, "first step of a tiny model": 4.0}
LOOK, LIMIT = 0.005, 120.0  # seconds between looks at a file, and for a command at most


def main(arguments: list[str] | None = None) -> int:
    """Time all commands, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        experiment = tiny_experiment(room)
        commands: dict[str, Callable[[int], float]] = {
            "train.py --help": lambda number: whole(["--help"]),
            "dry run of the quickstart": lambda number: whole([
                "--config", "configs/quickstart.yaml", "--dry-run", f"run.cache={room / 'cache'}"]),
            "first step of a tiny model": lambda number: first_step(experiment, room / f"run-{number}")}
        rows = [timed(name, command, chosen.rounds) for name, command in commands.items()]
    found = {"machine": machine("cpu"), "rows": rows}
    print(table(found))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def timed(name: str, command: Callable[[int], float], rounds: int) -> dict:
    """Medians of a command's seconds, by the clock and of its processes' work."""
    clock, work = [], []
    for number in range(rounds + 1):
        before = _worked()
        clock.append(command(number))
        work.append(_worked() - before)
    return {"command": name, "seconds": statistics.median(clock[1:]), "cpu_seconds": statistics.median(work[1:]),
            "first": clock[0], "rounds": rounds, "goal": GOALS[name]}


def _worked() -> float:
    """Seconds of the processor that ended children took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def whole(arguments: list[str]) -> float:
    """Seconds of `train.py` with these arguments, until it ends."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=_environment(), timeout=LIMIT)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return time.perf_counter() - started


def first_step(experiment: Path, folder: Path) -> float:
    """Seconds until the first step of a run is in its metrics; the run is killed then."""
    started = time.perf_counter()
    run = subprocess.Popen([sys.executable, "train.py", "--config", str(experiment), f"run.folder={folder}"], cwd=ROOT,
                           env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while '"loss"' not in _read(folder / "metrics.jsonl"):
            if run.poll() is not None or time.perf_counter() - started > LIMIT:
                raise SystemExit(f"no first step: exit code {run.poll()}")
            time.sleep(LOOK)
        return time.perf_counter() - started
    finally:
        run.kill()
        run.wait()


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _environment() -> dict[str, str]:
    """Of a person's shell: compiled modules are kept, and nothing is looked up on a hub."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {
        "HF_HUB_OFFLINE": "1"}


def tiny_experiment(room: Path) -> Path:
    """An experiment file for a tiny Llama, its tokenizer and a few rows of token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, **{f"w{number}": number for number in range(1, 256)}}
    made = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>").save_pretrained(room / "words")
    for name in ("train", "held-out"):
        (room / f"{name}.jsonl").write_text("".join(
            json.dumps({"ids": [1 + (row * 7 + at * at) % 255 for at in range(64)]}) + "\n" for row in range(64)))
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 64}
    file = room / "experiment.yaml"
    file.write_text(yaml.safe_dump({
        "name": "start", "student": {"architecture": shape},
        "data": {"path": str(room / "train.jsonl"), "input_ids": "ids", "sequence_length": 64,
                 "tokenizer": {"path": str(room / "words")}, "validation": {"path": str(room / "held-out.jsonl")}},
        "training": {"steps": 1000, "batch_size": 8, "micro_batch": 8}, "report": {"control": False},
        "run": {"cache": str(room / "cache")}}, sort_keys=False))
    return file


def table(found: dict) -> str:
    """For people."""
    lines = ["| from the command to the end of | seconds | of the processor | the very first time | goal |",
             "|---|---:|---:|---:|---:|"]
    lines += [f"| {row['command']} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | {row['first']:.2f} | "
              f"{row['goal']:g} |" for row in found["rows"]]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
