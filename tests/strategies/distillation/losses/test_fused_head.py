"""The loss taken where the head is, for architectures as they are, against the loss of their logits."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.distillation.losses.divergences import Divergence
from strategies.distillation.losses.fused_head import LogitShape, logit_shape
from strategies.distillation.losses.response import IGNORED, ResponseObjective
from strategies.distillation.step import Distillation

LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2}
ARCHITECTURES = {
    "llama": (LLAMA, LogitShape()), "gemma2": ({**LLAMA, "head_dim": 16, "final_logit_softcapping": 5.0},
                                               LogitShape(1.0, 5.0)),
    "cohere": ({**LLAMA, "logit_scale": 0.25}, LogitShape(0.25)),
    "granite": ({**LLAMA, "logits_scaling": 4.0}, LogitShape(0.25)), "gpt2": (GPT2, LogitShape()),
    "gptj": ({**GPT2, "rotary_dim": 8}, LogitShape()), "phi": (LLAMA, LogitShape()),
    "opt": ({"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100,
             "word_embed_proj_dim": 16, "max_position_embeddings": 64}, LogitShape())}


def made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name][0])).eval()
    for parameter in model.get_output_embeddings().parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_logits(name):
    """Silent error 6: logit soft-capping or scaling ignored."""
    student, teacher = made(name, 0), made(name, 1).requires_grad_(False)
    ids, targets = torch.randint(5, 100, (2, 9)), torch.randint(0, 100, (2, 9))
    targets[0, :4] = IGNORED
    objective = ResponseObjective(0.5, (Divergence("forward_kl", 1.0, 2.0),))
    shapes = logit_shape(student), logit_shape(teacher)
    assert shapes[0] == ARCHITECTURES[name][1]
    found = []
    for taken in (*(lambda shapes=shapes: Distillation(objective, student, teacher, shapes=shapes)(
                      student, {"input_ids": ids}, targets) for shapes in (shapes, (None, None))),
                  lambda: objective(student(input_ids=ids).logits, teacher(input_ids=ids).logits, targets)):
        student.zero_grad()
        loss, _ = taken()
        loss.backward()
        found.append((float(loss.detach()), {key: one.grad.clone() for key, one in student.named_parameters()
                                             if one.grad is not None}))
    wanted, gradients = found[-1]
    for value, ours in found[:-1]:
        assert value == pytest.approx(wanted, rel=1e-6) and ours.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert torch.allclose(ours[key], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), key
    assert student(input_ids=ids).logits.shape == (2, 9, 100), "the model is as it was"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_shape_of_logits_is_that_of_the_configuration_in_any_dtype(name, dtype):
    assert logit_shape(made(name, 0).to(dtype)) == ARCHITECTURES[name][1]


def test_a_model_that_does_something_else_to_its_logits_is_said():
    model = made("llama", 0)
    own = model.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits.abs()
        return out

    model.forward = forward
    with pytest.raises(ValueError, match="does something to its logits that is not known"):
        logit_shape(model)
    with pytest.raises(ValueError, match="hands out no output head"):
        logit_shape(nn.Linear(2, 2))


def test_a_head_with_a_product_of_its_own_is_none_of_ours():
    class Scaled(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * torch.arange(self.out_features)

    model = made("llama", 0)
    model.lm_head.__class__ = Scaled
    with pytest.raises(ValueError, match="is no linear layer"):
        logit_shape(model)


def test_gradients_of_a_wrapped_student_come_through_its_wrapper():
    """Silent error 4: `model.module(...)` called directly."""
    student = made("llama", 0)
    seen = []

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = student

        def forward(self, **inputs):
            seen.append(inputs)
            return self.module(**inputs)

    loss, _ = Distillation(ResponseObjective(divergences=()), student)(
        Wrapper(), {"input_ids": torch.full((1, 4), 5)}, torch.ones(1, 4).long())
    loss.backward()
    assert len(seen) == 1 and student.lm_head.weight.grad.abs().sum() > 0
