"""Writes the golden losses anew after a change that is meant to change them: `python -m tests.golden.write_golden`."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pytest", "tests/trainer/training/test_loop.py", "-k", "golden",
                        f"--basetemp={folder}/pytest"], cwd=ROOT, env={**os.environ}, check=False)
        golden = {}
        for metrics in sorted(Path(folder).rglob("golden-*/metrics.jsonl")):
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            golden[metrics.parent.name.removeprefix("golden-")] = [line["loss"] for line in lines if "loss" in line]
    (ROOT / "tests" / "golden" / "losses.json").write_text(json.dumps(golden, indent=0) + "\n")
    print({name: (len(curve), curve[0], curve[-1]) for name, curve in golden.items()})
