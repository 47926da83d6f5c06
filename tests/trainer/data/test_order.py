"""Samples follow (seed, epoch, global position) and nothing else: not processes, not workers, not the batch split."""

import pytest
import torch

from trainer.data.batches import training_batches
from trainer.data.dataset import prepare_text
from trainer.data.row_order import Order
from trainer.experiment.load import read_experiment


def text_of(write_experiment, **data):
    return prepare_text(read_experiment(write_experiment(data=data)).experiment)


def stream(rows, count, *, processes=1, micro_batch=1, workers=0, skip=0, seed=0):
    """The first `count` rows in global order, as `processes` processes would read them together."""
    readers = [training_batches(rows, seed=seed, micro_batch=micro_batch, replica=rank, replicas=processes, skip=skip,
                                workers=workers, pin=False) for rank in range(processes)]
    seen = []
    while len(seen) < count:
        for reader in readers:
            batch = next(reader)
            seen += list(zip(batch["row"].tolist(), batch["input_ids"], batch["targets"], strict=True))
    return seen[:count]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("processes", "micro_batch", "workers"), [(2, 2, 0), (4, 1, 0), (1, 4, 2), (2, 1, 3)])
def test_order_is_the_same_however_it_is_read(write_experiment, streaming, processes, micro_batch, workers):
    rows = text_of(write_experiment, streaming=streaming).train
    count = 40
    one = stream(rows, count)
    other = stream(rows, count, processes=processes, micro_batch=micro_batch, workers=workers)
    assert [row for row, *_ in one] == [row for row, *_ in other]
    for (_, ids, targets), (_, ids_, targets_) in zip(one, other, strict=True):
        assert torch.equal(ids, ids_) and torch.equal(targets, targets_)


@pytest.mark.parametrize("streaming", [False, True])
def test_starting_later_continues_the_same_order(write_experiment, streaming):
    rows = text_of(write_experiment, streaming=streaming).train
    whole, rest = stream(rows, 30), stream(rows, 18, skip=12, processes=2, micro_batch=2)
    for (row, ids, _), (row_, ids_, _) in zip(whole[12:], rest, strict=True):
        assert row == row_ and torch.equal(ids, ids_)


def test_every_epoch_has_every_row_once_in_another_order():
    order = Order(50, seed=1)
    first, second = [order[p] for p in range(50)], [order[p] for p in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert [Order(50, seed=2)[p] for p in range(50)] != first
    assert [Order(50, seed=1)[p] for p in range(50, 100)] == second, "an epoch does not depend on those before"


def test_streamed_epochs_are_shuffled_differently_and_hold_out_the_first_documents(write_experiment):
    text = text_of(write_experiment, streaming=True, validation={"rows": 6})
    again = text_of(write_experiment, streaming=True, validation={"rows": 6})
    assert torch.equal(text.held_out["input_ids"], again.held_out["input_ids"])
    held = {tuple(ids.tolist()) for ids in text.held_out["input_ids"]}
    rows = stream(text.train, 60)
    assert not held & {tuple(ids.tolist()) for _, ids, _ in rows}


def test_held_out_documents_are_never_trained_on(write_experiment):
    text = text_of(write_experiment)
    first = {tuple(ids[:12].tolist()) for ids in text.held_out["input_ids"]}
    train = {tuple(text.train[index]["input_ids"][:12].tolist()) for index in range(len(text.train))}
    assert len(first) > 1 and not first & train
    other = prepare_text(read_experiment(write_experiment(seed=5)).experiment)
    assert torch.equal(other.held_out["input_ids"], text.held_out["input_ids"]), "seeds are compared on the same text"
