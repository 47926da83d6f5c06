#!/usr/bin/env bash
# transformers 5.24.0, LongRoPE (Phi-3 and others): which of the two sets of rotary factors is used depends on the width
# of the batch. Padding on the right, masked and never attended to, changes the logits of a short text as soon as the
# batch is one token wider than `original_max_position_embeddings`; so does a longer neighbor. Seen with torch 2.13.0.
# Limbeck gives each document the frequencies that it has alone. Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/padding.py" <<'PY'
import sys

import torch
from transformers import Phi3Config, Phi3ForCausalLM, logging

logging.set_verbosity_error()
torch.manual_seed(0)
first = 32  # positions of the first training
model = Phi3ForCausalLM(Phi3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=first, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": first})).eval()
text = torch.arange(3, 19)


@torch.no_grad()
def padded(width):
    ids = torch.zeros(1, width, dtype=torch.long)
    ids[0, :len(text)] = text
    mask = (torch.arange(width) < len(text)).long()[None]
    return model(input_ids=ids, attention_mask=mask).logits[0, :len(text)]


alone = padded(len(text))
far = {width: float((padded(width) - alone).abs().max()) for width in (first, first + 1)}
for width, difference in far.items():
    print(f"{len(text)} tokens padded to {width}: logits differ by {difference:.1e} from those without padding")
sys.exit(not (far[first] == 0 and far[first + 1] > 1e-4))
PY
"$folder/venv/bin/python" "$folder/padding.py"
