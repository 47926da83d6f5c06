"""Load and measure ONNX files in a separate process, with only ONNX Runtime, NumPy and the tokenizer.

    python onnx_client.py request.json answer.json

Request and answer are those of `transformers_client.py`. The script imports nothing of this project but
the one beside it, so whatever it can load and compute, anybody can.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors.numpy import save_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
onnx_session = import_module("onnx_session")
open_session, layer_outputs = onnx_session.open_session, onnx_session.layer_outputs
IGNORED = -100
PAST, PRESENT = "past_key_values", "present"  # how the names of a cache's inputs and outputs begin
STEPS = 32  # tokens that are compared one by one


def measure(which: dict[str, Any], held_out: dict[str, np.ndarray], request: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte, tokens per second, parameters and a sample of one folder; also its logits, if requested."""
    folder = Path(which["path"])
    session = open_session(folder, request["threads"])
    if which.get("logits"):
        part, length = slice(0, request["logit_rows"]), request["logit_length"]
        compared = {"logits": logits_of(session, held_out, part, length)}
        if has_cache(session):
            compared["cached"] = cached_logits(session, held_out, part, length)
        save_file(compared, which["logits"])
    else:
        logits_of(session, held_out, slice(0, 1), None)  # warmup: the first call allocates buffers
    if which.get("layers"):
        save_file(layer_outputs(folder, request["threads"], lambda session: inputs_of(
            session, held_out, slice(0, 1), None)), which["layers"])
    nats, speeds = 0.0, []
    for begin in range(0, len(held_out["input_ids"]), request["micro_batch"]):
        part = slice(begin, begin + request["micro_batch"])
        started = time.perf_counter()
        logits = logits_of(session, held_out, part, None)
        speeds.append(held_out["input_ids"][part].size / (time.perf_counter() - started))
        nats += cross_entropy(logits, held_out["targets"][part])
    return {
        "bits_per_byte": nats / math.log(2) / max(1, int(held_out["bytes"].sum())),
        "tokens_per_second": statistics.median(speeds),
        "parameters": onnx_session.parameters(session),
        "parameter_bytes": onnx_session.parameter_bytes(folder),
        "sample": sample(session, folder, request),
    }


def logits_of(session: onnxruntime.InferenceSession, held_out: dict[str, np.ndarray], rows: slice, length: int | None
              ) -> np.ndarray:
    """(rows, length, vocabulary) fp32 logits of packed held-out rows."""
    return session.run(["logits"], inputs_of(session, held_out, rows, length))[0]


def inputs_of(session: onnxruntime.InferenceSession, held_out: dict[str, np.ndarray], rows: slice, length: int | None
              ) -> dict[str, np.ndarray]:
    """The inputs of a graph for packed held-out rows."""
    ids, positions = (np.ascontiguousarray(held_out[name][rows, :length], dtype=np.int64)
                      for name in ("input_ids", "position_ids"))
    return inputs(session, ids, np.ones_like(ids), positions, empty_cache(session, len(ids)))


def inputs(session: onnxruntime.InferenceSession, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray,
           cache: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs of a graph with or without a cache."""
    found = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
    return {value.name: found[value.name] for value in session.get_inputs()}


def has_cache(session: onnxruntime.InferenceSession) -> bool:
    """Whether a graph takes keys and values of earlier tokens."""
    return any(value.name.startswith(PAST) for value in session.get_inputs())


def empty_cache(session: onnxruntime.InferenceSession, rows: int) -> dict[str, np.ndarray]:
    """No earlier tokens: arrays (rows, heads, 0, width)."""
    return {value.name: np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float32)
            for value in session.get_inputs() if value.name.startswith(PAST)}


def step(session: onnxruntime.InferenceSession, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray,
         cache: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of new tokens, and the cache with them."""
    outputs = ["logits", *(name.replace(PAST, PRESENT) for name in cache)]
    logits, *presents = session.run(outputs, inputs(session, ids, mask, positions, cache))
    return logits, dict(zip(cache, presents, strict=True))


def cached_logits(session: onnxruntime.InferenceSession, held_out: dict[str, np.ndarray], rows: slice, length: int
                  ) -> np.ndarray:
    """The logits of `logits_of`, from a cache: half of the tokens at once, then one by one, and the rest at once.

    A cache does not tell documents apart, so that the mask hides those before the one that goes on.
    """
    ids, positions = (held_out[name][rows, :length].astype(np.int64) for name in ("input_ids", "position_ids"))
    begins = np.concatenate([positions[:, :1] == 0, np.diff(positions) != 1], 1)
    documents, count = begins.cumsum(1), ids.shape[1]
    half = (count + 1) // 2
    ends = [half, *range(half + 1, min(half + STEPS, count) + 1)]
    cache, found, begin = empty_cache(session, len(ids)), [], 0
    for end in ends if ends[-1] == count else [*ends, count]:
        mask = np.ones((len(ids), end), np.int64)
        mask[:, :begin] = documents[:, :begin] == documents[:, begin, None]
        logits, cache = step(session, ids[:, begin:end], mask, positions[:, begin:end], cache)
        found.append(logits)
        begin = end
    return np.concatenate(found, 1)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Summed nats of all targets (rows, length) in the loss; `logits` (rows, length, vocabulary) are overwritten."""
    counts = targets != IGNORED
    wanted = np.take_along_axis(logits, np.where(counts, targets, 0)[..., None], -1)[..., 0].astype(np.float64)
    largest = logits.max(-1)
    logits -= largest[..., None]
    sums = np.exp(logits, out=logits).sum(-1, dtype=np.float64)
    return float(((np.log(sums) + largest - wanted) * counts).sum())


def sample(session: onnxruntime.InferenceSession, folder: Path, request: dict[str, Any]) -> str:
    """The greedy continuation of the prompt, from a cache if the graph has one."""
    tokenizer = AutoTokenizer.from_pretrained(request.get("tokenizer") or folder, trust_remote_code=False)
    settings = json.loads((folder / "config.json").read_text())
    generation = folder / "generation_config.json"
    ends = (json.loads(generation.read_text()) if generation.exists() else settings).get("eos_token_id")
    ends = set(ends) if isinstance(ends, list) else {ends}
    ids = tokenizer(request["prompt"], add_special_tokens=True).input_ids
    room = settings.get("max_position_embeddings") or len(ids) + request["sample_tokens"]
    for token in greedy(session, ids, max(1, min(request["sample_tokens"], room - len(ids)))):
        ids.append(token)
        if token in ends:
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


def greedy(session: onnxruntime.InferenceSession, prompt: list[int], count: int, cached: bool = True) -> Iterator[int]:
    """Yield the `count` most probable next tokens; without a cache, all before a token are computed again for it."""
    row, cache, begin = np.array([prompt], dtype=np.int64), empty_cache(session, 1), 0
    for _ in range(count):
        places = np.arange(begin, row.shape[1], dtype=np.int64)[None]
        logits, after = step(session, row[:, begin:], np.ones_like(row), places, cache)
        if cached and after:
            cache, begin = after, row.shape[1]
        row = np.append(row, [[logits[0, -1].argmax()]], 1)
        yield int(row[0, -1])


if __name__ == "__main__":
    onnx_session.main(measure, sys.argv[1], sys.argv[2])
