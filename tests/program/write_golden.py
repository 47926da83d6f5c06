"""Writes the golden losses anew after a change that is meant to change them: `python -m tests.program.write_golden`."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pytest", "tests/program/test_loop.py", "-k", "golden",
                        f"--basetemp={folder}/pytest"], cwd=ROOT, env={**os.environ}, check=False)
        (metrics,) = Path(folder).rglob("golden/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    (ROOT / "tests" / "golden" / "losses.json").write_text(json.dumps({"loss": losses}, indent=0) + "\n")
    print(f"{len(losses)} losses from {losses[0]:.4f} to {losses[-1]:.4f}")
