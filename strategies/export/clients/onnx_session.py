"""Opens ONNX files in ONNX Runtime and answers requests about them: for the scripts that measure models there.

Nothing here needs more than ONNX Runtime, NumPy and safetensors; looking inside of a graph needs onnx, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

OUTPUT = "/output"  # suffix of a quantized layer's name, for its output in the graph
Measured = Callable[[dict[str, Any], dict[str, np.ndarray], dict[str, Any]], dict[str, Any]]


def main(measured: Measured, request_file: str, answer_file: str) -> None:
    """Measure every model of the request on the same held-out rows, one after the other."""
    request = json.loads(Path(request_file).read_text())
    held_out = load_file(request["held_out"])
    answer = {name: measured(model, held_out, request) for name, model in request["models"].items()}
    Path(answer_file).write_text(json.dumps(answer))


def open_session(folder: Path, threads: int, file: str = "model.onnx") -> onnxruntime.InferenceSession:
    """Open a folder's graph on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])


def layer_outputs(folder: Path, threads: int, inputs: Callable[[onnxruntime.InferenceSession], dict[str, np.ndarray]]
                  ) -> dict[str, np.ndarray]:
    """The output of each quantized layer on a row, by its name in the model.

    Args:
        inputs: makes the row's inputs for a session.
    """
    import onnx

    shown, graph = folder / ".layers.onnx", onnx.load(folder / "model.onnx", load_external_data=False)
    names = [name for node in graph.graph.node for name in node.output if name.endswith(OUTPUT)]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    try:
        onnx.save(graph, shown)  # next to the weight file that it refers to
        session = open_session(folder, threads, shown.name)
        outputs = session.run(names, inputs(session)) if names else []
    finally:
        shown.unlink(missing_ok=True)
    return {name.removeprefix("model.").removesuffix(OUTPUT): np.ascontiguousarray(output)
            for name, output in zip(names, outputs, strict=True)}


def parameter_bytes(folder: Path) -> int:
    """Bytes of a folder's graph and weights."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".onnx", ".data"))


def parameters(session: onnxruntime.InferenceSession) -> int:
    """Number of weights, as the exporter wrote it into the graph."""
    return int(session.get_modelmeta().custom_metadata_map["parameters"])
