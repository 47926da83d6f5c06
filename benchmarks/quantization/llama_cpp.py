"""Students in llama.cpp itself, beside torch: the same log-probabilities, and what its own rounding would give.

    pip install 'limbeck[gguf]' xllamacpp
    python -m benchmarks.quantization.llama_cpp [--json FILE]

xllamacpp is llama.cpp in wheels; llama-cpp-python, with the same in it, takes 12 to 28 minutes to build on 2 cores.

A small Llama is trained on the source of the Python library that runs this, quantized for each of GGUF's types with
scales of the least squared error, and written. llama.cpp loads the file and says how probable it finds each token after
each beginning of held-out text. torch computes the same from the same numbers, once as it is, and once with what enters
a quantized layer rounded to 8 bits, as llama.cpp does. A number there that lies between two may fall on the other one,
which all later positions see: hence the median beside the largest difference, which are of log-probabilities. gguf's
own rounding is of the same weights to the same type, in torch.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.quantization.trained_quantized import train
from benchmarks.quickstart import machine, show
from strategies.export.gguf.gguf_file import dequantized_reference, write_gguf
from strategies.export.gguf.gguf_rounding import round_inputs
from strategies.quantization.qat import prepare, quantized_layers
from strategies.quantization.quantizer import WeightQuantizer
from trainer.data.dataset import PreparedData, prepare_text
from trainer.experiment.load import read_experiment

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True}
SCHEMES: dict[str, dict[str, Any]] = {
    "Q8_0": {"bits": 8, "group_size": 32}, "Q6_K": {"bits": 6, "group_size": 256},
    "Q5_0": {"bits": 5, "group_size": 32}, "Q4_0": {"bits": 4, "group_size": 32},
    "Q4_K": {"bits": 4, "group_size": 256, "symmetric": False}, "Q3_K": {"bits": 3, "group_size": 256},
    "Q2_K": {"bits": 2, "group_size": 256, "symmetric": False}, "TQ2_0": {"kind": "ternary", "group_size": 256}}
OWN = ("Q8_0", "Q5_0", "Q4_0", "TQ2_0")  # types that gguf rounds weights to


class LlamaCpp:
    """A file in llama.cpp, on the CPU, with keys and values in float32; see `llama_cpp_client.LlamaCpp`."""

    def __init__(self, file: Path | str, context: int, threads: int = 1):
        from strategies.export.clients.llama_cpp_client import LlamaCpp as Runtime

        self._runtime = Runtime(file, context, threads)
        self.tokens, self.greedy = self._runtime.tokens, self._runtime.greedy

    def log_probabilities(self, ids: Sequence[int], vocabulary: int, letter: int) -> torch.Tensor:
        """(tokens, vocabulary) of what follows each beginning of `ids`."""
        return torch.stack([torch.from_numpy(self._runtime.after(ids[:end + 1], vocabulary, letter))
                            for end in range(len(ids))])


def rounded_inputs(model: nn.Module, size: int) -> nn.Module:
    """Have all linear layers see what llama.cpp's see, in place: 8 bits with a scale for `size` neighbors."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            round_inputs(layer, size)
    return model


def main(arguments: list[str] | None = None) -> int:
    """Train, write, run, print the table, and write what was found."""
    chosen = parser().parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    text = prepare_text(read_experiment(ROOT / "configs" / "quickstart.yaml").experiment)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE, vocab_size=len(text.tokenizer)))
    train(base, text, 0, chosen.steps, 2e-3)
    rows = []
    for name in ("F32", *chosen.types):
        rows.append(of_type(name, base, text, chosen))
        print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}"
                        for key, value in rows[-1].items()), flush=True)
    found = {"settings": {name: value for name, value in vars(chosen).items() if name != "json"}, "machine": machine(),
             "versions": {name: version(name) for name in ("torch", "gguf", "xllamacpp")}, "rows": rows}
    show(table(found), found, chosen.json)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--types", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    made.add_argument("--steps", type=int, default=300, help="of training in full precision")
    made.add_argument("--rows", type=int, default=24, help="of held-out text")
    made.add_argument("--length", type=int, default=24, help="of a row, tokens; llama.cpp wants room for one more")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--json", type=Path)
    return made


@torch.no_grad()
def of_type(name: str, base: nn.Module, text: PreparedData, chosen: argparse.Namespace) -> dict[str, Any]:
    """One file: what llama.cpp and torch make of held-out text."""
    model = copy.deepcopy(base)
    if name != "F32":
        prepare(model, WeightQuantizer(rule="mse", scale_dtype=torch.float16, **SCHEMES[name]), embeddings=True)
    ids = text.held_out["input_ids"][:chosen.rows, :chosen.length]
    plain = dequantized_reference(model, torch.float32)
    ours = plain(ids).logits.log_softmax(-1)
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "student.gguf"
        write_gguf(file, model, text.tokenizer, torch.float32)
        runtime = LlamaCpp(file, SHAPE["max_position_embeddings"], chosen.threads)
        letter = text.tokenizer.convert_tokens_to_ids("a")
        theirs = torch.stack([runtime.log_probabilities(row.tolist(), ours.shape[-1], letter) for row in ids])
        sample = text.tokenizer.decode(ids[0])
        row = {"type": name, "bytes": file.stat().st_size, "least_bytes": least_bytes(model),
               "same_tokens": runtime.tokens(sample) == text.tokenizer(sample)["input_ids"]}
    row |= {"loss_torch": loss(ours, ids), "loss_llama_cpp": loss(theirs, ids), **apart("torch", ours, theirs)}
    if name == "F32":
        return row
    rounded = rounded_inputs(plain, 32 if name in ("Q4_0", "Q5_0", "Q8_0") else 256)(ids).logits.log_softmax(-1)
    row |= apart("rounded", rounded, theirs)
    return row | ({"loss_own_rounding": loss(rounded_by_gguf(base, name)(ids).logits.log_softmax(-1), ids)}
                  if name in OWN else {})


def loss(log_probabilities: torch.Tensor, ids: torch.Tensor) -> float:
    """Nats per token: (rows, length, vocabulary) of what follows each of `ids` (rows, length)."""
    return float(-log_probabilities[:, :-1].gather(-1, ids[:, 1:, None]).mean())


def apart(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """The largest difference, the median over positions, and the share of them with the same most probable token."""
    largest = (ours - theirs).abs().amax(-1)
    return {f"{name}_largest": float(largest.max()), f"{name}_median": float(largest.median()),
            f"{name}_argmax": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())}


def least_bytes(model: nn.Module) -> int:
    """Bits x weights, scales and zero points of as many bits, and the rest in float32."""
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model)}
    within = {id(parameter) for layer in layers.values() for parameter in (
        layer.weight, getattr(layer, "first_ratio", None), getattr(layer, "log_ratio", None))}
    total = 4 * sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in within)
    for layer in layers.values():
        groups, bits = layer.grid().scale.numel(), layer.quantizer.bits
        total += layer.weight.numel() * bits // 8 + 2 * groups
        total += 0 if layer.quantizer.symmetric else groups * bits // 8
    return total


def rounded_by_gguf(base: nn.Module, name: str) -> nn.Module:
    """A copy with matrices as gguf rounds them to a type."""
    import gguf

    kind, model = gguf.GGMLQuantizationType[name], copy.deepcopy(base)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            blocks = gguf.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(gguf.dequantize(blocks, kind)))
    return model


def table(found: dict[str, Any]) -> str:
    """A line for each type, in Markdown."""
    lines = ["| type | bytes, over the least | loss, torch | llama.cpp | gguf's own rounding | difference from torch | "
             "from torch with 8-bit activations, median (largest) | same most probable token |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in found["rows"]:
        own = f"{row['loss_own_rounding']:.4f}" if "loss_own_rounding" in row else ""
        rounded = f"{row['rounded_median']:.1e} ({row['rounded_largest']:.1e})" if "rounded_median" in row else ""
        lines.append(f"| {row['type']} | {row['bytes']:,} ({row['bytes'] / row['least_bytes'] - 1:+.1%}) | "
                     f"{row['loss_torch']:.4f} | {row['loss_llama_cpp']:.4f} | {own} | {row['torch_largest']:.1e} | "
                     f"{rounded} | {row['torch_argmax']:.1%} |")
    same = all(row["same_tokens"] for row in found["rows"])
    lines.append("\nLosses are nats per token of held-out text, differences those of log-probabilities. Text is read "
                 f"as {'the same' if same else 'other'} tokens.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
