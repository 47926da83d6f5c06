"""CSV, token ids with labels, and preference pairs."""

import json

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from strategies.distillation.losses.response import IGNORED
from tests.conftest import sentences
from tests.trainer.teacher.test_distilling import bpe
from trainer.data.dataset import prepare_text
from trainer.data.sources import open_corpus
from trainer.data.token_ids import IdEncoder, token_bytes
from trainer.data.tokenizers import END, vocabulary_size
from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.data_nodes import Data, Validation
from trainer.experiment.load import read_experiment

HALF = Validation(fraction=0.5)


def fast():
    return PreTrainedTokenizerFast(tokenizer_object=bpe(300), eos_token=END, pad_token=END)


@pytest.fixture(scope="module")
def tokenizer():
    return fast()


def read(tmp_path, name, text, **data):
    (tmp_path / name).write_bytes(text.encode())
    corpus = open_corpus(Data(path=str(tmp_path / name), validation=HALF, **data), tmp_path / "cache")
    return sorted((dict(record) for part in (corpus.train, corpus.validation) for record in part), key=str)


# ---- CSV

@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("streaming", [False, True])
def test_fields_of_csv_are_text_as_it_is_written(tmp_path, name, mark, streaming):
    rows = [("\ufeffq", "a", "b"), ('"one,\r\n""quoted"""', "1", "x"),
            ("é\t" if mark == "," else "é", "2024-01-02", ""), ("", "", "y")]
    text = "\r\n".join(mark.join(row) for row in rows)
    file = tmp_path / name
    file.write_bytes(text.encode())
    data = Data(path=str(file), prompt="q", response="a", streaming=streaming,
                validation=Validation(path=str(file)))
    found = [(one["q"], one["a"]) for one in open_corpus(data, tmp_path / "cache").train]
    assert found == [('one,\r\n"quoted"', "1"), (rows[2][0], "2024-01-02"), ("", "")]


def test_csv_may_hold_messages_and_ids_as_json(tmp_path):
    talk = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).replace('"', '""')
    found = read(tmp_path, "a.csv", f'm,ids\n"{talk}","[1, 2]"\n' * 1 + f'"{talk}","[3]"\n', messages="m")
    assert found[0]["m"][1]["content"] == "b"
    assert [one["ids"] for one in read(tmp_path, "b.csv", 'ids\n"[1, 2]"\n"[3]"\n', input_ids="ids")] == [[1, 2], [3]]


@pytest.mark.parametrize(("text", "key", "said"), [
    ("text,b\none,1\ntwo\n", "data.path", "a.csv:3 has 1 fields, and the first line names 2"),
    ("text,text\none,1\n", "data.path", "a.csv:1 names the field 'text' twice"),
    ('text\n"one\n', "data.path", "is not CSV: unexpected end of data"),
    ("text;b\none;1\n", "data.text", "they seem to be separated by ';'"),
    ("just one\nand two\n", "data.text", "the first line of such a file names them"),
    ("text\n", "data.path", "the data set is empty"), ("", "data.path", "the data set is empty"),
])
def test_mistakes_in_csv(tmp_path, text, key, said):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "a.csv", text)
    assert caught.value.key == key and said in f"{caught.value.problem} {caught.value.way_out}"


# ---- token ids

def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_ids_are_learned_as_their_labels_say(write_experiment, tokenizer, tmp_path, form, streaming):
    """Rows and targets are those of the same text; nothing is added, and the bytes are those of the text."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    records = []
    for number in range(12):
        ids = tokenizer(sentences(number, 1 + number % 2))["input_ids"]
        records.append({"ids": ids, "labels": [-100] * 3 + ids[3:]})
    file = tmp_path / f"ids.{form}"
    if form == "jsonl":
        file.write_text(lines(*records))
    else:
        datasets.Dataset.from_list(records).to_parquet(file)
    data = {"path": str(file), "input_ids": "ids", "labels": "labels", "packing": False, "streaming": streaming,
            "sequence_length": 64, "validation": {"path": str(file), "rows": 12},
            "tokenizer": {"path": str(tmp_path / "tokenizer"), "train_vocabulary": None}}
    text = prepare_text(read_experiment(write_experiment(data=data)).experiment)
    found = {}
    for row in range(12):
        one = {name: tensor[row] for name, tensor in text.held_out.items()}
        found[tuple(one["input_ids"][:int(one["length"])].tolist())] = one
    for record in records:
        one = found[tuple(record["ids"])]
        size = len(record["ids"])
        assert one["targets"][:size - 1].tolist() == [IGNORED] * 2 + record["ids"][3:]
        assert int(one["bytes"]) == len(tokenizer.decode(record["ids"][3:]).encode())


@pytest.mark.parametrize(("record", "key", "said"), [
    ({"ids": [5, 6], "labels": [5, 6, 7]}, "data.labels", "record 3 has 3 labels and 2 ids"),
    ({"ids": [5, 6, 7], "labels": [5]}, "data.labels", "record 3 has 1 labels and 3 ids"),
    ({"ids": [5, 6, 7], "labels": [6, 7, -100]}, "data.labels", "where the id is 5: these labels are shifted"),
    ({"ids": [5, 6, 7], "labels": [5, 9, 7]}, "data.labels", "has label 9 at place 1, where the id is 6"),
    ({"ids": [5, 300], "labels": [5, 300]}, "data.input_ids", "record 3 has id 300 at place 1"),
    ({"ids": [-1, 5], "labels": [-1, 5]}, "data.input_ids", "record 3 has id -1 at place 0"),
])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_wrong_ids_and_labels_are_named_with_their_record(tmp_path, tokenizer, record, key, said, form):
    """However they are shuffled."""
    right = {"ids": [5, 6, 7], "labels": [-100, 6, 7]}
    file = tmp_path / f"a.{form}"
    records = [right, right, record, right]
    file.write_text(lines(*records)) if form == "jsonl" else datasets.Dataset.from_list(records).to_parquet(file)
    data = Data(path=str(file), input_ids="ids", labels="labels", validation=Validation(path=str(file)))
    documents = open_corpus(data, tmp_path / "cache").train.shuffle(seed=1)
    assert vocabulary_size(tokenizer) == 300
    with pytest.raises(UserError) as caught:
        IdEncoder(tokenizer, data)(list(documents))
    assert caught.value.key == key and said in caught.value.problem


@pytest.mark.parametrize(("ids", "said"), [
    ("1 2", "a.jsonl:2 has no list of integers"), ([1.5], "has no list of integers in this field, but [1.5]"),
    ([True], "no list of integers"), (None, "no list of integers"), ([2**70], "no list of integers")])
def test_what_is_no_list_of_integers_is_named_with_its_line(tmp_path, ids, said):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "a.jsonl", lines({"ids": [1]}, {"ids": ids}), input_ids="ids")
    assert caught.value.key == "data.input_ids" and said in caught.value.problem


def test_a_parquet_column_of_floats_is_no_ids(tmp_path, tokenizer):
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"ids": [1.5, 2.0]}] * 2).to_parquet(file)
    data = Data(path=str(file), input_ids="ids", validation=HALF)
    with pytest.raises(UserError, match="has a list with float 1.5 where a list of integers is expected"):
        IdEncoder(tokenizer, data)(list(open_corpus(data, tmp_path / "cache").train))


def test_bytes_of_tokens_of_other_decoders():
    """A tokenizer with word marks and single bytes, as sentencepiece has; and one of bytes."""
    words = ["<unk>", "<s>", "▁the", "▁cat", "s", "<0xE6>", "<0x97>", "<0xA5>", "é", "▁"]
    backend = Backend(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    marked = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="<s>")
    sizes = np.array(token_bytes(marked, len(words)))
    ids = [2, 3, 4, 5, 6, 7, 8, 3]
    assert sizes[ids].sum() == len(marked.decode(ids).encode()) + 1, "the space before the first word"
    plain = fast()
    ids = plain("naïve café 日本 🐈 the")["input_ids"]
    assert np.array(token_bytes(plain, 300))[ids].sum() == len("naïve café 日本 🐈 the".encode())


@pytest.mark.parametrize(("data", "key"), [
    ({"input_ids": "a", "messages": "m"}, "data.input_ids"), ({"labels": "a"}, "data.labels"),
    ({"input_ids": "a", "prompt": "m", "response": "r"}, "data.input_ids"), ({"system": "x"}, "data.system"),
    ({"messages": "m", "system": True}, "data.system"), ({"chosen": "c"}, "data.chosen")])
def test_keys_that_do_not_go_together(write_experiment, data, key):
    with pytest.raises(ExperimentErrors) as caught:
        read_experiment(write_experiment(data=data))
    assert [error.key for error in caught.value.errors] == [key]


def test_no_tokenizer_is_trained_on_ids(write_experiment, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"ids": [1, 2]}, {"ids": [3, 4]}))
    file = write_experiment(data={"path": str(tmp_path / "a.jsonl"), "input_ids": "ids"})
    with pytest.raises(UserError, match="token ids of another tokenizer"):
        prepare_text(read_experiment(file).experiment)


# ---- preferences

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIRS = [({"chosen": TALK, "rejected": TALK}, "data.messages: chosen"),
         ({"prompt": "a", "chosen": "b", "rejected": "c"}, "data.prompt: prompt and data.response: chosen"),
         ({"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]}, "join prompt and chosen to one list"),
         ({"chosen": "a b", "rejected": "c"}, "data.text: chosen")]


@pytest.mark.parametrize(("record", "way_out"), PAIRS)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_preference_pairs_are_refused_with_what_is_supported(tmp_path, record, way_out, form):
    file = tmp_path / f"a.{form}"
    file.write_text(lines(record, record)) if form == "jsonl" else datasets.Dataset.from_list(
        [record, record]).to_parquet(file)
    with pytest.raises(UserError) as caught:
        open_corpus(Data(path=str(file), validation=HALF), tmp_path / "cache")
    assert "preference pairs" in caught.value.problem and way_out in caught.value.way_out
    if "join" not in way_out:  # the way out works
        fields = dict(part.split(": ") for part in way_out.replace("data.", "").split(" and "))
        assert len(open_corpus(Data(path=str(file), validation=HALF, **fields), tmp_path / "cache").train) == 1
