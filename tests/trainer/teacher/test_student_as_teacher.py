"""Self-distillation: the teacher is the student as it starts, in full precision."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.trainer.teacher.test_distilling import bpe, first, save
from trainer.errors import ExperimentErrors
from trainer.experiment.load import read_experiment

QAT = {"quantization": {"method": "qat", "bits": 2, "group_size": 8}}
OWN = {"teacher": {"from_student": True}, "data": {"tokenizer": {"train_vocabulary": None}},
       "objective": {"cross_entropy": 0.5, "divergence": {"temperature": 1.0}},
       "training": {"steps": 2, "evaluate_every": 2, "checkpoint_every": 2}}


@pytest.fixture
def path(tmp_path):
    return save(tmp_path / "small", bpe(300))


def test_a_quantized_student_learns_from_itself_as_it_was(train_here, path):
    trainer = train_here("qat", **OWN, student={"path": path, "architecture": None, **QAT})
    stored, teacher = load_file(f"{path}/model.safetensors"), trainer.teacher.state_dict()
    assert all(torch.equal(teacher[name], weight) for name, weight in stored.items())
    student = dict(trainer.unwrapped.named_parameters())
    assert any(not torch.equal(student[name], weight) for name, weight in stored.items() if name in student)
    assert not {one.data_ptr() for one in trainer.teacher.parameters()} & {one.data_ptr() for one in student.values()}
    assert first(trainer)["forward_kl"] > 5e-5, "what quantization changes"
    size = sum(one.nbytes for one in (*trainer.teacher.parameters(), *trainer.teacher.buffers()))
    assert trainer.plan.memory.parts["teacher"] == size, "it is planned for"
    then = yaml.safe_load(trainer.folder.experiment.read_text())
    assert then["teacher"]["path"] == path and then["teacher"]["from_student"]
    assert read_experiment(trainer.folder.experiment).experiment.teacher == trainer.experiment.teacher


def test_an_unquantized_student_begins_where_its_teacher_is(train_here, path):
    assert first(train_here("plain", **OWN, student={"path": path, "architecture": None}))["forward_kl"] < 1e-7


@pytest.mark.parametrize(("student", "teacher", "key", "parts"), [
    ({}, {}, "teacher.from_student", ["random weights", "give the student a `path`"]),
    ({"architecture": None, "from_teacher": [0]}, {}, "teacher.from_student", ["made of the teacher's layers"]),
    ({"architecture": None, "from_run": "runs/x"}, {}, "teacher.from_student",
     ["name the exported student of that run", "runs/x/student"]),
    ({"architecture": None, "path": "a/b"}, {"path": "c/d"}, "teacher.path", ["which is a/b", "keep one of the two"]),
    ({"architecture": None, "path": "a/b"}, {"train": {"steps": 3}}, "teacher.from_student", ["an origin of its own"])])
def test_other_origins_are_refused(write_experiment, student, teacher, key, parts):
    with pytest.raises(ExperimentErrors) as error:
        read_experiment(write_experiment(student=student, teacher={"from_student": True, **teacher}))
    [one] = error.value.errors
    assert one.key == key
    for part in parts:
        assert part in f"{one.problem} {one.way_out}"
