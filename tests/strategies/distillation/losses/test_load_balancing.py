"""The routers' balancing loss as a term of the objective, against the loss that transformers computes for labels."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig

from strategies.distillation.losses.fused_head import logit_shape
from strategies.distillation.losses.load_balancing import balancing_function, balancing_loss
from strategies.distillation.losses.response import IGNORED, ResponseObjective
from strategies.distillation.step import Distillation
from tests.strategies.export.hf.test_saved_names import MIXTURES, SMALL, mixture
from tests.trainer.test_bad_input import refused
from trainer.errors import UserError
from trainer.experiment.objective_nodes import Objective
from trainer.models.router_balance import balancing_note, balancing_weight

TEXT = Objective(divergence={"weight": 0.0})


def batch(padded: bool):
    ids = torch.randint(0, 96, (3, 10), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        real[0, 6:] = real[2, 4:] = False
    labels = ids.masked_fill(~real, IGNORED)
    targets = torch.cat([labels[:, 1:], torch.full((3, 1), IGNORED)], 1)
    return ids, labels, targets, real


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe", "jetmoe"])
def test_loss_and_gradient_are_those_of_the_model_with_labels(kind, padded):
    model = mixture(kind, output_router_logits=True, **{"aux_loss_coef" if kind == "jetmoe" else "router_aux_loss_coef":
                                                        0.7}).train()
    ids, labels, targets, real = batch(padded)
    theirs = copy.deepcopy(model)
    wanted = theirs(input_ids=ids, attention_mask=real.long(), labels=labels)
    wanted.loss.backward()
    weight = balancing_weight(TEXT, model.config)
    total, terms = Distillation(ResponseObjective(divergences=()), model, shapes=(logit_shape(model), None),
                                balancing=weight)(model, {"input_ids": ids}, targets, real=real)
    tokens = int((targets != IGNORED).sum())
    (total / tokens).backward()
    assert weight == 0.7 and float(total.detach()) / tokens == pytest.approx(float(wanted.loss.detach()), rel=2e-6)
    assert float(terms["balancing"]) / tokens == pytest.approx(float(wanted.aux_loss.detach()), rel=2e-6)
    for (name, one), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=2e-4, atol=2e-6), name


def test_the_value_is_that_of_the_formula_in_double_precision():
    model = mixture("mixtral")
    ids, _, _, real = batch(padded=True)
    with torch.no_grad():
        output = model(ids, output_router_logits=True)
    counts, chances = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for layer in output.router_logits:
        for token, logits in enumerate(layer.double()):
            if real.flatten()[token]:
                chances += logits.softmax(0)
                counts[logits.topk(2).indices] += 1
    tokens = 2 * int(real.sum())
    assert float(balancing_loss(model, output, real)) == pytest.approx(float(4 * (counts * chances).sum() / tokens**2))
    nothing = balancing_loss(model, output, torch.zeros_like(real))
    assert nothing.isfinite()  # it counts for no target


def test_a_weight_of_zero_trains_without_it_and_no_logits_are_no_loss():
    model = mixture("mixtral", output_router_logits=True)
    ids, _, targets, _ = batch(padded=False)
    objective = ResponseObjective(divergences=())
    _, terms = Distillation(objective, model, balancing=0.0)(model, {"input_ids": ids}, targets)
    assert set(terms) == {"cross_entropy"}
    with pytest.raises(RuntimeError, match="no router logits"):
        balancing_loss(model, model(ids, output_router_logits=False), None)


def test_what_a_configuration_asks_for_is_what_counts():
    def config(kind: str, **more):
        values = {**SMALL, **MIXTURES.get(kind, {}), **more}
        return AutoConfig.for_model(kind, **{name: value for name, value in values.items() if value is not None})

    mixed = config("mixtral", output_router_logits=True, router_aux_loss_coef=0.02)
    assert balancing_weight(TEXT, mixed) == 0.02 and "weight 0.02" in balancing_note(TEXT, mixed)
    assert balancing_weight(Objective(balancing=0.5), mixed) == 0.5 and balancing_weight(
        Objective(balancing=0.0), mixed) == 0.0
    silent = config("mixtral", router_aux_loss_coef=0.02)
    assert balancing_weight(TEXT, silent) is None and "objective.balancing=0.02 adds it" in balancing_note(TEXT, silent)
    assert balancing_weight(Objective(balancing=0.02), silent) == 0.02
    dense = config("llama")
    assert balancing_note(TEXT, dense) is balancing_weight(TEXT, dense) is None
    with pytest.raises(UserError, match="no balancing loss"):
        balancing_weight(Objective(balancing=0.1), dense)
    assert balancing_function(torch.nn.Linear) is None


MIXTURE = {"model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.3}


def test_a_run_counts_logs_and_splits_it(train_here):
    found = {}
    for name, micro in (("whole", 8), ("parts", 4)):
        trainer = train_here(name, student={"architecture": {**MIXTURE, "hidden_size": 32, "intermediate_size": 32,
                                                             "num_hidden_layers": 2, "num_attention_heads": 4,
                                                             "num_key_value_heads": 2}},
                             training={"steps": 1, "micro_batch": micro, "evaluate_every": 1, "checkpoint_every": 1})
        line = next(line for line in trainer.folder.metrics.read_text().splitlines() if "balancing" in line)
        found[name] = json.loads(line)
        assert found[name]["loss"] == pytest.approx(found[name]["cross_entropy"] + 0.3 * found[name]["balancing"])
    assert found["parts"]["cross_entropy"] == pytest.approx(found["whole"]["cross_entropy"], rel=1e-5)
    assert found["parts"]["balancing"] == pytest.approx(found["whole"]["balancing"], rel=0.1)  # parts, each by itself


def test_a_balancing_loss_that_there_is_not_is_refused(write_experiment, tmp_path):
    refused(write_experiment(objective={"balancing": 0.1}), tmp_path,
            parts=["objective.balancing = 0.1", "no balancing loss of routers", "leave it out"])
