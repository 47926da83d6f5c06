"""Load and measure adapters in a separate process, with only `transformers`, `peft` and, for 4 bits, `bitsandbytes`.

    python peft_client.py request.json answer.json

A model with an `adapter` is its base from `path`, held in the numbers of `base`, with the adapter of that folder; one
without is loaded as `transformers_client.py` does. The script imports nothing of this project.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
transformers_client = import_module("transformers_client")
BLOCK = 64  # weights that share a scale in nf4

_plain = transformers_client._load


def load(path: str, **options: Any) -> Any:
    """The base in fp32, which has the values of the numbers that it was held in, with its adapter."""
    which = _asked.get("which") or {}
    model = _plain(path, **options)
    if not which.get("adapter"):
        return model
    from peft import PeftModel

    with torch.no_grad():
        hold(model, which["base"], which["adapter"])
    return PeftModel.from_pretrained(model, which["adapter"])


def hold(model: Any, base: str, adapter: str) -> None:
    """Round the weights of a base to the numbers that it was held in while the adapter was trained."""
    if base == "float32":
        return
    from peft import PeftConfig

    # Of many names peft writes the last parts that only they have.
    adapted = tuple(PeftConfig.from_pretrained(adapter).target_modules) if base != "bfloat16" else ()
    done = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim < 2 or id(weight) in done:
            continue
        done.add(id(weight))
        weight.copy_(rounded(weight, base) if any(f".{name}".endswith(f".{one}") for one in adapted) else
                     weight.bfloat16())


def rounded(weight: torch.Tensor, base: str) -> torch.Tensor:
    """The values of a weight's 8-bit or 4-bit numbers."""
    if base == "int8":
        largest = weight.abs().amax(1, keepdim=True)
        return (weight * (127 / largest.clamp(min=1e-30))).round() * (largest / 127)
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4"))


_asked: dict[str, Any] = {}


def measure(which: dict[str, Any], held_out: dict[str, torch.Tensor], request: dict[str, Any]) -> dict[str, Any]:
    """As `transformers_client.measure`, of a model that may have an adapter."""
    _asked["which"] = which
    return transformers_client.measure(which, held_out, request)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_client._load = load
    transformers_client.main(measure, sys.argv[1], sys.argv[2])
