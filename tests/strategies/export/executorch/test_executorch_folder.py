"""Programs for ExecuTorch: what XNNPACK multiplies, what is refused, and how it rounds what enters a layer."""


import pytest
import torch
from torch import nn

from strategies.export.executorch.executorch_folder import (
    MOST,
    check_executorch,
    longest,
    lowered,
    try_executorch,
    write_executorch,
)
from strategies.export.executorch.executorch_layers import XnnpackLinear, stored_as
from strategies.export.executorch.executorch_rounding import executorch_reference, nudged, rounded_with_zero_point
from strategies.export.readers import is_installed, read_by
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.qat import become_quantized, prepare
from strategies.quantization.quantizer import WeightQuantizer
from tests.strategies.export.gguf.test_gguf_file import trained
from tests.strategies.export.test_readers import BASE, build, ids, with_base

needs_executorch = pytest.mark.skipif(not is_installed("executorch"), reason="pip install 'limbeck[executorch]'")
EIGHT = ActivationQuantizer()
BF16 = {"scale_dtype": torch.bfloat16, "positive": True}
FORMS = [  # quantizer, inputs -> bits and group size that XNNPACK has for it
    ({"bits": 4, "group_size": 32, **BF16}, 96, (4, 32)),
    ({"bits": 3, "group_size": 64, "scale_dtype": torch.bfloat16}, 128, (4, 64)),
    ({"kind": "ternary", "group_size": 32, "scale_dtype": torch.bfloat16}, 64, (4, 32)),
    ({"bits": 4, "positive": True}, 96, (4, None)), ({"bits": 4, "positive": True}, 65, (8, None)),
    ({"bits": 4}, 96, (8, None)), ({"bits": 8, "positive": True}, 96, (8, None)),
    ({"bits": 4, "group_size": 96}, 96, (8, None)), ({"kind": "binary", "per_tensor": True}, 96, (4, None))]


def linear(how: dict, inputs: int, activations=EIGHT) -> nn.Module:
    layer = nn.Linear(inputs, 24)
    become_quantized(layer, WeightQuantizer(**how), activations)
    return layer


@pytest.mark.parametrize(("how", "inputs", "form"), FORMS)
def test_numbers_and_scales_of_training_are_what_is_stored(how, inputs, form):
    torch.manual_seed(0)
    layer = linear(how, inputs)
    stored = XnnpackLinear("layer", layer, layer.bias)
    scale = stored.scale.double().view(24, -1)
    weight = (stored.numbers.double().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    grid = layer.grid()
    groups = layer.numbers().double().view(*(grid.scale.shape if grid.scale.shape[0] > 1 else (1, 1)), -1)
    assert torch.equal(weight, (groups * grid.scale.double()[..., None]).view(24, inputs))
    assert (stored.form.bits, stored.form.group_size) == form and stored.scale.min() > 0
    assert stored.scale.dtype is torch.float32 and (form[1] is None or torch.equal(
        stored.scale, stored.scale.bfloat16().float()))


@pytest.mark.parametrize(("how", "says"), [
    ({"bits": 8}, "scales of both signs, and XNNPACK takes positive ones: set `positive_scales: true`"),
    ({"bits": 4, "group_size": 32, "scale_dtype": torch.bfloat16}, "scales of both signs.* or take whole channels"),
    ({"bits": 4, "group_size": 32, "positive": True}, "scales in float32, which XNNPACK rounds to bfloat16"),
    ({"bits": 4, "group_size": 16, **BF16}, "groups of 16, and XNNPACK those of a multiple of 32"),
    ({"bits": 8, "group_size": 32, **BF16}, "groups of 8-bit numbers"),
    ({"bits": 4, "symmetric": False}, "zero points and quantized activations"),
    ({"kind": "fp8"}, "fp8 numbers and quantized activations")])
def test_numbers_that_xnnpack_does_not_hold_are_refused(how, says):
    with pytest.raises(ValueError, match="layer has .*" + says):
        stored_as("layer", linear(how, 96))


def student(activations=EIGHT, **how):
    model = build(num_hidden_layers=1)
    prepare(model, WeightQuantizer(**how), activations=activations)
    return model


@pytest.mark.parametrize(("model", "says"), [
    (lambda: student(ActivationQuantizer("fp8"), bits=4), "with quantized activations, and XNNPACK multiplies"),
    (lambda: student(ActivationQuantizer(dynamic=False), bits=4), "with a scale of each token: set `kind: int`"),
    (lambda: student(bits=8), "q_proj has scales of both signs")])
def test_a_student_that_executorch_does_not_hold_is_refused(model, says, monkeypatch):
    monkeypatch.setattr("strategies.export.executorch.executorch_folder.is_installed", lambda _: True)
    with pytest.raises(ValueError, match=says):
        check_executorch(model())


def test_executorch_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("strategies.export.executorch.executorch_folder.is_installed", lambda _: False)
    with pytest.raises(ValueError, match=r"ExecuTorch is not installed: pip install 'limbeck\[executorch\]'"):
        check_executorch(build())


def test_activations_are_rounded_with_a_zero_point_as_torchs_own_operators_do():
    import torch.ao.quantization.fx._decomposed  # noqa: F401 - defines the operators

    ops = torch.ops.quantized_decomposed
    values = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0)) + torch.linspace(-4, 4, 50)[:, None]
    values[0, 0] = 0
    scale, zero = ops.choose_qparams_per_token_asymmetric(values, torch.int8)
    numbers = ops.quantize_per_token(values, scale, zero, -128, 127, torch.int8)
    wanted = ops.dequantize_per_token(numbers, scale, zero, -128, 127, torch.int8, torch.float32)
    torch.testing.assert_close(rounded_with_zero_point(values), wanted, rtol=1e-6, atol=1e-7)
    assert (EIGHT.fake_quantize(values) - wanted).abs().max() > 1e-3  # training rounds otherwise


@torch.no_grad()
def test_a_student_moves_by_itself_only_where_it_rounds():
    model, rows = build(num_hidden_layers=2), ids()[:1, :64]
    moved = []
    for activations in (None, EIGHT):
        if activations is not None:
            prepare(model, WeightQuantizer(4), activations=activations)
        reference = executorch_reference(model, torch.float32)
        before = reference(rows).logits
        with nudged(reference):
            moved.append(float((reference(rows).logits - before).abs().max()))
        assert torch.equal(reference(rows).logits, before)
    assert 0 < moved[0] < 1e-4 and moved[1] > 1e-2


def test_programs_take_as_long_texts_as_memory_allows():
    assert longest(build().config) == 1024
    large = build().config
    large.max_position_embeddings, large.num_attention_heads, large.vocab_size = 10**6, 32, 200_000
    assert longest(large) < MOST and 0.99 * 2**32 < 4 * (32 * longest(large) ** 2 + 200_000 * longest(large)) <= 2**32


@needs_executorch
def test_xnnpack_multiplies_the_numbers_of_every_form(tmp_path):
    torch.manual_seed(0)
    layers = [linear(how, inputs) for how, inputs, _ in FORMS]

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(XnnpackLinear("layer", layer, layer.bias) for layer in layers)

        def forward(self, values):
            return [layer(values[..., :layer.numbers.shape[1]]) for layer in self.layers]

    from executorch.runtime import Runtime

    values = 3 * torch.randn(1, 17, 128)
    file = tmp_path / "several.pte"  # a program that is loaded from bytes does not keep them
    file.write_bytes(lowered(Several(), (values[:, :5],), 32, {"most": 32}))
    program = Runtime.get().load_program(file)
    found = program.load_method("forward").execute([values])
    assert int(program.load_method("most").execute([])[0]) == 32
    for layer, theirs, (_, inputs, _) in zip(layers, found, FORMS, strict=True):
        scale = layer.grid().scale.float()
        weight = (layer.numbers().float().view(*scale.shape, -1) * scale[..., None]).view(24, inputs)
        ours = nn.functional.linear(rounded_with_zero_point(values[..., :inputs]), weight, layer.bias)
        assert (theirs - ours).abs().max() < 2e-6 * ours.abs().max()


@needs_executorch
def test_executorch_computes_what_its_reference_does_and_another_base_is_found(tmp_path):
    from executorch.runtime import Runtime

    torch.set_num_threads(1)
    model = build(num_hidden_layers=1, attention_bias=True)
    with torch.no_grad():
        for bias in (one for name, one in model.named_parameters() if name.endswith("bias")):
            bias.normal_()
    prepare(model, WeightQuantizer(bits=4, group_size=32, **BF16), ignore=(), activations=EIGHT, embeddings=True)
    folder = tmp_path / "student"
    notes = write_executorch(folder, model, trained(), torch.bfloat16)
    files, rows = [folder / "student.pte"], ids()
    reference = executorch_reference(model, torch.bfloat16)
    program = Runtime.get().load_program(files[0])  # at the first tokens no number falls on the next one yet
    theirs = program.load_method("forward").execute([rows[:1, :2], torch.arange(2)[None]])[0]
    torch.testing.assert_close(theirs, reference(rows[:1, :2]).logits.detach(), rtol=1e-5, atol=1e-5)
    receipt = read_by("executorch", folder, files, reference, rows, 2e-2, threads=1)
    assert receipt.holds and receipt.tokens > 500 and receipt.slowest_turn > 0.99, receipt
    assert "zero point of each token" in notes[1] and len(notes) == 2
    wrong = read_by("executorch", folder, files, with_base(reference, 1.1 * BASE), rows, 2e-2, threads=1)
    assert not wrong.holds and wrong.largest_difference > 3 * receipt.largest_difference, wrong
    bare = sum(parameter.numel() for parameter in model.parameters())
    assert files[0].stat().st_size < 2 * bare  # of which fp32 has 4 bytes each


@needs_executorch
def test_a_model_that_torch_does_not_export_is_said():
    class Chance(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.inner, self.config = nn.Embedding(7, 7), config

        def forward(self, input_ids, position_ids, use_cache):
            return self.inner(input_ids) if input_ids.sum() > 3 else None

    with pytest.raises(ValueError, match="ExecuTorch makes no program of Chance: (?!.*argument)"):
        try_executorch(Chance(build(num_hidden_layers=1).config))
