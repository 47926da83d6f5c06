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

from strategies.export.receipt import Receipt, ask_client, comparison_shape, make_receipt
from strategies.export.transformers_folder import weight_files, write_folder
from strategies.quantization.baking import bake
from strategies.quantization.qat import prepare, quantized_layers
from strategies.quantization.quantizer import WeightQuantizer
from tests.conftest import TINY

RELOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
assert not any(name.split('.')[0] in ('limbeck', 'strategies', 'trainer') for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    save_file({'logits': model(load_file(sys.argv[2])['ids']).logits.float().contiguous()}, sys.argv[3])
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


@pytest.mark.parametrize(("kind", "bits", "group", "dtype", "tied"), [
    ("llama", 4, 32, torch.float32, True),
    ("llama", 4, None, torch.float32, False),
    ("qwen2", 8, None, torch.float32, True),
    ("gpt_neox", 8, 32, torch.float32, False),
    ("llama", 4, 32, torch.bfloat16, True),
    ("llama", 8, None, torch.float16, True),
    ("llama", None, None, torch.float32, True),
])
def test_reloaded_logits_are_equal(tmp_path, kind, bits, group, dtype, tied):
    model = build(kind, tied)
    if bits:
        prepare(model, WeightQuantizer(bits, group, dtype))
    write_folder(tmp_path / "student", model, Tokenizer(), dtype)
    ids = torch.randint(0, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    done = subprocess.run([sys.executable, "-c", RELOAD, tmp_path / "student", tmp_path / "ids.safetensors",
                           tmp_path / "out.safetensors"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    if dtype is not torch.float32:
        model = bake(model, dtype)
    with torch.no_grad():
        ours = model(ids).logits.float()
    assert torch.equal(ours, load_file(tmp_path / "out.safetensors")["logits"])


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
