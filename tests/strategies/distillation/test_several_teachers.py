"""Several teachers, against the formula in float64 and against a single teacher."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from strategies.distillation.live_teacher import OnDemand
from strategies.distillation.losses.divergences import Divergence
from strategies.distillation.losses.fused_head import logit_shape
from strategies.distillation.losses.response import ResponseObjective
from strategies.distillation.losses.teacher_targets import LogitTargets
from strategies.distillation.several_teachers import OtherTeacher
from strategies.distillation.step import Distillation

SHARES = [0.5, 0.3, 0.2]
T = 2.0


def llama(seed, **changes):
    torch.manual_seed(seed)
    shape = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, **changes}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.lm_head.weight.data.mul_(20)
    return model


@pytest.fixture(scope="module")
def material():
    teachers = [llama(1, hidden_size=32).eval(), llama(2).eval(), llama(3, num_hidden_layers=2).eval()]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 24, (2, 7), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    return teachers, ids, targets


def distilled(student, teachers, shares, objective, **more):
    others = [OtherTeacher(share, one, logit_shape(one)) for share, one in zip(shares[1:], teachers[1:], strict=True)]
    return Distillation(objective, student, teachers[0], shapes=(logit_shape(student), logit_shape(teachers[0])),
                        others=others, **more)


def reference(student, teachers, ids, targets, shares, divergence):
    """Sum of the shares' divergences over target tokens, from full logits in float64."""
    def log_p(model):
        return torch.log_softmax(model(input_ids=ids).logits[targets != -100].double() / T, -1)

    q, total = log_p(student), 0
    for share, teacher in zip(shares, teachers, strict=True):
        with torch.no_grad():
            p = log_p(teacher)
        total = total + share * T**2 * divergence(p, q).sum()
    return total


KL = {"forward_kl": lambda p, q: p.exp() * (p - q), "reverse_kl": lambda p, q: q.exp() * (q - p)}


@pytest.mark.parametrize("name", KL)
def test_the_loss_is_the_sum_of_each_teachers_share(material, name):
    teachers, ids, targets = material
    student = llama(4)
    objective = ResponseObjective(0.7, (Divergence(name, 0.9, T),), z_loss=0.01)
    total, terms = distilled(student, teachers, SHARES, objective)(student, {"input_ids": ids}, targets)
    total.backward()
    found = [one.grad.clone() for one in student.parameters()]
    student.zero_grad()
    expected = 0.9 * reference(student, teachers, ids, targets, SHARES, KL[name])
    text, _ = Distillation(ResponseObjective(0.7, (), z_loss=0.01), student, shapes=(logit_shape(student), None))(
        student, {"input_ids": ids}, targets)
    (expected + text).backward()
    torch.testing.assert_close(total, (expected + text).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found, [one.grad for one in student.parameters()], rtol=1e-4, atol=1e-5)
    each = [name, f"{name}_2", f"{name}_3"]
    weighted = sum(share * 0.9 * terms[one] for share, one in zip(SHARES, each, strict=True))
    torch.testing.assert_close(weighted, expected.detach().float(), rtol=1e-5, atol=0)


def test_forward_kl_has_the_gradient_of_the_divergence_from_the_mixture(material):
    teachers, ids, targets = material
    student = llama(4)
    with torch.no_grad():
        mixture = sum(share * torch.softmax(one(input_ids=ids).logits / T, -1)
                      for share, one in zip(SHARES, teachers, strict=True))
    objective = ResponseObjective(0.0, (Divergence("forward_kl", 1.0, T),))
    sums = []
    for distillation, told in ((distilled(student, teachers, SHARES, objective), None),
                               (Distillation(objective, student), LogitTargets(T * mixture.log()))):
        student.zero_grad()
        distillation(student, {"input_ids": ids}, targets, told)[0].backward()
        sums.append([one.grad.clone() for one in student.parameters()])
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-5)


def test_equal_teachers_are_one(material):
    teachers, ids, targets = material
    student = llama(4)
    objective = ResponseObjective(0.5, (Divergence("jsd", 1.0, T),))
    losses = [float(distilled(student, those, shares, objective)(student, {"input_ids": ids}, targets)[0])
              for those, shares in ((teachers[:1], [1.0]), (teachers[:1] * 3, SHARES))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_a_student_wrote_is_judged_by_all_of_them(material):
    teachers, ids, targets = material
    student = llama(4)
    objective = ResponseObjective(0.7, (Divergence("forward_kl", 1.0, T),))
    total, terms = distilled(student, teachers, SHARES, objective).without_text()(student, {"input_ids": ids}, targets)
    assert float(total) == pytest.approx(float(reference(student, teachers, ids, targets, SHARES, KL["forward_kl"])),
                                         rel=1e-5)
    assert "cross_entropy" not in terms


def test_a_teacher_that_waits_for_its_turn_is_a_copy_of_itself():
    model = llama(2, tie_word_embeddings=True).eval()
    before, ids = {name: one.clone() for name, one in model.state_dict().items()}, torch.ones(1, 3, dtype=torch.long)
    waiting, said = [one.data_ptr() for one in model.parameters()], model(input_ids=ids).logits
    turn = OnDemand(model, torch.device("cpu"))
    for _ in range(2):
        with turn():
            assert not {one.data_ptr() for one in model.parameters()} & set(waiting)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            torch.testing.assert_close(model(input_ids=ids).logits, said, rtol=0, atol=0)
        with turn(model.lm_head):
            assert model.lm_head.weight.data_ptr() not in waiting
            assert model.model.norm.weight.data_ptr() in waiting, "its head alone"
        assert [one.data_ptr() for one in model.parameters()] == waiting
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
