"""`limbeck show-data`: records as they will be learned."""

import json

import pytest
from rich.console import Console

from trainer.cli import limbeck
from trainer.data.show_data import shown_document
from trainer.data.tokenizers import END

TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}" + END + "{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture
def talks(tmp_path):
    """Four chats, in a file with names of its own, and a tokenizer whose every token is a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    own = Tokenizer(models.BPE({END: 0, **{letter: number for number, letter in enumerate(sorted(letters), 1)}}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token=END, pad_token=END)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "letters")
    talk = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]
    (tmp_path / "talks.jsonl").write_text((json.dumps({"m": talk}) + "\n") * 4)
    return {"path": str(tmp_path / "talks.jsonl"), "messages": "m", "packing": True, "sequence_length": 64,
            "tokenizer": {"path": str(tmp_path / "letters"), "train_vocabulary": None}}


def test_records_are_shown_as_they_are_learned(write_experiment, talks, capsys):
    file = write_experiment(data=talks)
    mapping = ["data.keys={role: from, content: value}", "data.roles={human: user, gpt: assistant}"]
    assert limbeck(["show-data", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert str(file) in said and "data.keys" in said
    assert "add to data: keys: {role: from, content: value}, roles: {human: user, gpt: assistant}" in said
    assert limbeck(["show-data", "--config", str(file), *mapping]) == 0
    said = capsys.readouterr().out
    # 6 + 3 + 1 and 11 + 2 + 1 characters and ends of turns, of which the last three are learned.
    assert f"record 1: 24 tokens, 3 learned\n<user>why{END}<assistant>[[so{END}]]\n" in said
    assert "record 3" in said and "record 4" not in said and "72 tokens: 12% are learned" in said
    assert limbeck(["show-data", "--config", str(file), *mapping, "data.sequence_length=22"]) == 0
    said = capsys.readouterr().out
    assert f"<assistant>[[s]]\n--- a row ends here; what follows is left out ---\no{END}\n" in said
    assert "3 of 3 are longer than the 22 tokens of a row, and cut off there" in said and "4% are learned" in said
    assert limbeck(["show-data", "--config", str(file), *mapping, "data.sequence_length=8"]) == 0
    assert "3 of 3 have nothing to learn within a row, and are left out" in capsys.readouterr().out


def test_plain_text_is_shown_row_by_row_and_in_color_on_a_terminal(talks, tmp_path):
    from trainer.data.encoding import Encoder
    from trainer.data.tokenizers import load_tokenizer
    from trainer.experiment.data_nodes import Data

    tokenizer = load_tokenizer("data.tokenizer.path", talks["tokenizer"]["path"], None)
    (one,) = Encoder(tokenizer, Data())([{"text": "abc\x1b[0mdef"}])
    line = shown_document(tokenizer, one, 4, plain=True, color=False)
    rows = "\n--- a row ends here ---\n".join(["a[[bc\N{SYMBOL FOR ESCAPE}]]", "[[[0md]]", f"e[[f{END}]]"])
    assert line.plain == rows
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as said:
        console.print(shown_document(tokenizer, one, 64, plain=True, color=True))
    assert "\x1b[32mbc" in said.get() and "\x1b[0mdef" not in said.get()


def test_show_data_wants_an_experiment(capsys):
    assert limbeck(["show-data"]) == 2 and "limbeck show-data --config FILE" in capsys.readouterr().err
    assert limbeck(["show-data", "--config", "nothing.yaml"]) == 2 and "nothing.yaml" in capsys.readouterr().err
