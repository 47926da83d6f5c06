"""An epoch is every row once: its last step has the rows that are left."""

import json

import pytest
import torch

from strategies.distillation.losses.response import IGNORED
from tests.conftest import sentences
from tests.trainer.teacher.test_distilling import bpe, save, with_
from tests.trainer.training.test_loop import losses
from trainer.data.batches import training_batches
from trainer.data.row_order import Order
from trainer.experiment.nodes import Training
from trainer.run.metrics import read_lines

LENGTHS = {"steps": None, "batch_size": 4, "micro_batch": 2, "evaluate_every": 9, "checkpoint_every": 1}


@pytest.fixture
def ten(tmp_path):
    """Ten rows of different length."""
    file = tmp_path / "ten.jsonl"
    file.write_text("".join(json.dumps({"text": sentences(number, 1 + number % 3)}) + "\n" for number in range(10)))
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"text": sentences(11, 2)}) + "\n")
    return {"path": str(file), "validation": {"path": str(held)}, "packing": False, "sequence_length": 64}


@pytest.mark.parametrize(("epochs", "rows", "batch", "seen", "steps"), [
    (1, 10, 4, 10, 3), (1, 8, 4, 8, 2), (2, 10, 4, 20, 5), (3, 10, 4, 30, 8), (0.5, 10, 4, 5, 2), (0.1, 30, 4, 3, 1),
    (1, 3, 8, 3, 1), (0.01, 10, 4, 1, 1)])
def test_rows_and_steps_of_epochs(write_experiment, epochs, rows, batch, seen, steps):
    from trainer.experiment.load import read_experiment
    from trainer.planning.plan import count_steps

    training = {**LENGTHS, "epochs": epochs, "batch_size": batch}
    assert Training(**training).seen(rows) == seen
    assert count_steps(read_experiment(write_experiment(training=training)).experiment, rows) == steps
    assert Training(steps=7).seen(rows) is None


@pytest.mark.parametrize(("processes", "micro", "workers", "skip"),
                         [(1, 4, 0, 0), (2, 2, 0, 0), (2, 1, 1, 8), (4, 1, 0, 4)])
def test_every_row_is_seen_once_whoever_reads(ten, write_experiment, processes, micro, workers, skip):
    from trainer.data.dataset import prepare_text
    from trainer.experiment.load import read_experiment

    rows = prepare_text(read_experiment(write_experiment(data=ten)).experiment).train
    seen, empty = [], 0
    for rank in range(processes):
        batches = training_batches(rows, seed=3, micro_batch=micro, replica=rank, replicas=processes, skip=skip,
                                   workers=workers, pin=False, end=10)
        for _ in range((12 - skip) // (micro * processes)):
            batch = next(batches)
            there = batch["row"] >= 0
            seen += batch["row"][there].tolist()
            empty += int((~there).sum())
            assert (batch["targets"][~there] == IGNORED).all() and not batch["bytes"][~there].any()
            assert (batch["targets"][there] != IGNORED).any(-1).all()
    order = Order(10, seed=3)
    assert sorted(seen) == sorted(order[place] for place in range(skip, 10)) and empty == 2


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_the_last_step_is_the_mean_over_its_own_tokens(train_here, ten, micro_batch):
    """With a learning rate that moves nothing, each step's loss is that of the student as it was made."""
    trainer = train_here("one", data=ten, optimizer={"lr": 1e-30},
                         training={**LENGTHS, "epochs": 1, "micro_batch": micro_batch})
    lines = [line for line in read_lines(trainer.folder.metrics) if "loss" in line]
    rows, order, model = trainer.text.train, Order(10, seed=0), trainer.unwrapped.double().eval()
    assert len(lines) == 3 and not trainer.state.empty_steps
    for step, line in enumerate(lines):
        nats, tokens = 0.0, 0
        for place in range(4 * step, min(4 * step + 4, 10)):
            row = rows[order[place]]
            loss_mask = row["targets"] != IGNORED
            with torch.no_grad():
                log_p = model(input_ids=row["input_ids"][None]).logits[0].log_softmax(-1)
            nats -= float(log_p[loss_mask].gather(1, row["targets"][loss_mask, None]).sum())
            tokens += int(loss_mask.sum())
        assert line["tokens"] == tokens and line["loss"] == pytest.approx(nats / tokens, rel=1e-6)


def test_an_interrupted_epoch_goes_on_to_the_same_end(train_here, ten):
    training = {**LENGTHS, "epochs": 1.5}
    whole = train_here("whole", data=ten, training=training)
    train_here("parts", data=ten, training=training, until=3)
    rest = train_here("parts", data=ten, training={**training, "micro_batch": 1})
    assert len(losses(whole)) == len(losses(rest)) == 4
    assert losses(rest) == pytest.approx(losses(whole), rel=1e-6)
    for one, other in zip(whole.unwrapped.parameters(), rest.unwrapped.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("changes", [
    {"teacher": {"targets": {"source": "samples", "draws": 20}}},
    {"objective": {"on_policy": {"fraction": 1.0, "prompt_tokens": 4, "new_tokens": 4}}}])
def test_a_teacher_says_nothing_of_rows_that_are_not_there(train_here, ten, tmp_path, changes):
    """Ten rows: of the third step two are there, in one of two micro-batches."""
    family = {"teacher": {"path": save(tmp_path / "large", bpe(300), seed=1, hidden_size=48)},
              "student": {"path": save(tmp_path / "small", bpe(300))}, "data": {**ten, "tokenizer": {
                  "train_vocabulary": None}}, "objective": {"cross_entropy": 0.0, "divergence": {"weight": 1.0}}}
    trainer = train_here("taught", **with_(family, training={**LENGTHS, "epochs": 1}, **changes))
    lines = [line for line in read_lines(trainer.folder.metrics) if "loss" in line]
    written = "objective" in changes
    tokens = sum(int((trainer.text.train[row]["targets"] != IGNORED).sum()) for row in range(10))
    assert len(lines) == 3 and all(0 < line["loss"] < 20 for line in lines)
    assert lines[-1]["tokens"] <= 2 * 4 if written else sum(line["tokens"] for line in lines) == tokens
