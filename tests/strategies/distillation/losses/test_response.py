"""Losses against a float64 reference written out by hand."""

import math

import pytest
import torch

from strategies.distillation.losses.response import IGNORED, Divergence, ResponseObjective, cross_entropy_sum, kl_sum


def reference_kl(student, teacher, targets, temperature):
    """Sum over kept positions of T^2 sum_v p (log p - log q), in float64, by the definition."""
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    per_token = (p * (p.log() - q.log())).sum(-1)
    return temperature**2 * per_token[targets != IGNORED].sum()


def case(spread: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(3, 7, 50, generator=generator)
    teacher = spread * torch.randn(3, 7, 50, generator=generator)
    targets = torch.randint(0, 50, (3, 7), generator=generator)
    targets[0, :4] = targets[2, 6] = IGNORED
    return student, teacher, targets


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_kl_and_its_gradient_are_the_definition(temperature, spread):
    student, teacher, targets = case(spread)
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    value = kl_sum(ours, teacher, targets, temperature)
    wanted = reference_kl(exact, teacher, targets, temperature)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    value.backward()
    wanted.backward()
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * exact.grad.abs().max())
    assert not ours.grad[targets == IGNORED].any(), "a masked position moved the student"


def test_bf16_logits_are_summed_in_fp32_near_the_teacher():
    """Silent error 1 of peers: gradients far off in bf16 when the student is close to its teacher."""
    _, teacher, targets = case(3.0)
    teacher = teacher.bfloat16()
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    student = (teacher.float() + 0.05 * noise).bfloat16()
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    kl_sum(ours, teacher, targets, 1.0).backward()
    reference_kl(exact, teacher, targets, 1.0).backward()
    assert (ours.grad.double() - exact.grad).norm() < 0.004 * exact.grad.norm()  # the rounding of bf16 itself


def test_identical_models_have_zero_divergence_and_gradient():
    """Silent error 7: a KL that is really a cross-entropy."""
    student, _, targets = case(4.0)
    ours = student.clone().requires_grad_()
    value = kl_sum(ours, student, targets, 2.0)
    value.backward()
    assert abs(float(value)) < 1e-5 and ours.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("ce", "kl", "temperature"), [
    (0.5, 0.5, 2.0), (0.3, 0.9, 1.0), (0.0, 1.0, 4.0), (1.7, 0.0, 2.0)])
def test_weights_are_those_configured(ce, kl, temperature):
    """Silent error 3: a mixed loss optimized with other weights than configured, or a term without gradient."""
    student, teacher, targets = case(1.0)
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    objective = ResponseObjective(ce, (Divergence(weight=kl, temperature=temperature),))
    loss, terms = objective(ours, teacher if kl else None, targets)
    kept = targets != IGNORED
    cross = -torch.log_softmax(exact, -1)[kept].gather(-1, targets[kept][:, None]).sum()
    wanted = ce * cross + kl * reference_kl(exact, teacher, targets, temperature)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    loss.backward()
    wanted.backward()
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert set(terms) == {name for name, weight in (("cross_entropy", ce), ("forward_kl", kl)) if weight}


def test_cross_entropy_is_a_sum_over_targets():
    logits, targets = torch.zeros(2, 5, 8), torch.full((2, 5), IGNORED)
    targets[0, 1] = targets[1, 4] = 3
    assert float(cross_entropy_sum(logits, targets)) == pytest.approx(2 * math.log(8))


def test_all_masked_is_zero_without_nan():
    student, teacher, targets = case(1.0)
    ours = student.requires_grad_()
    loss, _ = ResponseObjective()(ours, teacher, torch.full_like(targets, IGNORED))
    loss.backward()
    assert float(loss) == 0 and not ours.grad.any()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3, 8\) cannot predict targets of shape \(2, 4\)"):
        cross_entropy_sum(torch.zeros(2, 3, 8), torch.zeros(2, 4, dtype=torch.long))


def test_different_vocabularies_are_refused():
    """Silent error 2: a shorter vocabulary padded with zero logits."""
    with pytest.raises(ValueError, match="over 50 and 40 tokens"):
        student, teacher, targets = case(1.0)
        kl_sum(student, teacher[..., :40], targets, 1.0)
