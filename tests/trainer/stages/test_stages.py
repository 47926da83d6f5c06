"""Experiments in stages: each starts from the student of the one before, and is finished, interrupted and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.conftest import ROOT, on_two_ranks, train_py
from tests.trainer.test_classification import BERT, texts  # noqa: F401 - a fixture
from trainer.cli import limbeck as limbeck_command
from trainer.distributed.signals import EndNote
from trainer.experiment.load import read_experiment
from trainer.run.folder import RunFolder
from trainer.stages.stage_settings import settings_of
from trainer.stages.stages_status import WatchStages

TEACHER = {"architecture": {**BERT, "num_hidden_layers": 3}, "train": {"steps": 30, "lr": 1e-2}}


def in_stages(texts, stages, **changes):  # noqa: F811
    """What differs in an experiment in stages on these texts."""
    return {"student": {"architecture": None, "from_teacher": [0, 2]}, "teacher": TEACHER, "optimizer": {"lr": 5e-3},
            "data": {"task": "sequence_classification", "path": str(texts / "train.jsonl"), "sequence_length": 16,
                     "validation": {"path": str(texts / "test.jsonl"), "rows": 24}},
            "training": {"steps": 12, "batch_size": 32, "micro_batch": 16}, "stages": stages, **changes}


QUANTIZE = {"quantize": {"student": {"quantization": {"method": "gptq", "bits": 4, "calibration_rows": 48}}}}
EXPORT = {"export": {"export": {"to": ["onnx"]}}}


def read(file):
    return json.loads(file.read_text())


def test_a_student_goes_from_stage_to_stage_with_a_receipt_each(write_experiment, texts, tmp_path, capsys):  # noqa: F811
    """The teacher is trained once; each student is what the next starts from; nothing is done twice."""
    values = in_stages(texts, [{"distil": {"training.steps": 15}}, QUANTIZE, EXPORT],
                       run={"cache": str(tmp_path / "own")})
    file = write_experiment("run", **values)
    folder = RunFolder(tmp_path / "run")
    assert train_py("--config", str(file)).returncode == 0
    record, runs = read(folder.path / "stages.json"), [RunFolder(folder.path / name) for name in (
        "1-distill", "2-quantize", "3-export")]
    assert len(list((tmp_path / "own" / "teachers").iterdir())) == 1
    assert all(run.finished and read(run.receipt)["holds"] for run in runs)
    assert [len(run.metrics.read_text().splitlines()) > 10 for run in runs] == [True, False, False]
    before = read(runs[1].path / ".input.json")
    assert before["sha256"] == read(runs[0].receipt)["sha256"] == record["stages"][0]["made"][0]["student"]["sha256"]
    # What is exported is the student of the stage before, to the bit.
    assert read(runs[2].receipt)["sha256"] == read(runs[1].receipt)["sha256"] != before["sha256"]
    assert read(runs[2].path / "student-onnx" / "receipt.json")["accuracy"] == read(runs[1].receipt)["accuracy"]
    assert not (runs[1].path / "student-onnx").exists() and not (runs[0].path / "control").exists()
    assert AutoModelForSequenceClassification.from_pretrained(folder.path / "student").num_labels == 3
    report = (folder.path / "report.md").read_text()
    teacher, last = record["teacher"]["bytes_on_disk"], record["stages"][-1]["made"][0]["student"]["bytes_on_disk"]
    assert f"| 3-export | 2,995 | {last:,} | {teacher / last:.1f}x |".replace("2,995", "") in report.replace(
        f"{record['stages'][-1]['made'][0]['student']['parameters']:,}", "")
    assert "for onnx" in report and (folder.path / "stages.png").exists()
    before = [run.report.stat().st_mtime_ns for run in runs]
    assert train_py("--config", str(file)).returncode == 0
    assert [run.report.stat().st_mtime_ns for run in runs] == before
    capsys.readouterr()
    assert limbeck_command(["status", str(folder.path)]) == 0
    assert "all 3 stages finished" in capsys.readouterr().out
    assert limbeck_command(["report", str(folder.path)]) == 0
    done = train_py("--config", str(file), "stages.0.distil={training.steps: 15, optimizer.lr: 0.1}")
    assert done.returncode == 2 and "optimizer.lr was 0.005 and is 0.1" in done.stderr, done.stderr
    assert (folder.path / "report.md").exists()
    done = train_py("--config", str(file), "stages.0.distil={training.steps: 20}")
    assert done.returncode == 2 and "was begun with another student than" in done.stderr, done.stderr
    assert "2-quantize" in done.stderr and "stages.1" in done.stderr


@pytest.mark.long
def test_a_kill_loses_nothing_and_leaves_no_student_that_looks_finished(write_experiment, texts):  # noqa: F811
    """Killed in its second stage, started again: the same files as without a kill, and the first stage as it was."""
    stages = [{"distill": {}}, {"quantize": {"student": {"quantization": {"bits": 4}}, "training": {
        "steps": 60, "checkpoint_every": 10}}}]
    files = [write_experiment(name, **in_stages(texts, stages, seed=3)) for name in ("whole", "killed")]
    assert train_py("--config", str(files[0])).returncode == 0
    whole, killed = (file.parent / name for file, name in zip(files, ("whole", "killed"), strict=True))
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--config", str(files[1])],
                               stdout=subprocess.DEVNULL, start_new_session=True)
    while not list((killed / "2-quantize" / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert RunFolder(killed / "1-distill").finished and not (killed / "2-quantize" / "student").exists()
    assert not (killed / "student").exists() and not (killed / "report.md").exists()
    assert WatchStages(killed).frame(80)[1] == 1
    (killed / "2-quantize").rename(killed / "aside")  # as it was a moment before that stage began
    assert WatchStages(killed).frame(80)[1] is None
    (killed / "aside").rename(killed / "2-quantize")
    first = (killed / "1-distill" / "report.md").stat().st_mtime_ns
    assert limbeck_command(["status", str(killed)]) == 1 and limbeck_command(["report", str(killed)]) == 2
    assert not (killed / "report.md").exists() and limbeck_command(["status", str(killed)]) == 1
    EndNote(read_experiment(files[1]).experiment).leave("stopped at step 10", 75)  # as a signal would have it
    assert limbeck_command(["status", str(killed)]) == WatchStages(killed).frame(80)[1] == 75
    assert train_py("--config", str(files[1])).returncode == 0
    assert (killed / "1-distill" / "report.md").stat().st_mtime_ns == first
    one, two = (load_file(folder / "student" / "model.safetensors") for folder in (whole, killed))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_go_through_the_stages_together(write_experiment, texts):  # noqa: F811
    file = write_experiment("two", **in_stages(texts, [{"distill": {"training": {"steps": 4}}}, QUANTIZE]))
    done = on_two_ranks("--config", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    folder = file.parent / "two"
    assert read(folder / "1-distill" / "plan.json")["topology"]["data_parallel"] == 2
    assert read(folder / "2-quantize" / "student" / "receipt.json")["holds"]


@pytest.mark.parametrize(("stages", "changes", "parts"), [
    ([{"distill": {"training": {"stepz": 5}}}], {}, ["stages.0.distill", "training.stepz = 5", "training.steps"]),
    ([{"distill": {}}, {"distill": {"student": {"from_teacher": [0]}}}], {},
     ["stages.1.distill.student.from_teacher = [0]", "of the stage before"]),
    ([{"distill": {"name": "x"}}], {}, ["stages.0.distill.name", "outside of `stages`"]),
    ([{"export": {}}], {}, ["stages.0.export", "no student yet", "begin with prune"]),
    ([{"distill": {}}, {"export": {"training.steps": 5}}], {}, ["stages.1.export.training", "into a stage before"]),
    ([QUANTIZE, {"distill": {}}], {}, ["stages.1.distill", "quantized student of stage 1-quantize", "before that one"]),
    ([{"quantize": {"student": {"quantization": {"bits": 4}}}}, {"export": {"export.dtype": "bfloat16"}}], {},
     ["stages.1.export.export.dtype = 'bfloat16'", "set it in that stage"]),
    ([{"prune": {"student.prune": {"mlp": 0.5}, "training.keep_best": "accuracy"}}], {},
     ["stages.0.prune.training.keep_best = 'accuracy'", "give it training.steps"]),
    ([{"prune": {"student.sparsity": {"sparsity": 0.5}}, "until": {"drop": 0.1}}], {},
     ["stages.0.until", "no round makes more"]),
    ([{"quantize": {}}], {}, ["stages.0.quantize", "no student.quantization", "bits: 4"]),
    ([{"prune": {}}], {}, ["stages.0.prune", "no student.prune or student.sparsity"]),
    ([{"distill": {}, "export": {}}], {}, ["stages.0", "of one kind, and this has distill, export"]),
    ([{"until": {"drop": 0.1}}], {}, ["stages.0", "of one kind", "write one of prune"]),
    ([{"distill": {}, "until": {"drop": 0.1, "metric": "gsm8k.exact_match"}}], {}, ["until.metric", "held-out data"]),
    ([{"quantize": {}, "until": {"drop": 0.1}}], {}, ["stages.0.until", "quantize does the same each time"]),
    ([{"distill": {"training": {"steps": 0}}}], {}, ["stages.0.distill.training.steps = 0", "nothing would be"]),
    ([{"prune": {"student.prune": {"heads": 9}}}], {}, ["student.prune.heads = 9", "stages.0.prune"]),
    ([{"distill": {}}, {"prune": {"student.prune": {"layers": 2}}}], {},
     ["student.prune.layers = 2", "stages.1.prune"]),
    ([{"distill": {"training.steps": 5}, "distil": {"training.steps": 7}}], {}, ["stages.0", "write distill"]),
    ([{"distill": {"training": 5, "training.steps": 7}}], {}, ["training = 5", "leave one of them out"]),
    ([{"prune": {"student": None, "student.prune.heads": 9}}], {}, ["student.prune.heads = 9", "stages.0.prune"]),
    ([{"distill": {}, "until": {"drop": 0.1, "metric": "bits_per_byte"}}], {},
     ["stages.0.until.metric = 'bits_per_byte'", "accuracy"]),
    ([{"distill": {}}], {"teacher": None, "student": {"architecture": BERT}}, ["stages.0.distill", "no teacher"]),
    ([{"distill": {"student": {"from_teacher": [7]}}}], {}, ["student.from_teacher = [7]", "layers 0 to 2"]),
    ([{"distill": {}}, {"distill": {"data": {"sequence_length": 4000}}}], {},
     ["data.sequence_length = 4000", "at most 32", "stages.1.distill"]),
])
def test_mistakes_are_found_before_any_stage_starts(write_experiment, texts, stages, changes, parts):  # noqa: F811
    values = in_stages(texts, stages)
    file = write_experiment("wrong", **{**values, **changes})
    done = train_py("--config", str(file))
    assert done.returncode == 2 and not (file.parent / "wrong").exists(), done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    assert f"{file.name}:" in done.stderr


def test_a_dry_run_plans_every_stage_and_writes_nothing(write_experiment, texts):  # noqa: F811
    file = write_experiment("dry", **in_stages(texts, [{"distill": {"training.steps": 15}}, QUANTIZE, EXPORT]))
    done = train_py("--config", str(file), "--dry-run", "--json", "stages.0.distill.training.batch_size=64")
    plans = [one["plan"] for one in json.loads(done.stdout)["stages"]]
    assert [one["steps"] for one in plans] == [15, 0, 0] and [one["batch_size"] for one in plans] == [64, 32, 32]
    assert plans[0]["student_bytes"] > plans[1]["student_bytes"] == plans[2]["student_bytes"]
    assert not (file.parent / "dry").exists()
    done = train_py("--config", str(file), "--dry-run")
    assert "nothing is trained; for onnx" in done.stdout and done.returncode == 0
    assert "15 steps with the teacher" in done.stdout and "from 1-distill" in done.stdout


@pytest.mark.long
def test_a_stage_is_repeated_until_the_student_is_too_much_worse(write_experiment, texts):  # noqa: F811
    """Each round cuts the student of the round before; the last good one is handed on, and taken to few bits."""
    rounds = [{"prune": {"student": {"from_teacher": "all", "prune": {"mlp": 0.5}}},
               "until": {"metric": "cross_entropy", "drop": 0.05, "rounds": 6}}, QUANTIZE]
    file = write_experiment("rounds", **in_stages(texts, rounds))
    done = train_py("--config", str(file))
    assert done.returncode == 0, done.stderr
    folder = file.parent / "rounds"
    first, second = (stage["made"] for stage in read(folder / "stages.json")["stages"])
    kept = [one["kept"] for one in first]
    assert kept in ([True] * len(kept), [True] * (len(kept) - 1) + [False])
    inner = [read(folder / "1-prune" / f"round-{number}" / "model" / "config.json")["intermediate_size"]
             for number in range(1, len(kept) + 1)]
    assert inner == [BERT["intermediate_size"] // 2**number for number in range(1, len(kept) + 1)]
    teacher = read(folder / "stages.json")["teacher"]["cross_entropy"]
    worse = [one["student"]["figures"]["cross_entropy"] - teacher for one in first]
    assert [one <= 0.05 for one in worse] == kept
    last = [one for one in first if one["kept"]][-1]["student"]
    assert read(folder / "2-quantize" / ".input.json")["sha256"] == last["sha256"]
    assert second[0]["student"]["bytes_on_disk"] < last["bytes_on_disk"]
    report = (folder / "report.md").read_text()
    assert ("not kept*" in report.split("Each stage starts")[0]) == (False in kept) and "*cut*" not in report
    before = (folder / "1-prune" / "round-1" / "report.md").stat().st_mtime_ns
    assert train_py("--config", str(file)).returncode == 0
    assert (folder / "1-prune" / "round-1" / "report.md").stat().st_mtime_ns == before


def test_a_script_is_told_of_stages(write_experiment, texts):  # noqa: F811
    import limbeck

    with pytest.raises(limbeck.UserError, match="several stages"):
        limbeck.Trainer(limbeck.read_experiment(write_experiment("script", **in_stages(texts, [{"distill": {}}]))))


@pytest.mark.long
def test_zeros_go_through_all_stages(write_experiment, texts):  # noqa: F811
    """Pruned once, healed with the teacher, rounded to 4 bits: no weight that was zero has become another."""
    file = write_experiment("zeros", **in_stages(texts, [
        {"prune": {"student.sparsity": {"method": "sparsegpt", "sparsity": 0.5, "calibration_rows": 32}}},
        {"distill": {"training.steps": 6}}, QUANTIZE]))
    done = train_py("--config", str(file))
    assert done.returncode == 0, done.stderr
    models = [AutoModelForSequenceClassification.from_pretrained(file.parent / "zeros" / name / "student")
              for name in ("1-prune", "2-distill", "3-quantize")]
    models[2](input_ids=torch.tensor([[2, 3]]))  # unpacks its weights
    pruned, healed, rounded = (dict(model.named_modules()) for model in models)
    layers = [name for name in pruned if name.startswith("bert.encoder") and name.endswith(("query", "dense"))]
    assert len(layers) > 4
    for name in layers:
        zeros = pruned[name].weight == 0
        assert 0.45 < zeros.float().mean() < 0.55
        assert (healed[name].weight[zeros] == 0).all() and not torch.equal(healed[name].weight, pruned[name].weight)
        ones = torch.eye(zeros.shape[1])  # what transformers computes with the packed weights
        weights = (rounded[name](ones) - rounded[name](torch.zeros(1, zeros.shape[1]))).T
        assert (weights[zeros].abs() < 1e-6).all() and (weights[~zeros].abs() > 1e-4).float().mean() > 0.5


def test_students_that_are_changed_further_are_in_full_precision(write_experiment, texts):  # noqa: F811
    qat = {"quantize": {"student": {"quantization": {"bits": 4}}}}
    file = write_experiment("dtypes", **in_stages(texts, [{"distill": {}}, qat, EXPORT], export={"dtype": "bfloat16"}))
    made = [stage.source.experiment.export for stage in settings_of(read_experiment(file))]
    assert [one.dtype for one in made] == ["float32", "bfloat16", "bfloat16"]
    assert [one.to for one in made] == [(), (), ("onnx",)]


@pytest.mark.long
def test_an_export_brings_exits_along_and_no_steps_of_its_own(write_experiment, texts):  # noqa: F811
    file = write_experiment("exits", **in_stages(texts, [
        {"distill": {"objective.early_exits.layers": [0]}}, EXPORT]))
    done = train_py("--config", str(file))
    assert done.returncode == 0, done.stderr
    folder = file.parent / "exits"
    one, two = (read(folder / name / "student-early-exit" / "receipt.json") for name in ("1-distill", "2-export"))
    assert one == two and "## Early exits" in (folder / "2-export" / "report.md").read_text()
    assert [stage["made"][0]["steps"] for stage in read(folder / "stages.json")["stages"]] == [12, 0]
    assert set(read(folder / "stages.json")["stages"][1]["made"][0]["runtimes"]) == {"early-exit", "onnx"}
