"""Scales that make weights comparable: normalized divergences, and what feature losses measure before step one."""

import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.distillation.losses.feature_start import RIDGE, fit_projections, teacher_variances
from strategies.distillation.losses.features import Projections
from strategies.distillation.losses.intermediate import Features, IntermediateTerms
from strategies.distillation.losses.response import IGNORED, Divergence, ResponseObjective


def near_the_teacher():
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(6, 30, generator=generator, dtype=torch.float64)
    student = teacher + 1e-4 * torch.randn(6, 30, generator=generator, dtype=torch.float64)
    return student, teacher, torch.zeros(6, dtype=torch.long)


def gradient(divergence):
    student, teacher, targets = near_the_teacher()
    ResponseObjective(0.0, (divergence,))(student.requires_grad_(), teacher, targets)[0].backward()
    return student.grad


@pytest.mark.parametrize(("name", "share", "curvature"), [
    ("reverse_kl", None, 1.0), ("jsd", None, 0.25), ("jsd", 0.1, 0.09), ("skewed_kl", 0.3, 0.49),
    ("skewed_reverse_kl", None, 0.81)])
def test_near_agreement_a_normalized_divergence_pulls_as_hard_as_kl(name, share, curvature):
    wanted = gradient(Divergence("forward_kl", 0.7))
    plain, normalized = (gradient(Divergence(name, 0.7, share=share, normalized=flag)) for flag in (False, True))
    torch.testing.assert_close(normalized, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    torch.testing.assert_close(plain, curvature * normalized, rtol=1e-9, atol=0)


def test_a_kink_has_no_curvature():
    with pytest.raises(ValueError, match="total_variation has a kink"):
        Divergence("total_variation", normalized=True)


@pytest.fixture(scope="module")
def models():
    def made(width: int, seed: int):
        torch.manual_seed(seed)
        shape = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 2, "vocab_size": 50}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).eval()
        model.model.embed_tokens.weight.data.mul_(20)
        return model
    return made(16, 0), made(24, 1)


def batches():
    generator = torch.Generator().manual_seed(2)
    for rows in (4, 2):
        targets = torch.where(torch.rand(rows, 20, generator=generator) < 0.7, 0, IGNORED)
        yield {"input_ids": torch.randint(0, 50, (rows, 20), generator=generator)}, targets


def states(model, layer):
    """Hidden states of the tokens that count, after a block, by transformers' own way."""
    with torch.no_grad():
        return numpy.concatenate([model(**inputs, output_hidden_states=True).hidden_states[layer + 1][
            targets != IGNORED].double() for inputs, targets in batches()])


def test_variances_are_numpys(models):
    teacher = models[1]
    found = teacher_variances(teacher, {0}, batches())
    assert found[0] == pytest.approx(states(teacher, 0).var(0).mean(), rel=1e-6)


def test_projections_begin_as_the_ridge_regression(models):
    student, teacher = models
    projections = Projections([(0, 0)], 16, 24)
    fit_projections(student, teacher, projections, ((0, 0),), batches())
    x, y = states(student, 0), states(teacher, 0)
    ridge = RIDGE * numpy.square(x).sum(0).mean()
    wanted = numpy.linalg.lstsq(numpy.vstack([x, ridge**0.5 * numpy.eye(16)]), numpy.vstack([y, numpy.zeros((16, 24))]),
                                rcond=None)[0].T
    numpy.testing.assert_allclose(projections.by_layer["0"].weight.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_scaled_features_are_the_share_of_variance_that_is_not_explained(models):
    """1 for a student that knows the mean alone, whatever the size of the teacher's states."""
    _, teacher = models
    (inputs, targets), _ = batches()
    kept = targets != IGNORED
    variances = teacher_variances(teacher, {0}, [(inputs, targets)])
    terms = IntermediateTerms(teacher, teacher, Features(1.0, ((0, 0),), variances=variances))
    with torch.no_grad(), terms.recording():
        teacher(**inputs)
        theirs = terms._recorders[1][0]._left[0, "hidden"]
        terms._recorders[0][0]._left[0, "hidden"] = theirs[kept].mean(0).expand_as(theirs)
        (_, _, value), = terms.sums(targets, inputs)
    assert float(value) == pytest.approx(int(kept.sum()), rel=1e-5)
