"""The system prompt: what a chat template adds by itself, and what `data.system` puts in its place."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.trainer.teacher.test_distilling import bpe
from trainer.data.encoding import Encoder
from trainer.data.tokenizers import END
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}" \
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
DEFAULT = "{% if messages[0].role != 'system' %}<|system|>You are a cat.<|end|>\n{% endif %}" + TURNS
STUBBORN = "<|system|>You are a cat.{% if messages[0].role == 'system' %} {{ messages[0].content }}" \
    "{% set messages = messages[1:] %}{% endif %}<|end|>\n" + TURNS
EMPTY = "{% if messages[0].role == 'system' and messages[0].content %}<|system|>{{ messages[0].content }}<|end|>\n" \
    "{% elif messages[0].role != 'system' %}<|system|>You are a cat.<|end|>\n{% endif %}" \
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}" \
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
ASKED = "<|user|>why<|end|>\n<|assistant|>so<|end|>\n" + END
TALK = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]


def written(template, **data):
    """The text of a conversation, and the notes."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(300), eos_token=END, pad_token=END)
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, Data(**(data or {"messages": "m"})))
    (one,) = encoder([{"m": TALK, "q": "why", "a": "so", "own": [{"role": "system", "content": "mine"}, *TALK]}])
    return tokenizer.decode(one.tokens.tolist()), encoder.notes


@pytest.mark.parametrize("fields", [{"messages": "m"}, {"prompt": "q", "response": "a"}])
@pytest.mark.parametrize(("template", "system", "before", "said"), [
    (TURNS, None, "", None), (TURNS, "Be brief.", "<|system|>Be brief.<|end|>\n", "get data.system"),
    (TURNS, False, "", None),
    (DEFAULT, None, "<|system|>You are a cat.<|end|>\n", "'You are a cat.'; data.system sets"),
    (DEFAULT, "Be brief.", "<|system|>Be brief.<|end|>\n", "get data.system"),
    (DEFAULT, False, "<|system|><|end|>\n", "an empty one"), (DEFAULT, "", "<|system|><|end|>\n", "an empty one"),
    (STUBBORN, None, "<|system|>You are a cat.<|end|>\n", "'<|system|>You are a cat.'"),
    (EMPTY, False, "", "an empty one"), (STUBBORN, "Be brief.", "<|system|>You are a cat. Be brief.<|end|>\n", "get"),
])
def test_the_system_prompt_is_that_of_the_template_or_of_the_experiment(fields, template, system, before, said):
    text, notes = written(template, **fields, system=system)
    assert text == before + ASKED
    by_template = ["prompt and response are written by the chat template, as user and assistant"]
    assert notes[:len(fields) - 1] == (by_template if "prompt" in fields else [])
    assert [said in note for note in notes[len(fields) - 1:]] == ([True] if said else [])


def test_a_record_keeps_its_own():
    assert written(DEFAULT, messages="own", system="Be brief.")[0] == "<|system|>mine<|end|>\n" + ASKED


@pytest.mark.parametrize(("template", "system", "said"), [
    (REFUSING, "Be brief.", "writes no system prompt"),
    (STUBBORN, False, "whatever it is given: '<|system|>You are a cat.'"),
    (None, "Be brief.", "no chat template to write a system prompt with")])
def test_what_a_template_cannot_is_said(template, system, said):
    with pytest.raises(UserError) as caught:
        written(template, prompt="q", response="a", system=system)
    assert caught.value.key == "data.system" and said in caught.value.problem


DATED = "{{ strftime_now('%d %b %Y') }}\n" + TURNS


@pytest.mark.parametrize(("template", "told"), [
    (DATED, True), (TURNS, False), ("{% if strftime_now is not defined %}no clock{% endif %}" + TURNS, False)])
def test_a_template_that_writes_the_date_is_told_of(template, told):
    """Llama 3.1's, Cohere's and gpt-oss's do: what is tokenized tomorrow is not what was tokenized today."""
    notes = written(template, messages="m")[1]
    assert any("writes the date of its use" in note for note in notes) == told
