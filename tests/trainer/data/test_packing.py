"""Packing: nothing lost, nothing over length, nothing seen across documents."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.distillation.losses.response import IGNORED
from tests.conftest import TINY
from trainer.data.encoding import Document
from trainer.data.packing import best_fit, build_row, cuts, pack
from trainer.models.model_trials import documents_stay_apart


@settings(max_examples=200, deadline=None)
@given(some.lists(some.integers(1, 16), max_size=60), some.integers(16, 40))
def test_best_fit_holds_everything_once_within_capacity(lengths, capacity):
    rows = best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    half = sum(sum(lengths[index] for index in row) * 2 <= capacity for row in rows)
    assert half <= 1, "two half-empty rows could have been one"


def document(ids, loss_mask=None, size=3):
    ids = np.asarray(ids, np.int32)
    return Document(ids, np.ones(len(ids), bool) if loss_mask is None else np.asarray(loss_mask, bool),
                    np.full(len(ids), size, np.int32))


def test_row_predicts_within_documents_only():
    row = build_row([document([5, 6, 7]), document([8, 9], [False, True])], 8, padding=0)
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert row["targets"].tolist() == [6, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED, IGNORED]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert int(row["bytes"]) == 9  # of tokens 6, 7 and 9


def test_end_of_sequence_is_learned_even_when_it_is_the_padding_token():
    """Silent error 6."""
    row = build_row([document([5, 6, 2])], 5, padding=2)
    assert row["targets"].tolist() == [6, 2, IGNORED, IGNORED, IGNORED]


def test_long_text_is_cut_and_long_records_keep_their_beginning():
    text = np.ones(10, bool)
    assert [(cut.start, cut.stop) for cut in cuts(text, 4, plain=True)] == [(0, 4), (4, 8), (8, 10)]
    assert [(cut.start, cut.stop) for cut in cuts(text, 4, plain=False)] == [(0, 4)]
    answer_beyond = np.array([False] * 5 + [True] * 3)
    assert not list(cuts(answer_beyond, 4, plain=False)), "a row with nothing to learn"
    assert not list(cuts(np.ones(1, bool), 4, plain=True)), "a single token has nothing to be predicted from"


def test_rows_of_a_window_are_not_sorted_by_length():
    pieces = [document([1] * length) for length in range(2, 30)]
    sizes = [len(row[0]) for row in pack(pieces, 30, packing=True)]
    assert sizes != sorted(sizes, reverse=True) and sum(sizes) > 0
    assert [[len(piece) for piece in row] for row in pack(pieces, 30, True)] == \
        [[len(piece) for piece in row] for row in pack(pieces, 30, True)]


def test_without_packing_each_document_has_its_row():
    rows = list(pack([document([1, 2]), document([3, 4])], 8, packing=False))
    assert [len(row) for row in rows] == [1, 1]


def build(kind):
    dimensions = {**TINY, "model_type": kind, "vocab_size": 40}
    if kind in ("gpt2", "opt"):
        del dimensions["num_key_value_heads"], dimensions["intermediate_size"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(**dimensions, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "mistral"])
def test_models_do_not_see_other_documents(kind):
    model = build(kind)
    first, second = document([3, 4, 5, 6, 7]), document([9, 8, 7, 6])
    packed = build_row([first, second], 12, padding=0)
    changed = build_row([document([30, 31, 32, 33, 34]), second], 12, padding=0)
    alone = build_row([second], 12, padding=0)

    def logits(row):
        with torch.no_grad():
            return model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None],
                         use_cache=False).logits[0]

    assert torch.equal(logits(packed)[5:9], logits(changed)[5:9])
    assert torch.allclose(logits(packed)[5:9], logits(alone)[:4], atol=1e-5)
    assert documents_stay_apart(model)


@pytest.mark.parametrize("kind", ["opt", "bloom"])
def test_models_that_would_see_other_documents_are_found_out(kind):
    assert not documents_stay_apart(build(kind))
