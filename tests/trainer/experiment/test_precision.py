"""Dynamic loss scaling, step by step."""

import pytest
import torch

from strategies.sharding.engine import Engine
from trainer.experiment.precision import MixedPrecision


def one_step(precision, parameter, optimizer, factor):
    """A step, as the trainer takes it, whose gradient is `factor` before scaling; returns the one after unscaling."""
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(parameter.grad.clone()))
    engine = Engine(torch.nn.Identity(), torch.nn.Identity(), optimizer)
    precision.scale((parameter * factor).sum()).backward()
    done = engine.update(None, True, precision.loss_scale)
    precision.settle(precision.overflowed(True, done.finite), done.finite)
    return seen[0] if seen else None


def test_scale_halves_on_overflow_skips_and_grows_back():
    precision = MixedPrecision("fp16", "cpu", initial_scale=2.0**120, growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    overflowing = 2.0**10  # 2^120 * 2^10 is no fp32 number
    for expected in (2.0**119, 2.0**118, 2.0**117):
        one_step(precision, parameter, optimizer, overflowing)
        assert precision.loss_scale == expected
    assert precision.skipped == 3 and torch.equal(parameter.detach(), torch.ones(2))
    for _ in range(3):
        assert torch.equal(one_step(precision, parameter, optimizer, 1.0), torch.ones(2)), "gradients are unscaled"
    assert precision.loss_scale == 2.0**118 and precision.growths == 1 and precision.skipped == 3
    assert torch.allclose(parameter.detach(), torch.full((2,), -0.5))


def test_state_goes_on():
    one = MixedPrecision("fp16", "cpu", initial_scale=64.0, growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    one_step(one, parameter, optimizer, float("inf"))
    one_step(one, parameter, optimizer, 1.0)
    two = MixedPrecision("fp16", "cpu", initial_scale=64.0, growth_interval=3)
    two.load_state_dict(one.state_dict())
    for precision in (one, two):
        one_step(precision, parameter, optimizer, 1.0)
        one_step(precision, parameter, optimizer, 1.0)
        assert (precision.loss_scale, precision.skipped, precision.growths) == (64.0, 1, 1)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_without_fp16_nothing_is_scaled(name):
    precision = MixedPrecision(name, "cpu")
    loss = torch.tensor(3.0)
    assert precision.scale(loss) is loss and precision.loss_scale == 1.0
    assert not precision.overflowed(True, False), "without a scale, a non-finite gradient is a failure"


def test_an_overflow_at_the_smallest_scale_is_a_failure():
    assert MixedPrecision("fp16", "cpu", initial_scale=8.0).overflowed(True, False)
    assert not MixedPrecision("fp16", "cpu", initial_scale=1.0).overflowed(True, False)
    assert not MixedPrecision("fp16", "cpu", initial_scale=8.0).overflowed(False, False), "a NaN loss is no overflow"
