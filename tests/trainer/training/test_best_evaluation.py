"""The best evaluation's checkpoint: kept, exported, chosen the same after an interruption; and early stopping."""

import json
import random

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import AutoModelForCausalLM

from tests.conftest import on_two_ranks
from tests.trainer.checkpoints.test_checkpoints import losses, same, small, store
from trainer import checkpoints, cli
from trainer.data.dataset import prepare_text
from trainer.errors import ExperimentErrors, RunFailed
from trainer.experiment.load import read_experiment
from trainer.experiment.quantization_nodes import Quantization
from trainer.run.folder import RunFolder, training_identity
from trainer.run.metrics import read_lines
from trainer.student.export_student import rebuilt
from trainer.training.best_evaluation import BestEvaluation


@pytest.fixture
def overfitting(tmp_path):
    """Settings with which held-out text, which is of another kind, becomes worse from the second step on."""
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"{n} jumps over {n * 7 % 11} lazy dogs, quickly." for n in range(60)))
    return {"training": {"steps": 20, "evaluate_every": 2, "checkpoint_every": 5, "keep_checkpoints": 1,
                         "micro_batch": 4, "keep_best": "bits_per_byte", "early_stopping": 3},
            "data": {"validation": {"path": str(other)}}, "optimizer": {"lr": 0.03},
            "schedule": {"shape": "constant", "warmup": 8}, "report": {"control": False}}


def held_out(folder):
    return {line["step"]: line["held_out"]["bits_per_byte"] for line in read_lines(folder) if "held_out" in line}


def test_improvements_are_counted_as_torchs_own_scheduler_counts_them():
    drawn = random.Random(1)
    for delta in (0.0, 0.3):
        best = BestEvaluation("bits_per_byte", patience=10**6, min_delta=delta)
        peer = ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)]), patience=10**6, threshold=delta,
                                 threshold_mode="abs")
        values = [drawn.choice([drawn.random() * 3, float("nan")]) for _ in range(200)]
        for step, value in enumerate(values, 1):
            best.take_in(step, {"bits_per_byte": value})
            peer.step(value)
            assert (best.waited, best.reference or float("inf")) == (peer.num_bad_epochs, peer.best)
        finite = [value for value in values if value == value]
        assert best.value == min(finite) and values[best.step - 1] == min(finite)


def test_the_best_checkpoint_is_the_student_and_an_interruption_changes_nothing(train_here, overfitting, capsys):
    whole = train_here("whole", **overfitting)
    curve = held_out(whole.folder.metrics)
    assert sorted(curve) == [2, 4, 6, 8] and min(curve, key=curve.get) == 2
    assert sorted(path.name for path in whole.folder.checkpoints.iterdir()) == ["step-00000002", "step-00000008"]
    assert "trained for 8 of 20 steps, since 3 evaluations in a row were no better; the student is that of step 2" in \
        capsys.readouterr().out
    assert whole.exported == 2 and whole.evaluations.held_out(whole.student, 8)["bits_per_byte"] == curve[2]
    train_here("parts", until=7, **overfitting)
    again = train_here("parts", **overfitting)
    assert "resumed at step 5" in capsys.readouterr().out and losses(again.folder.path) == losses(whole.folder.path)
    for step in (2, 8):
        same(*(one.folder.checkpoints / f"step-{step:08d}" for one in (whole, again)))
    assert again.folder.best.read_bytes() == whole.folder.best.read_bytes()
    ended = train_here("parts", **overfitting)
    assert losses(ended.folder.path) == losses(whole.folder.path), "a run that was stopped early stays so"
    for one, other in zip(whole.unwrapped.parameters(), ended.unwrapped.parameters(), strict=True):
        assert torch.equal(one, other)
    longer = train_here("parts", overrides=("training.steps=22",), **overfitting)
    assert max(held_out(longer.folder.metrics)) == 14 and longer.exported == 2, "for longer, it waits anew"


def test_shards_of_two_processes_export_it_and_so_does_a_later_export(write_experiment, overfitting, tmp_path, capsys):
    file = write_experiment("shards", **overfitting, sharding={"engine": "fsdp2"})
    done = on_two_ranks("--config", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    folder, experiment = RunFolder(tmp_path / "shards"), read_experiment(file).experiment
    best = json.loads(folder.best.read_text())
    curve = held_out(folder.metrics)
    assert best["step"] == min(curve, key=curve.get) < best["last_step"] == max(curve) < 20 == best["steps"]
    receipt = json.loads(folder.receipt.read_text())
    assert receipt["holds"] and receipt["bits_per_byte"] == pytest.approx(curve[best["step"]], rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(folder.student)
    other = AutoModelForCausalLM.from_pretrained(folder.student)
    checkpoints.load_whole(folder.checkpoints / f"step-{best['step']:08d}", other)
    assert all(torch.equal(*pair) for pair in zip(saved.parameters(), other.parameters(), strict=True))
    assert f"the student is that of step {best['step']}" in folder.report.read_text()
    assert cli.limbeck(["export", str(folder.path), "--to", "gguf"]) == 0
    later = json.loads((folder.student_for("gguf") / "receipt.json").read_text())
    assert later["bits_per_byte"] == pytest.approx(receipt["bits_per_byte"], rel=1e-5)
    checkpoints.finding.remove(folder.checkpoints / f"step-{best['step']:08d}")
    with pytest.raises(RunFailed, match=f"step {best['step']} had the best evaluation, whose checkpoint is not there"):
        rebuilt(experiment, folder, folder.student, prepare_text(experiment))


def test_the_best_is_kept_beside_the_newest_and_one_that_was_not_written_is_passed_over(tmp_path):
    _, engine = small()
    saving = store(tmp_path, said := [], background=False)
    for step, best in {2: 2, 4: 4, 6: 4, 8: 4, 10: 9, 12: 9, 14: 9}.items():  # that of step 9 could not be written
        saving.save(step, engine, {"best": {"step": best}})
    assert [path.name[-2:] for path in checkpoints.listed(tmp_path)] == ["04", "12", "14"] and not said
    assert checkpoints.best_kept(tmp_path).name == "step-00000004"
    saving.save(16, engine, {"best": {"step": 16}})
    assert [path.name[-2:] for path in checkpoints.listed(tmp_path)] == ["14", "16"]


def test_with_a_schedule_of_bits_only_a_student_of_the_last_bits_counts():
    asked = Quantization(bits_schedule=[[0, 8], [0.5, 4]])
    assert [asked.has_final_bits(step, 20) for step in (0, 9, 10, 19)] == [False, False, True, True]
    assert Quantization().has_final_bits(0, 20)
    best = BestEvaluation("bits_per_byte")
    best.take_in(5, {"bits_per_byte": 1.0}, counts=False)
    best.take_in(15, {"bits_per_byte": 2.0})
    assert best.step == 15 and best.evaluated == 15


@pytest.mark.parametrize(("changes", "said"), [
    ({"keep_best": "bits_per_bite"}, "did you mean"),
    ({"early_stopping": 3}, "nothing says what has to improve"),
    ({"keep_best": "cross_entropy", "min_delta": 0.1}, "it is for `early_stopping`, which is not given"),
])
def test_what_cannot_be_meant_is_said(write_experiment, changes, said, capsys):
    file = write_experiment(training=changes)
    with pytest.raises(ExperimentErrors):
        read_experiment(file)
    assert cli.train(["--config", str(file), "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_what_was_cached_before_there_were_these_keys_is_found_again(write_experiment):
    plain, kept = (read_experiment(write_experiment(training=training)).experiment
                   for training in ({}, {"keep_best": "bits_per_byte"}))
    assert not any("best" in key or "early" in key or "delta" in key for key in training_identity(plain))
    assert training_identity(kept)["training.keep_best"] == "bits_per_byte"
