#!/usr/bin/env bash
# compressed-tensors 0.20.1, transformers 5.24.0, torch 2.13.0: a folder whose layers are quantized in two ways (here 4 bits
# for attention and 8 for the rest, as two groups of its configuration) is read rightly as it is, and wrongly, without a
# word, with `CompressedTensorsConfig(dequantize=True)`: every layer is then unpacked by one of the schemes. Folders with
# one scheme are read alike in both ways. `dequantize=True` is what peft needs, which finds no weights otherwise. Limbeck
# refuses bits layer by layer wherever a folder can only be loaded dequantized.
# Prints what was seen; exit code 1 if it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1 numpy
cat > "$folder/two.py" <<'PY'
import sys

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

TOKENS = torch.arange(1, 33)[None]


def scheme(targets, bits):
    return QuantizationScheme(targets=targets, weights=QuantizationArgs(num_bits=bits, strategy="group", group_size=32))


found = {}
for kinds in ((4, 4), (4, 8)):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=100, tie_word_embeddings=False, initializer_range=0.2)).eval()
    config = QuantizationConfig(format="pack-quantized", ignore=["lm_head"], config_groups={
        "attention": scheme(["re:.*self_attn.*"], kinds[0]), "mlp": scheme(["re:.*mlp.*"], kinds[1])})
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            bits = module.quantization_scheme.weights.num_bits
            groups = module.weight.detach().unflatten(1, (-1, 32)).abs().amax(-1)
            module.weight_scale.data.copy_(groups / (2 ** (bits - 1) - 1))
    with torch.no_grad():
        meant = model(TOKENS).logits
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained("two")
    compressor.update_config("two")
    whole = AutoModelForCausalLM.from_pretrained("two")
    dense = AutoModelForCausalLM.from_pretrained("two", quantization_config=CompressedTensorsConfig(dequantize=True))
    with torch.no_grad():
        one, other = whole(TOKENS).logits, dense(TOKENS).logits
    found[kinds] = [float((read - meant).abs().max()) for read in (one, other)]
    print(f"found: attention in {kinds[0]} bits, the rest in {kinds[1]}: logits up to {float(meant.abs().max()):.2f}, read "
          f"{found[kinds][0]:.2f} away from them, and dequantized {found[kinds][1]:.2f} away", flush=True)
sys.exit(not (max(*found[4, 4], found[4, 8][0]) < 1e-4 and found[4, 8][1] > 1))
PY
cd "$folder"
venv/bin/python two.py 2>log | grep '^found' || { tail -5 log; exit 1; }
