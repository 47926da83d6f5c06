"""Columns matched by the strings of tokens, and what counts as one tokenizer."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from strategies.distillation.losses.response import Divergence, ResponseObjective
from strategies.distillation.tokenizers.shared_vocabulary import align, same_roles, same_tokenizer

CORPUS = ["The cat sees the bread, and the dog finds the milk.", "naïve café: 日本語",
          "a fox likes corn and a bird"] * 8
VOCABULARIES = st.lists(st.sampled_from([f"t{number}" for number in range(30)]), min_size=1, max_size=20, unique=True)
END = "<|endoftext|>"


def spread(tokens, gaps):
    """Ids of tokens, with holes between them."""
    numbers, at = {}, 0
    for token, gap in zip(tokens, [*gaps, *[0] * len(tokens)], strict=False):
        at += gap
        numbers[token] = at
        at += 1
    return numbers


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ours=VOCABULARIES, theirs=VOCABULARIES, gaps=st.lists(st.integers(0, 2), max_size=20),
       more=st.tuples(st.integers(-3, 8), st.integers(-3, 8)))
def test_columns_are_those_of_the_same_string(ours, theirs, gaps, more):
    student, teacher = spread(ours, gaps), spread(theirs, gaps[::-1])
    sizes = max(1, max(student.values()) + 1 + more[0]), max(1, max(teacher.values()) + 1 + more[1])
    wanted = sorted((student[token], teacher[token]) for token in {*ours} & {*theirs}
                    if student[token] < sizes[0] and teacher[token] < sizes[1])
    if not wanted:
        with pytest.raises(ValueError, match="have no token in common"):
            align(student, teacher, *sizes)
        return
    found = align(student, teacher, *sizes)
    assert list(zip(found.student.tolist(), found.teacher.tolist(), strict=True)) == wanted
    assert found.to_teacher.tolist() == [dict(wanted).get(number, -1) for number in range(sizes[0])]
    assert found.is_prefix == all(pair == (place, place) for place, pair in enumerate(wanted))
    assert found.of_student == len(wanted) / sum(number < sizes[0] for number in student.values())
    assert found.of_teacher == len(wanted) / sum(number < sizes[1] for number in teacher.values())


def test_what_the_loss_is_told():
    tokens = {f"t{number}": number for number in range(5)}
    moved = {token: (number + 1) % 5 for token, number in tokens.items()}
    assert align(tokens, tokens, 5, 5).common is None, "all columns of both heads are one"
    padded = align(tokens, tokens, 8, 5).common
    assert (padded.size, padded.student, padded.teacher) == (5, None, None), "slices suffice"
    assert align(tokens, tokens, 5, 8).common.size == 5
    assert align(tokens, tokens, 8, 8).common.size == 5, "columns that pad both heads are not compared"
    gathered = align(tokens, moved, 5, 5).common
    assert gathered.size == 5 and gathered.student.tolist() == [0, 1, 2, 3, 4]
    assert gathered.teacher.tolist() == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("moved", [False, True])
def test_identical_models_with_heads_of_other_sizes_do_not_diverge(moved):
    """Silent error 2 of peers: a shorter vocabulary filled up with zero logits."""
    student_vocab = {f"t{number}": number for number in range(20)}
    teacher_vocab = {f"t{number}": (number + 7) % 20 if moved else number for number in range(20)} | {"<|user|>": 20}
    found = align(student_vocab, teacher_vocab, 24, 32)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, size, generator=generator) for size in (24, 32))
    for token, number in student_vocab.items():  # the same model; only what pads its head differs
        teacher[:, teacher_vocab[token]] = student[:, number]
    objective, targets = ResponseObjective(0.0, (Divergence(),)), torch.arange(6)
    assert abs(float(objective(student, teacher, targets, common=found.common)[0])) < 1e-6
    filled = torch.nn.functional.pad(student, (0, 8))
    assert float(objective(filled, teacher, targets)[0]) > 0.1, "the error this is about"


def test_a_role_goes_before_a_name():
    student = {"a": 0, "</s>": 1, "<end>": 2}
    teacher = {"</s>": 0, "a": 1}
    found = align(student, teacher, 3, 2, roles={"<end>": "</s>"})
    assert found.student.tolist() == [0, 2] and found.teacher.tolist() == [1, 0]
    assert found.to_teacher.tolist() == [1, 0, 0], "text with either can be given to the teacher"
    assert (found.of_student, found.of_teacher) == (2 / 3, 1)


def test_a_token_that_begins_and_ends_texts_stands_for_both():
    ours = tokenizer(bos="<s>", eos="</s>")
    roles = same_roles(ours, tokenizer(bos=END, eos=END))
    assert roles == {"</s>": END, "<s>": END}
    found = align({"<s>": 0, "</s>": 1, "a": 2}, {"a": 0, END: 1}, 3, 2, roles)
    assert found.to_teacher.tolist() == [1, 1, 0]
    assert found.student.tolist() == [1, 2], "what is predicted is the end"
    assert same_roles(tokenizer(bos=END, eos=END), ours) == {END: "</s>"}


def test_ends_that_both_know_keep_their_names():
    """As a base model and its chat model: both know both strings, and each ends with another one."""
    base, chat = tokenizer(eos=END), tokenizer(eos="<|im_end|>")
    base.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    chat.add_special_tokens({"additional_special_tokens": [END]})
    assert same_roles(base, chat) == same_roles(chat, base) == {}
    assert same_roles(tokenizer(), chat) == same_roles(chat, tokenizer()) == {}, "a tokenizer without an end"
    found = align(base.get_vocab(), chat.get_vocab(), len(base), len(chat), same_roles(base, chat))
    for token in (END, "<|im_end|>"):
        assert found.to_teacher[base.get_vocab()[token]] == chat.get_vocab()[token]


def tokenizer(size=400, bos=None, eos=None, normalizer=None, space=False, corpus=None, decoder=None):
    made = Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    made.decoder = decoder or decoders.ByteLevel()
    made.train_from_iterator(corpus or CORPUS, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokens = {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token}
    return PreTrainedTokenizerFast(tokenizer_object=made, **tokens)


def unigram(scores, unknown=0):
    made = Tokenizer(models.Unigram(scores, unknown))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_one_tokenizer_with_other_added_tokens_and_other_merges_at_the_end_is_the_same():
    whole = tokenizer(eos=END)
    chat = tokenizer(eos="<|im_end|>")
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|tool|>"]})
    same, reason = same_tokenizer(whole, chat)
    assert same and "100.0% of the larger vocabulary" in reason
    fewer = len(whole.backend_tokenizer.get_vocab(with_added_tokens=False)) - 3
    same, reason = same_tokenizer(tokenizer(fewer), whole)
    assert same and f"({fewer} and {fewer + 3} tokens)" in reason


def rewritten(change):
    """A tokenizer whose description was changed."""
    said = json.loads(tokenizer().backend_tokenizer.to_str())
    change(said)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(said)))


def test_settings_that_do_not_act_on_text_do_not_count():
    def change(said):
        said["decoder"] |= {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        said["pre_tokenizer"] |= {"trim_offsets": False}
    assert same_tokenizer(tokenizer(), rewritten(change))[0]


def swap(said):
    merges = said["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


@pytest.mark.parametrize(("other", "reason"), [
    (lambda: tokenizer(normalizer=normalizers.NFC()), r'the normalizers differ: null and \{"type": "NFC"\}'),
    (lambda: tokenizer(space=True), "the pre_tokenizers differ: .*add_prefix_space"),
    (lambda: tokenizer(decoder=decoders.Fuse()), "the decoders differ: .*ByteLevel.* and .*Fuse"),
    (lambda: tokenizer(280), r"only \d\d\.\d% of the larger vocabulary .* needs 95%"),
    (lambda: tokenizer(corpus=["entirely other words give wholly unlike merges of letters"] * 8), "only "),
    (lambda: rewritten(swap), r"merge 3 joins \[.*\] in one and \[.*\] in the other"),
])
def test_other_tokenizers_are_told_apart_and_why(other, reason):
    same, words = same_tokenizer(tokenizer(), other())
    assert not same and re.match(reason, words)
    assert not same_tokenizer(other(), tokenizer())[0]


def test_scores_of_pieces_decide_how_text_is_cut():
    pieces = [("<unk>", 0.0), *((f"▁w{number}", -float(number)) for number in range(40))]
    assert same_tokenizer(unigram(pieces), unigram([*pieces, ("▁more", -50.0)]))[0]
    assert same_tokenizer(unigram(pieces), unigram(pieces[1:] + pieces[:1], 40))[0], "ids are not text"
    changed = [*pieces[:5], ("▁w4", -7.5), *pieces[6:]]
    same, reason = same_tokenizer(unigram(pieces), unigram(changed))
    assert not same and reason == "'▁w4' has the score -4 in one and -7.5 in the other"


def test_bytes_for_unknown_characters_are_another_spelling():
    def one(**settings):
        made = Tokenizer(models.BPE({"a": 0, "b": 1, "<unk>": 2}, [], **settings))
        return PreTrainedTokenizerFast(tokenizer_object=made)

    assert same_tokenizer(one(), one(unk_token="<unk>", continuing_subword_prefix=""))[0]
    same, reason = same_tokenizer(one(), one(byte_fallback=True))
    assert not same and reason.startswith("the models differ: ") and "byte_fallback" in reason


def test_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="b = ByT5Tokenizer does not say how it cuts text; give a fast tokenizer"):
        same_tokenizer(tokenizer(), ByT5Tokenizer())
