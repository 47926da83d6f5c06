"""A folder that `transformers` reloads in a process that knows nothing of this project."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.export.hf.transformers_folder import weight_files, write_folder
from strategies.export.receipt import Receipt, ask_client, comparison_shape, make_receipt
from strategies.export.sizes import exported_bytes
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.freeze import freeze_quantized
from strategies.quantization.qat import prepare, quantized_layers
from strategies.quantization.quantizer import RULES, WeightQuantizer
from tests.conftest import TINY

RELOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
assert not any(name.split('.')[0] in ('limbeck', 'strategies', 'trainer') for name in sys.modules)
ids, found = load_file(sys.argv[1])['ids'], {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found[folder.rpartition('/')[2]] = model(ids).logits.float().contiguous()
save_file(found, sys.argv[2])
"""


class Tokenizer:
    """Stands for the tokenizer's own saving, which is not what is tested here."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def build(kind: str, tied: bool = True):
    torch.manual_seed(3)
    torch.set_num_threads(1)
    dimensions = {**TINY, "hidden_size": 64, "vocab_size": 90, "tie_word_embeddings": tied} | {
        "llama": {"model_type": "llama"}, "qwen2": {"model_type": "qwen2", "pad_token_id": 0},
        "gpt_neox": {"model_type": "gpt_neox"}}[kind]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**dimensions)).eval()


def schemes() -> dict[str, dict]:
    """What `prepare` is asked for, by name."""
    found = {"none": {}}
    for bits in (8, 4, 3, 2):
        for group in (32, None):
            found |= {f"{bits} bits, {group}": {"bits": bits, "group_size": group},
                      f"{bits} bits, {group}, affine": {"bits": bits, "group_size": group, "symmetric": False,
                                                        "rule": "mse"}}
        found |= {f"{bits} bits, tensor": {"bits": bits, "per_tensor": True},
                  f"{bits} bits, tensor, affine": {"bits": bits, "per_tensor": True, "symmetric": False}}
    for kind, rules in RULES.items():
        found |= {f"{kind}, {rule}": {"kind": kind, "rule": rule, "group_size": 32} for rule in rules if kind != "int"}
        found[f"{kind}, tensor"] = {"kind": kind, "per_tensor": True}
    found = {name: {"quantizer": how} for name, how in found.items()}
    found |= {f"{name}, activations": {"quantizer": how, "activations": ActivationQuantizer(kind)}
              for name, how, kind in (("8 bits", {"bits": 8}, "int"), ("8 bits affine", {"bits": 8, "symmetric": False},
                                      "int"), ("4 bits", {"bits": 4, "group_size": 32}, "int"),
                                      ("ternary", {"kind": "ternary"}, "int"), ("fp8", {"kind": "fp8"}, "fp8"))}
    return found | {
        "head": {"quantizer": {"bits": 4}, "ignore": ()},
        "embedding": {"quantizer": {"bits": 4, "group_size": 32}, "embeddings": True},
        "tied": {"quantizer": {"bits": 4, "group_size": 32, "rule": "learned"}, "embeddings": True},
        "mixed": {"quantizer": {"bits": 4, "group_size": 32}, "rules": [
            ("*.down_proj", {"bits": 8}), ("*.q_proj", {"kind": "fp8"}), ("*.k_proj", None)]}}


def prepared(name: str, how: dict, dtype: torch.dtype):
    model = build("llama", tied=name not in ("head", "embedding"))
    if how["quantizer"] or name != "none":
        own = {"rules": [(match, made and WeightQuantizer(scale_dtype=dtype, **made))
                         for match, made in how.get("rules", ())]}
        prepare(model, **{**how, **own, "quantizer": WeightQuantizer(scale_dtype=dtype, **how["quantizer"])})
    return model


def reloaded(folders: list, tmp_path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token ids, and logits of them by every folder, loaded in a process that knows nothing of this project."""
    ids = torch.randint(0, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    done = subprocess.run([sys.executable, "-c", RELOAD, tmp_path / "ids.safetensors", tmp_path / "out.safetensors",
                           *folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return ids, load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_scheme_reloads_with_no_difference(tmp_path, dtype):
    """Training's forward against the file in transformers, and bytes on disk against what was said before."""
    models = {}
    for name, how in schemes().items():
        models[name] = prepared(name, how, dtype)
        folder = tmp_path / name
        write_folder(folder, models[name], Tokenizer(), dtype)
        file = weight_files(folder)[0]
        with file.open("rb") as handle:
            header = 8 + int.from_bytes(handle.read(8), "little")
        assert file.stat().st_size - header == exported_bytes(models[name], dtype), name
    ids, found = reloaded([tmp_path / name for name in models], tmp_path)
    for name, model in models.items():
        if dtype is not torch.float32:
            model = freeze_quantized(model, dtype)
        with torch.no_grad():
            assert torch.equal(model(ids).logits.float(), found[name]), name


@pytest.mark.parametrize(("kind", "bits", "group", "tied"), [("qwen2", 8, None, True), ("gpt_neox", 8, 32, False)])
def test_other_architectures_reload_too(tmp_path, kind, bits, group, tied):
    model = build(kind, tied)
    prepare(model, WeightQuantizer(bits, group))
    write_folder(tmp_path / "student", model, Tokenizer())
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "student").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], "others may read one as the other"
    ids, found = reloaded([tmp_path / "student"], tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, found["student"])


@pytest.mark.parametrize(("how", "said"), [
    ({"quantizer": WeightQuantizer(4, symmetric=False), "activations": ActivationQuantizer()},
     "q_proj is a weight with zero points, which transformers loads dequantized only"),
    ({"quantizer": WeightQuantizer(4), "embeddings": True, "activations": ActivationQuantizer()},
     "model.embed_tokens is an embedding, which transformers loads dequantized only"),
    ({"quantizer": WeightQuantizer(4, symmetric=False), "rules": [("*.down_proj", WeightQuantizer(8))]},
     "layers.0.mlp.down_proj has other numbers, which it then takes for the same"),
])
def test_what_the_format_cannot_hold_is_said(tmp_path, how, said):
    model = build("llama")
    prepare(model, **how)
    with pytest.raises(ValueError, match=said):
        write_folder(tmp_path / "student", model, Tokenizer())
    assert not list(tmp_path.iterdir())


def test_four_bits_take_four_bits_on_disk(tmp_path):
    """Silent error 11: 4-bit weights that take 8 bits."""
    model = build("llama")
    prepare(model, WeightQuantizer(4, 32))
    layers = dict(quantized_layers(model))
    write_folder(tmp_path / "s", model, Tokenizer(), torch.float32)
    with safe_open(tmp_path / "s" / "model.safetensors", "pt") as file:
        for name, layer in layers.items():
            packed = file.get_tensor(f"{name}.weight_packed")
            assert packed.numel() * packed.element_size() * 8 == 4 * layer.weight.numel()
    weights = sum(layer.weight.numel() for layer in layers.values())
    rest = sum(p.numel() for p in model.parameters()) - weights
    least = weights / 2 + 4 * weights / 32 + 4 * rest
    assert least < weight_files(tmp_path / "s")[0].stat().st_size < least + 8000  # the header, in JSON


def test_interrupted_export_leaves_nothing_that_looks_finished(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "student", build("llama"), Broken(), torch.float32)
    assert not (tmp_path / "student").exists()


def test_receipt_holds_only_within_tolerance(tmp_path):
    ours, weights = torch.randn(1, 4, 10), tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    found = {"bits_per_byte": 1.0, "tokens_per_second": 2.0, "parameters": 5}
    same = make_receipt(found, ours, ours, ours.clone(), [weights], 1e-5)
    assert same.sha256 == hashlib.sha256(b"weights").hexdigest() and same.bytes_on_disk == 7
    assert same.holds and same.largest_difference == 0 and same.argmax_agreement == 1
    assert not make_receipt(found, ours, ours, ours + 0.01, [weights], 1e-5).holds
    assert not make_receipt(found, ours, ours, ours * float("nan"), [weights], 1e-5).holds, "NaN is no agreement"
    same.write(tmp_path / "receipt.json")
    assert json.loads((tmp_path / "receipt.json").read_text())["holds"] is True
    assert isinstance(same, Receipt)


def test_large_vocabularies_compare_fewer_tokens():
    assert comparison_shape(64, 128, 2048) == (64, 128)
    rows, length = comparison_shape(64, 2048, 151_936)
    assert rows * length * 151_936 * 4 <= 64 * 2**20 and rows * length >= 100


def test_client_that_cannot_load_says_why(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    held_out = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(RuntimeError, match="a fresh process could not use the exported model"):
        ask_client({"student": {"path": str(tmp_path)}}, held_out, device="cpu", threads=1)
