"""What is shown while a run goes on."""

import json
import os
import pty
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from trainer.run.metrics import Metrics, read_lines, readable

RECORD = {"loss": 1.25, "tokens_per_second": 1234.0, "gradient_norm": 0.5, "loss_scale": 2048.0, "skipped": 3,
          "memory_peak": 3 * 2**20, "memory_kind": "rss"}
CODE = f"""
import time
from trainer.run.metrics import ProgressReporter
ticker = ProgressReporter("run", 40, 0, 10, True)
for number in range(1, 41):
    ticker.step(number, {RECORD!r})
    time.sleep(0.01)
ticker.say("done")
ticker.close()
"""
FIGURES = "loss 1.2500  1,234 tokens/s  grad norm 0.5  scale 2048 (3 skipped)  rss peak 3.00 MiB"


def test_plain_lines_without_a_terminal():
    out = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True).stdout
    assert out.splitlines() == [*(f"run  step {step}/40  {FIGURES}" for step in (10, 20, 30, 40)), "run  done"]


@pytest.mark.parametrize(("columns", "figures"), [("200", FIGURES), ("80", "loss 1.2500  1,234 tokens/s")])
def test_progress_bar_on_a_terminal(columns, figures):
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": columns, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", CODE], cwd=ROOT, stdout=child, stderr=child, env=environment)
    os.close(child)
    out = b""
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:
            break
        if not chunk:
            break
        out += chunk
    assert process.wait() == 0
    text = out.decode()
    assert "━" in text and "40/40" in text and figures in text and "\x1b[" in text


def test_metrics_drop_what_a_resumed_run_writes_again_and_a_torn_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in range(1, 6))
    file.write_text(whole + '{"step": 6, "lo')
    metrics = Metrics(file, active=True, step=3)
    metrics.write({"step": 4, "loss": 9.0})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_lines(file)] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0)]


def test_bytes_for_people():
    assert [readable(count) for count in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.50 KiB", "5.00 GiB"]
