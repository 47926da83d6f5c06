#!/usr/bin/env bash
# transformers 5.24.0, dynamic NTK scaling: after a long input a model answers the next, shorter one with the long one's
# rotary frequencies, until an input below `max_position_embeddings` comes. The same call gives other logits depending
# on what was asked before. Seen with torch 2.13.0. Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/remembers.py" <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging

logging.set_verbosity_error()
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32,
    rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})).eval()


@torch.no_grad()
def logits(length):
    return model(torch.arange(3, 3 + length)[None] % 64).logits[0]


first = logits(40)
logits(120)
after_longer = float((logits(40) - first).abs().max())
logits(16)
after_short = float((logits(40) - first).abs().max())
print(f"40 tokens again, after 120: logits differ by {after_longer:.1e}; after 16: by {after_short:.1e}")
sys.exit(not (after_longer > 1e-5 and after_short == 0))
PY
"$folder/venv/bin/python" "$folder/remembers.py"
