"""Whole runs in processes of their own: from a YAML file to a student that anybody can load."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, TINY, _train, fork, launch, train_py
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_lines
from trainer.run.run_status import STATUS, Life, status
from trainer.run.watch import Watch

DISTIL = {
    "teacher": {"architecture": TINY, "train": {"steps": 6, "lr": 3e-3}},
    "student": {"architecture": None, "from_teacher": [0, 2], "quantization": {"bits": 4, "group_size": 16}},
    "objective": {"cross_entropy": 0.4, "divergence": {"weight": 0.6, "temperature": 2.0}},
    "training": {"steps": 6, "checkpoint_every": 3, "evaluate_every": 3, "keep_checkpoints": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus, cache):
    """A finished run of the whole main job, launched once."""
    import yaml

    folder = tmp_path_factory.mktemp("finished")
    values = {
        "name": "whole", **DISTIL,
        "data": {"path": str(corpus), "sequence_length": 32, "tokenizer": {"train_vocabulary": 300},
                 "validation": {"fraction": 0.1, "rows": 6}},
        "report": {"sample_tokens": 4, "prompt": "The"},
        "run": {"folder": str(folder / "run"), "cache": str(cache), "trackers": ["tensorboard"]},
    }
    values["training"] = {**values["training"], "batch_size": 8, "micro_batch": 4}
    del values["student"]["architecture"]
    file = folder / "whole.yaml"
    file.write_text(yaml.safe_dump(values))
    with watched(folder / "run") as WATCHED[folder / "run"]:
        done = launch("--config", str(file))
    assert done.returncode == 0, done.stderr[-4000:]
    return file, folder / "run", done


WATCHED = {}  # by run folder and model: what `limbeck status` and `limbeck watch` said while it was made


@contextmanager
def watched(run):
    """Look at a run from its folder while it goes on."""
    said, over = {}, threading.Event()

    def look():
        watch, folder = None, RunFolder(run)
        while not over.wait(0.1):
            if (model := Life.of(folder).content.get("model", over)) is over:
                continue
            watch = watch or Watch(run)
            told, (frame, code) = status(run)[0], watch.frame(100)
            before, codes = said.setdefault(model, (("", []), set()))
            codes.add(code)
            if Life.of(folder).content.get("model", over) == model and len(frame) >= len(before[1]):
                said[model] = (told, frame), codes

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield said
    finally:
        over.set()
        thread.join()


def test_a_run_is_watched_from_its_folder_from_planning_to_its_end(finished):
    _, run, _ = finished
    assert list(WATCHED[run]) == [None, "teacher", "student", "control"]
    for model, ((told, frame), codes) in WATCHED[run].items():
        assert None in codes and codes <= {None, 0}, "it goes on"
        if model:
            assert f": running, {model}: " in told
            assert frame[0].startswith(f"whole  {model}: ") and "step " in frame[1] and " learned)" in "".join(frame)
    assert not (run / STATUS).exists()
    frame, code = Watch(run).frame(80)
    assert code == 0 and frame[0] == f"whole  finished, see {run / 'report.md'}"[:80]
    assert frame[1].startswith("step 6/6 ━━━━━━━━━━━━━━━━━━━━ 100%") and "held-out, bits per byte" in frame
    assert "newest checkpoint step-00000006" in " ".join(frame)


def test_run_folder_holds_everything(finished):
    _, run, done = finished
    names = {path.name for path in run.iterdir()}
    assert {"experiment.yaml", "plan.json", "metrics.jsonl", "checkpoints", "student", "report.md",
            "comparison.json", "control"} <= names
    assert not [name for name in names if name.startswith(".") and name != ".lock"], "nothing half-written is left"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    lines = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(0.4 * line["cross_entropy"] + 0.6 * line["forward_kl"], rel=1e-5)
    assert "held-out" in done.stdout and "Traceback" not in done.stderr


def test_report_compares_the_three_models_and_shows_pictures(finished):
    _, run, _ = finished
    report = (run / "report.md").read_text()
    found = json.loads((run / "comparison.json").read_text())
    for model in ("teacher", "student", "control"):
        assert f"| {model} |" in report and f"{found[model]['bits_per_byte']:.4f}" in report
    for picture in ("loss.png", "held_out.png", "size.png"):
        assert f"]({picture})" in report
        assert (run / picture).read_bytes().startswith(b"\x89PNG") and (run / picture).stat().st_size > 5000
    assert found["student"]["bytes_on_disk"] * 1.5 < found["teacher"]["bytes_on_disk"]
    before = (run / "report.md").read_bytes()
    (run / "report.md").unlink()
    done = subprocess.run([sys.executable, "-m", "limbeck", "report", run], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and (run / "report.md").read_bytes() == before


def test_receipt_says_equal_logits(finished):
    receipt = json.loads((finished[1] / "student" / "receipt.json").read_text())
    assert receipt["holds"] and receipt["largest_difference"] == 0 and receipt["argmax_agreement"] == 1
    held_out = [line["held_out"] for line in read_lines(finished[1] / "metrics.jsonl") if "held_out" in line]
    assert receipt["bits_per_byte"] == pytest.approx(held_out[-1]["bits_per_byte"], rel=1e-6), \
        "the file scores what the model in training scored"


CLIENT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer('The cat sees', return_tensors='pt').input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0]))
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[2])
"""


def test_student_in_a_fresh_transformers_process_is_the_trained_one(finished, tmp_path):
    """Independent of our client: the checkpoint's weights through the quantizer, against what transformers loads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from strategies.quantization.qat import prepare
    from strategies.quantization.quantizer import WeightQuantizer

    _, run, _ = finished
    done = subprocess.run([sys.executable, "-c", CLIENT, run / "student", tmp_path / "logits.pt"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("The cat sees")
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    config = AutoConfig.from_pretrained(run / "student")
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    prepare(model, WeightQuantizer(4, 16))
    weights = load_file(run / "checkpoints" / "step-00000006" / "model.safetensors")
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(run / "student")("The cat sees", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, theirs)


def test_control_is_the_same_student_without_teacher(finished):
    _, run, _ = finished
    control = [line for line in read_lines(run / "control" / "metrics.jsonl") if "loss" in line]
    student = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert all("forward_kl" not in line and line["loss"] == line["cross_entropy"] for line in control)
    assert control[0]["cross_entropy"] == student[0]["cross_entropy"], "same weights and same tokens at the start"
    assert [line["tokens"] for line in control] == [line["tokens"] for line in student]


def test_tensorboard_has_the_curves(finished):
    (events,) = (finished[1] / "limbeck").glob("events*") if (finished[1] / "limbeck").exists() else \
        list(finished[1].rglob("events*"))[:1]
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert len(accumulator.Scalars("loss")) == 6 and accumulator.Scalars("held_out/bits_per_byte")


def test_finished_run_says_so_and_does_nothing(finished):
    file, run, _ = finished
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    done = train_py("--config", str(file), "training.keep_checkpoints=7")
    assert done.returncode == 0 and "is finished: see" in done.stdout
    assert "not used, since it is finished: training.keep_checkpoints" in done.stdout
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


def test_resolved_experiment_reproduces_the_run(finished, tmp_path):
    _, run, _ = finished
    done = train_py("--config", str(run / "experiment.yaml"), f"run.folder={tmp_path / 'again'}",
                    "report.control=false", "run.trackers=[]")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "teacher from the cache" in done.stdout
    one, two = ([line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
                for folder in (run, tmp_path / "again"))
    assert one == two
    assert load_file(run / "student" / "model.safetensors").keys()
    for name, tensor in load_file(run / "student" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "again" / "student" / "model.safetensors")[name])


def test_folder_of_another_experiment_is_left_alone(finished):
    file, run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = train_py("--config", str(file), "optimizer.lr=0.5")
    assert done.returncode == 2
    assert f"optimizer.lr = 0.5: {run} belongs to another experiment" in done.stderr
    assert "optimizer.lr was 0.0003 and is 0.5" in done.stderr and f"from_run: {run}" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_killed_run_resumes_to_the_same_weights(write_experiment, tmp_path):
    """kill -9 in the middle; the same command goes on, and ends where an undisturbed run ends, to the last bit."""
    changes = {"training": {"steps": 60, "checkpoint_every": 7, "evaluate_every": 30},
               "student": {"architecture": {**TINY, "attention_dropout": 0.1}}}
    whole, cut = write_experiment("whole", **changes), write_experiment("cut", **changes)
    assert train_py("--config", str(whole)).returncode == 0
    process = fork({}, [tmp_path / "stdout", tmp_path / "stderr"], _train, ("--config", str(cut)))
    saved = tmp_path / "cut" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(saved.glob("step-*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    steps = sorted(path.name for path in saved.glob("step-*"))
    assert steps and steps[-1] != "step-00000060", "the kill came too late to show anything"
    done = train_py("--config", str(cut))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resumed at step {int(steps[-1][5:])}" in done.stdout
    one, two = ([(line["step"], line["loss"]) for line in read_lines(tmp_path / name / "metrics.jsonl")
                 if "loss" in line] for name in ("whole", "cut"))
    assert one == two and len(one) == 60
    for name, tensor in load_file(tmp_path / "whole" / "student" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "cut" / "student" / "model.safetensors")[name]), name


def test_plain_fine_tuning_without_a_teacher_on_a_stream(write_experiment, tmp_path):
    file = write_experiment("plain", data={"streaming": True}, precision={"dtype": "bf16"},
                            export={"dtype": "bfloat16"}, student={"quantization": {"bits": 8}})
    done = train_py("--config", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    report = (tmp_path / "plain" / "report.md").read_text()
    assert "fine-tuned without a teacher" in report and "| teacher |" not in report
    assert json.loads((tmp_path / "plain" / "student" / "receipt.json").read_text())["largest_difference"] == 0


def test_student_from_a_local_folder_in_the_hubs_layout(finished, write_experiment, tmp_path):
    """A teacher and a student by path, as from the hub: the cached teacher's folder is such a folder."""
    teacher = next(path for path in (finished[0].parent.parent).glob("cache*/teachers/*/student"))
    file = write_experiment(
        "hub", teacher={"path": str(teacher), "architecture": {"model_type": "llama", "hidden_size": 32}},
        student={"architecture": None, "path": str(teacher), "quantization": {"bits": 8}},
        data={"tokenizer": {"train_vocabulary": None}}, report={"control": False})
    done = train_py("--config", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    first = read_lines(tmp_path / "hub" / "metrics.jsonl")[0]
    assert 0 < first["forward_kl"] < 0.01, "an 8-bit copy of the teacher begins next to it"
    wrong = train_py("--config", str(file), f"run.folder={tmp_path / 'x'}", "teacher.architecture.hidden_size=64")
    assert wrong.returncode == 2 and "teacher.architecture.hidden_size = 64" in wrong.stderr
    assert "has 32" in wrong.stderr
