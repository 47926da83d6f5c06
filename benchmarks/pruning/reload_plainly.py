"""Loads folders with transformers alone, and writes the logits of each beside it: run in a process of its own.

    python benchmarks/pruning/reload_plainly.py FOLDER...

Each folder also holds `rows.safetensors`, the inputs; `logits.safetensors` is written, or `error.txt`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

AUTO = {"ForCausalLM": transformers.AutoModelForCausalLM, "LMHeadModel": transformers.AutoModelForCausalLM,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
        "ForImageClassification": transformers.AutoModelForImageClassification}


def main(folders: list[str]) -> None:
    """Load each folder and run it."""
    transformers.utils.logging.set_verbosity_error()
    for folder in map(Path, folders):
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        auto = next(kind for ending, kind in AUTO.items() if name.endswith(ending))
        try:
            model = auto.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                logits = model(**load_file(folder / "rows.safetensors")).logits
            save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
        except Exception as error:
            (folder / "error.txt").write_text(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
