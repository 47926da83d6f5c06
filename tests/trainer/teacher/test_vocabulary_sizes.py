"""Tokenizers whose ids a model has no rows for: with gaps in them, or grown after the model was trained."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.conftest import TINY, sentences
from tests.trainer.teacher.test_distilling import END, bpe, save
from trainer.data.tokenizers import known_size, load_tokenizer, vocabulary_size
from trainer.early_checks import check_early
from trainer.errors import UserError
from trainer.experiment.load import read_experiment


def plain(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of 300 tokens, in a folder."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(300), eos_token=END, pad_token=END)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture
def gaps(tmp_path) -> str:
    """A tokenizer some of whose ids lie eleven further on."""
    folder = tmp_path / "gaps"
    plain(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    moved = sorted(vocabulary, key=vocabulary.get)[-20:]
    content["model"]["vocab"] |= {token: vocabulary[token] + 11 for token in moved}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_ids_with_a_gap_have_rows_up_to_the_last(train_here, write_experiment, gaps):
    tokenizer = load_tokenizer("data.tokenizer.path", gaps, None)
    used = max(tokenizer(sentences(3, 20))["input_ids"])
    assert len(tokenizer) <= used < vocabulary_size(tokenizer), "the text has tokens behind the gap"
    changes = {"data": {"tokenizer": {"path": gaps, "train_vocabulary": None}}}
    trainer = train_here("gap", **changes, training={"steps": 1})
    assert trainer.unwrapped.config.vocab_size == vocabulary_size(tokenizer) == len(tokenizer) + 11
    experiment = read_experiment(write_experiment("early", **changes)).experiment
    assert known_size(experiment.data.tokenizer, experiment.with_weights) == len(tokenizer) + 11


def test_a_grown_tokenizer_is_refused_early_with_both_sizes_and_a_way_out(train_here, write_experiment, tmp_path,
                                                                          monkeypatch):
    folder = save(tmp_path / "grown", bpe(300))
    tokenizer = plain(folder)
    tokenizer.add_tokens(["<call>", "</call>"])
    tokenizer.save_pretrained(folder)
    changes = {"student": {"architecture": None, "path": folder}, "data": {"tokenizer": {"train_vocabulary": None}}}
    with pytest.raises(UserError, match="302 tokens, and the model .* rows for 300") as refused:
        check_early(read_experiment(write_experiment("small", **changes)).experiment)
    assert refused.value.key == "student.path"
    _, *lines = refused.value.way_out.splitlines()
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines[:-1]), {})
    train_here("larger", **changes | {"student": {"architecture": None, "path": str(Path("grown-302"))}},
               training={"steps": 1})
    assert "name a tokenizer of at most 300 tokens" in lines[-1]
    other = {**changes, "data": {"tokenizer": {"train_vocabulary": None, "path": str(tmp_path / "plain")}}}
    plain(tmp_path / "plain")
    check_early(read_experiment(write_experiment("other", **other)).experiment)


@pytest.mark.parametrize(("given", "key"), [({"vocab_size": 200}, "student.architecture.vocab_size"), ({}, None)])
def test_dimensions_that_are_too_few_are_named_where_they_are_given(write_experiment, tmp_path, given, key):
    plain(tmp_path / "plain")
    file = write_experiment(student={"architecture": {**TINY, **given}},
                            data={"tokenizer": {"train_vocabulary": None, "path": str(tmp_path / "plain")}})
    if key is None:
        return check_early(read_experiment(file).experiment)
    with pytest.raises(UserError, match="the model has 200 tokens and the tokenizer 300") as refused:
        check_early(read_experiment(file).experiment)
    assert refused.value.key == key and "or leave it out" in refused.value.way_out
    return None
