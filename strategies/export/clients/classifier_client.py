"""Load and measure exported classifiers in a separate process, with only `transformers`.

    python classifier_client.py request.json answer.json

The script imports nothing of this project, so whatever it can load and compute, anybody can.
"""

from __future__ import annotations

import inspect
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils import logging

IGNORED, BINS = -100, 15
TASKS = {"sequence_classification": AutoModelForSequenceClassification,
         "token_classification": AutoModelForTokenClassification,
         "image_classification": AutoModelForImageClassification}
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


def main(request_file: str, answer_file: str) -> None:
    """Measure every model of the request on the same held-out rows, one after the other."""
    with open(request_file) as handle:
        request = json.load(handle)
    torch.set_num_threads(request["threads"])
    held_out = load_file(request["held_out"])
    answer = {name: measure(model, held_out, request) for name, model in request["models"].items()}
    with open(answer_file, "w") as handle:
        json.dump(answer, handle)


@torch.no_grad()
def measure(which: dict[str, Any], held_out: dict[str, torch.Tensor], request: dict[str, Any]) -> dict[str, Any]:
    """Accuracy, calibration, rows per second and parameters of one model; also its logits, if requested."""
    options = {"revision": which["revision"]} if which.get("revision") else {}
    model = TASKS[request["task"]].from_pretrained(
        which["path"], dtype=which.get("dtype", "auto"), use_safetensors=True,
        trust_remote_code=which.get("trust_remote_code", False), **options).to(request["device"]).eval()
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
        save_file({name: output.cpu() for name, output in layer_outputs(model, lambda: run(0, 1)).items()},
                  which["layers"])
    return {
        **figures(logits.numpy(), held_out["targets"].numpy()),
        "rows_per_second": statistics.median(speeds),
        # Scales and shapes of quantized weights are parameters too, but do not count as weights of the model.
        "parameters": sum(parameter.numel() for name, parameter in model.named_parameters()
                          if not name.endswith(("_scale", "_shape", "_zero_point"))),
        "parameter_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
    }


def layer_outputs(model: torch.nn.Module, run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """The output of each leaf module at its first call, in fp32, in the order of calls."""
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            def keep(_: Any, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, torch.Tensor) and name not in found:
                    found[name] = output.detach().float().contiguous()

            hooks.append(module.register_forward_hook(keep))
    run()
    for hook in hooks:
        hook.remove()
    return found


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
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main(sys.argv[1], sys.argv[2])
