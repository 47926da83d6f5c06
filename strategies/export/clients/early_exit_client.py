"""Load and measure a model with early exits in a separate process, by the code in its own folder.

    python early_exit_client.py request.json answer.json

The script imports nothing of this project but the scripts beside it, so whatever it can load and compute, anybody can.
"""

from __future__ import annotations

import importlib.util
import inspect
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
classifier_figures = import_module("classifier_figures").figures
transformers_client = import_module("transformers_client")
NOTHING_LEAVES = 2.0  # a threshold above all probabilities


@torch.no_grad()
def measure(which: dict[str, Any], held_out: dict[str, torch.Tensor], request: dict[str, Any]) -> dict[str, Any]:
    """Figures and parameters of a model, its logits where nothing leaves, and where inputs leave at the threshold."""
    model = code_of(Path(which["path"])).load(which["path"], device=request["device"])
    found = language if model.settings["task"] == "causal_lm" else classifier
    logits, answer = found(model, held_out, request)
    save_file({"logits": logits.float().cpu().contiguous()}, which["logits"])
    return {**answer, **transformers_client.sizes(model.model)}


def code_of(folder: Path) -> Any:
    """The module early_exit.py of a folder."""
    spec = importlib.util.spec_from_file_location("early_exit", folder / "early_exit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["early_exit"] = module
    spec.loader.exec_module(module)
    return module


def classifier(model: Any, held_out: dict[str, torch.Tensor], request: dict[str, Any]
               ) -> tuple[torch.Tensor, dict[str, Any]]:
    """Figures at the threshold, rows that leave dropped from their batches."""
    known, rows, step = inspect.signature(model.model.forward), len(held_out["targets"]), request["micro_batch"]
    names = [name for name in request["inputs"] if name in known.parameters]

    def run(begin: int, threshold: float | None) -> Any:
        part = {name: held_out[name][begin:begin + step].to(model.model.device) for name in names}
        if "pixel_values" in part:
            part["pixel_values"] = part["pixel_values"].to(model.model.dtype)
        return model.classify(threshold, **part)

    whole = torch.cat([run(begin, NOTHING_LEAVES).logits for begin in range(0, request["logit_rows"], step)])
    answers, speeds = [], []
    for begin in range(0, rows, step):
        started = time.perf_counter()
        answers.append(run(begin, None))
        speeds.append(len(answers[-1].logits) / (time.perf_counter() - started))
    said = torch.cat([one.logits.float().cpu() for one in answers])
    return whole[:request["logit_rows"]], {
        **classifier_figures(said.numpy(), held_out["targets"].numpy()), "rows_per_second": statistics.median(speeds),
        "blocks": torch.cat([one.blocks for one in answers]).tolist()}


def language(model: Any, held_out: dict[str, torch.Tensor], request: dict[str, Any]
             ) -> tuple[torch.Tensor, dict[str, Any]]:
    """Bits per byte where nothing leaves; and what a few rows need, token by token with a cache, at the threshold."""
    followed, prompt = held_out["input_ids"][:request["logit_rows"], :request["logit_length"]], request["prompt_tokens"]
    logits, blocks, nats = [], [], []
    for row in followed.to(model.model.device):
        logits.append(model.generate(row[None, :1], threshold=NOTHING_LEAVES, follow=row[1:]).logits)
        written = model.generate(row[None, :prompt], follow=row[prompt:-1])
        blocks.append(written.blocks)
        nats.append(torch.nn.functional.cross_entropy(written.logits.float(), row[prompt:], reduction="none").tolist())
    return torch.stack(logits), {**transformers_client.read_through(model.model, held_out, request), "blocks": blocks,
                                 "nats": nats}


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_client.main(measure, sys.argv[1], sys.argv[2])
