"""The tiled loss of hidden states and heads against float64 by the definitions, for every divergence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.distillation.losses.divergences import NAMES, Divergence
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.response import IGNORED, ResponseObjective
from strategies.distillation.losses.teacher_targets import HiddenTargets, SampledTargets, SharedVocabulary, TopTargets
from tests.strategies.distillation.distilling import NEAR, WHOLE, Case, case, definition, relative, results

JUMPS = "total_variation"  # its gradient, where p = q: a probability within rounding of that may fall on either side
LARGE = {"positions": 120, "width": 32, "vocabulary": 1000}  # enough that rows with all mass on one token are not all


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("spread", "distance"), [(0.1, None), (3.0, None), (30.0, None), (0.1, NEAR), (3.0, NEAR),
                                                  (30.0, NEAR)])
def test_values_and_gradients_of_given_logits_are_exact(name, spread, distance):
    """1e-6 of the definition in float64: also 0.01 from the teacher, and where one token has nearly all the mass."""
    one = case(spread, distance, **LARGE)
    student, teacher = one.student_logits().float(), one.teacher_logits().float()
    objective = ResponseObjective(0.0, (Divergence(name),))
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    value = objective(ours, teacher, one.targets)[0]
    wanted = definition(name, exact, teacher.double(), one.targets)
    value.backward()
    wanted.backward()
    assert relative(value, wanted) < 1e-6
    assert relative(ours.grad, exact.grad) < (1e-4 if name == JUMPS else 2e-6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_values_of_close_models_do_not_depend_on_how_each_sum_of_exponentials_was_rounded(name):
    """A part of 1e-7 in all of a row would be one of 1e-5 in a value that is the square of differences of 1e-3.

    What is left are roundings of single terms, 100,000 of them: 6e-8 / 1e-3 / 100,000^0.5 = 2e-7 of the value, whatever
    the processor's exponentials are.
    """
    for seed in range(1, 6):
        one = case(0.1, NEAR, seed=seed, **LARGE)
        student, teacher = one.student_logits().float(), one.teacher_logits().float()
        value = ResponseObjective(0.0, (Divergence(name),))(student, teacher, one.targets)[0]
        assert relative(value, definition(name, student.double(), teacher.double(), one.targets)) < 1e-6


@pytest.mark.parametrize("name", ["cross_entropy", *WHOLE])
@pytest.mark.parametrize(("spread", "distance"), [(0.1, None), (30.0, None), (0.1, NEAR), (3.0, NEAR), (30.0, NEAR)])
def test_bf16_hidden_states_lose_what_bf16_gradients_round_away(name, spread, distance):
    """Silent error 1 of peers: gradients 17-59% off in bf16 where the student is close to its teacher."""
    one = case(spread, distance, torch.bfloat16, **LARGE)
    ours, exact = results(name, one), results(name, one, exact=True)
    assert relative(ours[0], exact[0]) < 1e-5
    for mine, wanted in zip(ours[1:], exact[1:], strict=True):
        assert relative(mine, wanted) < (0.02 if name == JUMPS else 0.004)


@pytest.mark.parametrize("name", ["cross_entropy", *WHOLE])
@pytest.mark.parametrize(("spread", "distance"), [(3.0, None), (30.0, None), (3.0, NEAR)])
def test_fp32_hidden_states_accumulated_in_float64_are_exact(name, spread, distance):
    one = case(spread, distance, **LARGE)
    ours = results(name, one, accumulate=torch.float64)
    for mine, wanted in zip(ours, results(name, one, exact=True), strict=True):
        assert relative(mine, wanted) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_identical_models_have_zero_divergence_and_gradient(name):
    one = case(3.0)
    same = Case(one.hidden, one.weight, one.bias, one.hidden, one.weight, one.bias, one.targets)
    value, *gradients = results(name, same)
    assert abs(float(value)) < 1e-5
    assert all(float(gradient.abs().max()) < 1e-6 for gradient in gradients)


def test_shorter_vocabulary_of_an_identical_model_scores_zero():
    """Silent error 2: a shorter student vocabulary padded with zero logits scores a loss for identical models."""
    one = case(3.0)
    targets = torch.where(one.targets < 0, one.targets, one.targets % 40)
    short = Case(one.hidden, one.weight[:40], one.bias[:40], one.hidden, one.weight, one.bias, targets)
    value, *gradients = results("forward_kl", short, common=SharedVocabulary(40))
    assert abs(float(value)) < 1e-5 and float(gradients[0].abs().max()) < 1e-6


def test_common_tokens_are_compared_wherever_each_model_has_them():
    one = case(2.0)
    mine, theirs = torch.tensor([3, 5, 7, 20, 41]), torch.tensor([4, 0, 9, 49, 2])
    common = SharedVocabulary(5, mine, theirs)
    ours, exact = one.student_logits().float().requires_grad_(), one.student_logits().requires_grad_()
    value = ResponseObjective(0.0, (Divergence("jsd"),))(ours, one.teacher_logits().float(), one.targets,
                                                         common=common)[0]
    wanted = definition("jsd", exact[..., mine], one.teacher_logits()[..., theirs], one.targets)
    value.backward()
    wanted.backward()
    assert relative(value, wanted) < 1e-6 and relative(ours.grad, exact.grad) < 1e-6


def test_terms_share_a_pass_and_keep_their_weights():
    """Silent error 3: a term dropped from backward, or optimized with another weight than configured."""
    one = case(2.0)
    kinds = (Divergence("forward_kl", 0.3, 2.0), Divergence("reverse_kl", 0.2, 2.0), Divergence("jsd", 0.9, 1.0, 0.3))
    objective = ResponseObjective(0.7, kinds, label_smoothing=0.1, z_loss=0.05)
    exact = one.student_logits().requires_grad_()
    kept = one.targets != IGNORED
    cross = torch.nn.functional.cross_entropy(exact[kept], one.targets[kept], reduction="sum", label_smoothing=0.1)
    wanted = (0.7 * cross + 0.05 * exact.logsumexp(-1)[kept].square().sum()
              + 0.3 * definition("forward_kl", exact, one.teacher_logits(), one.targets, 2.0)
              + 0.2 * definition("reverse_kl", exact, one.teacher_logits(), one.targets, 2.0)
              + 0.9 * definition("jsd", exact, one.teacher_logits(), one.targets, 1.0, 0.3))
    ours = one.student_logits().float().requires_grad_()
    value, terms = objective(ours, one.teacher_logits().float(), one.targets)
    value.backward()
    wanted.backward()
    assert relative(value, wanted) < 1e-6 and relative(ours.grad, exact.grad) < 1e-6
    assert set(terms) == {"cross_entropy", "z_loss", "forward_kl", "reverse_kl", "jsd"}


@pytest.mark.parametrize(("scale", "cap"), [(0.25, None), (1.0, 5.0), (2.0, 8.0)])
def test_scale_and_soft_cap_are_part_of_the_logits(scale, cap):
    """Silent error 6: logit soft-capping or scaling ignored."""
    one = case(3.0)
    hidden, weight = one.hidden.clone().requires_grad_(), one.weight.clone().requires_grad_()
    value = ResponseObjective(1.0, (Divergence("forward_kl"),))(
        hidden, HiddenTargets(one.teacher_targets, Head(one.their_weight, one.their_bias, 0.5, 4.0)), one.targets,
        head=Head(weight, one.bias, scale, cap))[0]
    value.backward()
    exact = [tensor.double().requires_grad_() for tensor in (one.hidden, one.weight)]
    logits = scale * (exact[0] @ exact[1].T + one.bias.double())
    logits = logits if cap is None else cap * (logits / cap).tanh()
    teacher = 4.0 * (0.5 * one.teacher_logits() / 4.0).tanh()
    wanted = definition("cross_entropy", logits, teacher, one.targets) + definition(
        "forward_kl", logits, teacher, one.targets)
    wanted.backward()
    assert relative(value, wanted) < 1e-6
    assert all(relative(mine, true.grad) < 3e-6 for mine, true in zip((hidden.grad, weight.grad), exact, strict=True))


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(1, 20), tile=st.integers(1, 20_000), name=st.sampled_from(["cross_entropy", *NAMES]),
       seed=st.integers(0, 99))
def test_loss_does_not_depend_on_how_it_is_split(cut, tile, name, seed):
    """Silent error 5: over micro-batches, or over tiles, sums are the same."""
    one = case(2.0, seed=seed)
    whole, parts = results(name, one), [results(name, part, tile=tile) for part in one.split(cut)]
    assert relative(sum(part[0] for part in parts), whole[0]) < 1e-5
    assert relative(torch.cat([part[1] for part in parts]), whole[1]) < 3e-5
    assert relative(sum(part[2] for part in parts), whole[2]) < 1e-5


def test_all_masked_is_zero_with_zero_gradients():
    one = case(1.0)
    masked = Case(*one.__dict__.values())
    masked.targets = torch.full_like(one.targets, IGNORED)
    value, *gradients = results("jsd", masked)
    assert float(value) == 0 and not any(gradient.any() for gradient in gradients)


def test_no_tensor_of_positions_times_vocabulary_is_made():
    from strategies.memory.tracker import LiveBytes

    positions, width, vocabulary, tile = 512, 16, 32000, 2**18
    hidden, weight = torch.randn(positions, width), torch.randn(vocabulary, width)
    targets = torch.randint(0, vocabulary, (positions,))
    hidden, mine = hidden.requires_grad_(), weight.clone().requires_grad_()
    objective = ResponseObjective(1.0, tuple(Divergence(name) for name in NAMES if name != "uld"))
    with LiveBytes() as tracker:
        objective(hidden, HiddenTargets(hidden.detach(), Head(weight)), targets, head=Head(mine), tile=tile
                  )[0].backward()
    kept = 4 * width * (positions + vocabulary)
    assert tracker.peak < kept + 16 * 2**20 < 4 * positions * vocabulary


def test_sampled_targets_are_right_on_average_and_zero_for_identical_models():
    one, draws = case(1.0), 4000
    log_p = one.teacher_logits().log_softmax(-1).float()
    drawn = log_p.exp().multinomial(draws, replacement=True, generator=torch.Generator().manual_seed(1))
    shares = torch.zeros_like(log_p).scatter_add_(-1, drawn, torch.full(drawn.shape, 1 / draws))
    every = torch.arange(log_p.shape[-1]).expand(log_p.shape)
    teacher_targets = SampledTargets(every, shares, log_p, 1.0)
    objective = ResponseObjective(0.0, (Divergence(),))
    student = one.student_logits().float().requires_grad_()
    value = objective(student, teacher_targets, one.targets)[0]
    value.backward()
    exact = one.student_logits().requires_grad_()
    wanted = definition("forward_kl", exact, one.teacher_logits(), one.targets)
    wanted.backward()
    assert relative(value, wanted) < 0.05 and relative(student.grad, exact.grad) < 0.1
    same = objective(one.teacher_logits().float(), teacher_targets, one.targets)[0]
    assert abs(float(same)) < 1e-4


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_top_targets_keep_the_tail_as_one_token(name):
    one, k = case(2.0), 7
    log_p = one.teacher_logits().log_softmax(-1)
    top = log_p.topk(k, -1)
    tail = torch.log1p(-top.values.exp().sum(-1))
    teacher_targets = TopTargets(top.indices, top.values.float(), tail.float(), 1.0)

    def coarse(log: torch.Tensor) -> torch.Tensor:
        chosen = log.gather(-1, top.indices)
        return torch.cat([chosen, torch.log1p(-chosen.exp().sum(-1, keepdim=True))], -1)

    exact = one.student_logits().requires_grad_()
    wanted = definition(name, coarse(exact.log_softmax(-1)), coarse(log_p), one.targets)
    student = one.student_logits().float().requires_grad_()
    value = ResponseObjective(0.0, (Divergence(name),))(student, teacher_targets, one.targets)[0]
    value.backward()
    wanted.backward()
    assert relative(value, wanted) < 1e-5 and relative(student.grad, exact.grad) < 1e-5
    same = one.teacher_logits().float().requires_grad_()
    zero = ResponseObjective(0.0, (Divergence(name),))(same, teacher_targets, one.targets)[0]
    zero.backward()
    assert abs(float(zero)) < 1e-5
    if name != "total_variation":  # whose gradient is a sign, of rounding here
        assert float(same.grad.abs().max()) < 1e-5


@pytest.mark.parametrize(("wrong", "said"), [
    (lambda: Divergence("kl"), "no divergence 'kl'"),
    (lambda: Divergence(temperature=0), "above zero, not 0"),
    (lambda: Divergence(weight=-1.0), "from zero on, not -1"),
    (lambda: Divergence(share=0.5), "forward_kl mixes nothing"),
    (lambda: Divergence("jsd", share=1.0), "both excluded, not 1.0"),
    (lambda: ResponseObjective(-1.0), "cross_entropy is a weight"),
    (lambda: ResponseObjective(label_smoothing=1.0), "label_smoothing is a share"),
    (lambda: ResponseObjective(0.0, ()), "every weight of the objective is zero"),
    (lambda: ResponseObjective(1.0, (Divergence(), Divergence(temperature=2.0))), "forward_kl is given twice"),
    (lambda: ResponseObjective()(torch.zeros(2, 8), None, torch.zeros(2).long()), "no teacher to diverge from"),
    (lambda: ResponseObjective()(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(2).long()), "does not belong to"),
    (lambda: Head(torch.zeros(3)), "a head's weight is"),
    (lambda: Head(torch.zeros(3, 2), torch.zeros(2)), "over 3 tokens has as many biases"),
    (lambda: Head(torch.zeros(3, 2), cap=0.0), "above zero, not 0.0"),
    (lambda: SharedVocabulary(2, torch.zeros(2)), "for both models, or for neither"),
    (lambda: ResponseObjective(0.0, (Divergence("jsd"),))(torch.zeros(2, 8), SampledTargets(
        *[torch.zeros(2, 3)] * 3, 1.0), torch.zeros(2).long()), "needs the teacher's whole distribution"),
    (lambda: ResponseObjective(0.0, (Divergence(temperature=2.0),))(torch.zeros(2, 8), SampledTargets(
        *[torch.zeros(2, 3)] * 3, 1.0), torch.zeros(2).long()), "made at temperature 1.0"),
])
def test_what_does_not_fit_is_said(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


def test_backward_twice_is_refused():
    one = case(1.0)
    hidden = one.hidden.clone().requires_grad_()
    loss = ResponseObjective(divergences=())(hidden, None, one.targets, head=Head(one.weight))[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


def test_uld_is_the_distance_of_sorted_probabilities():
    """Boizard et al. 2024, eq. 4, against the definition, with vocabularies of two sizes."""
    one = case(2.0)
    exact = one.student_logits().requires_grad_()
    wide = torch.cat([one.teacher_logits(), one.teacher_logits()[..., :13] - 1], -1)
    kept = one.targets != IGNORED
    q = torch.nn.functional.pad(exact.softmax(-1), (0, 13)).sort(-1, descending=True).values
    wanted = (q - wide.softmax(-1).sort(-1, descending=True).values).abs().sum(-1)[kept].sum()
    student = one.student_logits().float().requires_grad_()
    value = ResponseObjective(0.0, (Divergence("uld"),))(student, wide.float(), one.targets)[0]
    value.backward()
    wanted.backward()
    assert relative(value, wanted) < 1e-6 and relative(student.grad, exact.grad) < 1e-5
    assert math.isfinite(float(value))
