"""Which tokens are learned, and how many bytes they stand for."""

import numpy as np
import pytest
from transformers import AutoConfig

from trainer.data.encoding import Encoder
from trainer.data.tokenizers import END, load_tokenizer, own_tokenizer, train_tokenizer
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data, Tokenizer

TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}" + END + "\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    records = [{"text": "a question about cats and the answer, naïve café 日本 🐈"}] * 3
    train_tokenizer([(Data(tokenizer=Tokenizer(train_vocabulary=300)), records)], folder)
    return load_tokenizer("data.tokenizer.path", str(folder), None)


def learned_text(tokenizer, document):
    return tokenizer.decode(document.tokens[document.loss_mask].tolist())


def test_plain_text_learns_everything_and_its_end(tokenizer):
    (one,) = Encoder(tokenizer, Data())([{"text": "the cats"}])
    assert tokenizer.decode(one.tokens.tolist()) == "the cats" + END
    assert one.loss_mask.all() and one.tokens[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本 🐈🐈 x", "", "\n\n", "a\u0301"])
def test_bytes_are_exact(tokenizer, text):
    (one,) = Encoder(tokenizer, Data())([{"text": text}])
    assert one.bytes.sum() == len(text.encode()) and one.bytes[-1] == 0 and (one.bytes >= 0).all()


def test_prompt_is_masked_and_the_answer_with_its_end_is_learned(tokenizer):
    encoder = Encoder(tokenizer, Data(prompt="q", response="a"))
    (one,) = encoder([{"q": "a question", "a": "the answer"}])
    assert tokenizer.decode(one.tokens.tolist()) == "a question\nthe answer" + END
    assert learned_text(tokenizer, one) == "the answer" + END
    assert one.bytes[one.loss_mask].sum() == len("the answer")


def test_white_space_alone_teaches_nothing(tokenizer):
    (one,) = Encoder(tokenizer, Data())([{"text": " \n\t\n"}])
    assert not one.loss_mask.any()


def test_only_the_assistant_is_learned_in_every_turn(tokenizer):
    tokenizer.chat_template = TEMPLATE
    try:
        encoder = Encoder(tokenizer, Data(messages="m"))
        turns = [("system", "s"), ("user", "u1"), ("assistant", "first"), ("user", "u2"), ("assistant", "second")]
        (one,) = encoder([{"m": [{"role": role, "content": content} for role, content in turns]}])
        assert learned_text(tokenizer, one) == f"first{END}\nsecond{END}\n"
        assert (one.tokens == tokenizer.eos_token_id).sum() == 5, "the template ends its turns itself"
        (asked,) = encoder([{"m": [{"role": "user", "content": "u"}]}])
        assert not asked.loss_mask.any()
        prompted = Encoder(tokenizer, Data(prompt="q", response="a"))([{"q": "u", "a": "first"}])[0]
        assert learned_text(tokenizer, prompted) == f"first{END}\n"
    finally:
        tokenizer.chat_template = None


def test_end_is_added_where_the_template_has_none(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace(END, "")
    try:
        (one,) = Encoder(tokenizer, Data(messages="m"))(
            [{"m": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "yes"}]}])
        assert one.tokens[-1] == tokenizer.eos_token_id and one.loss_mask[-1]
    finally:
        tokenizer.chat_template = None


def test_a_template_that_refuses_a_record_names_it(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    try:
        with pytest.raises(UserError, match=r"the chat template refuses a record \(no system role\): .*system"):
            Encoder(tokenizer, Data(messages="m"))([{"m": [{"role": "system", "content": "s"}]}])
    finally:
        tokenizer.chat_template = None


def test_white_space_is_learned_and_counted_where_the_tokenizer_trims_offsets(tokenizer):
    """GPT-NeoX and RoBERTa tokenizers leave white space out of offsets: a token of spaces looks empty."""
    from tokenizers.processors import ByteLevel

    plain = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    try:
        (one,) = Encoder(tokenizer, Data(prompt="q", response="a"))([{"q": "code  ", "a": "if x:\n        y  "}])
        assert learned_text(tokenizer, one) == "if x:\n        y  " + END
        assert one.bytes.sum() == len("code  \nif x:\n        y  ")
    finally:
        tokenizer.backend_tokenizer.post_processor = plain or ByteLevel(trim_offsets=False)


@pytest.mark.parametrize(("data", "record", "message"), [
    (Data(), {"text": None, "body": "x"}, "has nothing in this field where str is expected: {.*body"),
    (Data(), {"text": 3}, "a record has int in this field where str is expected: {.*3}"),
    (Data(prompt="q", response="a"), {"q": "x", "a": None}, "has nothing in this field"),
])
def test_a_record_without_its_field_is_named(tokenizer, data, record, message):
    with pytest.raises(UserError, match=message):
        Encoder(tokenizer, data)([record])


def test_chat_needs_a_template(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        Encoder(tokenizer, Data(messages="m"))


def test_bos_is_put_first_where_the_tokenizer_does(tokenizer):
    from tokenizers.processors import TemplateProcessing

    plain = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.bos_token_id)])
    try:
        (one,) = Encoder(tokenizer, Data())([{"text": "cats"}])
        assert one.tokens[0] == tokenizer.bos_token_id and np.array_equal(one.bytes[[0, -1]], [0, 0])
    finally:
        if plain is not None:
            tokenizer.backend_tokenizer.post_processor = plain


@pytest.mark.parametrize("kind", ["llama", "bert", "mamba", "qwen2", "gemma3_text", "roberta"])
def test_a_folder_of_weights_alone_has_no_tokenizer_whatever_its_type(kind, tmp_path):
    """transformers makes one up for some types, whose few tokens would be taken for the model's own."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert own_tokenizer(str(tmp_path), None) is None
