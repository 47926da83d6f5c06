"""Load and measure GGUF files in llama.cpp itself, in a separate process, with only `xllamacpp` and NumPy.

    python llama_cpp_client.py request.json answer.json

xllamacpp is llama.cpp in wheels. It tells log-probabilities instead of logits: those of every token of the vocabulary
after a beginning of the text. The script imports nothing of this project, so whatever it can load and compute, anybody
can.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from safetensors.numpy import load_file, save_file

SAY = 1000.0  # bias of the token to say; that of sampling, which the log-probabilities do not contain


def main(request_file: str, answer_file: str) -> None:
    """Read the one row of the request with every model, one after the other."""
    request = json.loads(Path(request_file).read_text())
    held_out = load_file(request["held_out"])
    answer = {name: measure(model, held_out, request) for name, model in request["models"].items()}
    Path(answer_file).write_text(json.dumps(answer))


def measure(which: dict[str, Any], held_out: dict[str, np.ndarray], request: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second; writes (positions, vocabulary) log-probabilities at the requested positions."""
    ids, kept = held_out["input_ids"][0].tolist(), held_out["kept"].tolist()
    runtime = LlamaCpp(which["path"], len(ids) + 1, request["threads"])
    started = time.perf_counter()
    scores = np.stack([runtime.after(ids[:end + 1], request["vocabulary"], request["letter"]) for end in kept])
    seconds = time.perf_counter() - started
    save_file({"logits": scores}, which["logits"])
    return {"tokens_per_second": len(ids) / seconds}


class LlamaCpp:
    """A file in llama.cpp, on the CPU, with keys and values in float32.

    Args:
        file: GGUF.
        context: tokens there is room for, at most the model's own; one of them is for a token that llama.cpp says.
        threads: of the CPU.
    """

    def __init__(self, file: Path | str, context: int, threads: int = 1):
        how = xllamacpp.CommonParams()
        how.model.path, how.n_ctx, how.n_parallel, how.warmup, how.verbosity = str(file), context, 1, False, -1
        how.n_gpu_layers, how.cpuparams.n_threads = 0, threads
        how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(how)

    def after(self, ids: Sequence[int], vocabulary: int, letter: int) -> np.ndarray:
        """(vocabulary,) log-probabilities of what follows a text. A text that begins as the one before is read on.

        Args:
            ids: the text.
            vocabulary: tokens.
            letter: a token of whole letters, which llama.cpp is made to say: of half a letter it tells nothing.
        """
        said = self._server.handle_completions({"prompt": list(ids), "max_tokens": 1, "temperature": 0,
                                                "logprobs": vocabulary, "logit_bias": [[letter, SAY]]})
        if "choices" not in said:
            raise RuntimeError(f"llama.cpp: {said}")
        found = np.full(vocabulary, np.nan, np.float32)
        for token in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most probable next tokens, one after the other."""
        said = self._server.handle_completions({"prompt": list(prompt), "max_tokens": count, "temperature": 0,
                                                "logprobs": 1, "ignore_eos": True})
        if "choices" not in said:
            raise RuntimeError(f"llama.cpp: {said}")
        return [token["id"] for token in said["choices"][0]["logprobs"]["content"]]

    def tokens(self, text: str) -> list[int]:
        """Text as llama.cpp reads it, with special tokens."""
        asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(f"{self._server.listening_address}/tokenize", asked,
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
