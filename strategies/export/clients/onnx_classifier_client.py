"""Load and measure classifiers as ONNX files in a separate process, with only ONNX Runtime and NumPy.

    python onnx_classifier_client.py request.json answer.json

Request and answer are those of `classifier_client.py`. The script imports nothing of this project, so whatever it can
load and compute, anybody can.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors.numpy import load_file, save_file

IGNORED, BINS = -100, 15
OUTPUT = "/output"  # suffix of a quantized layer's name, for its output in the graph


def main(request_file: str, answer_file: str) -> None:
    """Measure every model of the request on the same held-out rows, one after the other."""
    request = json.loads(Path(request_file).read_text())
    held_out = load_file(request["held_out"])
    answer = {name: measure(model, held_out, request) for name, model in request["models"].items()}
    Path(answer_file).write_text(json.dumps(answer))


def measure(which: dict[str, Any], held_out: dict[str, np.ndarray], request: dict[str, Any]) -> dict[str, Any]:
    """Accuracy, calibration, rows per second and parameters of one graph; also its logits, if requested."""
    folder = Path(which["path"])
    session = open_session(folder, request["threads"])
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
        save_file(layer_outputs(folder, {name: held_out[name][:1] for name in names}, request["threads"]),
                  which["layers"])
    meta = session.get_modelmeta().custom_metadata_map
    return {**figures(logits, held_out["targets"]), "rows_per_second": statistics.median(speeds),
            "parameters": int(meta["parameters"]),
            "parameter_bytes": sum(one.stat().st_size for one in folder.iterdir() if one.suffix in (
                ".onnx", ".data"))}


def open_session(folder: Path, threads: int, file: str = "model.onnx") -> onnxruntime.InferenceSession:
    """Open a folder's graph on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])


def layer_outputs(folder: Path, inputs: dict[str, np.ndarray], threads: int) -> dict[str, np.ndarray]:
    """The output of each quantized layer on a row, by its name in the model."""
    import onnx

    shown, graph = folder / ".layers.onnx", onnx.load(folder / "model.onnx", load_external_data=False)
    names = [name for node in graph.graph.node for name in node.output if name.endswith(OUTPUT)]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    try:
        onnx.save(graph, shown)  # next to the weight file that it refers to
        outputs = open_session(folder, threads, shown.name).run(names, inputs) if names else []
    finally:
        shown.unlink(missing_ok=True)
    return {name.removeprefix("model.").removesuffix(OUTPUT): np.ascontiguousarray(output)
            for name, output in zip(names, outputs, strict=True)}


def figures(logits: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Cross-entropy in nats, accuracy, macro F1, expected calibration error, and the confusion: true class by answer.

    Args:
        logits: (..., classes).
        targets: (...) class numbers, or `IGNORED`.
    """
    classes = logits.shape[-1]
    kept = targets.reshape(-1) != IGNORED
    scores, truth = logits.reshape(-1, classes)[kept].astype(np.float64), targets.reshape(-1)[kept]
    scores -= scores.max(-1, keepdims=True)
    shares = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    answer, rows = scores.argmax(-1), len(truth)
    confidence, hit = np.exp(shares.max(-1)), answer == truth
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (truth, answer), 1)
    each = [2 * confusion[one, one] / total for one in range(classes)
            if (total := confusion[one].sum() + confusion[:, one].sum())]
    place = np.clip(np.ceil(confidence * BINS).astype(int), 1, BINS) - 1
    gap = sum(abs(confidence[place == one].sum() - hit[place == one].sum()) for one in range(BINS))
    found = {"cross_entropy": float(-shares[np.arange(rows), truth].mean()), "accuracy": float(hit.mean()),
             "macro_f1": float(np.mean(each)), "calibration_error": float(gap / rows)} if rows else dict.fromkeys(
                 ("cross_entropy", "accuracy", "macro_f1", "calibration_error"), math.nan)
    return {**found, "rows": rows, "confusion": confusion.tolist()}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
