"""Quantized convolutional nets in files: a byte for each number in transformers folders, packed in ONNX graphs."""

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from strategies.export.hf.transformers_folder import no_place, write_folder
from strategies.export.onnx.onnx_folder import write_onnx
from strategies.export.sizes import exported_bytes, header_bound
from strategies.quantization.folding import fold_batch_norms
from strategies.quantization.qat import Quantized, prepare
from strategies.quantization.quantizer import WeightQuantizer

SIZES = {"num_channels": 1, "image_size": 16, "num_labels": 4}
NETS = {"resnet": lambda: ResNetForImageClassification(ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck", **SIZES)),
        "mobilenet": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(
            depth_multiplier=0.01, min_depth=4, depth_divisible_by=4, **SIZES))}


class Processor:
    model_input_names = ("pixel_values",)

    def save_pretrained(self, folder):
        """Nothing has to be prepared."""


def trained(make):
    """A net whose batch norms have seen images."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for _ in range(4):
            model.train()(pixel_values=torch.randn(16, 1, 16, 16))
    model.config.architectures = [type(model).__name__]
    return model.eval()


@pytest.mark.parametrize(("name", "quantizer", "graph"), [
    ("mobilenet", WeightQuantizer(4), True), ("resnet", WeightQuantizer(4, symmetric=False), True),
    ("resnet", WeightQuantizer(8), False), ("resnet", WeightQuantizer(kind="ternary"), False),
    ("resnet", WeightQuantizer(8, per_tensor=True), False)], ids=str)
def test_files_give_the_logits_of_training(name, quantizer, graph, tmp_path):
    model, images = trained(NETS[name]), torch.randn(5, 1, 16, 16)
    layers = prepare(model, quantizer)
    assert no_place(model, {layer: model.get_submodule(layer) for layer in layers}) == {}
    with torch.no_grad():
        before = model(pixel_values=images).logits
    write_folder(tmp_path / "folder", model, Processor())
    stored = load_file(tmp_path / "folder" / "model.safetensors")
    assert all(stored[f"{layer}.weight"].dtype == torch.int8 for layer in layers)
    size = (tmp_path / "folder" / "model.safetensors").stat().st_size
    assert 0 <= exported_bytes(model, torch.float32) + header_bound(model) - size < header_bound(model)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images).logits, before)
    if not graph:
        return
    if name == "mobilenet":  # whose layers are all as wide: a few are traced sooner
        del model.mobilenet_v2.layer[2:]
        before = model(pixel_values=images).logits.detach()
    layers = [one for one, module in model.named_modules() if isinstance(module, Quantized)]
    assert len(fold_batch_norms(model, {"pixel_values": images})) == len(layers) - 1
    write_onnx(tmp_path / "onnx", model, Processor())
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    found = session.run(["logits"], {"pixel_values": images.numpy()})[0]
    assert np.abs(found - before.numpy()).max() < 3e-5 * before.abs().max()


def test_beside_larger_linear_layers_a_convolution_stays_in_full_precision():
    """Of a vision transformer the linear layers are packed, as before."""
    model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                intermediate_size=32, patch_size=4, **SIZES))
    layers = prepare(model, WeightQuantizer(4))
    (name, why), = no_place(model, {layer: model.get_submodule(layer) for layer in layers}).items()
    assert name.endswith("patch_embeddings.projection") and "beside larger linear layers" in why
