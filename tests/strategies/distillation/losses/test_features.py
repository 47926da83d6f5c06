"""Feature losses against float64 references, and the projections between widths."""

import pytest
import torch
from torch import nn

from strategies.distillation.losses.features import Projections, cosine_distance_sum, squared_error_sum

LOSSES = [squared_error_sum, cosine_distance_sum]


def reference(loss, student, teacher, kept):
    """By the definition, token by token, in float64."""
    total = 0
    for s, t in zip(student[kept].double(), teacher[kept].double(), strict=True):
        total = total + ((s - t).pow(2).mean() if loss is squared_error_sum else 1 - (s @ t) / s.norm() / t.norm())
    return total


def case(dtype=torch.float32, near=1.0):
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(4, 6, 32, generator=generator)
    student = teacher + near * torch.randn(4, 6, 32, generator=generator)
    kept = torch.rand(4, 6, generator=generator) < 0.6
    kept[1] = False
    return student.to(dtype), teacher.to(dtype), kept


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 0.004), (torch.float16, 5e-4)])
@pytest.mark.parametrize("near", [1.0, 0.05])
def test_value_and_gradient_are_the_definition(loss, dtype, rounding, near):
    """In half precision too, and near the teacher: nothing but the gradient's own rounding to the dtype is lost."""
    student, teacher, kept = case(dtype, near)
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    value, wanted = loss(ours, teacher, kept), reference(loss, exact, teacher, kept)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(wanted.item(), rel=1e-5)
    value.backward()
    wanted.backward()
    assert (ours.grad.double() - exact.grad).norm() < 2 * max(rounding, 1e-5) * exact.grad.norm()


def test_cosine_keeps_its_digits_where_fp32_has_none_left_of_the_cosine():
    student, teacher, kept = case(near=1e-3)
    exact = reference(cosine_distance_sum, student, teacher, kept)
    assert float(cosine_distance_sum(student, teacher, kept)) == pytest.approx(float(exact), rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_sums_do_not_depend_on_the_split_into_micro_batches(loss):
    student, teacher, kept = case()
    parts = sum(loss(student[rows], teacher[rows], kept[rows]) for rows in (slice(0, 1), slice(1, 4)))
    assert float(parts) == pytest.approx(float(loss(student, teacher, kept)), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_does_not_count_is_not_looked_at(loss):
    student, teacher, kept = case()
    wanted = loss(student, teacher, kept)
    student[~kept], teacher[~kept] = float("nan"), float("inf")
    ours = student.requires_grad_()
    value = loss(ours, teacher, kept)
    value.backward()
    assert torch.equal(value, wanted) and ours.grad.isfinite().all() and not ours.grad[~kept].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_kept_and_nothing_to_learn_are_zero(loss):
    student, teacher, kept = case()
    zeros = torch.zeros_like(student)
    for ours, theirs, mask in ((student, teacher, kept & False), (student, student, kept), (zeros, zeros, kept)):
        ours = ours.clone().requires_grad_()
        value = loss(ours, theirs, mask)
        value.backward()
        assert value.item() == 0 and not ours.grad.any()


def test_a_vector_of_zeros_finds_a_direction():
    student, teacher, kept = case()
    ours = torch.zeros_like(student).requires_grad_()
    value = cosine_distance_sum(ours, teacher, kept)
    value.backward()
    assert value.item() == pytest.approx(kept.sum() / 2) and ours.grad.isfinite().all()
    assert (torch.cosine_similarity(-ours.grad[kept], teacher[kept], -1) > 0.999).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teacher_gets_no_gradient(loss):
    student, teacher, kept = case()
    loss(student.requires_grad_(), teacher.requires_grad_(), kept).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_pooled_embeddings_are_tokens_without_a_sequence(loss):
    student, teacher, _ = case()
    mask = torch.tensor([True, False, True, True])
    assert float(loss(student[:, 0], teacher[:, 0], mask)) == \
        pytest.approx(float(reference(loss, student[:, 0], teacher[:, 0], mask)), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("change", "message"), [
    (lambda s, t, k: (s[..., :8], t, k), "student and teacher are 8 and 32 wide; project .* with Projections"),
    (lambda s, t, k: (s[:, :5], t, k), r"shapes \(4, 5, 32\) and \(4, 6, 32\) are not of the same positions"),
    (lambda s, t, k: (s, t, k[:2]), r"kept of shape \(2, 6\) does not mask positions of shape \(4, 6\)"),
    (lambda s, t, k: (s, t, k.long()), r"kept has dtype torch.int64: .* make it one with kept.bool\(\)"),
])
def test_what_does_not_fit_is_said(loss, change, message):
    with pytest.raises(ValueError, match=message):
        loss(*change(*case()))


PAIRS = ((0, 2), (1, 5))


def test_projections_are_the_same_by_seed_alone_and_touch_no_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Projections(PAIRS, 16, 32, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = Projections(PAIRS, 16, 32, seed=7), Projections(PAIRS, 16, 32, seed=8)
    weights = [dict(projections.named_parameters()) for projections in (first, again, other)]
    assert set(weights[0]) == {"by_layer.0.weight", "by_layer.1.weight"}
    for name, weight in weights[0].items():
        assert weight.shape == (32, 16) and weight.abs().max() <= 0.25 and weight.std() > 0.1
        assert torch.equal(weight, weights[1][name]) and not torch.equal(weight, weights[2][name])
    assert not torch.equal(*weights[0].values()), "each layer has its own"


def test_equal_widths_need_none_and_may_have_some():
    hidden = torch.randn(2, 3, 16)
    none = Projections(PAIRS, 16, 16)
    assert none(hidden, 1) is hidden and not list(none.parameters())
    some = Projections(PAIRS, 16, 16, always=True)
    assert torch.equal(some(hidden, 1), hidden @ some.by_layer["1"].weight.T)


def test_projections_are_in_fp32_under_autocast_and_in_half_precision():
    projections = Projections(PAIRS, 16, 32)
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = hidden.double() @ projections.by_layer["0"].weight.double().T
    with torch.autocast("cpu", torch.bfloat16):
        assert (projections(hidden, 0) - exact).abs().max() < 1e-5
    rounded = hidden.double() @ projections.by_layer["0"].weight.bfloat16().double().T
    assert (projections.bfloat16()(hidden, 0) - rounded).abs().max() < 1e-5


def test_a_students_projections_learn_with_it_and_leave_without_a_trace():
    student, teacher = nn.Linear(4, 16), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    before = set(student.state_dict())
    Projections(PAIRS, 16, 32).attach(student)
    projections = student.distillation_projections
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    losses = []
    for _ in range(200):
        hidden = student(torch.eye(5, 4))
        loss = squared_error_sum(projections(hidden, 1), teacher, torch.ones(5, dtype=torch.bool))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0] and projections.by_layer["1"].weight.grad.any()
    assert Projections.detach_from(student) is projections
    assert set(student.state_dict()) == before and not list(student.children())


def test_projections_say_what_is_wrong():
    student, projections = nn.Linear(4, 16), Projections(PAIRS, 16, 32)
    with pytest.raises(ValueError, match="layer 2 of the student is in no pair; in pairs are 0, 1"):
        projections(torch.zeros(1, 16), 2)
    with pytest.raises(ValueError, match="Linear has no submodule distillation_projections; put one there"):
        Projections.detach_from(student)
    projections.attach(student)
    with pytest.raises(ValueError, match="Linear has a submodule distillation_projections; remove it"):
        projections.attach(student)
