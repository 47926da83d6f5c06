"""Load and measure CTranslate2 folders in a separate process, with only `ctranslate2`, `torch` and `transformers`.

    python ctranslate2_client.py request.json answer.json

Request and answer are those of `transformers_client.py`; or, with `kept` among the held-out rows, of
`openvino_client.py`. The script imports nothing of this project, so whatever it can load and compute, anybody can.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ctranslate2
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.utils import logging
from transformers_client import logits_of, main, read_through  # beside this file


def measure(which: dict[str, Any], held_out: dict[str, torch.Tensor], request: dict[str, Any]) -> dict[str, Any]:
    """The measurements of `transformers_client.measure`, or those of one text at some positions."""
    model = Model(which["path"], request["threads"])
    if "kept" in held_out:
        started = time.perf_counter()
        logits = model.after(held_out["input_ids"].tolist())[0]
        seconds = time.perf_counter() - started
        save_file({"logits": logits[held_out["kept"]].contiguous()}, which["logits"])
        return {"tokens_per_second": held_out["input_ids"].numel() / seconds}
    if which.get("logits"):
        rows, length = request["logit_rows"], request["logit_length"]
        save_file({"logits": logits_of(model, held_out, slice(0, rows), length).contiguous()}, which["logits"])
    file = Path(which["path"]) / "config.json"
    return {**read_through(model, held_out, request), "parameters": json.loads(file.read_text())["parameters"],
            "parameter_bytes": file.with_name("model.bin").stat().st_size, "sample": sample(model, which, request)}


class Model:
    """A folder in CTranslate2, on the CPU in float32, that is called as a model of transformers is."""

    device = torch.device("cpu")

    def __init__(self, path: str, threads: int):
        self._generator = ctranslate2.Generator(path, device="cpu", compute_type="float32", inter_threads=1,
                                                intra_threads=threads)

    def modules(self) -> list[Any]:
        """None: there is nothing to look into."""
        return []

    def after(self, texts: list[list[int]]) -> torch.Tensor:
        """(texts, tokens, vocabulary) fp32 logits of texts, padded to the longest."""
        return torch.from_numpy(np.array(self._generator.forward_batch(texts)).astype(np.float32))

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> Any:
        """Logits of packed rows: each document, which begins at position 0, is a text of its own."""
        rows = []
        for ids, positions in zip(input_ids, position_ids, strict=True):
            begins = [0, *(1 + (positions.diff() != 1).nonzero().flatten()).tolist(), len(ids)]
            rows.append(torch.cat([self.after([ids[begin:end].tolist()])[0]
                                   for begin, end in zip(begins, begins[1:], strict=False)]))
        return SimpleNamespace(logits=torch.stack(rows))


def sample(model: Model, which: dict[str, Any], request: dict[str, Any]) -> str:
    """The greedy continuation of the prompt, computed without a KV cache."""
    tokenizer = AutoTokenizer.from_pretrained(request.get("tokenizer") or which["path"], trust_remote_code=False)
    ids = tokenizer(request["prompt"], add_special_tokens=True).input_ids
    for _ in range(request["sample_tokens"]):
        ids.append(int(model.after([ids])[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main(measure, sys.argv[1], sys.argv[2])
