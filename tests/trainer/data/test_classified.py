"""Classified data: classes and their order, rows by hand, what is wrong with labels, and what a dry run says."""

import json

import datasets
import numpy as np
import pytest
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainer import cli
from trainer.data.classified import class_names
from trainer.data.classified_preview import classified_preview
from trainer.data.dataset import prepare_text
from trainer.data.show_data import show_data
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data
from trainer.experiment.load import read_experiment

BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "cat", "sat"]


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """The folder of a WordPiece tokenizer such as BERT's."""
    tokenizer = Tokenizer(models.WordPiece({token: number for number, token in enumerate(VOCABULARY)},
                                           unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    folder = tmp_path_factory.mktemp("pieces")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                            sep_token="[SEP]", mask_token="[MASK]").save_pretrained(folder)
    return folder


@pytest.fixture
def written(tmp_path):
    """Writes records, and returns the settings of their data."""
    def write(records, held_out=None, task="sequence_classification", **keys):
        for name, rows in (("rows", records), ("held-out", held_out)):
            if rows is not None:
                (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if held_out is not None:
            keys["validation"] = {"path": str(tmp_path / "held-out.jsonl")}
        return {"task": task, "path": str(tmp_path / "rows.jsonl"), **keys}
    return write


@pytest.fixture
def experiment(tmp_path, pieces):
    """The experiment that trains on some data."""
    def read(data):
        values = {"name": "e", "student": {"architecture": BERT},
                  "data": {"sequence_length": 8, "tokenizer": {"path": str(pieces)}, **data},
                  "training": {"steps": 2, "batch_size": 2, "micro_batch": 2},
                  "run": {"folder": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}}
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(values))
        return read_experiment(tmp_path / "e.yaml").experiment
    return read


def texts(*labels):
    return [{"text": "cat sat", "label": label} for label in labels]


# ---- classes

@pytest.mark.parametrize("labels, keys, expected", [
    (["pos", "neg", "a"], {}, ("a", "neg", "pos")),
    ([10, 9, 2], {}, ("2", "9", "10")),
    (["10", "9", "x"], {}, ("10", "9", "x")),
    ([1, 0], {"class_names": ["no", "yes"]}, ("no", "yes")),
    ([True, False], {}, ("False", "True")),
    ([-1, 1, 0], {"class_names": ["-1", "0", "1"]}, ("-1", "0", "1")),
    (["b", "a"], {"class_names": ["b", "a", "c"]}, ("b", "a", "c")),
])
def test_classes_stand_in_an_order_that_the_data_alone_decides(written, experiment, tmp_path, labels, keys, expected):
    data = written(texts(*labels, *labels), texts(*labels), **keys)
    assert class_names(Data(**data), tmp_path) == expected
    text = prepare_text(experiment(data))
    assert text.classes == expected
    by_number = {str(label): expected[int(row)] for label, row in zip(labels, text.held_out["targets"][np.argsort(
        np.random.default_rng(0).permutation(len(labels)))], strict=True)}
    assert by_number == {str(label): expected[label] if expected == ("no", "yes") else str(label) for label in labels}


def test_a_data_set_that_names_its_classes_decides_their_order(experiment, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = datasets.Dataset.from_dict({"text": ["cat"] * 4, "label": [0, 1, 1, 0]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    text = prepare_text(experiment({"task": "sequence_classification", "path": str(tmp_path / "rows.parquet")}))
    assert text.classes == ("z", "a")
    rows = rows.add_item({"text": "cat", "label": -1})
    rows.to_parquet(tmp_path / "secret.parquet")
    with pytest.raises(UserError, match="no label, but -1") as caught:
        class_names(Data(task="sequence_classification", path=str(tmp_path / "secret.parquet")), tmp_path)
    assert "labels that are kept secret" in caught.value.way_out


# ---- mistakes

@pytest.mark.parametrize("records, held_out, keys, parts", [
    (texts("a", "b", None), None, {}, ["data.label", "rows.jsonl:3 has nothing in this field where the name or"]),
    (texts("a", "b", ""), None, {}, ["data.label", "rows.jsonl:3 has nothing"]),
    (texts("a", "b", {}), None, {}, ["data.label", "rows.jsonl:3 has {} in this field"]),
    (texts("a", "b", -1), None, {}, ["data.label", "a training record has no label, but -1,", "data.class_names"]),
    (texts("a", "a", "a"), None, {}, ["data.label", "one class only, 'a'", "at least two classes"]),
    (texts("card", "cash"), texts("cards"), {}, ["data.validation", "a held-out record has the label 'cards'",
                                                 "did you mean 'card'?", "data.class_names"]),
    (texts("card", "cash"), texts("card"), {"class_names": ["card", "cahs"]}, [
        "data.class_names", "a training record has the label 'cash', which is none of these", "did you mean 'cahs'?"]),
    (texts("a", "b"), texts("b", 7), {"class_names": ["a", "b"]}, ["data.class_names", "the label '7'"]),
    ([*texts("a", "b"), {"text": None, "label": "a"}], None, {}, ["data.text", "has nothing", "rows.jsonl:3"]),
    (texts("a", "b"), None, {"label": "lable"}, ["data.label", "no such field", "did you mean 'label'?"]),
    (texts("a", "b"), None, {"text_pair": "other"}, ["data.text_pair", "no such field", "text, label"]),
])
def test_what_is_wrong_with_labels_is_said_before_anything_is_trained(written, experiment, records, held_out, keys,
                                                                     parts):
    asked = experiment(written(records * (1 + (held_out is None)), held_out, **keys))
    with pytest.raises(UserError) as caught:
        prepare_text(asked)
    said = f"{caught.value.key}: {caught.value.problem} {caught.value.way_out}"
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize("record, parts", [
    ({"tokens": ["cat", "sat"], "label": ["O"]}, ["data.label", "rows.jsonl:1 has 2 words and 1 labels"]),
    ({"tokens": "cat sat", "label": ["O", "O"]}, ["data.words", 'has "cat sat" in this field where a list of words']),
    ({"tokens": ["cat", None], "label": ["O", "O"]}, ["data.words", "a list of words"]),
    ({"tokens": ["cat"], "label": None}, ["data.label", "has nothing in this field where a list of names"]),
])
def test_words_and_their_labels_go_together(written, experiment, record, parts):
    asked = experiment(written([record, {"tokens": ["cat"], "label": ["B"]}] * 2, task="token_classification"))
    with pytest.raises(UserError) as caught:
        prepare_text(asked)
    for part in parts:
        assert part in f"{caught.value.key}: {caught.value.problem}", caught.value.problem


# ---- rows

def test_the_first_token_of_a_word_has_its_class(written, experiment):
    records = [{"tokens": ["unaffable", "cat", "sat"], "label": ["B", "O", None]},
               {"tokens": ["cat", "unaffable", "cat", "cat"], "label": [-100, "O", "B", "O"]}]
    text = prepare_text(experiment(written(records, records, task="token_classification")))
    rows = [text.train[number] for number in (0, 1)]
    assert text.classes == ("B", "O") and text.train.lengths.tolist() == [7, 8]
    assert rows[0]["input_ids"].tolist() == [2, 5, 6, 7, 8, 9, 3, 0], "[CLS] un ##aff ##able cat sat [SEP] [PAD]"
    assert rows[0]["attention_mask"].tolist() == [1] * 7 + [0]
    assert rows[0]["targets"].tolist() == [-100, 0, -100, -100, 1, -100, -100, -100]
    assert rows[1]["input_ids"].tolist() == [2, 8, 5, 6, 7, 8, 8, 3]
    assert rows[1]["targets"].tolist() == [-100, -100, 1, -100, -100, 0, 1, -100]


def test_pairs_of_texts_are_told_apart_and_long_ones_cut(written, experiment):
    records = [{"text": "cat", "other": "sat", "label": 0}, {"text": "cat " * 9, "other": "sat", "label": 1}]
    text = prepare_text(experiment(written(records, records, text_pair="other")))
    row, long = text.train[0], text.train[1]
    assert row["input_ids"].tolist() == [2, 8, 3, 9, 3, 0, 0, 0] and row["targets"] == 0
    assert row["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert long["input_ids"].tolist() == [2, 8, 8, 8, 8, 3, 9, 3] and int(long["length"]) == 8
    assert text.tokenizer.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]
    assert text.train[-1]["targets"] == -100, "a row that only fills a batch"


# ---- what a person sees

def test_a_dry_run_counts_classes_and_shows_tokens_and_leaves_nothing_behind(written, experiment, tmp_path, capsys):
    held_out = [{"tokens": ["cat", "unaffable"], "label": ["O", "B"]}, {"tokens": ["sat"], "label": ["O"]}]
    records = [*held_out, {"tokens": ["cat"] * 9, "label": ["O"] * 9}]
    data = written(records, held_out, task="token_classification")
    experiment(data)
    before = sorted(tmp_path.rglob("*"))
    assert cli.train(["--config", str(tmp_path / "e.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    assert "effective batch     2 rows = 2 per micro-batch x 1 accumulated x 1 processes\n" in said
    assert "3 to train on, 2 held out" in said and "2: B 1, O 11" in said
    assert "66.7% accuracy, by always answering O" in said and "33.3% of the texts are longer" in said
    assert "record 1:\n[CLS] cat/O un/B ##aff ##able [SEP]\n" in said
    assert "record 3:\n[CLS] cat/O cat/O cat/O cat/O cat/O cat/O cat/O\n--- about 3 tokens more are cut off ---" in said


def test_show_data_and_a_dry_run_show_the_same(written, experiment, tmp_path, pieces, capsys):
    asked = experiment(written(texts("a", "b", "b", "b"), texts("b", "b", "a")))
    show_data(asked, Console(highlight=False))
    said = capsys.readouterr().out
    assert "record 1: a\n[CLS]|cat|sat|[SEP]\n" in said and "classes: 2: a 1, b 3" in said
    assert "66.7% accuracy, by always answering b" in said
    (found,) = classified_preview(asked.data, ("data.tokenizer.path", str(pieces), None), tmp_path)
    assert found.examples[0] == "record 1: a\n[CLS]|cat|sat|[SEP]" and found.classes == {"a": 1, "b": 3}


def test_tokens_are_counted_from_all_of_the_data_which_may_be_sorted(written, experiment, pieces, tmp_path):
    short, long = {"text": "cat", "label": "a"}, {"text": "cat " * 9, "label": "b"}  # 3 and 11 tokens
    asked = experiment(written([short] * 1500 + [long] * 1500, [short, long]))
    (found,) = classified_preview(asked.data, ("data.tokenizer.path", str(pieces), None), tmp_path)
    assert (found.tokens, found.longest, found.cut, found.counted) == (7.0, 11, 0.5, 1000)
    assert "7.0 in a text on average, 11 at most, in 1,000 texts; 50.0% of the texts" in dict(found.rows)["tokens"]


def test_a_dry_run_misses_a_local_file_of_held_out_records(written, experiment, tmp_path, capsys):
    data = written(texts("a", "b"), texts("b"))
    experiment({**data, "validation": {**data["validation"], "path": str(tmp_path / "nowhere.jsonl")}})
    assert cli.train(["--config", str(tmp_path / "e.yaml"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "data.validation.path = " in said and "there is no such file or folder" in said


def test_a_dry_run_does_not_ask_the_hub_for_classes(experiment, tmp_path, capsys):
    experiment({"task": "sequence_classification", "path": "somebody/reviews"})
    assert cli.train(["--config", str(tmp_path / "e.yaml"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "data.path = 'somebody/reviews': its classes are not known" in said and "data.class_names" in said
    assert cli.train(["--config", str(tmp_path / "e.yaml"), "--dry-run", "data.class_names=[bad, good]"]) == 0
    assert "limbeck show-data downloads and shows it" in capsys.readouterr().out
