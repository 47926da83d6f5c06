#!/usr/bin/env bash
# tokenizers 0.23.3: an added token whose `id` in tokenizer.json leaves a gap behind the vocabulary is given the next
# free number on load, without an error or a word. A model whose row 10 belongs to that token is then fed row 3.
# Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
cat > "$folder/gap.py" <<'PY'
import json
import sys

from tokenizers import Tokenizer

token = {"id": 10, "content": "<late>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
written = json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [token], "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"}})
loaded = Tokenizer.from_str(written).token_to_id("<late>")
print(f"written with id {token['id']}, loaded as id {loaded}")
sys.exit(loaded != 3)
PY
"$folder/venv/bin/python" "$folder/gap.py"
