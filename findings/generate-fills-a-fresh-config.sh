#!/usr/bin/env bash
# transformers 5.24.0: `generate(generation_config=GenerationConfig(...))` is not as given: what the fresh configuration
# leaves at None is filled in from the model's own generation_config.json, a repetition penalty for example. Greedy answers
# then differ from the largest logits. Seen with torch 2.13.0; Limbeck replaces the model's own for the call. Exit code 1
# if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/show.py" <<'PY'
import sys

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, logging

logging.set_verbosity_error()
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2))
model.eval().generation_config.repetition_penalty = 5.0
prompt = torch.tensor([[5, 6, 7]])
asked = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0)


@torch.no_grad()
def largest_logits():
    ids = prompt
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


right = largest_logits()
given = model.generate(prompt, generation_config=asked)
model.generation_config = asked
replaced = model.generate(prompt, generation_config=asked)
print("fresh configuration given to generate: equal to the largest logits:", torch.equal(given, right))
print("the model's own replaced:              equal to the largest logits:", torch.equal(replaced, right))
sys.exit(torch.equal(given, right) or not torch.equal(replaced, right))
PY
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2>/dev/null
