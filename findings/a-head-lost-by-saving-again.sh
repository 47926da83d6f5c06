#!/usr/bin/env bash
# transformers 5.24.0: where config.json says that head and embeddings are tied and the file has two different matrices,
# `from_pretrained` keeps both, and the configuration goes on saying tied. A model made from that configuration (as
# consolidating tools do) has one matrix, and `load_state_dict` fills it without an error: other logits. Seen with torch
# 2.13.0; Limbeck settles what is tied by the file. Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/show.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

logging.set_verbosity_error()
torch.manual_seed(0)
folder = Path(sys.argv[1]) / "model"
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False
                             )).save_pretrained(folder)
values = json.loads((folder / "config.json").read_text())
(folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
again = AutoModelForCausalLM.from_config(loaded.config).eval()
again.load_state_dict(loaded.state_dict())
with torch.no_grad():
    difference = float((loaded(torch.arange(20)[None]).logits - again(torch.arange(20)[None]).logits).abs().max())
two = loaded.lm_head.weight is not loaded.model.embed_tokens.weight
print(f"loaded: two matrices {two}, configuration says tied {loaded.config.tie_word_embeddings}")
print(f"made again from it, same state_dict: largest difference of a logit {difference:.1e}")
sys.exit(not (two and loaded.config.tie_word_embeddings and difference > 1e-3))
PY
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2>/dev/null
