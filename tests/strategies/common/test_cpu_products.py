"""fp32 products that are handed to oneDNN are products of fp32 numbers, and nothing else changes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from strategies.common import cpu_products
from strategies.common.cpu_products import faster_fp32_products, rounds_nothing

CPU = torch.device("cpu")


def setting():
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize("shapes", [((64, 96), (96, 200)), ((300, 257), (257, 1031)), ((5, 40, 64), (5, 64, 48))])
def test_products_are_as_exact_as_before(shapes):
    """bf16 operands would be 1e-3 off."""
    first, second = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)
    exact = first.double() @ second.double()
    with faster_fp32_products(CPU):
        for found in (first @ second, (second.mT.contiguous() @ first.mT.contiguous()).mT):
            assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_the_permission_is_given_only_where_nothing_is_rounded(monkeypatch):
    monkeypatch.setattr(cpu_products, "is_faster", lambda: True)
    before = setting()
    with pytest.raises(KeyError), faster_fp32_products(CPU):
        assert setting() == "bf16"
        raise KeyError
    assert setting() == before
    with faster_fp32_products(torch.device("cuda")):
        assert setting() == before
    monkeypatch.setattr(cpu_products, "is_faster", lambda: False)
    with faster_fp32_products(CPU):
        assert setting() == before


def test_a_product_that_rounds_is_seen(monkeypatch):
    """The trial itself: products of operands rounded to bf16 do not pass it."""
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda one, other: product(one.bfloat16().float(),
                                                                               other.bfloat16().float()))
    assert not rounds_nothing()


def test_it_can_be_asked_first_while_a_step_is_planned():
    """On tensors without data no product shows anything."""
    cpu_products.is_faster.cache_clear()
    with FakeTensorMode():
        within = cpu_products.is_faster()
    cpu_products.is_faster.cache_clear()
    assert within == cpu_products.is_faster()


def test_defaults_and_autocast_do_not_change_what_is_found():
    cpu_products.is_faster.cache_clear()
    wanted = cpu_products.is_faster()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        cpu_products.is_faster.cache_clear()
        assert cpu_products.is_faster() == wanted
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        cpu_products.is_faster.cache_clear()
        assert cpu_products.is_faster() == wanted


def test_what_somebody_else_sets_is_left(monkeypatch):
    monkeypatch.setattr(cpu_products, "is_faster", lambda: True)
    settings = torch.backends.mkldnn.matmul
    with faster_fp32_products(CPU):
        settings.fp32_precision = "ieee"
    try:
        assert setting() == "ieee"
        with faster_fp32_products(CPU):
            assert setting() == "ieee"
    finally:
        settings.fp32_precision = "none"


def test_products_can_be_kept_as_they_are_for_all_inside(monkeypatch):
    monkeypatch.setattr(cpu_products, "is_faster", lambda: True)
    with cpu_products.fp32_products(CPU, faster=False), faster_fp32_products(CPU):
        assert setting() == "none"
    with cpu_products.fp32_products(CPU, faster=False), cpu_products.fp32_products(CPU, faster=True):
        assert setting() == "none"
    with cpu_products.fp32_products(CPU, faster=True):
        assert setting() == "bf16"
    assert setting() == "none"


def test_the_precision_can_be_asked_for_within(monkeypatch):
    """Models and libraries ask; torch raises where CPU and GPU do not agree."""
    monkeypatch.setattr(cpu_products, "is_faster", lambda: True)
    gpu = torch.backends.cuda.matmul
    gpu.fp32_precision = "tf32"  # a person's own setting
    try:
        with faster_fp32_products(CPU):
            assert torch.get_float32_matmul_precision() == "medium" and setting() == "bf16"
        assert gpu.fp32_precision == "tf32" and setting() == "none"
    finally:
        gpu.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"
    gpu.allow_tf32 = True  # the older way
    try:
        with faster_fp32_products(CPU):
            assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_float32_matmul_precision() == "high" and gpu.allow_tf32 and setting() == "none"
    finally:
        gpu.allow_tf32 = False
        gpu.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"
