"""`limbeck watch` and `limbeck status`: what a run's folder tells of it while it goes on, and after its end."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import ROOT
from trainer.cli import limbeck
from trainer.errors import UserError
from trainer.experiment.load import read_experiment
from trainer.run import run_status
from trainer.run.folder import RunFolder
from trainer.run.metrics import Metrics
from trainer.run.pace import Pace
from trainer.run.run_status import ENDED, STATUS, Life, RunStatus, status
from trainer.run.text_curve import text_curve
from trainer.run.watch import Watch, watch
from trainer.run.working import noted, warnings, working


def step(number, loss=2.0, **more):
    return {"step": number, "loss": loss, "learning_rate": 1e-3, "tokens": 50, "tokens_seen": 100, "seconds": 0.5,
            "gradient_norm": 1.0, "loss_scale": 1.0, "skipped": 0, "memory_peak": 2**20, "memory_kind": "rss", **more}


@pytest.fixture
def run(write_experiment):
    """The folder of a run of 40 steps that has been planned, and its experiment."""
    experiment = read_experiment(write_experiment("mine", training={"steps": 40, "evaluate_every": 10})).experiment
    folder = RunFolder(experiment.folder)
    folder.path.mkdir()
    (folder.path / "experiment.yaml").write_text(json.dumps(experiment.model_dump(mode="json")))
    folder.plan.write_text('{"steps": 40}')
    return folder, experiment


def living(folder, experiment):
    return RunStatus(experiment.name, folder, lambda: folder.check(experiment))


def test_a_run_that_goes_on(run):
    folder, _ = run
    warnings.clear()
    metrics = Metrics(folder.metrics, True, 0, Pace(40, 10, 40))
    for number in range(1, 11):
        metrics.write(step(number, 3.0 - number / 10))
    metrics.write({"step": 10, "held_out": {"bits_per_byte": 1.5}, "seconds": 5.0})
    looks = Watch(folder.path)
    with living(*run), working("mine", "training", quiet=True, model="student") as work:
        lines, code = looks.frame(100)
        assert code is None and lines[0].startswith("mine  student: training, for ")
        assert lines[1] == ("step 10/40 ━━━━━─────────────── 25%  loss 2.0000  lr 1.0e-03  200 tokens/s "
                            "(100 learned)  30s left")
        assert lines[2] == ("eval 50%  rss peak 1.00 MiB  grad norm 1  held-out 1.5000 bits per byte, best 1.5000 at "
                            "step 10")
        assert lines[4] == "loss" and lines[5].startswith("     2.9 ") and lines[12].startswith("       2 ")
        metrics.write(step(11, "nan", nonfinite="process 0"))
        metrics.write({"step": 20, "held_out": {"bits_per_byte": 1.25}, "seconds": 5.0})
        noted("warning: the checkpoint step-00000010 was not written\n  -> make room")
        work.report("rows", 3, 7)
        with (folder.metrics).open("a") as handle:
            handle.write('{"step": 21, "lo')  # the rest is on its way
        time.sleep(2 * run_status.LOOK)
        lines, code = looks.frame(100)
        assert "loss nan" in lines[1] and "held-out 1.2500 bits per byte, best 1.2500 at step 20" in "".join(lines)
        assert lines[-2:] == ["step 11: non-finite loss or gradient, step skipped",
                              "warning: the checkpoint step-00000010 was not written"]
        with folder.metrics.open("a") as handle:
            handle.write('ss": 1.5}\n')
        assert "step 21/40" in looks.frame(100)[0][1]
        metrics.close()
        Metrics(folder.metrics, True, 4).close()  # the run is resumed
        assert "step 4/40" in looks.frame(100)[0][1]
    warnings.clear()
    assert not (folder.path / STATUS).exists()


def test_the_training_of_a_teacher_or_control_is_shown_while_it_goes_on(run, tmp_path, capsys):
    folder, _ = run
    control, teacher = RunFolder(folder.control), RunFolder(tmp_path / "cache" / "teacher")
    for other, steps in ((control, 3), (teacher, 7)):
        other.path.mkdir(parents=True)
        other.plan.write_text(json.dumps({"steps": steps}))
        (other.checkpoints / f"step-0000000{steps - 1}").mkdir(parents=True)
        Metrics(other.metrics, True, 0).write(step(1))
    with living(*run):
        for model, other, steps in (("control", control, 3), ("teacher", teacher, 7)):
            with working("mine", "training", quiet=True, model=model, folder=str(other.path)):
                lines, _ = Watch(folder.path).frame(80)
                assert lines[0].startswith(f"mine  {model}: training") and lines[1].startswith(f"step 1/{steps} ")
                assert limbeck(["status", str(folder.path)]) == 1
                assert (f"running, {model}: training; newest checkpoint step-0000000{steps - 1}, of {steps} steps"
                        in capsys.readouterr().out)
        with working("mine", "training", quiet=True, model="teacher", folder=str(tmp_path / "on" / "another" / "disk")):
            assert "its folder is not to be seen from here: " in "".join(Watch(folder.path).frame(200)[0])


def test_how_a_run_ended(run, capsys, monkeypatch):
    folder, experiment = run
    assert status(folder.path)[1] == 1 and Watch(folder.path).frame(80) == (
        ["mine  dead: it ended without a word, and not finished"], 1)
    with living(*run):
        assert Life.of(folder).lives
        old = time.time() - 10
        os.utime(folder.path / STATUS, (old, old))
        content = json.loads((folder.path / STATUS).read_text())
        (folder.path / STATUS).write_text(json.dumps({**content, "host": "another", "pid": 2**22}))
        assert Life.of(folder).lives and Watch(folder.path).frame(80)[1] is None, "its machine has told lately"
        old = time.time() - 2 * run_status.DEAD
        os.utime(folder.path / STATUS, (old, old))
        lines, code = Watch(folder.path).frame(80)
        assert code == 1 and lines[0] == ("mine  dead: it ended without a word, and not finished, 4m00s after its last "
                                          "sign of life")[:80]
    (folder.path / ENDED).write_text(json.dumps({"code": 75, "said": "stopped at step 3 by \x1b[2JSIGTERM\nstart"}))
    assert Watch(folder.path).frame(80) == (["mine  ended: stopped at step 3 by ?[2JSIGTERM"], 75)
    (folder.path / ENDED).unlink()
    folder.student.mkdir()
    folder.receipt.write_text("{}")
    folder.report.write_text("")
    out = Console(file=io.StringIO(), width=200)
    assert watch(Watch(folder.path), 1.0, False, out) == 0, "where there is no terminal, once"
    assert out.file.getvalue() == f"mine  finished, see {folder.report}\n"
    assert limbeck(["watch", str(folder.path), "--once", "--every", "3"]) == 0
    assert capsys.readouterr().out.startswith("mine  finished, see ")
    with living(*run):
        assert status(folder.path) == (f"{folder.path}: running, starting; no checkpoint yet, of 40 steps", 1), \
            "it makes its student again"


def test_a_process_that_was_killed_is_gone_at_once_on_its_own_machine(run):
    folder, _ = run
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (folder.path / STATUS).write_text(json.dumps({"host": socket.gethostname(), "pid": process.pid}))
    assert Life.of(folder).lives and status(folder.path)[0].startswith(f"{folder.path}: running; ")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Life.of(folder).lives and "ended without a word" in status(folder.path)[0]


def test_on_a_terminal_frames_follow_until_the_end_and_ctrl_c_ends_only_the_watching(run, monkeypatch):
    folder, _ = run
    out, slept = Console(file=io.StringIO(), force_terminal=True, width=90, height=40), []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            going_on.__exit__(None, None, None)
            (folder.path / ENDED).write_text(json.dumps({"code": 3, "said": "error: memory.budget"}))

    going_on = living(*run)
    with going_on:
        before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
        assert watch(Watch(folder.path), 7.0, False, out, sleep) == 1
    assert slept == [7.0, 7.0, 1.0]
    shown = out.file.getvalue()
    assert shown.count("mine  starting") == 2 and "mine  ended: error: memory.budget" in shown
    del before[folder.path / STATUS]
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing was touched"

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.run.watch.watch", interrupt)
    assert limbeck(["watch", str(folder.path)]) == 130


def test_the_folder_of_a_refused_experiment_is_not_left_and_that_of_another_not_touched(run, tmp_path):
    folder, experiment = run
    new = RunFolder(tmp_path / "some" / "new")
    with pytest.raises(UserError), RunStatus("new", new, lambda: None):
        assert status(new.path)[0] == f"{new.path}: running, starting; no checkpoint yet"
        raise UserError("data.path", "is missing")
    assert not (tmp_path / "some").exists()

    def refuse():
        raise UserError("run.folder", "the folder belongs to another experiment")

    with RunStatus("other", folder, refuse):
        assert not (folder.path / STATUS).exists()
    (folder.path / STATUS).write_text(json.dumps({"host": "another", "pid": 1, "name": "first"}))
    with living(*run) as ours:
        ours.beat()
        assert Life.of(folder).content["name"] == "first", "another run seems to go on here"
    assert (folder.path / STATUS).exists()
    with living(*run) as ours:
        folder.lock(wait=False)
        ours.beat()
        assert Life.of(folder).content["name"] == "mine", "it was killed on a machine that cannot be asked"
    assert not (folder.path / STATUS).exists()


@pytest.mark.parametrize("content", [
    "", "[]", "{", "[" * 50_000, '{"pid": -1, "folder": 3, "warnings": [[]], "done": "x"}',
    '{"pid": 99999999999999999999, "model": {}, "since": "now"}'], ids=range(6))
def test_a_folder_may_hold_anything(run, content):
    folder, _ = run
    (folder.path / STATUS).write_text(content)
    folder.plan.write_text('{"steps": "many"}')
    lines = ({"loss": [], "seconds": -1}, {"held_out": 3}, {"loss": 3, "tokens": [], "seconds": 1}, {"memory": 1})
    folder.metrics.write_text("".join(json.dumps({"step": 2, **line}) + "\n" for line in lines) + '{"no step": 1}\n')
    folder.experiment.write_text("training: 3\nname: [a]\n")
    lines, _ = Watch(folder.path).frame(80)
    assert lines[0].startswith("mine  ") and "step 2: a record of metrics.jsonl is not as a run writes it" in lines
    assert status(folder.path)[1] == 1


def test_watching_imports_nothing_heavy():
    code = "import sys; import trainer.run.watch; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def dots(lines):
    """The picture of a curve as a matrix of dots, from the characters' names in Unicode's table."""
    import unicodedata

    cells = [[unicodedata.name(one).removeprefix("BRAILLE PATTERN ").removeprefix("DOTS-") for one in line[9:]]
             for line in lines]
    places = {"1": (0, 0), "2": (1, 0), "3": (2, 0), "7": (3, 0), "4": (0, 1), "5": (1, 1), "6": (2, 1), "8": (3, 1)}
    found = np.zeros((4 * len(cells), 2 * len(cells[0])), bool)
    for row, line in enumerate(cells):
        for column, name in enumerate(line):
            for dot in "" if name == "BLANK" else name:
                found[4 * row + places[dot][0], 2 * column + places[dot][1]] = True
    return found


def test_a_curve_is_drawn_where_its_values_are():
    lines = text_curve([(x, x * x) for x in range(1, 61)], columns=29, rows=5)
    found = dots(lines[:-1])
    assert found.shape == (20, 40) and found.any(0).all(), "no gap"
    for column in range(40):  # 60 points in 40 columns of dots: the mean of those in each, at its height
        own = [x * x for x in range(1, 61) if int(min((x - 1) / 59 * 40, 39)) == column]
        height = round((3600 - np.mean(own)) / 3599 * 19) if len(own) else None
        assert height is None or found[max(0, height - 1):height + 2, column].any(), column
    assert lines[0].startswith("    3600 ") or lines[0].startswith("    3540 ")
    assert lines[-1] == " " * 9 + "1" + "60".rjust(19)


def test_curves_of_few_points_of_constants_and_of_a_run_that_has_just_begun():
    assert text_curve([], 40, 4) == [] == text_curve([(1, float("nan"))], 40, 4)
    level = dots(text_curve([(1, 2.0), (9, 2.0)], 29, 4)[:-1])
    assert level.any(1).sum() == 1 and level.any(0).all()
    begun = dots(text_curve([(1, 3.0), (10, 2.0), (11, float("inf"))], 29, 4, last=100)[:-1])
    assert not begun[:, 5:].any() and begun[:, :3].any()
