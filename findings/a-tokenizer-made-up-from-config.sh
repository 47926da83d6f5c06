#!/usr/bin/env bash
# transformers 5.24.0: `AutoTokenizer.from_pretrained` of a folder that holds a config.json and no tokenizer at all does not
# fail for several types (qwen2, bert, mamba, ...): it makes an all but empty tokenizer of the class of that type, which
# reads every text as unknown or nothing. Limbeck looks for the files. Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/show.py" <<'PY'
import sys
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, logging

logging.set_verbosity_error()
sizes = {}
for kind in ("qwen2", "bert", "mamba"):
    folder = Path(sys.argv[1]) / kind
    AutoConfig.for_model(kind).save_pretrained(folder)
    try:
        sizes[kind] = len(AutoTokenizer.from_pretrained(folder))
    except Exception:
        sizes[kind] = None
    print(f"{kind}: files {[file.name for file in folder.iterdir()]}, tokenizer of {sizes[kind]} tokens")
sys.exit(not all(size is not None and size < 10 for size in sizes.values()))
PY
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2>/dev/null
