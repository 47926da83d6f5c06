"""How the time of planning grows with the number of blocks: whole dry runs, each in a fresh process.

    python -m benchmarks.planning_time [--json FILE] [--blocks 8 32 128] [--repeats 1] [--tree FOLDER]

A Llama 1024 wide with a vocabulary of 32,000 on two sequences of 2,048 tokens in bf16, for an H100 that is not there.
Three commands for each number of blocks: without a budget to speak of (the device's memory), with 0.6 of what keeping
everything needs, and with 0.6 of that again, which is refused and answered with changes that would fit. Seconds are
those of the whole command, imports and the look at the data included, on the clock and of the processor; nothing is
found in a cache. `peak` is the plan's, or the least that the refusal names, to compare two versions of the code:
`--tree` runs the `train.py` of another checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rematerialization.frontier import machine

SHARE = 0.6
CONFIG = """\
name: growth
student: {{architecture: {{model_type: llama, hidden_size: 1024, intermediate_size: 2816, num_hidden_layers: {blocks},
  num_attention_heads: 16, num_key_value_heads: 16, vocab_size: 32000, max_position_embeddings: 4096}}}}
data: {{path: python-library, sequence_length: 2048, tokenizer: {{train_vocabulary: 32000}}, validation: {{rows: 16}}}}
training: {{steps: 100, batch_size: 2, micro_batch: 2}}
precision: {{dtype: bf16}}
memory: {{device: h100}}
"""


def main(arguments: list[str] | None = None) -> int:
    """Run, print and write the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=1, help="times that each command runs; medians are shown")
    parser.add_argument("--tree", type=Path, default=Path.cwd(), help="checkout whose train.py runs")
    options = parser.parse_args(arguments)
    rows = [row for blocks in options.blocks for row in planned(options.tree.resolve(), blocks, options.repeats)]
    for row in rows:
        print(f"{row['blocks']:4} blocks, {row['budget']:8}: {row['seconds']:6.1f} s, {row['cpu_seconds']:6.1f} s of "
              f"the processor; {row['peak']:,} bytes")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=2) + "\n")
    return 0


def planned(tree: Path, blocks: int, repeats: int) -> list[dict]:
    """The three commands for one number of blocks."""
    none = timed(tree, blocks, [], repeats)
    budget = int(SHARE * none["peak"])
    kept = timed(tree, blocks, [f"memory.budget={budget}"], repeats)
    refused = timed(tree, blocks, [f"memory.budget={int(SHARE * budget)}"], repeats)
    return [{"blocks": blocks, "budget": name, **row} for name, row in
            (("none", none), ("kept", kept), ("refused", refused))]


def timed(tree: Path, blocks: int, overrides: list[str], repeats: int) -> dict:
    """Medians of one command's seconds, and the bytes that it names."""
    taken = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "growth.yaml"
            config.write_text(CONFIG.format(blocks=blocks))
            taken.append(run([sys.executable, str(tree / "train.py"), "--config", str(config), *overrides, "--dry-run",
                              "--json"], folder, tree))
    return {"seconds": statistics.median(one["seconds"] for one in taken),
            "cpu_seconds": statistics.median(one["cpu_seconds"] for one in taken), "peak": taken[0]["peak"]}


def run(command: list[str], folder: str, tree: Path) -> dict:
    """One command in an empty folder."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as in a shell
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False,
                          env={**kept, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"})
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode == 0:
        peak = json.loads(done.stdout)["plan"]["memory"]["peak"]
    else:
        peak = int(re.search(r"\(([\d,]+) bytes\)", done.stderr)[1].replace(",", ""))
    return {"seconds": seconds, "peak": peak,
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def table(rows: list[dict]) -> str:
    """For documents: seconds of the processor of each command."""
    lines = ["| blocks | without a budget | 0.6 of it, planned | 0.36 of it, refused |", "|---:|---:|---:|---:|"]
    for blocks in dict.fromkeys(row["blocks"] for row in rows):
        of = {row["budget"]: row["cpu_seconds"] for row in rows if row["blocks"] == blocks}
        lines.append(f"| {blocks} | " + " | ".join(f"{of[kind]:.1f} s" for kind in ("none", "kept", "refused")) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
