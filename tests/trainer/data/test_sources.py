"""Where documents can come from, and what is said when they cannot."""

import json

import datasets
import pytest

from trainer.data.sources import open_corpus
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data, Validation


def texts(documents):
    return sorted(record["text"] for record in documents)


@pytest.fixture
def room(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(10):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number}\nwith two lines\n")
    records = [{"text": f"document {number}\nwith two lines\n", "q": "?", "a": "!"} for number in range(10)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "records.parquet")
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    datasets.Dataset.from_list(records[:8]).to_parquet(hub / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(records[8:]).to_parquet(hub / "test-00000-of-00001.parquet")
    return tmp_path


@pytest.mark.parametrize("path", ["text", "text/*.txt", "records.jsonl", "records.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_gives_the_same_documents(room, path, streaming):
    data = Data(path=str(room / path), streaming=streaming, validation=Validation(fraction=0.2, rows=2))
    corpus = open_corpus(data, room / "cache")
    both = texts(corpus.train) + texts(corpus.validation)
    assert sorted(both) == [f"document {number}\nwith two lines\n" for number in range(10)]
    assert len(texts(corpus.validation)) == 2


def test_folder_in_the_hubs_layout_with_splits(room):
    corpus = open_corpus(Data(path=str(room / "hub"), validation=Validation(split="test")), room / "cache")
    assert len(corpus.train) == 8 and texts(corpus.validation)[0].startswith("document 8")


def test_slices_of_a_local_split_are_disjoint_where_they_are_meant_to_be(room):
    corpus = open_corpus(Data(path=str(room / "records.jsonl"), split="train[:7]",
                              validation=Validation(split="train[7:]")), room / "cache")
    assert len(corpus.train) == 7 and not set(texts(corpus.train)) & set(texts(corpus.validation))


def test_home_is_expanded(room, monkeypatch):
    monkeypatch.setenv("HOME", str(room))
    assert Data(path="~/records.jsonl").path == str(room / "records.jsonl")


def test_one_long_text_holds_out_its_end(room):
    (room / "book.txt").write_text("".join(f"line {number}\n" for number in range(200)))
    corpus = open_corpus(Data(path=str(room / "book.txt"), validation=Validation(fraction=0.1)), room / "cache")
    assert corpus.train[0]["text"].startswith("line 0\n") and corpus.train[0]["text"].endswith("\n")
    assert corpus.train[0]["text"] + corpus.validation[0]["text"] == (room / "book.txt").read_text()


def test_python_library_is_real_text_in_a_fixed_order(room):
    first = open_corpus(Data(max_documents=30), room / "cache")
    again = open_corpus(Data(max_documents=30), room / "cache")
    assert len(first.train) + len(first.validation) == 30
    assert texts(first.train) == texts(again.train) and any("import " in text for text in texts(first.train))


@pytest.mark.parametrize(("change", "key", "message"), [
    ({"path": "./nowhere.txt"}, "data.path", "there is no such file or folder"),
    ({"path": "no-such/dataset"}, "data.path", "no such file or folder here, and no such data set on the hub"),
    ({"path": "empty.jsonl"}, "data.path", "the data set is empty"),
    ({"path": "empty/*.txt"}, "data.path", "the data set is empty"),
    ({"path": "latin.txt"}, "data.path", "latin.txt:2 is not UTF-8 text convert the file, for example with iconv"),
    ({"path": "nothing.jsonl"}, "data.path", "there is no such file or folder"),
    ({"path": "no/*.txt"}, "data.path", "no file matches this pattern"),
    ({"path": "void"}, "data.path", "this folder is empty"),
    ({"path": "broken.jsonl"}, "data.path", "broken.jsonl:2 is not JSON"),
    ({"path": "{mixed/a.txt,mixed/b.jsonl}"}, "data.path", "no such file"),
    ({"path": "mixed/*"}, "data.path", "not all text, all JSONL, all CSV or all Parquet"),
    ({"path": "records.jsonl", "text": "body"}, "data.text", "the records have no such field"),
    ({"path": "records.jsonl", "prompt": "q", "response": "b"}, "data.response", "no such field"),
    ({"path": "records.jsonl", "messages": "turns"}, "data.messages", "their fields"),
    ({"path": "hub", "split": "trian"}, "data.path", "cannot read this data set"),
    ({"path": "records.jsonl", "validation": Validation(split="test")}, "data.validation.split", "cannot read"),
    ({"validation": Validation(split="test")}, "data.validation.split", "no splits"),
    ({"path": "records.jsonl", "streaming": True, "validation": Validation(rows=10)}, "data.validation.rows",
     "no more documents than are held out"),
    ({"path": "one.jsonl"}, "data.validation.fraction", "one record is too little"),
    ({"path": "records.jsonl", "validation": Validation(path="gone.txt")}, "data.validation.path",
     "there is no such file"),
])
def test_mistakes_name_the_key(room, monkeypatch, change, key, message):
    monkeypatch.chdir(room)
    (room / "empty.jsonl").write_text("")
    (room / "empty").mkdir()
    (room / "empty" / "a.txt").write_text("")
    (room / "broken.jsonl").write_text('{"text": "x"}\n{"text": \n')
    (room / "one.jsonl").write_text('{"text": "x"}\n')
    (room / "latin.txt").write_bytes("line\ncaf\u00e9\n".encode("latin-1"))
    (room / "void").mkdir()
    (room / "mixed").mkdir()
    (room / "mixed" / "a.txt").write_text("x")
    (room / "mixed" / "b.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError) as caught:
        open_corpus(Data(**change), room / "cache")
    assert caught.value.key == key
    assert message in f"{caught.value.problem} {caught.value.way_out}"
