"""Load and measure exported classifiers in a separate process, with only `transformers`.

    python classifier_client.py request.json answer.json

The script imports nothing of this project but the scripts beside it, so whatever it can load and compute, anybody can.
"""

from __future__ import annotations

import inspect
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
figures = import_module("classifier_figures").figures
transformers_client = import_module("transformers_client")
TASKS = {"sequence_classification": AutoModelForSequenceClassification,
         "token_classification": AutoModelForTokenClassification,
         "image_classification": AutoModelForImageClassification}
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


@torch.no_grad()
def measure(which: dict[str, Any], held_out: dict[str, torch.Tensor], request: dict[str, Any]) -> dict[str, Any]:
    """Accuracy, calibration, rows per second and parameters of one model; also its logits, if requested."""
    options = {"revision": which["revision"]} if which.get("revision") else {}
    model = TASKS[request["task"]].from_pretrained(
        which["path"], dtype=which.get("dtype", "auto"), use_safetensors=True,
        trust_remote_code=which.get("trust_remote_code", False), **options).to(request["device"]).eval()
    if getattr(model.config, "pad_token_id", 0) is None:  # a decoder that was published without, told by its user
        model.config.pad_token_id = which.get("pad_token_id")
    known = inspect.signature(model.forward).parameters
    if not (getattr(model.config, "type_vocab_size", None) or 0) > 1 and model.config.model_type != "xlnet":
        known = {name: None for name in known if name != "token_type_ids"}
    inputs = {name: held_out[name] for name in INPUTS if name in held_out and name in known}
    rows, step = len(held_out["targets"]), request["micro_batch"]

    def run(begin: int, end: int) -> torch.Tensor:
        given = {name: tensor[begin:end].to(model.device) for name, tensor in inputs.items()}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(model.dtype)
        return model(**given).logits.float().cpu()

    run(0, 1)  # warmup: the first call unpacks weights
    found, speeds = [], []
    for begin in range(0, rows, step):
        started = time.perf_counter()
        found.append(run(begin, min(begin + step, rows)))
        speeds.append(len(found[-1]) / (time.perf_counter() - started))
    logits = torch.cat(found)
    if which.get("logits"):
        save_file({"logits": logits[:request["logit_rows"]].contiguous()}, which["logits"])
    if which.get("layers"):
        outputs = transformers_client.layer_outputs(model, lambda: run(0, 1))
        save_file({name: output.cpu() for name, output in outputs.items()}, which["layers"])
    return {
        **figures(logits.numpy(), held_out["targets"].numpy()),
        "rows_per_second": statistics.median(speeds),
        **transformers_client.sizes(model),
    }


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_client.main(measure, sys.argv[1], sys.argv[2])
