"""Load and measure ONNX folders in OpenVINO, in a separate process, with only `openvino` and NumPy.

    python openvino_client.py request.json answer.json

The script imports nothing of this project, so whatever it can load and compute, anybody can.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from safetensors.numpy import load_file, save_file

# By default OpenVINO may multiply in bfloat16, and rounds what enters a packed layer to 8 bits.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}


def main(request_file: str, answer_file: str) -> None:
    """Read the one row of the request with every model, one after the other."""
    request = json.loads(Path(request_file).read_text())
    held_out = load_file(request["held_out"])
    answer = {name: measure(model, held_out, request) for name, model in request["models"].items()}
    Path(answer_file).write_text(json.dumps(answer))


def measure(which: dict[str, Any], held_out: dict[str, np.ndarray], request: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second; writes (positions, vocabulary) logits at the requested positions."""
    graph = openvino.Core().compile_model(str(Path(which["path"]) / "model.onnx"), "CPU",
                                          {**EXACT, "INFERENCE_NUM_THREADS": request["threads"]})
    ids = np.ascontiguousarray(held_out["input_ids"], dtype=np.int64)
    started = time.perf_counter()
    logits = graph(inputs_of(graph, ids))[graph.output("logits")]
    seconds = time.perf_counter() - started
    save_file({"logits": np.ascontiguousarray(logits[0, held_out["kept"]])}, which["logits"])
    return {"tokens_per_second": ids.size / seconds}


def inputs_of(graph: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of a graph, with or without a cache of keys and values, for one text from its beginning."""
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    found = {}
    for value in graph.inputs:
        shape = [1 if size.is_dynamic else size.get_length() for size in value.get_partial_shape()]
        name = value.get_any_name()
        found[name] = known[name] if name in known else np.zeros((1, shape[1], 0, shape[3]), np.float32)
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
