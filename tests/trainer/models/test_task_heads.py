"""Models and the task of the data: what transformers has no head for, and classifiers of other classes."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from trainer.cli import limbeck
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data
from trainer.experiment.model_nodes import Student, Teacher
from trainer.models.classifier_trials import check_classifier
from trainer.models.configs import student_config, teacher_config
from trainer.models.task_heads import Task

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
NAMES = ("bad", "good", "neutral")


@pytest.fixture
def classifier(tmp_path):
    """The folder of a trained classifier with classes."""
    def make(*names):
        config = BertConfig(**SHAPE, id2label=dict(enumerate(names)),
                            label2id={name: number for number, name in enumerate(names)})
        BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
        return Teacher(path=str(tmp_path / "teacher"))
    return make


def said(call):
    with pytest.raises(UserError) as caught:
        call()
    return f"{caught.value.key} = {caught.value.value!r}: {caught.value.problem} -> {caught.value.way_out}"


@pytest.mark.parametrize("model_type, task, parts", [
    ("llama", "image_classification", ["no llama model for image_classification", "vit, resnet, mobilenet_v2",
                                       "set data.task: causal_lm"]),
    ("resnet", "sequence_classification", ["no resnet model for sequence_classification", "bert, distilbert",
                                           "set data.task: image_classification"]),
    ("vit", "token_classification", ["no vit model for token_classification", "set data.task: image_classification"]),
])
def test_a_task_that_transformers_has_no_head_for(model_type, task, parts):
    student = Student(architecture={"model_type": model_type})
    found = said(lambda: student_config(student, None, 50, task=Task(task, NAMES)))
    assert found.startswith(f"student.architecture.model_type = '{model_type}'")
    for part in parts:
        assert part in found, found


def test_a_teacher_of_other_classes(classifier):
    task = Task("sequence_classification", NAMES)
    assert tuple(teacher_config(classifier(*NAMES), 50, task=task).id2label.values()) == NAMES
    found = said(lambda: teacher_config(classifier("bad", "good"), 50, task=task))
    assert "it tells 2 classes apart and the data has 3" in found and found.startswith("teacher.path")
    found = said(lambda: teacher_config(classifier("bad", "gut", "neutral"), 50, task=task))
    assert "'good' is none of its own" in found and "name a model trained on these classes" in found
    found = said(lambda: teacher_config(classifier("good", "bad", "neutral"), 50, task=task))
    assert found.startswith("data.class_names") and "data.class_names: [good, bad, neutral]" in found
    way_out = Task("sequence_classification", ("good", "bad", "neutral"))
    teacher_config(classifier("good", "bad", "neutral"), 50, task=way_out)
    unnamed = teacher_config(classifier("LABEL_0", "LABEL_1", "LABEL_2"), 50, task=task)
    assert tuple(unnamed.id2label.values()) == NAMES, "whoever trained it has not named them"


def test_a_classifier_is_no_language_model(classifier, tmp_path, capsys):
    """transformers would give it a language model's head, of random weights, or of its embeddings."""
    folder = classifier(*NAMES).path
    found = said(lambda: teacher_config(classifier(*NAMES), 50))
    assert found.startswith(f"teacher.path = {folder!r}: this is a classifier, BertForSequenceClassification")
    assert "data.task: sequence_classification" in found
    (tmp_path / "asked.jsonl").write_text('{"text": "one", "prompt": "one"}\n')
    (tmp_path / "tasks.yaml").write_text(f"tasks: [{{name: t, kind: perplexity, path: {tmp_path / 'asked.jsonl'}}}]\n")
    for words in (["evaluate", folder, "--tasks", str(tmp_path / "tasks.yaml")],
                  ["generate", folder, "--prompts", str(tmp_path / "asked.jsonl"), "--to", str(tmp_path / "answers")]):
        assert limbeck(words) == 2
        assert "this is a classifier, BertForSequenceClassification" in capsys.readouterr().err


def test_a_model_without_a_head_gets_one_with_the_names(tmp_path):
    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    config = student_config(Student(path=str(tmp_path)), None, 50, task=Task("token_classification", NAMES))
    assert config.architectures == ["BertForTokenClassification"] and config.label2id["neutral"] == 2


def test_texts_longer_than_the_model_has_positions_for():
    """RoBERTa counts positions from behind its padding token on, so that it reads fewer than its configuration says."""
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**SHAPE, max_position_embeddings=34, num_labels=3)).eval()
    data = Data(task="sequence_classification", sequence_length=32)
    check_classifier(model, "student", data, None)
    found = said(lambda: check_classifier(model, "student", data.model_copy(update={"sequence_length": 33}), None))
    assert found.startswith("data.sequence_length = 33: RobertaForSequenceClassification cannot read texts so long")


