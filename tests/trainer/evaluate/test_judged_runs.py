"""Runs with tasks: judged at the end as a whole or again, in training by all processes alike, and by the verb."""

import json
import os
import signal
import time

import pytest

from tests.conftest import TINY, on_two_ranks
from tests.trainer.evaluate.asked_models import objects, small_model, small_tokenizer, write_records
from trainer import cli
from trainer.distributed import signals
from trainer.errors import Stopped
from trainer.experiment.load import read_experiment
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_lines
from trainer.training import task_evaluation
from trainer.training.best_evaluation import BestEvaluation

SHORT = {"name": "words", "kind": "exact_match", "max_new_tokens": 3, "stop": ["."], "limit": 5}


@pytest.fixture
def tasks(tmp_path):
    path = objects(tmp_path / "records.jsonl", 20)
    return [{"name": "objects", "kind": "multiple_choice", "path": path}, {**SHORT, "path": path},
            {"name": "texts", "kind": "perplexity", "path": path, "limit": 8}]


def test_models_are_judged_side_by_side_as_a_whole_or_again(run_experiment, write_experiment, tasks, monkeypatch,
                                                            capsys):
    import limbeck
    from trainer.student import judge_student

    changes = {"teacher": {"architecture": TINY, "train": {"steps": 2}}, "evaluate": {"tasks": tasks},
               "student": {"quantization": {"method": "rtn", "bits": 2, "group_size": 16}}}
    plain, loaded = judge_student.load_exported, []

    def until_the_control(entry, device):
        if "control" in entry["path"] and not loaded:
            loaded.append(entry)
            raise KeyboardInterrupt
        return plain(entry, device)

    monkeypatch.setattr(judge_student, "load_exported", until_the_control)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(**changes)
    folder = RunFolder(read_experiment(write_experiment(**changes)).experiment.folder)
    assert loaded and not folder.evaluation.exists() and not folder.finished
    run_experiment(**changes)
    found = json.loads(folder.evaluation.read_text())
    assert list(found["models"]) == ["teacher", "student", "student before rounding", "control"]
    bits = {model: of["texts"]["bits_per_byte"]["value"] for model, of in found["models"].items()}
    assert len(set(bits.values())) == 4 and "teacher" not in found["differences"]
    apart = found["differences"]["student"]["texts"]["bits_per_byte"]
    assert apart["value"] == pytest.approx(bits["student"] - bits["teacher"])
    assert len(found["records"]["control"]["objects"]["accuracy"]) == 20
    said = folder.report.read_text()
    assert "## Tasks" in said and "| `texts`: bits per byte, lower is better | 8 |" in said
    assert f"{bits['student before rounding']:.4f} [" in said and (folder.path / "tasks.png").exists()
    assert "| `objects`: accuracy | 20 |" in (folder.student / "README.md").read_text()
    # The verb judges the same folder, which is what was exported, and another number of records from a file.
    assert cli.limbeck(["evaluate", str(folder.path), "--tokens", "256"]) == 0
    alone = json.loads((folder.student / "evaluation.json").read_text())
    assert alone["models"]["student"] == found["models"]["student"] and alone["tasks"]["texts"]["path"] == \
        "records.jsonl"
    # A change of tasks judges again, and nothing else; a finished run says that it is.
    before = folder.receipt.stat().st_mtime_ns, folder.metrics.read_bytes()
    changes["evaluate"]["tasks"] = tasks[:1]
    run_experiment(**changes)
    assert list(json.loads(folder.evaluation.read_text())["tasks"]) == ["objects"]
    assert (folder.receipt.stat().st_mtime_ns, folder.metrics.read_bytes()) == before
    capsys.readouterr()
    limbeck.run(limbeck.read_experiment(write_experiment(**changes), ["evaluate.every=2"]))
    assert "is finished" in capsys.readouterr().out


def test_the_best_by_a_task_is_exported_and_an_interruption_changes_nothing(train_here, tasks, tmp_path, capsys):
    other = tmp_path / "other.jsonl"  # which is forgotten the better the grammar is known
    write_records(other, [{"text": f"{n} jumps over {n * 7 % 11} lazy dogs, quickly."} for n in range(20)])
    settings = {"training": {"steps": 12, "evaluate_every": 4, "checkpoint_every": 12, "keep_checkpoints": 1,
                             "keep_best": "other.bits_per_byte"}, "optimizer": {"lr": 0.03}, "schedule": {"warmup": 8},
                "evaluate": {"every": 3, "tasks": [
                    *tasks, {"name": "other", "kind": "perplexity", "path": str(other)}]}}
    whole = train_here("whole", **settings)
    lines = {line["step"]: line["tasks"] for line in read_lines(whole.folder.metrics) if "tasks" in line}
    curve = {step: found["other"]["bits_per_byte"] for step, found in lines.items()}
    best = min(curve, key=curve.get)
    assert list(curve) == [3, 6, 9, 12] and best < 12
    assert whole.exported == best and f"with the lowest bits per byte of other: {curve[best]:.4f}" in \
        capsys.readouterr().out
    assert whole.evaluations.tasks(whole.student) == lines[best]
    train_here("parts", until=8, **settings)
    again = train_here("parts", **settings)
    assert {line["step"]: line["tasks"] for line in read_lines(again.folder.metrics) if "tasks" in line} == lines
    assert again.folder.best.read_bytes() == whole.folder.best.read_bytes()


def test_an_evaluation_that_a_signal_interrupts_is_done_again_as_a_whole(train_here, tasks, monkeypatch):
    settings = {"training": {"steps": 4, "evaluate_every": 4, "checkpoint_every": 4},
                "evaluate": {"every": 2, "tasks": tasks}}
    whole = train_here("whole", **settings)
    plain, done = task_evaluation.judge, []

    def interrupted(*given):
        done.append(given)
        if len(done) == 2:  # after the first task of the first evaluation
            os.kill(os.getpid(), signal.SIGTERM)
            while signals.asked() is None:
                time.sleep(0.01)
        return plain(*given)

    monkeypatch.setattr(task_evaluation, "judge", interrupted)
    with signals.handle_signals(lambda *_: None), pytest.raises(Stopped, match="stopped at step 2 by SIGTERM"):
        train_here("parts", **settings)
    again = train_here("parts", **settings)
    curves = [[(line["step"], line["tasks"]) for line in read_lines(one.folder.metrics) if "tasks" in line]
              for one in (whole, again)]
    assert curves[0] == curves[1] and [step for step, _ in curves[0]] == [2, 4]


def test_more_is_better_of_an_accuracy():
    best = BestEvaluation("own.accuracy", patience=2, min_delta=0.1)
    for step, value in enumerate([0.1, 0.15, 0.25, 0.3, 0.32], 1):
        best.take_in(step, {"own.accuracy": value})
    assert (best.step, best.value, best.reference, best.waited) == (5, 0.32, 0.25, 2) and best.exhausted
    lower = BestEvaluation("own.bits_per_byte")
    for step, value in enumerate([0.2, 0.1, 0.3], 1):
        lower.take_in(step, {"own.bits_per_byte": value})
    assert lower.step == 2


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_share_the_records_and_find_what_one_finds(write_experiment, tasks, tmp_path, engine):
    given = tmp_path / "given"
    small_model(max_position_embeddings=64).save_pretrained(given)
    small_tokenizer().save_pretrained(given)
    asked = [task for task in tasks if engine == "ddp" or task["kind"] != "exact_match"]
    changes = {"student": {"path": str(given), "architecture": None}, "sharding": {"engine": engine},
               "data": {"tokenizer": {"train_vocabulary": None}}, "training": {"steps": 0, "micro_batch": 4},
               "evaluate": {"every": 1, "tasks": asked}}
    file = write_experiment("two", **changes)
    done = on_two_ranks("--config", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    folder = RunFolder(tmp_path / "two")
    [found] = [line["tasks"] for line in read_lines(folder.metrics) if "tasks" in line]
    at_end = json.loads(folder.evaluation.read_text())["models"]["student"]
    assert cli.limbeck(["evaluate", str(given), "--tasks", str(file), "--tokens", "128"]) == 0
    alone = json.loads((given / "evaluation.json").read_text())["models"]["student"]
    assert at_end == alone
    for task, metrics in alone.items():
        for metric, one in metrics.items():
            assert found[task][metric] == pytest.approx(one["value"], rel=1e-6)
