"""Relations and attention maps against float64 references, row by row, head by head, query by query."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from strategies.distillation.losses import attention
from strategies.distillation.losses.attention import attention_map_sum, relation_sum, visible_pairs


def reference_relation(student, teacher, kept, visible, heads):
    """KL(R_teacher || R_student) by the definition, over what a query sees, in float64."""
    def relation(x, row, head, t):
        v = x[row].double().unflatten(-1, (heads, -1))[:, head]
        return torch.softmax((v[visible[row, t]] @ v[t]) / v.shape[-1]**0.5, 0)

    total = torch.zeros((), dtype=torch.float64)
    for row, t in kept.nonzero().tolist():
        for head in range(heads):
            p, q = relation(teacher, row, head, t), relation(student, row, head, t)
            total = total + (p * (p.log() - q.log())).sum() / heads
    return total


def case(dtype=torch.float32, scale=1.0):
    """Three rows: two documents and padding, one document, nothing that counts."""
    generator = torch.Generator().manual_seed(0)
    student = scale * torch.randn(3, 10, 24, generator=generator)
    teacher = scale * torch.randn(3, 10, 48, generator=generator)
    real = torch.ones(3, 10, dtype=torch.bool)
    real[0, 8:] = False
    positions = torch.arange(10).repeat(3, 1)
    positions[0, 5:] -= 5
    kept = real & (torch.rand(3, 10, generator=generator) < 0.7)
    kept[2] = False
    return student.to(dtype), teacher.to(dtype), kept, visible_pairs(real, positions, causal=True)


def test_documents_padding_and_the_future_are_not_seen():
    real = torch.tensor([[True] * 5 + [False]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2), torch.zeros(1, 1)).bool()
    assert torch.equal(visible_pairs(real, positions, causal=False)[0], blocks)
    assert torch.equal(visible_pairs(real, positions, causal=True)[0], blocks.tril())
    whole = torch.block_diag(torch.ones(5, 5), torch.zeros(1, 1)).bool()
    assert torch.equal(visible_pairs(real, causal=False)[0], whole)


def test_a_row_that_begins_within_a_document_has_that_document_first():
    positions = torch.tensor([[7, 8, 0, 1]])
    seen = visible_pairs(torch.ones(1, 4, dtype=torch.bool), positions, causal=False)
    assert torch.equal(seen[0], torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool())


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.004)])
def test_relations_and_their_gradient_are_the_definition(heads, scale, dtype, rounding):
    student, teacher, kept, visible = case(dtype, scale)
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    value, wanted = relation_sum(ours, teacher, kept, visible, heads), \
        reference_relation(exact, teacher, kept, visible, heads)
    (3 * value).backward()
    (3 * wanted).backward()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (ours.grad.double() - exact.grad).norm() < 2 * rounding * exact.grad.norm()


@pytest.mark.parametrize("near", [1e-1, 1e-2, 1e-3])
def test_a_student_near_its_teacher_keeps_digits(near):
    """Of sum p (log p - log q) in fp32, nothing is left at 1e-3; the scores' own rounding, about 1e-6, remains."""
    _, teacher, kept, visible = case(scale=0.5)
    student = teacher + near * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    value, wanted = relation_sum(ours, teacher, kept, visible, 4), reference_relation(exact, teacher, kept, visible, 4)
    value.backward()
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6 / near)
    assert (ours.grad.double() - exact.grad).norm() < 1e-6 / near * exact.grad.norm()


def test_relations_that_have_nothing_in_common_are_finite():
    """Where p is 0 in fp32, log p - log q has no bound, and expm1 of it none either."""
    student, teacher, kept, visible = case()
    student[:, ::5] *= 60  # the first of each document, to which all others relate by some 60 nats
    teacher[:, ::5] *= 60
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    value = relation_sum(ours, teacher, kept, visible, 2)
    wanted = torch.zeros((), dtype=torch.float64)
    for row, t in kept.nonzero().tolist():
        for head in range(2):
            log_q, log_p = ((v[visible[row, t]] @ v[t] / v.shape[-1]**0.5).log_softmax(0) for v in
                            (x[row].double().unflatten(-1, (2, -1))[:, head] for x in (exact, teacher)))
            wanted = wanted + torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / 2
    value.backward()
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5) and value > 300
    assert (ours.grad.double() - exact.grad).norm() < 1e-5 * exact.grad.norm()


class Largest(TorchDispatchMode):
    """The most elements of any tensor made within."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("block", [1, 4 * 3 * 10 * 4, 4 * 3 * 100, 4 * 3 * 100 * 2])
def test_blocks_change_neither_value_nor_gradient(monkeypatch, block):
    """Of one query, of four, of a row, and of two rows."""
    student, teacher, kept, visible = case()
    whole = student.clone().requires_grad_()
    wanted = relation_sum(whole, teacher, kept, visible, 3)
    wanted.backward()
    monkeypatch.setitem(attention.BLOCK, "cpu", block)
    ours = student.clone().requires_grad_()
    value = relation_sum(ours, teacher, kept, visible, 3)
    value.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.allclose(ours.grad, whole.grad, rtol=1e-5, atol=1e-6)


def test_long_rows_do_not_have_all_their_scores_at_once(monkeypatch):
    values = torch.randn(2, 256, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    real = torch.ones(2, 256, dtype=torch.bool)
    monkeypatch.setitem(attention.BLOCK, "cpu", 2**16)
    with Largest() as largest:
        relation_sum(values, values.detach() + 1, real, visible_pairs(real, causal=True), 4).backward()
    assert largest.numel <= 2**16 // 4, "scores of a row are 2^18 numbers"


def test_packed_documents_are_the_documents_alone():
    student, teacher, _, visible = case()
    kept = torch.ones(1, 8, dtype=torch.bool)
    packed = relation_sum(student[:1, :8], teacher[:1, :8], kept, visible[:1, :8, :8], 4)
    alone = 0.0
    for part in (slice(0, 5), slice(5, 8)):
        real = kept[:, part]
        alone += relation_sum(student[:1, part], teacher[:1, part], real, visible_pairs(real, causal=True), 4).item()
    assert packed.item() == pytest.approx(alone, rel=1e-6)


def maps(heads=4):
    """Attention maps of student and teacher, zero where nothing is seen, as models have them."""
    _, _, kept, visible = case()
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(2, 3, heads, 10, 10, generator=generator).masked_fill(~visible[None, :, None], -1e9)
    student, teacher = scores.softmax(-1)
    return student, teacher, kept, visible


def reference_maps(student, teacher, kept, visible):
    total = torch.zeros((), dtype=torch.float64)
    for row, t in kept.nonzero().tolist():
        seen = visible[row, t]
        total = total + (student[row, :, t, seen].double() - teacher[row, :, t, seen].double()).square().mean()
    return total


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.004)])
def test_maps_and_their_gradient_are_the_definition(dtype, rounding):
    student, teacher, kept, visible = maps()
    student, teacher = student.to(dtype), teacher.to(dtype)
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    value, wanted = attention_map_sum(ours, teacher, kept, visible), reference_maps(exact, teacher, kept, visible)
    value.backward()
    wanted.backward()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (ours.grad.double() - exact.grad).norm() < 2 * rounding * exact.grad.norm()


def test_where_all_is_seen_it_is_tinyberts_mean_times_the_tokens():
    student, teacher, _, _ = maps()
    everything = torch.ones(3, 10, dtype=torch.bool)
    value = attention_map_sum(student, teacher, everything, visible_pairs(everything, causal=False))
    per_row = sum(torch.nn.functional.mse_loss(student[:, head], teacher[:, head]) for head in range(4)) / 4
    assert value.item() == pytest.approx(30 * per_row.item(), rel=1e-5)


def test_means_over_heads_may_be_of_different_numbers_of_heads():
    student, teacher, kept, visible = maps()
    with pytest.raises(ValueError, match="have 2 and 4 heads; compare their means with average_heads=True, or"):
        attention_map_sum(student[:, :2], teacher, kept, visible)
    value = attention_map_sum(student[:, :2], teacher, kept, visible, average_heads=True)
    wanted = reference_maps(student[:, :2].mean(1, keepdim=True), teacher.mean(1, keepdim=True), kept, visible)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)


LOSSES = [(lambda s, t, k, v: relation_sum(s, t, k, v, 4), case), (attention_map_sum, maps)]


@pytest.mark.parametrize(("loss", "make"), LOSSES)
def test_rows_do_not_know_of_each_other(loss, make):
    whole = make()
    parts = sum(loss(*(x[rows] for x in whole)).item() for rows in (slice(0, 1), slice(1, 3)))
    assert parts == pytest.approx(loss(*whole).item(), rel=1e-6)


@pytest.mark.parametrize(("loss", "make"), LOSSES)
def test_nothing_kept_and_nothing_to_learn_are_zero(loss, make):
    student, teacher, kept, visible = make()
    nobody = kept & False, visible & False
    for theirs, mask, pairs in ((teacher, nobody[0], visible), (student, kept, visible), (teacher, kept, nobody[1])):
        ours = student.clone().requires_grad_()
        value = loss(ours, theirs, mask, pairs)
        value.backward()
        assert value.item() == 0 and not ours.grad.any()


@pytest.mark.parametrize(("loss", "make"), LOSSES)
def test_autocast_changes_nothing_and_the_teacher_gets_no_gradient(loss, make):
    student, teacher, kept, visible = make()
    wanted = loss(student, teacher, kept, visible)
    student.requires_grad_()
    teacher.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher, kept, visible)
    value.backward()
    assert value.item() == wanted.item() and teacher.grad is None and student.grad.any()


def test_what_nobody_sees_is_not_looked_at():
    student, teacher, kept, visible = case()
    wanted = relation_sum(student, teacher, kept, visible, 4)
    unseen = ~(kept | (visible & kept[:, :, None]).any(1))
    assert unseen[0, 8:].all() and unseen[2].all()
    student[unseen], teacher[unseen] = float("nan"), float("inf")
    ours = student.requires_grad_()
    value = relation_sum(ours, teacher, kept, visible, 4)
    value.backward()
    assert value.item() == wanted.item() and ours.grad.isfinite().all() and not ours.grad[unseen].any()

    student, teacher, kept, visible = maps()
    wanted = attention_map_sum(student, teacher, kept, visible)
    unseen = ~(visible & kept[:, :, None])[:, None].expand_as(student)
    student[unseen], teacher[unseen] = float("nan"), float("-inf")
    ours = student.requires_grad_()
    value = attention_map_sum(ours, teacher, kept, visible)
    value.backward()
    assert value.item() == wanted.item() and ours.grad.isfinite().all() and not ours.grad[unseen].any()


def test_what_does_not_fit_is_said():
    student, teacher, kept, visible = case()
    with pytest.raises(ValueError, match="heads = 5 does not divide .* 24 .* 48 .*: 1, 2, 3, 4, 6, 8, 12, 24$"):
        relation_sum(student, teacher, kept, visible, 5)
    with pytest.raises(ValueError, match="heads = 0 does not divide"):
        relation_sum(student, teacher, kept, visible, 0)
    with pytest.raises(ValueError, match=r"heads = 16 does not divide .* 24 .* 48 "):
        relation_sum(student, teacher, kept, visible, 16)
    with pytest.raises(ValueError, match=r"visible of shape \(3, 1, 10\) does not mask .* \(3, 10, 10\)"):
        relation_sum(student, teacher, kept, visible[:, :1], 4)
    with pytest.raises(ValueError, match="visible has dtype torch.float32"):
        relation_sum(student, teacher, kept, visible.float(), 4)
    with pytest.raises(ValueError, match="are not of the same positions"):
        relation_sum(student[:2], teacher, kept, visible, 4)
    with pytest.raises(ValueError, match=r"position_ids of shape \(1, 4\) are not those of `real`, \(2, 4\)"):
        visible_pairs(torch.ones(2, 4, dtype=torch.bool), torch.zeros(1, 4), causal=True)
    with pytest.raises(ValueError, match="real has dtype torch.int64: .* with real.bool"):
        visible_pairs(torch.ones(2, 4, dtype=torch.long), causal=True)
    ours, theirs, kept, visible = maps()
    with pytest.raises(ValueError, match=r"\(3, 4, 10, 9\) and \(3, 4, 10, 10\) are not maps of the same positions"):
        attention_map_sum(ours[..., :9], theirs, kept, visible)
    with pytest.raises(ValueError, match=r"kept of shape \(2, 10\) does not mask"):
        attention_map_sum(ours, theirs, kept[:2], visible)
    with pytest.raises(ValueError, match="visible has dtype torch.int64"):
        attention_map_sum(ours, theirs, kept, visible.long())
