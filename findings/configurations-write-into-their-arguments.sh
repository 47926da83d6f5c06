#!/usr/bin/env bash
# transformers 5.24.0: a dictionary handed to a configuration as `rope_scaling` is changed in place: the base is written
# into it. Of two models made from one dictionary the second takes the base of the first, whatever `rope_theta` it is
# given. Limbeck copies. Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/show.py" <<'PY'
import sys

from transformers import LlamaConfig, logging

logging.set_verbosity_error()
shared = {"rope_type": "linear", "factor": 2.0}
bases = [LlamaConfig(rope_scaling=shared, rope_theta=base).rope_parameters["rope_theta"] for base in (1e4, 5e5)]
print("given 10000 and 500000, used", *(f"{base:g}" for base in bases))
print("the dictionary afterwards:", shared)
sys.exit(not ("rope_theta" in shared and bases == [1e4, 1e4]))
PY
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2>/dev/null
