"""ONNX files that ONNX Runtime loads in a process that knows nothing of this project."""

import ast
import copy
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from strategies.export.clients import onnx_client
from strategies.export.hf.transformers_folder import write_folder
from strategies.export.onnx.onnx_folder import check_onnx, write_onnx, write_onnx_module
from strategies.export.receipt import CACHED
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.freeze import freeze_quantized
from strategies.quantization.outliers import keep_whole
from strategies.quantization.qat import prepare, quantized_layers
from strategies.quantization.quantizer import WeightQuantizer
from tests.strategies.export.onnx.onnx_models import (
    CLOSE,
    ask,
    build,
    held_out,
    logits,
    says_what_transformers_says,
    tokenizer,
)

RUN = """
import sys, numpy, onnxruntime
from safetensors.numpy import load_file, save_file
found = {}
for file in sys.argv[3:]:
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    found[file] = session.run(None, {'input': load_file(sys.argv[1])['input']})[0]
save_file(found, sys.argv[2])
assert not any(name.split('.')[0] in ('torch', 'strategies', 'trainer') for name in sys.modules)
"""


def run_afresh(file, values, tmp_path):
    """What a file gives for an input, in a process of its own."""
    save_file({"input": values}, tmp_path / "in.safetensors")
    done = subprocess.run([sys.executable, "-c", RUN, tmp_path / "in.safetensors", tmp_path / "out.safetensors", file],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(tmp_path / "out.safetensors")[str(file)]


# ---- layers

def schemes() -> dict[str, tuple[int, dict]]:
    """By name: inputs of a linear layer, and how it is quantized."""
    found = {}
    for bits in (2, 4, 8):
        for symmetric in (True, False):
            kind = {"bits": bits, "symmetric": symmetric, "rule": "mse"}
            name = f"{bits} bits{'' if symmetric else ', affine'}"
            found |= {f"{name}, 32": (96, {**kind, "group_size": 32}), f"{name}, 16": (96, {**kind, "group_size": 16}),
                      f"{name}, channel": (96, kind), f"{name}, channel of 40": (40, kind),
                      f"{name}, tensor": (96, {**kind, "per_tensor": True})}
        found[f"{bits} bits, learned"] = (96, {"bits": bits, "group_size": 32, "rule": "learned"})
        found[f"{bits} bits, half"] = (96, {"bits": bits, "symmetric": False, "group_size": 32,
                                            "scale_dtype": torch.float16 if bits == 2 else torch.bfloat16})
    found |= {"ternary": (96, {"kind": "ternary", "group_size": 32}), "ternary, channel": (40, {"kind": "ternary"}),
              "binary": (96, {"kind": "binary", "group_size": 32})}
    return found | {f"{name}, activations": (inputs, {**how, "activations": ActivationQuantizer()})
                    for name, (inputs, how) in found.items() if name.startswith(("8", "4 bits, 32", "ternary,"))} | {
        "outliers": (96, {"bits": 4, "group_size": 32, "outliers": [3, 50]}),
        "outliers, activations": (96, {"bits": 8, "activations": ActivationQuantizer(), "outliers": [3, 50]})}


class Layers(nn.Module):
    """Linear layers of every scheme that read the same input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inputs = [inputs for inputs, _ in schemes().values()]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(inputs, 24)) for inputs in self.inputs)
        for layer, (_, how) in zip(self.layers, schemes().values(), strict=True):
            how = dict(how)
            outliers, activations = how.pop("outliers", None), how.pop("activations", None)
            prepare(layer, WeightQuantizer(**how), activations=activations)
            if outliers:
                keep_whole(layer[0], torch.tensor(outliers))

    def forward(self, values):
        return torch.stack([layer(values[..., :width]) for width, layer in zip(self.inputs, self.layers, strict=True)])


def test_every_scheme_gives_what_training_gives(tmp_path):
    layers = Layers()
    write_onnx_module(tmp_path / "layers.onnx", layers, torch.randn(2, 5, 96))
    values = torch.randn(50, 5, 96) * torch.logspace(-2, 2, 50)[:, None, None]
    values[7] = 0
    found = run_afresh(tmp_path / "layers.onnx", values, tmp_path)
    with torch.no_grad():
        wanted = layers(values)
    scale = values.abs().amax(-1)[None, ..., None].clamp(min=1e-2)
    for name, theirs, ours in zip(schemes(), found / scale, wanted / scale, strict=True):
        assert (theirs - ours).abs().max() <= CLOSE * ours.abs().max(), name
    assert sorted(file.name for file in tmp_path.glob("*.onnx*")) == ["layers.onnx", "layers.onnx.data"]


def test_convolutions_keep_their_numbers(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2, groups=2), nn.ReLU(),
                        nn.Conv2d(8, 8, 1, padding="same"), nn.Flatten(), nn.Linear(8 * 49, 10))
    prepare(net, WeightQuantizer(8), rules=[("2", WeightQuantizer(4)), ("6", WeightQuantizer(8, symmetric=False))])
    write_onnx_module(tmp_path / "net.onnx", net, torch.randn(2, 3, 16, 16))
    values = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        wanted = net(values)
    assert (run_afresh(tmp_path / "net.onnx", values, tmp_path) - wanted).abs().max() <= CLOSE * wanted.abs().max()
    graph = onnx.load(tmp_path / "net.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kernels = [stored[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert [(list(tensor.dims), tensor.data_type) for tensor in kernels] == [
        ([16, 3, 3, 3], onnx.TensorProto.INT8), ([8, 8, 1, 1], onnx.TensorProto.INT8)]
    assert torch.equal(torch.tensor(onnx.numpy_helper.to_array(kernels[0], str(tmp_path))), net[0].numbers())


# ---- language models

STUDENTS = {  # model, how it is prepared, dtype, largest difference as a share of the largest logit
    "llama": (build("llama", hidden_size=192, vocab_size=8000, intermediate_size=512), {
        "quantizer": WeightQuantizer(4, 32), "embeddings": True,
        "rules": [("*.mlp.*", WeightQuantizer(8)), ("*.q_proj", WeightQuantizer(2, 64))]}, torch.float32, CLOSE),
    "qwen2": (build("qwen2", tied=False), {
        "quantizer": WeightQuantizer(8, symmetric=False), "embeddings": True, "ignore": (),
        "rules": [("*.down_proj", WeightQuantizer(2, 16, rule="learned"))]}, torch.float32, CLOSE),
    "gpt_neox": (build("gpt_neox", tied=False), {"quantizer": WeightQuantizer(kind="ternary")}, torch.float32, CLOSE),
    "half": (build("llama"), {"quantizer": WeightQuantizer(2, 32, torch.bfloat16, symmetric=False), "embeddings": True},
             torch.bfloat16, CLOSE),
    # A token's largest number becomes 127.5, which the last bit of it rounds up or down. Embeddings that are one unit
    # in the last place off do the same to the model in training.
    "activations": (build("llama"), {"quantizer": WeightQuantizer(8), "activations": ActivationQuantizer()},
                    torch.float32, 5e-3)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Folders of all students, and what one fresh process found in them."""
    folder = tmp_path_factory.mktemp("students")
    for name, (model, how, dtype, _) in STUDENTS.items():
        prepare(model, **how)
        model.train()
        kinds = [type(module) for module in model.modules()]
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        assert write_onnx(folder / name, model, tokenizer(), dtype) == []
        assert model.training and kinds == [type(module) for module in model.modules()]
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        model.eval()
    return folder, *ask(folder, list(STUDENTS), "onnx_client.py")


@pytest.mark.parametrize("name", STUDENTS)
def test_the_reloaded_student_is_the_one_in_training(answers, name):
    _, found, theirs = answers
    model, _, dtype, close = STUDENTS[name]
    reference = model if dtype is torch.float32 else freeze_quantized(copy.deepcopy(model), dtype).float()
    rows = held_out()
    ours = logits(reference, rows["input_ids"][:4, :20], rows["position_ids"][:4, :20])
    assert (theirs[name] - ours).abs().max() <= close * ours.abs().max()
    assert torch.equal(theirs[name].argmax(-1), ours.argmax(-1))
    assert (theirs[name + CACHED] - ours).abs().max() <= close * ours.abs().max()
    whole = logits(reference, rows["input_ids"], rows["position_ids"])
    nats = nn.functional.cross_entropy(whole.flatten(0, 1).double(), rows["targets"].flatten(), reduction="sum")
    assert found[name]["bits_per_byte"] == pytest.approx(float(nats) / 0.6931471805599453 / 350, rel=max(close, 1e-6))


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_packed_documents_stay_apart(answers, name):
    """Positions that begin again hide the document before, and a document has the logits that it has alone."""
    session = onnx_client.open_session(answers[0] / name, threads=1)
    ids = torch.arange(2, 14)[None]
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    changed = torch.where(torch.arange(12) < 7, ids.flip(1), ids)

    def run(tokens, places):
        return onnx_client.logits_of(session, {"input_ids": tokens.numpy(), "position_ids": places.numpy()},
                                     slice(None), None)[0, -5:]

    assert (run(ids, positions) == run(changed, positions)).all()
    assert abs(run(ids, positions) - run(ids[:, 7:], positions[:, 7:])).max() < 1e-6
    assert abs(run(ids, positions) - run(ids, torch.arange(12)[None])).max() > 1e-3


def test_attention_is_the_operator_of_the_standard(answers):
    graph = onnx.load(answers[0] / "llama" / "model.onnx", load_external_data=False)
    assert next(one.version for one in graph.opset_import if one.domain == "") == 23
    attention = [node for node in graph.graph.node if node.op_type == "Attention"]
    assert [node.domain for node in attention] == [""]
    assert {"past_key_values.0.key", "past_key_values.0.value"} <= {*attention[0].input}
    assert {"present.0.key", "present.0.value"} <= {*attention[0].output}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_text_from_the_cache_is_that_of_transformers(answers, name):
    says_what_transformers_says(answers[0] / name, STUDENTS[name][0])


def test_the_client_measures_what_the_client_of_transformers_measures(answers, tmp_path):
    model = STUDENTS["gpt_neox"][0]
    write_folder(tmp_path / "gpt_neox", model, tokenizer())
    found, theirs = ask(tmp_path, ["gpt_neox"], "transformers_client.py")
    ours = answers[1]["gpt_neox"]
    assert ours["sample"] == found["gpt_neox"]["sample"] and len(ours["sample"]) > len("w1 w2 w3")
    assert ours["bits_per_byte"] == pytest.approx(found["gpt_neox"]["bits_per_byte"], rel=1e-6)
    assert ours["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert ours["tokens_per_second"] > 0
    assert ours["parameter_bytes"] == sum(file.stat().st_size for file in (answers[0] / "gpt_neox").glob("model.onnx*"))


def test_a_folder_has_all_that_a_reader_needs(answers):
    folder, found, _ = answers
    config = AutoConfig.from_pretrained(folder / "llama")
    assert config.architectures == ["LlamaForCausalLM"] and config.vocab_size == 8000
    assert not hasattr(config, "quantization_config")
    assert PreTrainedTokenizerFast.from_pretrained(folder / "llama")("w1 w2").input_ids == [3, 4]
    model = STUDENTS["qwen2"][0]  # scales that are learned are no weights of it
    assert found["qwen2"]["parameters"] == sum(parameter.numel() for name, parameter in model.named_parameters()
                                               if not name.endswith("_ratio"))
    assert not list(folder.glob(".*"))


def test_packed_weights_take_their_bits_on_disk(answers):
    """Silent error 11, and a tied embedding is stored once: bits, scales, and everything else in fp32."""
    model = STUDENTS["llama"][0]
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model)}.values()
    weights = sum(layer.weight.numel() for layer in layers)
    rest = sum(parameter.numel() for parameter in model.parameters()) - weights
    packed = sum(layer.weight.numel() * layer.quantizer.bits // 8 for layer in layers)
    least = packed + 4 * sum(layer.grid().scale.numel() for layer in layers) + 4 * rest
    assert least <= sum(file.stat().st_size for file in (answers[0] / "llama").glob("model.onnx*")) <= 1.03 * least


@pytest.mark.parametrize(("how", "said"), [
    ({"quantizer": WeightQuantizer(3)}, "q_proj has 3 bits, and .* 2, 4, 8: take 4"),
    ({"quantizer": WeightQuantizer(kind="fp8")}, "q_proj has fp8 numbers, .*: take 8 bits"),
    ({"quantizer": WeightQuantizer(8), "activations": ActivationQuantizer("fp8")}, "q_proj has fp8 numbers"),
    ({"quantizer": WeightQuantizer(4, 8)}, "q_proj has groups of 8, and .*: take one of them, or whole channels"),
    ({"quantizer": WeightQuantizer(4), "rules": [("*.up_proj", WeightQuantizer(6))]}, "up_proj has 6 bits"),
])
def test_what_the_runtime_cannot_multiply_is_said(tmp_path, how, said):
    model = build("llama")
    prepare(model, **how)
    with pytest.raises(ValueError, match=said):
        write_onnx(tmp_path / "student", model, tokenizer())
    assert not list(tmp_path.iterdir())


def test_weights_of_half_precision_are_refused_and_shapes_are_enough_to_tell():
    with torch.device("meta"):
        model = build("llama")
        prepare(model, WeightQuantizer(4, 32, torch.bfloat16))
    for _, layer in quantized_layers(model):
        layer.fix(layer.grid())  # scales of half precision are none of the weights
    check_onnx(model)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is torch.bfloat16: .* call model.float\(\) first"):
        check_onnx(model.bfloat16())


def test_interrupted_export_leaves_nothing_that_looks_finished(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_onnx(tmp_path / "student", build("gpt_neox"), Broken())
    assert not (tmp_path / "student").exists()


def test_the_client_knows_nothing_of_this_project():
    with open(onnx_client.__file__) as handle:
        modules = {alias.name if isinstance(node, ast.Import) else node.module for node in ast.walk(ast.parse(
            handle.read())) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not {module.split(".")[0] for module in modules} & {"strategies", "trainer", "limbeck", "torch"}
    assert onnxruntime.__version__
