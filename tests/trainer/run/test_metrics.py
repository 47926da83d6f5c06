"""What is shown while a run goes on."""

import json
import math
import os
import pty
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from trainer.run.metrics import Metrics, read_lines, readable
from trainer.run.pace import Pace, duration, figures, fitting

RECORD = {"step": 1, "loss": 1.25, "seconds": 0.5, "tokens": 400, "tokens_seen": 617, "learning_rate": 2.94e-4,
          "gradient_norm": 0.5, "loss_scale": 2048.0, "skipped": 3, "memory_peak": 3 * 2**20, "memory_kind": "rss"}
CODE = f"""
import time
from pathlib import Path
from trainer.run.metrics import Metrics, ProgressReporter
from trainer.run.pace import Pace
metrics = Metrics(Path("unused"), False, 0, Pace(40, 20, 40))
ticker = ProgressReporter("run", 40, 0, 10, True, metrics.pace)
for number in range(1, 41):
    record = {RECORD!r} | dict(step=number)
    metrics.write(record)
    if number % 20 == 0:
        metrics.write(dict(step=number, held_out=dict(), seconds=2.0))
    ticker.step(number, record)
    time.sleep(0.01)
ticker.say("done")
ticker.close()
"""
FIGURES = "loss 1.2500  lr 2.9e-04  1,234 tokens/s (800 learned)"


def test_plain_lines_without_a_terminal():
    out = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True).stdout
    scale = "scale 2048 (3 skipped)"
    assert out.splitlines() == [
        f"run  step 10/40  {FIGURES}  15s left  {scale}", f"run  step 20/40  {FIGURES}  12s left  eval 17%  {scale}",
        f"run  step 30/40  {FIGURES}  7s left  eval 12%  {scale}",
        f"run  step 40/40  {FIGURES}  0s left  eval 17%  {scale}", "run  done"], "what fits into 120 columns"


@pytest.mark.parametrize(("columns", "last"), [("200", "grad norm 0.5"), ("80", FIGURES.split("  ")[2])])
def test_progress_bar_on_a_terminal(columns, last):
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
    assert "━" in text and "40/40" in text and last in text and "\x1b[" in text


def test_metrics_drop_what_a_resumed_run_writes_again_and_a_torn_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in range(1, 6))
    file.write_text(whole + '{"step": 6, "lo')
    metrics = Metrics(file, active=True, step=3)
    metrics.write({"step": 4, "loss": math.inf})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_lines(file)] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, "inf")]


def paced(seconds, evaluations=(), saves=(), pace=None):
    """A run's pace after steps, evaluations and saves of so many seconds."""
    pace = pace or Pace(100, 30, 50)
    for step, taken in enumerate(seconds, pace.step + 1):
        pace.add({"step": step, "loss": 1.0, "seconds": taken})
    for taken in evaluations:
        pace.add({"step": pace.step, "held_out": {}, "seconds": taken})
    for taken in saves:
        pace.add({"step": pace.step, "checkpoint": "step-00000001", "seconds": taken})
    return pace


def test_the_time_left_counts_what_is_still_to_be_evaluated_and_saved():
    assert paced([]).left is None and paced([9.0]).left is None, "one step, which compiles, says nothing"
    assert paced([60.0, 1.0]).left == 98.0, "the first step is not taken for a usual one"
    assert paced([60.0, 1.0, 7.0, 1.0]).left == 96.0, "nor is the one that is measured"
    # 60 steps to go, evaluations after steps 60, 90 and 100, saves after 50 and 100
    assert paced([1.0] * 40, [5.0, 7.0], [3.0]).left == 60 + 3 * 6 + 2 * 3
    mixed = paced([1.0, 3.0] * 30).left / 40  # as where the student writes in every other step
    assert 1.8 < mixed < 2.0
    assert paced([1.0] * 100, [5.0], [3.0]).left == 0


def test_time_lost_is_a_share_of_all_and_goes_on_in_a_resumed_run(tmp_path):
    pace = paced([1.0] * 6, [3.0], [1.0])
    assert (pace.share("evaluating"), pace.share("saving")) == (0.3, 0.1)
    file = tmp_path / "metrics.jsonl"
    first = Metrics(file, active=True, step=0, pace=Pace(100, 30, 50))
    for line in ({"step": 1, "loss": 1.0, "seconds": 60.0}, {"step": 2, "loss": 1.0, "seconds": 2.0},
                 {"step": 2, "held_out": {}, "seconds": 31.0}, {"step": 2, "checkpoint": "step-00000002", "seconds": 7},
                 {"step": 3, "loss": 1.0, "seconds": 500.0}):
        first.write(line)
    first.close()
    resumed = Metrics(file, active=True, step=2, pace=Pace(100, 30, 50))
    resumed.close()
    assert resumed.pace.share("evaluating") == 0.31 and resumed.pace.share("saving") == 0.07
    assert resumed.pace.left is None, "this machine's speed is not known yet"
    assert paced([1.0, 1.0], pace=resumed.pace).left == 96.0


def test_figures_of_every_kind_of_step_and_of_earlier_versions():
    pace = paced([1.0] * 50)
    assert figures({"step": 1, "loss": None}, pace) == ["no target tokens", "50s left"]
    old = {"loss": 2.0, "learning_rate": 1e-3, "tokens": 100, "seconds": 0.1, "gradient_norm": "inf", "loss_scale": 1.0}
    assert figures(old, Pace(9, 9, 9)) == ["loss 2.0000", "lr 1.0e-03", "1,000 tokens/s", "grad norm inf"]
    assert fitting(["loss 2", "lr 1", "more"], 12) == "loss 2  lr 1" and fitting(["loss 2", "lr 1"], 3) == "loss 2"


def test_bytes_and_times_for_people():
    assert [readable(count) for count in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.50 KiB", "5.00 GiB"]
    assert [duration(seconds) for seconds in (0.4, 59.6, 192, 7500, 273600)] == ["0s", "1m00s", "3m12s", "2h05m",
                                                                                "3d04h"]
