"""A run that an earlier version began: `version_before` was written by the commit before names and folders moved.

It trained 2 of 4 steps, with dropout and learned scales, and its metrics have the losses of all 4.
"""

import shutil
from pathlib import Path

import pytest

from tests.conftest import train_py
from trainer.run.metrics import read_lines

KEPT = Path(__file__).with_name("version_before")


@pytest.fixture
def begun(tmp_path):
    """A copy of the run's folder, and the losses that the version before had."""
    shutil.copytree(KEPT, tmp_path, dirs_exist_ok=True)
    return tmp_path, {line["step"]: line["loss"] for line in read_lines(KEPT / "run" / "metrics.jsonl")
                      if "loss" in line}


def test_a_checkpoint_of_the_version_before_is_gone_on_from(begun):
    """Under new names of values, to the losses that it had; what is on disk is read as it was written."""
    folder, losses = begun
    assert "learnt" in (folder / "run" / "experiment.yaml").read_text()
    done = train_py("--config", "experiment.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "before  resumed at step 2" in done.stdout
    found = {line["step"]: line["loss"] for line in read_lines(folder / "run" / "metrics.jsonl") if "loss" in line}
    assert [*found] == [1, 2, 3, 4] and found == pytest.approx(losses, rel=5e-6)


def test_a_value_that_was_renamed_is_answered_with_the_new_one(begun):
    folder, _ = begun
    file = folder / "experiment.yaml"
    file.write_text(file.read_text().replace("learned", "learnt"))
    done = train_py("--config", "experiment.yaml", cwd=folder)
    assert done.returncode == 2, done.stdout
    assert "experiment.yaml:6: student.quantization.scales = 'learnt'" in done.stderr
    assert "did you mean `learned`?" in done.stderr


def test_a_checkpoint_that_this_version_cannot_read_is_refused_with_the_way_out(begun):
    folder, _ = begun
    done = train_py("--config", "experiment.yaml", "student.quantization.group_size=8", cwd=folder)
    assert done.returncode == 2 and "student.quantization.group_size was 16 and is 8" in done.stderr, done.stderr
