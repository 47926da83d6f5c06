"""Relational losses against the paper's formulas, pair by pair and triple by triple in float64."""

from itertools import permutations

import pytest
import torch

from strategies.distillation.losses.relations import (
    evenly_spaced,
    sample_angles_sum,
    sample_distances_sum,
    token_angles_sum,
    token_distances_sum,
)

SAMPLES, TOKENS = [sample_distances_sum, sample_angles_sum], [token_distances_sum, token_angles_sum]


def huber(a):
    return a * a / 2 if abs(a) <= 1 else abs(a) - 0.5


def distances(points):
    """psi of every pair: distance over the mean distance."""
    found = {pair: (points[pair[0]] - points[pair[1]]).norm() for pair in permutations(range(len(points)), 2)}
    mean = sum(found.values()) / len(found)
    return {pair: distance / mean for pair, distance in found.items()}


def angles(points):
    """psi of every triple: the cosine of the angle at its middle."""
    return {(i, j, k): torch.cosine_similarity(points[i] - points[j], points[k] - points[j], 0)
            for i, j, k in permutations(range(len(points)), 3)}


def reference(loss, student, teacher):
    """Mean over tuples times the number of points, in float64."""
    relate = distances if loss in (sample_distances_sum, token_distances_sum) else angles
    ours, theirs = relate(student.double()), relate(teacher.double())
    return len(student) * sum(huber(theirs[points] - ours[points]) for points in ours) / len(ours)


def case(dtype=torch.float32, spread=1.0):
    """Student and teacher of different widths, far from the origin; row 1 has nothing kept, row 2 all."""
    generator = torch.Generator().manual_seed(0)
    student = 5 + spread * torch.randn(4, 9, 12, generator=generator)
    teacher = -3 + spread * torch.randn(4, 9, 20, generator=generator)
    teacher[:, 2] *= 4  # distances beyond the quadratic part
    kept = torch.rand(4, 9, generator=generator) < 0.6
    kept[1], kept[2] = False, True
    return student.to(dtype), teacher.to(dtype), kept


def agrees(value, wanted, ours, exact, rounding):
    value.backward()
    wanted.backward()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert (ours.grad.double() - exact.grad).norm() < 2 * max(rounding, 1e-4) * exact.grad.norm()


@pytest.mark.parametrize("loss", SAMPLES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.004)])
def test_among_samples_value_and_gradient_are_the_definition(loss, dtype, rounding):
    student, teacher, _ = case(dtype)
    ours, exact = student[2].clone().requires_grad_(), student[2].double().requires_grad_()
    agrees(loss(ours, teacher[2]), reference(loss, exact, teacher[2]), ours, exact, rounding)


@pytest.mark.parametrize("loss", TOKENS)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.004)])
def test_among_tokens_value_and_gradient_are_the_definition(loss, dtype, rounding):
    """Each row for itself, by its kept tokens alone."""
    student, teacher, kept = case(dtype)
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    wanted = sum(reference(loss, exact[row][kept[row]], teacher[row][kept[row]]) for row in (0, 2, 3))
    agrees(loss(ours, teacher, kept, 9), wanted, ours, exact, rounding)
    assert not ours.grad[~kept].any()


@pytest.mark.parametrize("loss", TOKENS)
def test_few_tokens_of_a_row_stand_for_all_that_are_kept(loss):
    student, teacher, kept = case()
    at = [0, 2, 5, 8]  # 4 of row 2's 9
    wanted = reference(loss, student[2, at], teacher[2, at]) / 4 * 9
    assert float(loss(student[2:3], teacher[2:3], kept[2:3], 4)) == pytest.approx(float(wanted), rel=1e-4)


def test_points_close_together_and_far_from_the_origin_keep_their_distances():
    """By way of products, as cdist does for more than 25 points, nothing would be left of them."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 100 + 1e-2 * torch.randn(2, 30, 16, generator=generator)
    wanted = reference(sample_distances_sum, student, teacher)
    assert float(sample_distances_sum(student, teacher)) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("loss", TOKENS)
def test_rows_do_not_know_of_each_other_nor_of_their_padding(loss):
    student, teacher, kept = case()
    whole = loss(student, teacher, kept, 5)
    parts = [loss(student[row:row + 1], teacher[row:row + 1], kept[row:row + 1], 5) for row in range(4)]
    padded = [torch.cat([x, torch.full_like(x[:, :3], fill)], 1)
              for x, fill in ((student, float("nan")), (teacher, float("inf")), (kept, False))]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)
    assert float(loss(*padded, 5)) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("loss", TOKENS)
def test_nothing_kept_too_few_kept_and_nothing_to_learn_are_zero(loss):
    student, teacher, kept = case()
    alone = torch.zeros_like(kept)
    alone[:, 3] = True
    for theirs, mask in ((teacher, kept & False), (teacher, alone), (student, kept)):
        ours = student.clone().requires_grad_()
        value = loss(ours, theirs, mask)
        value.backward()
        assert float(value.detach()) == 0 and not ours.grad.any()


@pytest.mark.parametrize("loss", SAMPLES)
@pytest.mark.parametrize("samples", [0, 1])
def test_a_batch_without_relations_is_zero(loss, samples):
    student, teacher, _ = case()
    ours = student[2, :samples].clone().requires_grad_()
    value = loss(ours, teacher[2, :samples])
    value.backward()
    assert float(value.detach()) == 0 and not ours.grad.any()


@pytest.mark.parametrize("loss", SAMPLES)
def test_points_that_coincide_have_finite_gradients(loss):
    student, teacher, _ = case()
    some, every, theirs = student[2].clone(), student[2, :1].repeat(9, 1), teacher[2].clone()
    some[4] = some[5] = some[6]
    theirs[5] = theirs[6]
    for points in (some, every):
        ours = points.clone().requires_grad_()
        value = loss(ours, theirs)
        value.backward()
        assert value.isfinite() and value > 0 and ours.grad.isfinite().all()


@pytest.mark.parametrize("loss", SAMPLES)
def test_a_teacher_turned_moved_and_scaled_teaches_the_same(loss):
    student, teacher, _ = case()
    turn = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1)))[0]
    turned = loss(student[2], 7 + 3 * teacher[2] @ turn)
    assert float(turned) == pytest.approx(float(loss(student[2], teacher[2])), rel=1e-4)


@pytest.mark.parametrize("loss", [*SAMPLES, *TOKENS])
def test_autocast_changes_nothing_and_the_teacher_gets_no_gradient(loss):
    student, teacher, kept = case()
    arguments = (student, teacher, kept) if loss in TOKENS else (student[2], teacher[2])
    wanted = loss(*arguments)
    arguments[0].requires_grad_()
    arguments[1].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*arguments)
    value.backward()
    assert value.item() == float(wanted) and teacher.grad is None


@pytest.mark.parametrize("tokens", [2, 3, 4, 7, 20])
def test_positions_are_spread_from_the_first_kept_to_the_last(tokens):
    kept = torch.rand(50, 12, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1.05, 50)[:, None]
    positions, there = evenly_spaced(kept, tokens)
    assert positions.shape == there.shape == (50, min(tokens, 12))
    for row in range(50):
        candidates = kept[row].nonzero()[:, 0].tolist()
        found = positions[row][there[row]].tolist()
        assert len(found) == min(tokens, len(candidates))
        if len(found) > 1:
            ranks = [candidates.index(position) for position in found]
            steps = [after - before for before, after in zip(ranks, ranks[1:], strict=False)]
            assert ranks[0] == 0 and ranks[-1] == len(candidates) - 1 and max(steps) - min(steps) <= 1 <= min(steps)


def test_what_does_not_fit_is_said():
    student, teacher, kept = case()
    for loss, least in zip(TOKENS, (2, 3), strict=True):
        with pytest.raises(ValueError, match=f"tokens = {least - 1}: it takes {least} to have a relation"):
            loss(student, teacher, kept, least - 1)
        with pytest.raises(ValueError, match=r"shapes \(4, 5, 12\) and \(4, 9, 20\) are not of the same positions"):
            loss(student[:, :5], teacher, kept)
        with pytest.raises(ValueError, match=r"kept of shape \(4, 5\) does not mask positions of shape \(4, 9\)"):
            loss(student, teacher, kept[:, :5])
        with pytest.raises(ValueError, match="kept has dtype torch.int64"):
            loss(student, teacher, kept.long())
    with pytest.raises(ValueError, match="kept has dtype torch.float32"):
        evenly_spaced(kept.float(), 3)
    for loss in SAMPLES:
        with pytest.raises(ValueError, match=r"\(4, 12\) and \(3, 20\): both are \(samples, width\), with as many"):
            loss(student[:, 0], teacher[:3, 0])
        with pytest.raises(ValueError, match=r"both are \(samples, width\)"):
            loss(student, teacher)
