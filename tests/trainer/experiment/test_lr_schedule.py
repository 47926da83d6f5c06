"""Learning rates against the formulas, at the places that are easily off by one."""

import math

import pytest

from trainer.experiment.lr_schedule import LearningRate


def test_warmup_reaches_the_peak_and_cosine_the_end():
    rate = LearningRate(peak=2.0, steps=100, shape="cosine", warmup=10, final=0.1)
    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(10) == pytest.approx(2.0) and rate(55) == pytest.approx(1.1) and rate(100) == pytest.approx(0.2)
    assert rate(99) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * 89 / 90)) / 2)


def test_linear_wsd_and_constant():
    linear = LearningRate(peak=1.0, steps=10, shape="linear", final=0.0)
    assert [linear(step) for step in range(10)] == pytest.approx([1 - step / 10 for step in range(10)])
    wsd = LearningRate(peak=1.0, steps=100, shape="wsd", warmup=0.1, decay=0.2, final=0.0)
    assert wsd.warmup_steps == 10
    assert all(wsd(step) == 1.0 for step in range(10, 80))
    assert [wsd(79), wsd(80), wsd(90), wsd(99)] == pytest.approx([1.0, 1.0, 0.5, 1 / 20]), "no step is taken at zero"
    constant = LearningRate(peak=1.0, steps=10, shape="constant", warmup=0)
    assert {constant(step) for step in range(10)} == {1.0}


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_never_rises_after_warmup_nor_leaves_its_bounds(shape, steps):
    rate = LearningRate(peak=3.0, steps=steps, shape=shape, warmup=0.3, final=0.1)
    values = [rate(step) for step in range(steps)]
    after = values[rate.warmup_steps:]
    assert all(a >= b - 1e-12 for a, b in zip(after, after[1:], strict=False))
    assert all(0.0 < value <= 3.0 + 1e-12 for value in values)
