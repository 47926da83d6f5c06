"""What thresholds save and cost, against counting row by row."""

import pytest
import torch

from strategies.pruning.early_exit.exit_curve import Costs, classifier_curve, point
from strategies.pruning.early_exit.exit_decisions import confidence, first_confident
from strategies.pruning.early_exit.exit_heads import attach_exits, detach_exits
from tests.strategies.pruning.early_exit.exit_models import CLASSIFIERS, LANGUAGE, made

COSTS = Costs((0, 2), (100, 100, 100, 100), (10, 10, 10, 10), 5, 40)


def test_a_curve_is_what_counting_row_by_row_gives():
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(3, 50, 4), torch.randint(0, 4, (50,))
    targets[7] = -100
    for one in classifier_curve(logits, targets, COSTS, thresholds=(0.0, 0.6, 0.9, 2.0)):
        right, blocks, flops, left = [], 0, 0, [0, 0, 0]
        for row in range(50):
            sure = logits[:, row].softmax(-1).amax(-1)
            exit = next((number for number in (0, 1) if sure[number] >= one.threshold), 2)
            depth = [1, 3, 4][exit]
            left[exit] += 1
            blocks += depth
            flops += 100 * depth + 10 * (4 - depth) + 5 * min(exit + 1, 2) + 40 * (exit == 2)
            if targets[row] >= 0:
                right.append(bool(logits[exit, row].argmax() == targets[row]))
        assert one.accuracy == pytest.approx(sum(right) / 49)
        assert one.blocks == pytest.approx(blocks / 200)
        assert one.exits == pytest.approx([count / 50 for count in left])
        assert one.flops == pytest.approx(1.0 if one.threshold > 1 else flops / (50 * 440))


def test_exits_that_nobody_uses_cost_more_than_none():
    assert point(COSTS, 1.0, torch.full((4,), 2), accuracy=1.0).flops == pytest.approx(450 / 440)
    assert point(COSTS, 2.0, torch.full((4,), 2), accuracy=1.0).flops == 1


def test_a_row_with_a_class_for_each_token_leaves_with_the_least_sure_of_them():
    logits = torch.tensor([[[9.0, 0.0], [0.1, 0.0], [0.0, 0.0]]])
    assert float(confidence(logits)) == 0.5
    assert float(confidence(logits, torch.tensor([[1, 1, 0]]))) == pytest.approx(0.525, abs=1e-3)


def test_the_first_confident_exit_counts():
    assert first_confident(torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.1, 0.1]]), 0.5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_costs_of_a_language_model(name):
    """A block's matrices by hand; filling a cache takes the projections before attention alone."""
    model = made(LANGUAGE[name])
    attach_exits(model, [1])
    costs = Costs.of(model, detach_exits(model), 1)
    if name == "llama":  # query, key, value, output; gate, up, down
        assert costs.blocks == (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48,) * 4 and costs.filled == (32 * 64,) * 4
    else:
        assert costs.blocks == (12 * 32 * 32,) * 4 and costs.filled == (3 * 32 * 32,) * 4
    assert costs.exit == costs.head == 32 * 64


def test_costs_of_a_classifier():
    model = made(CLASSIFIERS["bert"])
    attach_exits(model, [1])
    costs = Costs.of(model, detach_exits(model), 7)
    assert costs.blocks == (7 * (4 * 32 * 32 + 2 * 32 * 48),) * 4 and costs.filled == (0,) * 4
    assert costs.exit == 32 * 5 and costs.head == 32 * 32 + 32 * 5
