"""The compiled kernels of the response loss: elementary functions, every term, and what threads must not change."""

import numba
import numpy as np
import pytest
import torch

from strategies.distillation.losses import fused_rows, row_math, tiled_loss
from strategies.distillation.losses.divergences import Divergence
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.response import IGNORED, ResponseObjective
from strategies.distillation.losses.teacher_targets import HiddenTargets, LogitTargets
from tests.strategies.distillation.distilling import WHOLE, case, relative

SIZE = {"positions": 37, "width": 16, "vocabulary": 700}
FUNCTIONS = {
    "exponential": (np.exp, -86.0, 87.0), "growth": (np.expm1, -60.0, 87.0), "log_of_one_more": (np.log1p, -0.999, 1e6),
    "beyond_line": (lambda x: np.where(abs(x) > 1e-2, np.expm1(x) - x, x**2 / 2 + x**3 / 6 + x**4 / 24 + x**5 / 120),
                    -1.0, 1.0),
    "below_line": (lambda x: np.where(abs(x) > 1e-2, x - np.log1p(x), x**2 / 2 - x**3 / 3 + x**4 / 4 - x**5 / 5), -0.9,
                   1e4)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_are_exact_to_a_few_units_in_the_last_place(name):
    function = getattr(row_math, name)
    function = function.by_numba() if hasattr(function, "by_numba") else function
    wanted, low, high = FUNCTIONS[name]

    @numba.njit
    def of_all(given, found):
        for index in range(given.size):
            found[index] = function(given[index])

    near = 10.0 ** np.linspace(-7, 0, 5000)
    given = np.concatenate([np.linspace(low, high, 20000), near, -near])
    given = given[(given > low) & (given < high)].astype(np.float32)
    found = np.empty_like(given)
    of_all(given, found)
    exact = wanted(given.astype(np.float64))
    assert np.max(np.abs(found - exact) / np.maximum(np.abs(exact), 1e-37)) < 1e-6
    of_all(np.full(3, np.nan, np.float32), found)
    assert np.isnan(found[:3]).all()


def both(objective, one, through_kernels, **options):
    """Loss and gradient of given logits, by the kernels or by torch."""
    logits = one.student_logits().float().requires_grad_()
    least = fused_rows.LEAST
    fused_rows.LEAST = 0 if through_kernels else 10**9
    try:
        value, terms = objective(logits, one.teacher_logits().float(), one.targets, **options)
    finally:
        fused_rows.LEAST = least
    value.backward()
    return value.detach(), logits.grad, terms


@pytest.mark.parametrize("name", [None, *WHOLE])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kernels_and_torch_agree_on_every_term(name, temperature):
    one = case(3.0, **SIZE)
    share = 0.3 if name in ("jsd", "skewed_kl", "skewed_reverse_kl") else None
    taught = () if name is None else (Divergence(name, 0.8, temperature, share, share is not None),)
    objective = ResponseObjective(0.6, taught, label_smoothing=0.1, z_loss=0.02)
    asked = torch.arange(37) % 3 != 0
    ours, plain = (both(objective, one, kernels, asked=None if name is None else asked) for kernels in (True, False))
    assert relative(ours[0], plain[0]) < 1e-6 and relative(ours[1], plain[1]) < 3e-6
    assert all(relative(ours[2][term], plain[2][term]) < 2e-6 for term in objective.terms.names)


def test_the_kernels_are_what_computes_a_vocabulary(monkeypatch):
    """A silent return to torch would pass every other test."""
    called = []
    monkeypatch.setattr(tiled_loss, "on_tile", lambda *given: called.append(given) or fused_rows.on_tile(*given))
    one = case(1.0, **SIZE)
    hidden, weight = one.hidden.clone().requires_grad_(), one.weight.clone().requires_grad_()
    ResponseObjective(1.0, (Divergence("jsd"),))(hidden, HiddenTargets(one.teacher_targets, Head(one.their_weight)),
                                                 one.targets, head=Head(weight))[0].backward()
    assert len(called) == 1


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_bits_do_not_depend_on_the_number_of_threads(name):
    one, before = case(2.0, **SIZE), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(both(ResponseObjective(0.5, (Divergence(name),)), one, True))
        finally:
            torch.set_num_threads(before)
    for value, gradient, _ in found[1:]:
        assert torch.equal(value, found[0][0]) and torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("name", [None, *WHOLE])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_make_the_loss_not_finite(name, bad):
    """Silent error 9: a NaN step that reports a loss."""
    one = case(1.0, **SIZE)
    logits = one.student_logits().float()
    logits[1, 5] = bad
    objective = ResponseObjective(1.0, () if name is None else (Divergence(name),))
    value, _ = objective(logits, one.teacher_logits().float(), one.targets)
    assert one.targets[1] != IGNORED and not torch.isfinite(value)


def test_the_teachers_logits_are_left_as_they_are():
    one = case(1.0, **SIZE)
    teacher = one.teacher_logits().float()
    kept = teacher.clone()
    student = one.student_logits().float()
    ResponseObjective(0.0, (Divergence("reverse_kl"),))(student, LogitTargets(teacher), one.targets)
    assert torch.equal(teacher, kept)


@pytest.mark.parametrize("wrong", [-1, 700])
def test_targets_that_are_no_tokens_are_refused(wrong):
    """Compiled code asks for no bounds: it would read, and write, what lies beside the logits."""
    one = case(1.0, **SIZE)
    targets = one.targets.clone()
    targets[1] = wrong
    with pytest.raises(IndexError, match=f"index {wrong} is out of bounds"):
        ResponseObjective(1.0, ())(one.student_logits().float(), None, targets)


def test_rows_without_a_target_have_no_loss():
    """A rank may have none in a step."""
    one = case(1.0, **SIZE)
    hidden, weight = one.hidden.clone().requires_grad_(), one.weight.clone().requires_grad_()
    value, _ = ResponseObjective(1.0, (Divergence("jsd"),))(
        hidden, HiddenTargets(one.teacher_targets, Head(one.their_weight)), torch.full((37,), IGNORED),
        head=Head(weight))
    value.backward()
    assert float(value) == 0 and not hidden.grad.any() and not weight.grad.any()
