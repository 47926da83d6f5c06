"""Keys that go with the task of an experiment: what does not is an error before anything is read."""

import pytest
import yaml

from trainer.errors import ExperimentErrors
from trainer.experiment.load import read_experiment

SEQUENCE, TOKEN, IMAGE = "sequence_classification", "token_classification", "image_classification"
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64}


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment of a task, and reads it with changes."""
    def read(task, *overrides):
        values = {"student": {"architecture": BERT}, "data": {"task": task, "path": "rows.jsonl"},
                  "training": {"steps": 2, "batch_size": 4, "micro_batch": 4}}
        file = tmp_path / "e.yaml"
        file.write_text(yaml.safe_dump(values))
        return read_experiment(file, overrides).experiment
    return read


@pytest.mark.parametrize("task, key, parts", [
    ("sequence_clasification", None, ["data.task = 'sequence_clasification'", f"did you mean `{SEQUENCE}`?"]),
    ("text-classification", None, ["data.task = 'text-classification'", f"did you mean `{SEQUENCE}`?"]),
    (SEQUENCE, "objective.divergence.name=KL", ["objective.divergence.name", "did you mean `forward_kl`?"]),
    (SEQUENCE, "objective.divergence=null", ["it cannot be null", "write divergence: {weight: 0}"]),
    ("text_generation", None, ["did you mean `causal_lm`?"]),
    (SEQUENCE, "metric_for_best_model=f1", ["no such key", "did you mean `training.keep_best`?"]),
    (SEQUENCE, "num_labels=4", ["no such key", "did you mean `data.class_names`?"]),
    (SEQUENCE, "data.labels=label", ["data.labels = 'label'", "for language models", "name the field in `label`"]),
    (SEQUENCE, "data.lable=intent", ["data.lable", "did you mean `data.label`?"]),
    (SEQUENCE, "data.messages=chat", ["data.messages = 'chat'", "set `task: causal_lm`"]),
    (SEQUENCE, "data.streaming=true", ["data.streaming", "remove `streaming`"]),
    (SEQUENCE, "data.words=tokens2", ["data.words", f"this is for {TOKEN}"]),
    (SEQUENCE, "data.images={size: 32}", ["data.images", f"this is for {IMAGE}"]),
    (TOKEN, "data.text_pair=other", ["data.text_pair", f"this is for {SEQUENCE}"]),
    ("causal_lm", "data.class_names=[a, b]", ["data.class_names", "for classification", f"set `task: {SEQUENCE}`"]),
    ("causal_lm", "data.image=picture", ["data.image", f"set `task: {IMAGE}`"]),
    (SEQUENCE, "data.class_names=[a, a]", ["data.class_names", "at least two classes, each with a name of its own"]),
    (IMAGE, "data.images={channels: 1, mean: [0.5, 0.4]}", ["data.images.mean", "there are 1 channels"]),
    (IMAGE, "data.images={size: 8, shift: 8}", ["data.images.shift", "out of sight"]),
    (SEQUENCE, "training.keep_best=bits_per_byte", ["training.keep_best", "use one of accuracy, macro_f1"]),
    (SEQUENCE, "training.keep_best=acuracy", ["training.keep_best = 'acuracy'", "did you mean `accuracy`?"]),
    (SEQUENCE, "training.keep_best=held_out.macro_f1", ["measured on held-out rows alone", "did you mean `macro_f1`?"]),
    (SEQUENCE, "training.keep_best=gsm8k.exact_match", ["measured on held-out rows alone", "use one of accuracy"]),
    (SEQUENCE, "training.keep_best=ece", ["no evaluation has such a value", "did you mean `calibration_error`?"]),
    (TOKEN, "training.keep_best=F1", ["no evaluation has such a value", "did you mean `macro_f1`?"]),
    ("causal_lm", "training.keep_best=eval_loss", ["did you mean `cross_entropy`?"]),
    ("causal_lm", "training.keep_best=accuracy", ["training.keep_best", "use bits_per_byte or cross_entropy"]),
    (SEQUENCE, "objective.balancing=0.1", ["objective.balancing", f"the task is {SEQUENCE}", "remove it"]),
    (SEQUENCE, "export.to=[gguf, onnx]", ["export.to", "keep onnx alone"]),
    (IMAGE, "export.to=[gguf]", ["export.to", "use onnx"]),
    (SEQUENCE, "student={path: some/bert, adapter: {kind: lora}}", ["student.adapter", "train all weights"]),
])
def test_what_does_not_go_with_the_task_is_said_with_a_way_out(experiment, task, key, parts):
    with pytest.raises(ExperimentErrors) as caught:
        experiment(task, *([key] if key else []))
    (error,) = caught.value.errors
    said = f"{error.key} = {error.value!r}: {error.problem} {error.way_out}"
    for part in parts:
        assert part in said, said


def test_what_only_a_teacher_of_text_can_do_is_refused(experiment):
    for wrong, way_out in (("objective.divergence={name: uld}", "use forward_kl"),
                           ("teacher.targets={source: hidden}", "use live, or logits")):
        with pytest.raises(ExperimentErrors) as caught:
            experiment(SEQUENCE, "teacher={path: some/teacher}", wrong)
        assert caught.value.errors[0].way_out == way_out


def test_the_ways_out_are_taken(experiment):
    assert experiment(SEQUENCE, "data.label=intent", "training.keep_best=macro_f1").data.read == ("text", "label")
    assert experiment(SEQUENCE, "objective.divergence={weight: 0}").objective.divergence.weight == 0
    assert experiment(SEQUENCE, "data.text_pair=other", "export.to=[onnx]").data.read == ("text", "text_pair", "label")
    assert experiment(TOKEN, "data.words=tokens2").data.read == ("words", "label")
    assert experiment(IMAGE, "data.images={channels: 1, mean: [0.5]}").data.images.channels == 1
    assert not experiment(SEQUENCE).data.packs and experiment("causal_lm").data.packs
