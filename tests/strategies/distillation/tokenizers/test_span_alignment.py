"""Positions after the same text: read back by the tokenizers' own decoders, for texts of any kind."""

import itertools
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from strategies.distillation.losses.response import IGNORED, Divergence, ResponseObjective
from strategies.distillation.tokenizers.span_alignment import SpanAligner

CORPUS = ["The cat sees the bread, and the dog finds the milk.\n", "naïve café, señor: 日本語 and 日本 🐈🐈\n\n",
          "def find(cat):\n    return cat[0] + 17\n", "Привет, мир! привет  привет", "🐈 and 🐕, and ½ of it"] * 8
WORDS = [*"".join(CORPUS)[:200].split(), " the", " ", "  ", "\n", "naï", "日本", "日", "🐈", "é", "ö", "▁"]
TEXTS = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
                  st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join),
                  st.lists(st.sampled_from(WORDS), max_size=25).map("".join)).filter(str.strip)
SPECIAL = ["<s>", "</s>", "<unk>"]


def finished(tokenizer, **tokens):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def byte_level(size, end="<|endoftext|>", normalizer=None, space=False):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[end], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return finished(tokenizer, bos_token=end, eos_token=end, pad_token=end)


def begins_with_bos(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return finished(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram():
    """SentencePiece's kind of pieces, with a beginning of sequence."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return begins_with_bos(tokenizer)


def fallback(once=False):
    """As Llama 2 has it: a space before each text, pieces of characters, and bytes for characters it does not know.

    With `once`, no space before a text that begins with one, as newer files of it have it.
    """
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz,.日é", "th", "▁th",
              "▁the", "▁▁"]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(dict(zip(pieces, range(len(pieces)), strict=True)), merges, byte_fallback=True,
                                     unk_token="<unk>", fuse_unk=True))
    if once:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return begins_with_bos(tokenizer)


def characters(*texts):
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *sorted(set("".join(texts)))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    return finished(tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


TOKENIZERS = {"small": byte_level(300), "large": byte_level(700, "<|end|>"), "unigram": unigram(),
              "fallback": fallback(), "characters": characters(*CORPUS), "prefixed": byte_level(400, space=True)}
PAIRS = [pytest.param(*pair, id="-".join(pair)) for pair in itertools.product(TOKENIZERS, repeat=2)]


def documents(tokenizer, texts):
    """Tokens of each text, begun as the tokenizer does, and ended."""
    begin = tokenizer("")["input_ids"][:1]
    return [[*begin, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]


def row(pieces, capacity=None, padding=0):
    """A student's row: every token but each document's first is learned."""
    rest = max(0, (capacity or 0) - sum(map(len, pieces)))
    tokens = sum(map(list, pieces), []) + [padding] * rest
    positions = [place for piece in [*pieces, range(rest)] for place in range(len(piece))]
    targets = sum(([*piece[1:], IGNORED] for piece in pieces), []) + [IGNORED] * rest
    return tuple(torch.tensor(values, dtype=torch.int64) for values in (tokens, positions, targets))


def prefix(tokenizer, tokens, positions, at):
    """A document up to a position, as the tokenizer's own decoder writes it, without the ends and the first space.

    Decoders write a character that has only begun as U+FFFD once or more often, and some all bytes before it too.
    """
    begin = at - int(positions[at])
    text = tokenizer.decode(tokens[begin:at + 1].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.lstrip(" ")


def is_same(ours, theirs):
    return ours == theirs or ours.endswith("\ufffd") and theirs.endswith("\ufffd")


@cache
def aligner_of(*names):
    return SpanAligner(*(TOKENIZERS[name] for name in names), 600)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_both_have_read_the_same_text_at_every_pair(ours, theirs, texts):
    student_row = row(documents(TOKENIZERS[ours], texts))
    found = aligner_of(ours, theirs)(*student_row)
    for i, j in zip(found.student_at.tolist(), found.teacher_at.tolist(), strict=True):
        assert is_same(prefix(TOKENIZERS[ours], *student_row[:2], i),
                       prefix(TOKENIZERS[theirs], found.input_ids, found.position_ids, j))
        assert student_row[2][i] != IGNORED
    assert (found.student_at.diff() > 0).all() and (found.teacher_at.diff() > 0).all()
    assert found.loss_mask == (student_row[2] != IGNORED).sum() and found.beyond == 0
    assert found.aligned >= found.documents - found.changed, "a document's end is common to all"


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_a_tokenizer_and_itself_pair_each_learned_position_with_the_same_one(name, texts):
    unknown = TOKENIZERS[name].unk_token_id
    pieces = [piece for piece in documents(TOKENIZERS[name], texts) if unknown is None or unknown not in piece]
    if name == "prefixed":  # " a" and "a" are both read as " a", which is told from "  a", but not from each other
        pieces = [piece for piece in pieces if TOKENIZERS[name].decode(piece)[:2].strip()]
    student_row = row(pieces, 300)
    found = aligner_of(name, name)(*student_row)
    loss_mask = (student_row[2] != IGNORED).nonzero()[:, 0]
    assert found.changed == 0 and torch.equal(found.student_at, loss_mask) and torch.equal(found.teacher_at, loss_mask)
    assert found.input_ids[:sum(map(len, pieces))].tolist() == sum(pieces, [])


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(text=st.lists(st.sampled_from(["the", " cat", "日", "é", " "]), min_size=3, max_size=12).map("".join),
       ends=st.tuples(st.integers(0, 8), st.integers(2, 30)))
def test_a_document_may_be_cut_anywhere(ours, theirs, text, ends):
    (whole,) = documents(TOKENIZERS[ours], [text])
    student_row = row([whole[ends[0]:sum(ends)] or whole])
    found = aligner_of(ours, theirs)(*student_row)
    for i, j in zip(found.student_at.tolist(), found.teacher_at.tolist(), strict=True):
        ours_read = prefix(TOKENIZERS[ours], *student_row[:2], i)
        theirs_read = prefix(TOKENIZERS[theirs], found.input_ids, found.position_ids, j)
        assert is_same(ours_read, theirs_read) or is_same(ours_read.lstrip("\ufffd").lstrip(" "), theirs_read)


@pytest.mark.parametrize(("theirs", "first"), [(byte_level(257, "<|end|>"), 0), (TOKENIZERS["fallback"], 2)])
def test_a_character_that_both_cut_is_compared_within(theirs, first):
    """The second one has a beginning of sequence and a space before all text."""
    ours = byte_level(257)
    found = SpanAligner(ours, theirs, 16)(*row(documents(ours, ["🐈ö"])))
    assert found.student_at.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.teacher_at.tolist() == list(range(first, first + 6))


def test_a_character_cut_off_is_left_out_at_both_ends():
    ours, theirs = byte_level(257), TOKENIZERS["characters"]
    (whole,) = documents(ours, ["日ab日"])
    piece = whole[1:-2]  # two bytes of the first character, a, b, two of the last one
    found = SpanAligner(ours, theirs, 16)(*row([piece]))
    assert theirs.convert_ids_to_tokens(found.input_ids[:2].tolist()) == ["a", "b"]
    assert found.student_at.tolist() == [2, 3] and found.teacher_at.tolist() == [0, 1]
    found = SpanAligner(ours, TOKENIZERS["fallback"], 16)(*row([piece]))  # <s> ▁ a b
    assert found.student_at.tolist() == [2, 3] and found.teacher_at.tolist() == [2, 3]


@pytest.mark.parametrize("ours", [fallback(), fallback(once=True)])
@pytest.mark.parametrize("spaces", range(5))
def test_spaces_that_a_text_begins_with(ours, spaces):
    text = " " * spaces + "cab"
    student_row = row(documents(ours, [text, text]))
    found = SpanAligner(ours, ours, 40)(*student_row)
    loss_mask = (student_row[2] != IGNORED).nonzero()[:, 0]
    assert torch.equal(found.student_at, loss_mask) and torch.equal(found.teacher_at, loss_mask)
    student = TOKENIZERS["small"]
    assert SpanAligner(student, ours, 40)(*row(documents(student, [text]))).changed == 0, "teachers can read it too"


def test_a_beginning_is_compared_where_the_student_begins():
    ours, theirs = TOKENIZERS["fallback"], TOKENIZERS["unigram"]
    piece = ours.encode("cab")  # <s> ▁ c a b
    aligner = SpanAligner(ours, theirs, 32)
    begun, cut = aligner(*row([piece])), aligner(*row([piece[1:]]))
    assert begun.input_ids[0] == cut.input_ids[0] == theirs.bos_token_id
    assert 0 in begun.student_at or 1 in begun.student_at
    read = [prefix(theirs, cut.input_ids, cut.position_ids, at) for at in cut.teacher_at.tolist()]
    assert read and all(read), "a teacher at the beginning of all texts was asked how this one goes on"


def test_the_end_of_one_is_the_end_of_the_other_within_a_document_too():
    ours, theirs = TOKENIZERS["small"], TOKENIZERS["characters"]
    (first,), (second,) = documents(ours, ["the cat"]), documents(ours, ["a dog"])
    found = SpanAligner(ours, theirs, 32)(*row([first + second]))
    assert theirs.decode(found.input_ids[:14].tolist()) == "the cat</s>a dog</s>"
    ends = (found.input_ids[:14] == theirs.eos_token_id).nonzero()[:, 0] - 1
    paired = dict(zip(found.teacher_at.tolist(), found.student_at.tolist(), strict=True))
    assert [paired[end] for end in ends.tolist()] == [len(first) - 2, len(first) + len(second) - 2]


def test_a_space_put_behind_an_end_is_not_of_the_text():
    ours, theirs = TOKENIZERS["fallback"], TOKENIZERS["large"]
    (piece,) = documents(ours, ["the cab</s>a dog"])
    assert ours.convert_ids_to_tokens(piece[5:8]) == ["b", "</s>", "▁"]
    found = SpanAligner(ours, theirs, 64)(*row([piece]))
    length = int((found.position_ids.diff() != 1).nonzero()[0, 0]) + 1
    assert theirs.decode(found.input_ids[:length].tolist()) == "the cab<|end|>a dog<|end|>"
    back = SpanAligner(theirs, ours, 64)(*row(documents(theirs, ["the cab<|end|>a dog"])))
    assert back.changed == 0 and back.input_ids[:len(piece)].tolist() == piece


def test_only_learned_positions_are_compared_and_only_their_documents_read():
    ours, theirs = TOKENIZERS["small"], TOKENIZERS["large"]
    tokens, positions, targets = row(documents(ours, ["the cat", "the dog", "a fish"]), 60, ours.pad_token_id)
    targets[positions < 1] = IGNORED
    second = (positions == 0).nonzero()[1:3, 0].tolist()
    targets[second[0]:second[1]] = IGNORED
    found = SpanAligner(ours, theirs, 40)(tokens, positions, targets)
    assert theirs.decode(found.input_ids[found.input_ids != theirs.pad_token_id].tolist()) == "the cata fish"
    assert (found.documents, found.loss_mask) == (2, int((targets != IGNORED).sum()))
    assert (targets[found.student_at] != IGNORED).all() and 0 < found.aligned <= found.loss_mask


def test_the_teachers_row_has_its_length():
    ours, theirs = TOKENIZERS["small"], TOKENIZERS["characters"]
    student_row = row(documents(ours, ["the cat sees", "the dog"]))
    whole, short = (SpanAligner(ours, theirs, capacity)(*student_row) for capacity in (40, 16))
    assert whole.position_ids.tolist() == [*range(13), *range(8), *range(19)]
    assert (whole.input_ids[21:] == theirs.pad_token_id).all() and whole.beyond == 0
    assert torch.equal(short.input_ids, whole.input_ids[:16])
    assert torch.equal(short.position_ids, whole.position_ids[:16])
    assert short.beyond == (whole.teacher_at >= 16).sum() > 0 and short.aligned + short.beyond == whole.aligned


@pytest.mark.parametrize(("ours", "theirs", "text"), [
    (byte_level(300), byte_level(300, normalizer=normalizers.NFC()), "cafe\u0301"),
    (byte_level(300), byte_level(300, normalizer=normalizers.Lowercase()), "The cat"),
    (byte_level(300), characters("abcdefgh "), "a cab, the"),  # the teacher knows no comma
    (characters("abcdefgh "), byte_level(300), "a cab, the"),  # the student does not
])
def test_a_text_that_a_tokenizer_changes_is_not_compared_and_counted(ours, theirs, text):
    found = SpanAligner(ours, theirs, 64)(*row(documents(ours, [text, "a bed"])))
    (piece,) = documents(ours, [text])
    assert (found.documents, found.changed) == (2, 1)
    assert found.aligned > 0 and (found.student_at >= len(piece)).all()


def test_a_student_that_normalises_is_given_a_teacher_of_what_it_has_read():
    ours, theirs = byte_level(300, normalizer=normalizers.Lowercase()), TOKENIZERS["large"]
    found = SpanAligner(ours, theirs, 64)(*row(documents(ours, ["The CAT"])))
    assert found.changed == 0 and theirs.decode(found.input_ids.tolist(), skip_special_tokens=True) == "the cat"


def test_bytes_that_are_no_text_are_not_compared():
    ours = byte_level(257)
    piece = ours.encode("a日")[:2] + ours.encode("b")  # as a student may write it that samples byte by byte
    found = SpanAligner(ours, TOKENIZERS["large"], 8)(*row([piece]))
    assert (found.documents, found.changed, found.aligned) == (1, 1, 0)


@pytest.mark.parametrize("marker", ["<|user|>", "<é▁>"])
@pytest.mark.parametrize("make", [lambda: byte_level(300), fallback])
def test_a_chat_marker_is_text_and_one_token_where_it_is_known(marker, make):
    """The second one has characters that stand for a byte and for a space within tokens that are not added."""
    ours, theirs = make(), byte_level(350)
    ours.add_special_tokens({"additional_special_tokens": [marker]})
    piece = ours.encode(f"{marker}cab", add_special_tokens=False)
    found = SpanAligner(ours, theirs, 64)(*row([piece]))
    assert theirs.decode(found.input_ids.tolist(), skip_special_tokens=True) == f"{marker}cab"
    theirs.add_tokens([AddedToken(marker, special=True)])
    known = SpanAligner(ours, theirs, 64)(*row([piece]))
    assert known.input_ids[0] == theirs.convert_tokens_to_ids(marker)
    assert known.teacher_at[0] == 0 and ours.convert_ids_to_tokens(piece)[:known.student_at[0]] in ([], [marker])


def test_an_unknown_token_that_is_the_end_stands_for_no_lost_text():
    ours = byte_level(300)
    ours.unk_token = ours.eos_token  # as GPT-2 has it
    found = SpanAligner(ours, TOKENIZERS["large"], 16)(*row(documents(ours, ["the cat"])))
    assert found.changed == 0 and found.aligned > 0


def test_a_token_that_no_bytes_make_is_meant_as_it_is_written():
    tokenizer = Tokenizer(models.BPE({"<e>": 0, "a": 1, "<｜x｜>": 2}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ours = finished(tokenizer, eos_token="<e>")
    found = SpanAligner(ours, TOKENIZERS["large"], 16)(*row([[1, 2, 1]]))
    assert TOKENIZERS["large"].decode(found.input_ids.tolist(), skip_special_tokens=True) == "a<｜x｜>a"


def test_a_row_that_teaches_nothing_is_empty():
    tokens, positions, targets = row(documents(TOKENIZERS["small"], ["the cat"]))
    found = SpanAligner(TOKENIZERS["small"], TOKENIZERS["large"], 8)(tokens, positions, targets.fill_(IGNORED))
    assert (found.aligned, found.loss_mask, found.documents, found.changed) == (0, 0, 0, 0)
    assert found.position_ids.tolist() == list(range(8)) and found.student_at.dtype == torch.int64


def test_it_travels_to_a_worker():
    aligner = SpanAligner(TOKENIZERS["unigram"], TOKENIZERS["small"], 64)
    student_row = row(documents(TOKENIZERS["unigram"], ["the cat sees the dog"]))
    here = aligner(*student_row)
    again = pickle.loads(pickle.dumps(aligner))(*student_row)
    (there,) = DataLoader(_Rows(aligner, student_row), batch_size=None, num_workers=1, multiprocessing_context="fork")
    for one in (again, there):
        assert all(torch.equal(getattr(one, name), getattr(here, name))
                   for name in ("input_ids", "position_ids", "student_at", "teacher_at"))


class _Rows(torch.utils.data.Dataset):
    def __init__(self, aligner, student_row):
        self.aligner, self.row = aligner, student_row

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.aligner(*self.row)


@pytest.mark.parametrize(("decoder", "kind"), [
    (decoders.WordPiece(), "WordPiece"), (None, "none at all"),
    (decoders.Sequence([decoders.Replace(Regex("_+"), " "), decoders.Fuse()]), "Replace by a pattern")])
def test_a_decoder_that_adds_text_is_refused(decoder, kind):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    strange = finished(tokenizer)
    with pytest.raises(ValueError, match=rf"teacher_tokenizer = .* has a decoder \({kind}\)"):
        SpanAligner(TOKENIZERS["small"], strange, 8)
    with pytest.raises(ValueError, match=rf"student_tokenizer = .* has a decoder \({kind}\)"):
        SpanAligner(strange, TOKENIZERS["small"], 8)


def test_a_slow_tokenizer_and_a_row_without_tokens_are_refused():
    with pytest.raises(ValueError, match="student_tokenizer = ByT5Tokenizer .* give a fast tokenizer"):
        SpanAligner(ByT5Tokenizer(), TOKENIZERS["small"], 8)
    with pytest.raises(ValueError, match="capacity = 0"):
        SpanAligner(TOKENIZERS["small"], TOKENIZERS["large"], 0)


def uld(student_logits, teacher_logits):
    """Sum over positions of sum_v |sorted p - sorted q|, the shorter one filled up with zeros, in float64."""
    p, q = (torch.softmax(logits.double(), -1).sort(-1, descending=True).values
            for logits in (teacher_logits, student_logits))
    size = max(p.shape[-1], q.shape[-1])
    p, q = (torch.nn.functional.pad(one, (0, size - one.shape[-1])) for one in (p, q))
    return (p - q).abs().sum()


def test_the_reference_is_the_least_cost_of_matching_tokens():
    """Transport with one cost for all pairs of tokens: the least over all ways to take one vocabulary for the other."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.softmax(torch.randn(size, generator=generator).double(), -1) for size in (5, 3))
    q = torch.cat([q, torch.zeros(2)])
    least = min((p - q[list(order)]).abs().sum() for order in itertools.permutations(range(5)))
    assert float(uld(q[None, :3].log(), p[None].log())) == pytest.approx(float(least), rel=1e-12)


def test_pairs_are_what_the_loss_compares():
    """Logits that depend on the text before a position alone agree at all pairs, whatever the tokens; others do not."""
    ours, theirs = TOKENIZERS["small"], TOKENIZERS["large"]
    student_row = row(documents(ours, ["the cat sees 日本", "naïve 🐈"]))
    found = SpanAligner(ours, theirs, 64)(*student_row)

    def logits(tokenizer, tokens, positions, at):
        rows = []
        for place in at.tolist():
            begin = place - int(positions[place])
            text = tokenizer.decode(tokens[begin:place + 1].tolist(), skip_special_tokens=True)
            known = np.random.default_rng(list(text.encode())).normal(size=20)
            rows.append(np.concatenate([known, np.full(len(tokenizer) - 20, -60.0)]))
        return torch.tensor(np.array(rows))

    student = logits(ours, *student_row[:2], found.student_at)
    teacher = logits(theirs, found.input_ids, found.position_ids, found.teacher_at)
    assert float(uld(student, teacher)) < 1e-12
    shifted = teacher.roll(1, 0)
    loss, _ = ResponseObjective(0.0, (Divergence("uld"),))(student, shifted, student_row[2][found.student_at])
    assert float(loss) == pytest.approx(float(uld(student, shifted)), rel=1e-5) and loss > 1
