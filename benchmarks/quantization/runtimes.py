"""Every scheme in every runtime: the training forward beside the reloaded file, and bytes on disk beside the least.

    python -m benchmarks.quantization.runtimes [--json FILE]

A Llama of random weights is prepared for each scheme, written by each writer, and loaded in a fresh process by its
runtime: transformers (compressed-tensors), ONNX Runtime, and gguf's own reader (llama.cpp itself rounds what enters a
layer: see `benchmarks.quantization.llama_cpp`). Differences are of logits on held-out rows, from the fake-quantized
forward in fp32. The least bytes are bits x weights, scales and zero points as the format stores them, and the rest in
its dtype.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.quickstart import machine, show
from strategies.export.quantized_layers import quantized_layers
from strategies.export.receipt import ask_client
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer
from trainer.data.dataset import PreparedData, prepare_text
from trainer.experiment.load import read_experiment
from trainer.student.compare_student import logits_of
from trainer.student.export_student import RUNTIMES

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True}
SCHEMES: dict[str, dict[str, Any]] = {
    **{f"{bits} bits, 32 a scale": {"quantizer": WeightQuantizer(bits, 32)} for bits in (8, 4, 3, 2)},
    "4 bits, a channel a scale": {"quantizer": WeightQuantizer(4)},
    "4 bits, zero points, 32 a scale": {"quantizer": WeightQuantizer(4, 32, symmetric=False)},
    "4 bits, learned scales": {"quantizer": WeightQuantizer(4, 32, rule="learned")},
    "4 bits, embeddings too": {"quantizer": WeightQuantizer(4, 32), "embeddings": True},
    "ternary, 256 a scale": {"quantizer": WeightQuantizer(kind="ternary", group_size=256)},
    "binary, 32 a scale": {"quantizer": WeightQuantizer(kind="binary", group_size=32)},
    "fp8, a channel a scale": {"quantizer": WeightQuantizer(kind="fp8")},
    "8 bits, 8-bit activations": {"quantizer": WeightQuantizer(8), "activations": ActivationQuantizer()},
}
WHERE = {"transformers": (torch.float32, "transformers_client.py"), "onnx": (torch.float32, "onnx_client.py"),
         "gguf": (torch.float16, "gguf_client.py")}


def main(arguments: list[str] | None = None) -> int:
    """Write and read everything, print the table, and write what was found."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--runtimes", nargs="+", choices=list(WHERE), default=list(WHERE))
    made.add_argument("--json", type=Path)
    chosen = made.parse_args(arguments)
    text = prepare_text(read_experiment(ROOT / "configs" / "quickstart.yaml").experiment)
    rows = [row for scheme in SCHEMES for runtime in chosen.runtimes for row in [of_scheme(scheme, runtime, text)]]
    found = {"machine": machine(), "rows": rows, "versions": {
        name: version(name) for name in ("transformers", "compressed-tensors", "onnxruntime", "gguf")
        if find_spec(name.replace("-", "_"))}}
    show(table(found), found, chosen.json)
    return 0


def of_scheme(scheme: str, runtime: str, text: PreparedData) -> dict:
    """Write one model, have a fresh process read it, and compare."""
    dtype, client = WHERE[runtime]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE, vocab_size=len(text.tokenizer)))
    how = SCHEMES[scheme]
    prepare(model, **{**how, "quantizer": replace(how["quantizer"], scale_dtype=dtype)})
    row: dict[str, Any] = {"scheme": scheme, "runtime": runtime}
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / ("student.gguf" if runtime == "gguf" else "student")
        write = writer(runtime)
        try:
            write(path, model, text.tokenizer, torch.float32)
        except ValueError as error:
            return row | {"refused": str(error)}
        ours = logits_of(model, text)
        found, logits = ask_client({"student": {"path": str(path), "compare": True}}, text.held_out, client=client,
                                   device="cpu", threads=torch.get_num_threads(), micro_batch=8, logit_rows=len(ours),
                                   logit_length=ours.shape[1], prompt="import", sample_tokens=4, tokenizer=None)
        theirs = logits["student"]
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in (
            ".safetensors", ".onnx", ".data")]
        size = sum(file.stat().st_size for file in files)
    print(f"{scheme}, {runtime}: {float((ours - theirs).abs().max()):.1e}", flush=True)
    return row | {"difference": float((ours - theirs).abs().max()), "largest_logit": float(ours.abs().max()),
                  "argmax_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
                  "bytes": size, "least": least_bytes(model), "runtime_used": found["student"].get("runtime", runtime)}


def writer(runtime: str) -> Any:
    """What writes for a runtime."""
    if runtime == "transformers":
        return import_module("strategies.export.hf.transformers_folder").write_folder
    return getattr(import_module(f"strategies.export.{RUNTIMES[runtime].module}"), f"write_{runtime}")


def least_bytes(model: nn.Module) -> int:
    """Bits x weights, scales and zero points of a number's bits, and the rest in fp32."""
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model)}
    kept = {id(parameter) for layer in layers.values() for name, parameter in layer.named_parameters()
            if name != "bias"}
    total = 4 * sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in kept)
    for layer in layers.values():
        grid, bits = layer.grid(), layer.quantizer.bits
        total += layer.weight.numel() * bits // 8 + grid.scale.numel() * grid.scale.element_size()
        total += 0 if grid.zero_point is None else grid.zero_point.numel() * bits // 8
    return total


def table(found: dict) -> str:
    """A line for each scheme, a column for each runtime: largest difference, and bytes over the least."""
    rows = found["rows"]
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    lines = [f"| scheme | {' | '.join(runtimes)} |", "|---|" + "---|" * len(runtimes)]
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        own = {row["runtime"]: row for row in rows if row["scheme"] == scheme}
        lines.append(f"| {scheme} | " + " | ".join(_cell(own[name]) for name in runtimes) + " |")
    lines.append("\nLargest difference of a logit, positions where both predict the same token, and bytes on disk over "
                 "the arithmetic least; the largest logit is "
                 f"{max(row.get('largest_logit', 0) for row in rows):.1f}.")
    return "\n".join(lines)


def _cell(row: dict) -> str:
    if "refused" in row:
        return "refused"
    return f"{row['difference']:.1e}, {row['argmax_agreement']:.1%}, {row['bytes'] / row['least'] - 1:+.1%}"


if __name__ == "__main__":
    raise SystemExit(main())
