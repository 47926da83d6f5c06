#!/usr/bin/env bash
# A folder that transformers 5.24.0 saves has the rotary base in `rope_parameters` alone. transformers 4.57.6 does not
# read that and takes its default, 10000, without a word: the same weights predict other tokens. Limbeck writes the keys
# of both. Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.6; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet torch==2.13.0 "transformers==$version" numpy
done
cat > "$folder/read.py" <<'PY'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
folder = sys.argv[1]
if transformers.__version__.startswith("5"):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    LlamaForCausalLM(config).save_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.arange(3, 63)[None]).logits
base = getattr(model.config, "rope_theta", None) or model.config.rope_parameters["rope_theta"]
print(f"transformers {transformers.__version__}: rotary base {base:g}")
torch.save(logits, f"{folder}/{transformers.__version__}.pt")
if not transformers.__version__.startswith("5"):
    difference = float((logits - torch.load(f"{folder}/5.24.0.pt")).abs().max())
    print(f"largest difference of a logit: {difference:.1e}")
    sys.exit(not (base == 10000 and difference > 1e-4))
PY
"$folder/5.24.0/bin/python" "$folder/read.py" "$folder/model"
"$folder/4.57.6/bin/python" "$folder/read.py" "$folder/model"
