"""A run that goes on for longer, a student that starts from another run, and one that is exported as it is."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import train_py
from tests.trainer.data.test_epochs import LENGTHS, ten  # noqa: F401 - a fixture
from trainer.early_checks import next_start
from trainer.errors import OtherRun, UserError
from trainer.experiment.load import read_experiment
from trainer.experiment.lr_schedule import LearningRate
from trainer.run.folder import RunFolder, training_identity
from trainer.run.metrics import read_lines

ALONE = {"report": {"control": False}}
BROUGHT = {"data": {"tokenizer": {"train_vocabulary": None}}}
TEACHER = {"architecture": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "num_key_value_heads": 1}, "train": {"steps": 2}}


def steps_of(folder):
    return {line["step"]: line for line in read_lines(folder.metrics) if "loss" in line}


def weights(folder, step):
    return load_file(folder.checkpoints / f"step-{step:08d}" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_goes_on_and_its_control_with_it(run_experiment, write_experiment, capsys):
    """With the schedule begun anew it is, to the bit, the longer run that was to begin anew there all along."""
    _, folder = run_experiment("run", teacher=TEACHER)
    first = {file.name: file.read_bytes() for file in (folder.report, folder.comparison)}
    exported = load_file(folder.student / "model.safetensors")
    capsys.readouterr()
    longer = {"teacher": TEACHER, "training": {"steps": 6}, "schedule": {"restarts": [4]}}
    run_experiment("run", **longer)
    out = " ".join(capsys.readouterr().out.split())
    assert "goes on from step 4 to 6 (schedule.restarts was [] and is [4]; training.steps was 4 and is 6)" in out
    _, whole = run_experiment("whole", **longer)
    assert same(weights(folder, 6), weights(whole, 6))
    assert [line["loss"] for line in steps_of(folder).values()] == [line["loss"] for line in steps_of(whole).values()]
    control = RunFolder(folder.control)
    assert same(weights(control, 6), weights(RunFolder(whole.control), 6)) and len(steps_of(control)) == 6
    kept = folder.earlier / "step-00000004"
    assert {name: (kept / name).read_bytes() for name in first} == first
    assert same(load_file(kept / "student" / "model.safetensors"), exported) and (kept / "loss.png").exists()
    assert folder.finished and json.loads(folder.receipt.read_text())["holds"]
    assert "went on at step 4: training.steps 4 → 6" in folder.report.read_text()
    assert yaml.safe_load(folder.experiment.read_text())["training"]["steps"] == 6
    run_experiment("run", **longer)
    assert "is finished" in capsys.readouterr().out
    file = write_experiment("run", **longer)  # as a dry run says
    for change, said in (("seed=0", "is finished, and nothing is done"), ("training.steps=9", "goes on from step 6 "),
                         ("report.prompt=x", "is trained; what report.prompt changes is made again"),
                         ("optimizer.lr=1e-5", "refused: "), (f"run.folder={folder.path}-2", "-2: a new run")):
        assert said in next_start(read_experiment(file, [change]).experiment)
    with pytest.raises(OtherRun, match="training.steps was 6 and is 4") as refused:
        run_experiment("run", teacher=TEACHER)
    assert "6 steps are done" in refused.value.way_out and refused.value.key == "schedule.restarts"


def test_learning_rates_go_on_as_one_schedule_unless_begun_anew(train_here, capsys):
    train_here("run", training={"steps": 2, "checkpoint_every": 2})
    trainer = train_here("run", training={"steps": 6, "checkpoint_every": 2}, until=5)
    said = " ".join(capsys.readouterr().out.split())
    rate = LearningRate(peak=3e-3, steps=6, shape="cosine", warmup=0.05, final=0.1)
    assert f"so that the next is {rate(2):.2e}; `schedule.restarts: [2]` warms up and decays anew from here" in said
    assert "a2" not in said
    again = train_here("run", training={"steps": 6, "checkpoint_every": 2})  # interrupted while it went on
    lines = steps_of(again.folder)
    assert [lines[step]["learning_rate"] for step in (3, 4, 5, 6)] == [rate(step) for step in (2, 3, 4, 5)]
    assert trainer.folder.extensions() == [{"step": 2, "changed": {"training.steps": [2, 6]}}]


def test_restarts_warm_up_and_decay_by_themselves():
    rate = LearningRate(peak=1.0, steps=30, shape="linear", warmup=2, final=0.0, restarts=(10, 20))
    part = LearningRate(peak=1.0, steps=10, shape="linear", warmup=2, final=0.0)
    assert [rate(step) for step in range(30)] == [part(step) for step in range(10)] * 3


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_more_epochs_see_every_row_as_often(train_here, ten, micro_batch):  # noqa: F811
    """The last step of the first end was short: the rows that it lacked belong to the next epoch."""
    training = {**LENGTHS, "micro_batch": micro_batch}
    once = train_here("run", data=ten, training={**training, "epochs": 1})
    tokens = sum(line["tokens"] for line in steps_of(once.folder).values())
    assert once.state.step == 3 and once.state.rows == 10
    twice = train_here("run", data=ten, training={**training, "epochs": 2}, until=4)
    twice = train_here("run", data=ten, training={**training, "epochs": 2})
    assert twice.state.step == 6 and twice.state.rows == 20
    lines = steps_of(twice.folder)
    assert sum(line["tokens"] for line in lines.values()) == 2 * tokens
    assert sum(lines[step]["tokens"] for step in (4, 5, 6)) == tokens


@pytest.mark.parametrize(("changes", "key", "way_out"), [
    ({"training": {"steps": 2}}, "training.steps", "4 steps are done: a run can go on for longer with a higher"),
    ({"training": {"steps": 8}, "schedule": {"restarts": [2]}}, "schedule.restarts", "its schedule restart at 4 or"),
    ({"schedule": {"restarts": [2]}}, "schedule.restarts", "a higher training.steps"),
    ({"optimizer": {"lr": 1e-4}}, "optimizer.lr", "from_run: "),
    ({"student": {"architecture": {"num_hidden_layers": 2}}}, "student.architecture.num_hidden_layers", "choose anoth"),
])
def test_a_changed_key_is_answered_with_the_way_that_there_is(write_experiment, train_here, changes, key, way_out):
    train_here("run")
    experiment = read_experiment(write_experiment("run", **changes)).experiment
    with pytest.raises(OtherRun, match="belongs to another experiment") as refused:
        RunFolder(experiment.folder).check(experiment)
    assert refused.value.key == key and way_out in refused.value.way_out


def test_bits_that_follow_a_schedule_do_not_move_again(write_experiment, train_here):
    quantization = {"quantization": {"bits": 4, "group_size": 16, "bits_schedule": [[0, 8], [0.5, 4]]}}
    train_here("run", student=quantization)
    experiment = read_experiment(write_experiment("run", student=quantization, training={"steps": 8})).experiment
    with pytest.raises(OtherRun, match="training.steps was 4 and is 8") as refused:
        RunFolder(experiment.folder).check(experiment)
    assert "cannot be made longer" in refused.value.way_out and "from_run: " in refused.value.way_out


def test_the_command_line_names_the_line_of_the_changed_key(write_experiment, train_here):
    folder = train_here("run").folder
    file = write_experiment("run", optimizer={"lr": 0.5})
    line = 1 + file.read_text().splitlines().index("  lr: 0.5")
    done = train_py("--config", str(file))
    assert done.returncode == 2, done.stdout
    assert f"{file}:{line}: optimizer.lr = 0.5: {folder.path} belongs to another" in done.stderr
    assert not (folder.path / "ended.json").exists()


def test_a_control_is_exported_as_the_student_is_when_that_is_made_again(run_experiment):
    """Otherwise the report would compare a student of few bits with a control of many."""
    _, folder = run_experiment("run", teacher=TEACHER, report={"control": False})
    run_experiment("run", teacher=TEACHER)
    found = json.loads(folder.comparison.read_text())
    assert "control" in found and "| control |" in folder.report.read_text()
    run_experiment("run", teacher=TEACHER, student={"quantization": {"method": "rtn", "bits": 4, "group_size": 16}})
    found = json.loads(folder.comparison.read_text())
    assert found["control"]["bytes_on_disk"] == found["student"]["bytes_on_disk"]
    assert "quantization_config" in json.loads((RunFolder(folder.control).student / "config.json").read_text())


def test_what_a_stopped_run_is_to_export_may_change(run_experiment, train_here):
    """Its folder tells of the values of now, and is not made again at the next start."""
    train_here("run", training={"checkpoint_every": 2}, until=3, **ALONE)
    changed = {"training": {"checkpoint_every": 2}, "export": {"dtype": "bfloat16"}, **ALONE}
    _, folder = run_experiment("run", **changed)
    assert yaml.safe_load(folder.experiment.read_text())["export"]["dtype"] == "bfloat16"
    assert not folder.afterwards(read_experiment(folder.experiment).experiment.model_dump(mode="json"))


def test_a_teacher_that_an_earlier_version_trained_is_found(write_experiment):
    """Keys that came later count for nothing where they are not set."""
    experiment = read_experiment(write_experiment(teacher=TEACHER)).experiment.as_teacher("")
    named = training_identity(experiment)
    assert not {key for key in named if key.startswith(("data.sources", "data.system", "data.input_ids", "data.label"))}
    assert not {"schedule.restarts", "student.from_run", "student.adapter", "training.keep_best"} & named.keys()


# ---- from another run

def test_a_student_starts_from_another_run(run_experiment, train_here, write_experiment, tmp_path):
    """Nothing is trained here: the exported student is the one that the other run trained."""
    source = train_here("source", training={"steps": 4, "checkpoint_every": 2})
    own = {"architecture": None, "from_run": str(source.folder.path)}
    _, folder = run_experiment("as-it-is", student=own, training={"steps": 0}, **BROUGHT, **ALONE)
    trained = {name: tensor.detach() for name, tensor in source.unwrapped.named_parameters()}
    assert same(load_file(folder.student / "model.safetensors"), trained)
    assert json.loads(folder.receipt.read_text())["holds"] and not steps_of(folder)
    assert "exported as it is, without any training" in folder.report.read_text()
    card = (folder.student / "README.md").read_text()
    assert "begun with random weights, by way of 1 earlier run" in card and "| `source` |" in card
    held = [line["held_out"] for line in read_lines(folder.metrics) if "held_out" in line]
    assert held[0]["bits_per_byte"] == pytest.approx(json.loads(folder.receipt.read_text())["bits_per_byte"], rel=1e-6)
    earlier = train_here("earlier", training={"steps": 0}, **BROUGHT, student={
        **own, "from_run": str(source.folder.checkpoints / "step-00000002")})
    assert same(weights(earlier.folder, 0), weights(source.folder, 2))
    # It trains on, with other values.
    run_experiment("as-it-is", student=own, training={"steps": 2}, **BROUGHT, **ALONE)
    assert len(steps_of(folder)) == 2 and folder.finished


@pytest.mark.parametrize("group_size", [16, 8])
def test_learned_scales_come_along_where_the_grid_is_the_same(train_here, group_size):
    learned = {"method": "qat", "bits": 4, "scales": "learned"}
    source = train_here("source", student={"quantization": {**learned, "group_size": 16}}, optimizer={"lr": 3e-2})
    warm = train_here("warm", student={"architecture": None, "from_run": str(source.folder.path), "quantization": {
        **learned, "group_size": group_size}}, optimizer={"lr": 1e-30}, training={"steps": 1}, **BROUGHT)
    ours, theirs = weights(warm.folder, 1), weights(source.folder, 4)
    plain = [name for name in theirs if name.endswith(".weight")]
    assert plain and all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-12) for name in plain)
    scales = [name for name in theirs if "ratio" in name or "scale" in name]
    fresh = [name for name in scales if ours[name].shape != theirs[name].shape]
    if group_size == 16:
        assert scales and not fresh and all(torch.allclose(ours[name], theirs[name]) for name in scales)
    else:
        assert fresh == scales


def test_a_model_that_is_there_is_quantized_and_exported_without_training(run_experiment, train_here, tmp_path):
    source = train_here("source")
    _, folder = run_experiment("small", student={
        "architecture": None, "from_run": str(source.folder.path),
        "quantization": {"method": "rtn", "bits": 4, "group_size": 16}}, training={"steps": 0}, **BROUGHT, **ALONE)
    packed = [name for name in load_file(folder.student / "model.safetensors") if name.endswith("weight_packed")]
    assert len(packed) == 3 * 7 and json.loads(folder.receipt.read_text())["holds"]
    run_experiment("small", student={
        "architecture": None, "from_run": str(source.folder.path),
        "quantization": {"method": "rtn", "bits": 8, "group_size": 16}}, training={"steps": 0}, **BROUGHT, **ALONE)
    assert json.loads((folder.student / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"]["weights"]["num_bits"] == 8


def test_what_cannot_be_started_from(run_experiment, train_here, tmp_path):
    source = train_here("source").folder
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def refused(path):
        with pytest.raises(UserError) as error:
            run_experiment("new", student={"architecture": None, "from_run": str(path)}, **BROUGHT)
        assert error.value.key == "student.from_run", error.value
        return f"{error.value.problem} -> {error.value.way_out}"

    assert "there is no such folder" in refused(tmp_path / "nowhere")
    assert "name it in `student.path` instead" in refused(tmp_path / "model")
    file = source.checkpoints / "step-00000004" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\0\1\2\3")
    assert re.search(r"no checkpoint there is as it was written .*SHA-256 differs", refused(source.path))
    file.write_bytes(content)
    (source.path / "checkpoints").rename(source.path / "moved")
    assert "this run has no checkpoint yet" in refused(source.path)


@pytest.mark.parametrize(("changes", "key", "problem"), [
    ({"student": {"from_run": "runs/other"}}, "student.from_run", "two origins"),
    ({"student": {"architecture": None, "from_run": "runs/tiny/checkpoints"}, "run": {"folder": "runs/tiny"}},
     "student.from_run", "this is the run itself"),
    ({"training": {"steps": 0}}, "training.steps", "random weights"),
    ({"student": {"architecture": None, "path": "m", "quantization": {"method": "qat"}}, "training": {"steps": 0}},
     "student.quantization.method", "qat is part of training"),
    ({"schedule": {"restarts": [3, 2]}}, "schedule.restarts", "rising order"),
])
def test_settings_that_cannot_be(write_experiment, changes, key, problem):
    from trainer.errors import ExperimentErrors

    with pytest.raises(ExperimentErrors) as wrong:
        read_experiment(write_experiment(**changes))
    assert wrong.value.errors[0].key == key and problem in wrong.value.errors[0].problem


def test_a_restart_after_the_end_is_refused(train_here):
    with pytest.raises(UserError, match="the run has 4 steps") as refused:
        train_here(schedule={"restarts": [4]})
    assert refused.value.key == "schedule.restarts"
