#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: `from_pretrained` forgets which parameters an architecture does not train. The
# sinusoidal positions of Pegasus, Marian and RoFormer are made with requires_grad=False and come back from a folder with
# requires_grad=True, so that fine-tuning a loaded model moves them, and training one from its configuration does not.
# Limbeck freezes again what a fresh model of the same configuration has frozen. Prints what was seen; exit code 1 if it
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$folder/thaws.py" <<'PY'
import sys
import tempfile

from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 1}
SEQ2SEQ = {**SMALL, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32,
           "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
KINDS = {"pegasus": SEQ2SEQ, "marian": {**SEQ2SEQ, "decoder_start_token_id": 0},
         "roformer": {**SMALL, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "intermediate_size": 32, "is_decoder": True}}


def fixed(model):
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


changed = False
for kind, sizes in KINDS.items():
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    print(f"found: {kind}: not trained when made: {fixed(made)}; when loaded: {fixed(loaded)}")
    changed |= not fixed(made) or bool(fixed(loaded))
sys.exit(changed)
PY
"$folder/venv/bin/python" "$folder/thaws.py" 2>"$folder/log" | grep '^found' || { tail -5 "$folder/log"; exit 1; }
