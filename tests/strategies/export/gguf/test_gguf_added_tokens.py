"""Added tokens as llama.cpp reads them, which has no room for how a tokenizer.json says they are found."""

from importlib.util import find_spec

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from strategies.export.gguf.gguf_added_tokens import GgufReading, check_added_tokens
from tests.conftest import sentences

END = "<|end|>"
PLAIN = AddedToken("<call>", special=False, normalized=False)
BEFORE = AddedToken("<left>", special=True, lstrip=True, normalized=False)
BEHIND = AddedToken("<stop>", special=True, rstrip=True, normalized=False)
WORD = AddedToken("cat", special=False, single_word=True, normalized=False)
SPECIAL_WORD = AddedToken("<w>", special=True, single_word=True, normalized=False)


def tokenizer(*added: AddedToken, template: str | None = None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([sentences(1, 30)], trainers.BpeTrainer(
        vocab_size=290, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)
    fast.add_tokens(list(added))
    fast.chat_template = template
    return fast


def joined(made, *parts: str) -> list[int]:
    """Numbers of tokens of parts that are read by themselves, an added token alone or none in each."""
    return [number for part in parts for number in made(part, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("parts", [
    ("The", "<call>", "dog"), ("The ", "<left>", " dog"), ("The", "<stop>", "\n\nThe"), ("con", "cat", "enates"),
    ("<stop>", " ", "<left>", END), ("The bird finds the corn.",), ("a", "<w>", "b")])
def test_text_is_cut_at_added_tokens_wherever_they_are(parts):
    made = tokenizer(PLAIN, BEFORE, BEHIND, WORD, SPECIAL_WORD)
    assert GgufReading(made).ids("".join(parts)) == joined(made, *parts)


def test_of_overlapping_tokens_the_longest_is_found_first():
    """Where transformers takes the one that begins first."""
    made = tokenizer(AddedToken("<ab", normalized=False), AddedToken("b>xyz", normalized=False))
    assert GgufReading(made).ids("<ab>xyz") == joined(made, "<a", "b>xyz")
    assert made("<ab>xyz")["input_ids"] == joined(made, "<ab", ">xyz")


def test_tokens_that_are_found_alike_are_nothing_to_speak_of():
    assert check_added_tokens(tokenizer(PLAIN, AddedToken("<x>")), ["The<call> dog <x>"]) == []


def test_special_tokens_that_no_text_has_are_named():
    said, = check_added_tokens(tokenizer(PLAIN, BEFORE, BEHIND), ["The dog sees the milk."])
    assert said.endswith("'<left>' (lstrip), '<stop>' (rstrip)") and "otherwise than transformers" in said


@pytest.mark.parametrize(("added", "texts", "template", "said"), [
    (BEHIND, ["The dog<stop> sees"], None, r"'<stop>' \(rstrip\)\. In tokenizer.json set these to false"),
    (BEHIND, ["The dog"], "{{ m }}<stop>\n", r"'<stop>' \(rstrip\)"),  # the template will write it
    (WORD, ["The dog"], None, r"'cat' \(single_word\)")])  # any text may have it
def test_tokens_that_matter_are_refused_by_name(added, texts, template, said):
    with pytest.raises(ValueError, match=said):
        check_added_tokens(tokenizer(added, template=template), texts)


def test_text_that_is_read_otherwise_for_another_reason_is_shown():
    made = tokenizer()
    made.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(ValueError, match="llama.cpp would read text of the data otherwise: "):
        check_added_tokens(made, ["The cafe\u0301"])
    assert check_added_tokens(made, ["The caf\u00e9"]) == []


@pytest.mark.skipif(not find_spec("xllamacpp"), reason="pip install xllamacpp: llama.cpp in wheels")
def test_llama_cpp_itself_reads_so(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.quantization.llama_cpp import LlamaCpp
    from strategies.export.gguf.gguf_file import write_gguf
    from tests.conftest import TINY

    made = tokenizer(PLAIN, BEFORE, BEHIND, WORD, SPECIAL_WORD, AddedToken("<ab", normalized=False),
                     AddedToken("b>xyz", normalized=False))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=300))
    write_gguf(tmp_path / "s.gguf", model, made)
    runtime = LlamaCpp(tmp_path / "s.gguf", 64)
    for text in ("The <call>dog", "The  <left> dog", "The<stop>\n\nThe", "concatenates cat", "a<w>b <w>", "<ab>xyz"):
        assert runtime.tokens(text) == GgufReading(made).ids(text), text
