"""Counts of a classifier's answers, against figures that NumPy computes from all rows at once."""

import math

import numpy as np
import pytest
import torch

from strategies.common.classification_counts import ClassificationCounts

CLASSES = 7


def figures_by_hand(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Straight from the definitions: F1 by precision and recall, calibration by masks of `bins` (Guo et al., eq. 3)."""
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    answers, confidence, every = shares.argmax(1), shares.max(1), []
    for one in sorted({*targets, *answers}):
        hits = ((answers == one) & (targets == one)).sum()
        precision = hits / (answers == one).sum() if (answers == one).any() else 0.0
        recall = hits / (targets == one).sum() if (targets == one).any() else 0.0
        every.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs((answers == targets)[inside].mean() - confidence[inside].mean())
    return {"cross_entropy": -np.log(shares[np.arange(len(targets)), targets]).mean(), "macro_f1": np.mean(every),
            "accuracy": (answers == targets).mean(), "calibration_error": error}


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets; of class 5 there are none, and class 6 is never answered."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (200,), generator=draw)
    targets[targets == 5] = 2
    logits = 1.5 * torch.randn(200, CLASSES, generator=draw) + 1.2 * torch.nn.functional.one_hot(targets, CLASSES)
    logits[:, 6] -= 50
    return logits, targets


def test_figures_are_those_of_the_definitions_and_of_scikit_learn():
    logits, targets = rows(0)
    counts = ClassificationCounts(CLASSES)
    counts.add(logits, targets)
    found, expected = counts.figures(), figures_by_hand(logits.double().numpy(), targets.numpy())
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    metrics = pytest.importorskip("sklearn.metrics")
    answers = logits.argmax(-1).numpy()
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(targets.numpy(), answers, average="macro"))
    assert np.array_equal(counts.table(), metrics.confusion_matrix(targets.numpy(), answers, labels=range(CLASSES)))


def test_batches_and_processes_do_not_change_a_figure():
    """What two processes have counted of their rows, in batches, is summed as the trainer sums it."""
    logits, targets = rows(1)
    whole, parts = ClassificationCounts(CLASSES), [ClassificationCounts(CLASSES) for _ in range(2)]
    whole.add(logits, targets)
    for number in range(0, 200, 8):
        parts[number // 8 % 2].add(logits[number:number + 8], targets[number:number + 8])
    parts[1].add(logits[:3], torch.full((3,), -100))  # rows that only fill a batch
    summed = whole.take(parts[0].numbers() + parts[1].numbers())
    assert summed.table() == whole.table()
    assert torch.equal(summed.bins[0], whole.bins[0]) and torch.equal(summed.bins[2], whole.bins[2])
    assert summed.figures() == pytest.approx(whole.figures(), rel=1e-12)


def test_each_token_counts_that_has_a_class_and_nothing_else():
    logits, targets = rows(2)
    tokens, some = ClassificationCounts(CLASSES), torch.arange(200) % 3 == 0
    tokens.add(logits.view(20, 10, CLASSES), torch.where(some, targets, -100).view(20, 10))
    expected = figures_by_hand(logits[some].double().numpy(), targets[some].numpy())
    assert tokens.figures() == pytest.approx(expected, abs=1e-6) and int(tokens.confusion.sum()) == int(some.sum())


def test_full_confidence_is_in_the_last_interval():
    sure = ClassificationCounts(3)
    sure.add(torch.tensor([[100.0, 0, 0]]), torch.tensor([0]))
    assert sure.bins[0][14] == 1 and sure.figures()["calibration_error"] == 0


def test_what_is_no_number_is_no_answer():
    """A maximum would be found among them: class 0, which is right for the row of class 0."""
    counts = ClassificationCounts(2)
    counts.add(torch.tensor([[2.0, 1.0], [math.nan, 0.0]]), torch.tensor([0, 0]))
    assert all(map(math.isnan, counts.figures().values()))
    assert all(map(math.isnan, ClassificationCounts(2).figures().values())), "nor is nothing at all"
