"""Load and measure classifiers as ONNX files in a separate process, with only ONNX Runtime and NumPy.

    python onnx_classifier_client.py request.json answer.json

Request and answer are those of `classifier_client.py`. The script imports nothing of this project but the scripts
beside it, so whatever it can load and compute, anybody can.
"""

from __future__ import annotations

import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
figures, onnx_session = import_module("classifier_figures").figures, import_module("onnx_session")


def measure(which: dict[str, Any], held_out: dict[str, np.ndarray], request: dict[str, Any]) -> dict[str, Any]:
    """Accuracy, calibration, rows per second and parameters of one graph; also its logits, if requested."""
    folder = Path(which["path"])
    session = onnx_session.open_session(folder, request["threads"])
    names = [one.name for one in session.get_inputs()]
    rows, step = len(held_out["targets"]), request["micro_batch"]

    def run(begin: int, end: int) -> np.ndarray:
        return session.run(["logits"], {name: held_out[name][begin:end] for name in names})[0]

    run(0, 1)  # warmup: the first call allocates buffers
    found, speeds = [], []
    for begin in range(0, rows, step):
        started = time.perf_counter()
        found.append(run(begin, min(begin + step, rows)))
        speeds.append(len(found[-1]) / (time.perf_counter() - started))
    logits = np.concatenate(found)
    if which.get("logits"):
        save_file({"logits": np.ascontiguousarray(logits[:request["logit_rows"]])}, which["logits"])
    if which.get("layers"):
        save_file(onnx_session.layer_outputs(folder, request["threads"], lambda _: {
            name: held_out[name][:1] for name in names}), which["layers"])
    return {**figures(logits, held_out["targets"]), "rows_per_second": statistics.median(speeds),
            "parameters": onnx_session.parameters(session), "parameter_bytes": onnx_session.parameter_bytes(folder)}


if __name__ == "__main__":
    onnx_session.main(measure, sys.argv[1], sys.argv[2])
