"""Models whose own code reads the weights of their layers: files that transformers can run, and what is left wide."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.export.hf.transformers_folder import no_place, write_folder
from strategies.export.weight_reads import weight_reads
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer
from tests.conftest import TINY
from tests.strategies.export.hf.test_transformers_folder import Tokenizer

MAMBA = {"model_type": "mamba", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
NANOCHAT = {**TINY, "model_type": "nanochat", "vocab_size": 64}


def made(dimensions):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**dimensions)).eval()


def test_what_is_read_and_what_is_computed_with_is_found():
    def ends(names):
        return {name.rpartition(".")[2] for name in names}

    found = weight_reads(made(MAMBA))
    assert ends(found.used) == {"dt_proj"} and ends(found.read) == {"dt_proj", "x_proj", "out_proj", "lm_head"}
    found = weight_reads(made(NANOCHAT))
    assert ends(found.read) == {"o_proj"} and not found.used
    assert not weight_reads(made({**TINY, "vocab_size": 64})).read


def test_a_layer_that_is_computed_past_has_no_place():
    model = made(MAMBA)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    (name, why), = no_place(model, layers).items()
    assert name.endswith("dt_proj") and "past the layer" in why


def test_packed_layers_that_code_reads_load_as_they_were_trained(tmp_path):
    """Else transformers itself fails: packed layers have no weight that could be read."""
    model = made(NANOCHAT)
    prepare(model, WeightQuantizer(bits=4, group_size=16))
    write_folder(tmp_path / "student", model, Tokenizer())
    assert AutoConfig.from_pretrained(tmp_path / "student").quantization_config["dequantize"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
