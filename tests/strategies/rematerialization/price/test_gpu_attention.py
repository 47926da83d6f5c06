"""Planning for a GPU where there is none: attention needs what its kernels there need."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from strategies.rematerialization.price.gpu_attention import attention_as_on_gpus, fused_attention
from strategies.rematerialization.rematerialize import study
from tests.strategies.rematerialization.planning_cases import HEADS, language_model


def captured_for(device: str, kind: str, length: int, autocast: torch.dtype | None = None):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = language_model(kind)
        ids = torch.zeros(2, length, dtype=torch.long)
    return study(model, {"input_ids": ids, "labels": ids}, device=device, autocast=autocast).calls[0].captured


@pytest.mark.parametrize(("kind", "autocast"), [("gpt2", None), ("gpt2", torch.bfloat16), ("llama", torch.bfloat16)])
def test_no_probabilities_are_held_on_a_gpu_even_with_dropout(kind, autocast):
    length = 64
    probabilities = 2 * HEADS * length * length * (4 if autocast is None else 2)
    on_gpu = captured_for("h100", kind, length, autocast)
    assert max(on_gpu.size) < probabilities
    assert any("attention_backward" in str(node.target) for node in on_gpu.operations)
    if kind == "gpt2":
        assert max(captured_for("cpu", kind, length, autocast).size) >= probabilities
    assert F.scaled_dot_product_attention is not fused_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("grouped", [False, True])
def test_shapes_are_those_of_torchs_own(dtype, mask, grouped):
    def attend():
        query = torch.empty(3, 4, 10, 8, dtype=dtype, requires_grad=True)
        key, value = (torch.empty(3, 2 if grouped else 4, 12, 8, dtype=dtype, requires_grad=True) for _ in range(2))
        masked = None if mask is None else torch.empty(3, 1, 10, 12, dtype=dtype if mask.is_floating_point else mask)
        out = F.scaled_dot_product_attention(query, key, value, masked, enable_gqa=grouped)
        return [out, *torch.autograd.grad(out, [query, key, value], torch.empty_like(out))]

    with FakeTensorMode():
        own = attend()
        with attention_as_on_gpus():
            found = attend()
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in own]


def test_attention_of_other_dimensions_is_torchs_own():
    query = torch.randn(10, 8)
    assert torch.equal(fused_attention(query, query, query), F.scaled_dot_product_attention(query, query, query))
