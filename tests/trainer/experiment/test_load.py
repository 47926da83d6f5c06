"""A wrong key, value or file: one message with key, place, value and the nearest right name."""

import pytest

from trainer.errors import ExperimentErrors
from trainer.experiment.experiment import Experiment
from trainer.experiment.explain import help_text, resolved_yaml, schema
from trainer.experiment.load import ELSEWHERE, all_keys, read_experiment
from trainer.failures import messages

GOOD = """\
name: good
student:
  architecture: {model_type: llama}
optimizer:
  lr: 1e-3
training: {steps: 10, batch_size: 32, micro_batch: 8}
"""


def message(tmp_path, text: str, *overrides: str) -> str:
    file = tmp_path / "e.yaml"
    file.write_text(text)
    with pytest.raises(ExperimentErrors) as caught:
        read_experiment(file, list(overrides))
    return messages(caught.value)


def read(tmp_path, text: str, *overrides: str):
    file = tmp_path / "e.yaml"
    file.write_text(text)
    return read_experiment(file, list(overrides))


def test_scientific_notation_is_a_number(tmp_path):
    assert read(tmp_path, GOOD).experiment.optimizer.lr == 1e-3


def test_numbers_without_a_point_are_numbers_everywhere_and_quoted_ones_are_text(tmp_path):
    text = GOOD.replace("{model_type: llama}", "{model_type: llama, a: 1e6, b: '1e6', c: x1e6}")
    architecture = read(tmp_path, text, "student.architecture.d=2e-5").experiment.student.architecture
    assert architecture == {"model_type": "llama", "a": 1e6, "b": "1e6", "c": "x1e6", "d": 2e-5}


def test_override_wins_and_is_remembered(tmp_path):
    source = read(tmp_path, GOOD, "optimizer.lr=3e-4", "student.quantization.bits=8")
    assert source.experiment.optimizer.lr == 3e-4
    assert source.experiment.student.quantization.bits == 8
    assert source.origin("optimizer.lr") == "override `optimizer.lr=3e-4`"
    assert source.origin("training.steps") == f"{tmp_path}/e.yaml:6"
    assert source.origin("objective.divergence.temperature") == "default"


@pytest.mark.parametrize(("text", "overrides", "parts"), [
    (GOOD.replace("  lr", "  lrr"), (),
     ["e.yaml:5: optimizer.lrr = 0.001", "no such key", "did you mean `optimizer.lr`"]),
    (GOOD, ("data.sequence_lenght=64",), ["override `data.sequence_lenght=64`", "= 64", "`data.sequence_length`"]),
    (GOOD, ("optimizer.learning_rate=1",), ["optimizer.learning_rate = 1: no such key", "did you mean `optimizer.lr`"]),
    (GOOD, ("data.max_length=8",), ["data.max_length = 8: no such key", "did you mean `data.sequence_length`"]),
    (GOOD + "temperature: 3\n", (), ["e.yaml:7: temperature = 3", "did you mean `objective."]),
    (GOOD.replace("1e-3", "fast"), (), ["e.yaml:5: optimizer.lr = 'fast'", "valid number", "Peak learning rate"]),
    (GOOD.replace("1e-3", "-1"), (), ["e.yaml:5: optimizer.lr = -1", "greater than 0"]),
    (GOOD, ("optimizer.lr=.inf",), ["optimizer.lr = inf", "finite"]),
    (GOOD, ("optimizer=3",), ["optimizer = 3", "its keys are name, lr"]),
    (GOOD, ("precision.dtype=fp8",), ["precision.dtype = 'fp8'", "'fp32', 'bf16' or 'fp16'"]),
    (GOOD.replace("micro_batch: 8", "micro_batch: 5"), (),
     ["e.yaml:6: training.micro_batch = 5", "must divide batch_size (32)", "1, 2, 4, 8, 16, 32"]),
    (GOOD.replace("steps: 10, ", ""), (), ["e.yaml:6: training.steps = None", "exactly one of `steps` and `epochs`"]),
    (GOOD.replace("training:", "#"), (), ["training", "this key is required", "How long and in which batches"]),
    (GOOD.replace("  architecture: {model_type: llama}", "  quantization: {bits: 4}"), (),
     ["e.yaml:2: student", "the student has no origin", "`from_teacher`"]),
    (GOOD.replace("model_type: llama", "hidden_size: 3"), (), ["student.architecture", "lack `model_type`"]),
    (GOOD, ("student.from_teacher=[0]", "student.architecture=null"),
     ["student.from_teacher = [0]", "no teacher to take layers from"]),
    (GOOD, ("student.from_teacher=[0]",), ["student.from_teacher", "two origins"]),
    (GOOD, ("teacher.path=x", "student.from_teacher=[2, 1]", "student.architecture=null"),
     ["student.from_teacher = [2, 1]", "rising order"]),
    (GOOD, ("objective.divergence.weight=0.5",), ["objective.divergence.weight = 0.5", "no teacher to learn from"]),
    (GOOD, ("objective.cross_entropy=0",), ["every weight of the objective is zero"]),
    (GOOD, ("objective.divergence.temperature=0",), ["objective.divergence.temperature = 0", "greater than 0"]),
    (GOOD, ("teacher.dtype=float32",), ["teacher", "neither `path` nor `architecture`"]),
    (GOOD, ("teacher.architecture={model_type: llama}",), ["teacher.train", "random weights", "train: {steps: 500}"]),
    (GOOD, ("teacher.path=x", "teacher.train.steps=3"), ["teacher.train", "also to be trained from scratch"]),
    (GOOD, ("data.prompt=q",), ["data.prompt", "belong together"]),
    (GOOD, ("data.prompt=q", "data.response=a", "data.messages=m"), ["data.messages = 'm'", "either chat messages"]),
    (GOOD, ("data.tokenizer.path=x", "data.tokenizer.train_vocabulary=300"), ["both loaded", "keep one"]),
    (GOOD, ("student.quantization.bits=5",), ["student.quantization.bits = 5", "8, 4, 3, 2 or 1"]),
    (GOOD, ("student.quantization={bits: 4, kind: ternary}",),
     ["student.quantization.bits = 4", "ternary weights have 2 bits, not 4"]),
    (GOOD, ("student.quantization.scales=absmean",), ["quantization.scales = 'absmean'", "minmax or mse or learned"]),
    (GOOD, ("student.quantization={bits: 2, bits_schedule: [[0, 8], [0.5, 4]]}",),
     ["student.quantization.bits_schedule", "ends with the bits that are exported (2)", "[[0, 8], [0.5, 2]]"]),
    (GOOD, ("student.quantization.layers=[{match: a, kind: fp8, bits: 4}]",), ["quantization.layers", "fp8 weights"]),
    (GOOD, ("student.quantization.smooth=0.5",), ["quantization.smooth", "after training", "`method` to rtn or gptq"]),
    (GOOD, ("student.quantization={method: gptq, scales: learned}",), ["quantization.scales", "nothing is learned"]),
    (GOOD, ("student.quantization={method: rtn, budget: 3MB, kind: fp8}",), ["quantization.budget = '3MB'", "whole"]),
    (GOOD, ("student.quantization={method: rtn, budget: 3XB}",), ["quantization.budget = '3XB'"]),
    (GOOD, ("name=../up",), ["name = '../up'", "only letters, digits, '.', '_' and '-'"]),
    (GOOD + "name: again\n", (), ["e.yaml:7", "name: the key stands twice", "remove one"]),
    ("name: [\n", (), ["e.yaml:2", "not valid YAML"]),
    ("", (), ["e.yaml", "the file is empty"]),
    ("- 1\n", (), ["no `key: value` pairs"]),
    ("a: &a [*a]\n", (), ["e.yaml:1", "contains itself"]),
    (GOOD, ("lr",), ["override `lr`", "written key=value"]),
    (GOOD, ("optimizer.lr=",), ["override `optimizer.lr=`", "the value is missing", "optimizer.lr=null"]),
    (GOOD, ("optmizer.lr=1",), ["override `optmizer.lr=1`: optmizer = {'lr': 1}", "did you mean `optimizer`"]),
    (GOOD, ("training.steps.x=1",), ["override `training.steps.x=1`: training.steps = {'x': 1}", "valid integer"]),
    (GOOD, ("teacher=some/model",), ["teacher = 'some/model'", "write teacher: {path: some/model}"]),
    (GOOD.replace("  lr: 1e-3", "  lrate: 1e-3"), (), ["e.yaml:5: optimizer.lrate = 0.001: no such key",
                                                       "-> did you mean `optimizer.lr`?"]),
    (GOOD.replace("  lr", "\tlr"), (), ["e.yaml:5", "not valid YAML", "indent with spaces, not tabs"]),
    (GOOD, ("optimizer.lr=[",), ["override `optimizer.lr=[`", "not valid YAML"]),
    (GOOD + "!!python/object/apply:os.system ['true']: 1\n", (), ["e.yaml:7"]),
])
def test_message(tmp_path, text, overrides, parts):
    said = message(tmp_path, text, *overrides)
    for part in parts:
        assert part in said, said


def test_missing_file_names_the_nearest():
    with pytest.raises(ExperimentErrors) as caught:
        read_experiment("configs/quikstart.yaml")
    said = messages(caught.value)
    assert "configs/quikstart.yaml: cannot read this file" in said
    assert "did you mean configs/quickstart.yaml?" in said


def test_aliases_of_aliases_do_not_exhaust_memory(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert "too many values" in message(tmp_path, bomb)


def test_several_mistakes_are_told_together(tmp_path):
    said = message(tmp_path, GOOD, "optimizer.lr=x", "training.steps=-1")
    assert said.count("error: ") == 2


def test_resolved_experiment_reads_back_to_itself(tmp_path):
    first = read(tmp_path, GOOD, "student.quantization.bits=8", "optimizer.lr=2e-5").experiment
    file = tmp_path / "resolved.yaml"
    file.write_text(resolved_yaml(first))
    assert read_experiment(file).experiment == first


def test_frozen(tmp_path):
    experiment = read(tmp_path, GOOD).experiment
    with pytest.raises(ValueError, match="frozen"):
        experiment.optimizer.lr = 1.0


def test_every_key_has_its_line_of_help():
    text = help_text()
    for key, info in all_keys(Experiment).items():
        assert info.description and "\n" not in info.description, f"{key} says nothing about itself"
        assert info.description in text


def test_shipped_schema_is_of_this_tree():
    import json

    from tests.conftest import ROOT
    from trainer.sweep.sweep_schema import sweep_schema

    for name, now in {"experiment": schema(), "sweep": sweep_schema()}.items():
        assert json.loads((ROOT / "configs" / f"{name}.schema.json").read_text()) == now, "run `make schema`"


def test_schema_accepts_and_refuses_what_the_reader_does(tmp_path):
    import jsonschema
    import yaml

    validator = jsonschema.Draft202012Validator(schema())
    from tests.conftest import ROOT

    for file in sorted((ROOT / "configs").glob("[!s]*.yaml")):  # but for sweeps
        assert not list(validator.iter_errors(yaml.safe_load(file.read_text()))), file
    wrong = yaml.safe_load(GOOD) | {"optimiser": {}}
    assert list(validator.iter_errors(wrong))


def test_names_of_other_trainers_lead_to_keys_that_are_there():
    there = all_keys(Experiment)
    assert not [key for key in ELSEWHERE.values() if key not in there]
    assert not [name for name in ELSEWHERE if name in {key.rpartition(".")[2] for key in there}]
