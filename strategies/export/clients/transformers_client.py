"""Load and measure exported folders in a separate process, with only `transformers`.

    python transformers_client.py request.json answer.json

The script imports nothing of this project, so whatever it can load and compute, anybody can.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

IGNORED = -100


Measured = Callable[[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]], dict[str, Any]]


def main(measured: Measured, request_file: str, answer_file: str) -> None:
    """Measure every model of the request on the same held-out rows, one after the other."""
    with open(request_file) as handle:
        request = json.load(handle)
    torch.set_num_threads(request["threads"])
    held_out = load_file(request["held_out"])
    answer = {name: measured(model, held_out, request) for name, model in request["models"].items()}
    with open(answer_file, "w") as handle:
        json.dump(answer, handle)
    gc.freeze()  # the interpreter would look for garbage in all that was imported, for a second


@torch.no_grad()
def measure(which: dict[str, Any], held_out: dict[str, torch.Tensor], request: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte, tokens per second, parameters and a sample of one model; also its logits, if requested."""
    options = {"revision": which["revision"]} if which.get("revision") else {}
    model = _load(which["path"], dtype=which.get("dtype", "auto"), use_safetensors=True,
                  trust_remote_code=which.get("trust_remote_code", False), **options).to(request["device"]).eval()
    if which.get("logits"):
        rows, length = request["logit_rows"], request["logit_length"]
        save_file({"logits": logits_of(model, held_out, slice(0, rows), length).float().cpu().contiguous()},
                  which["logits"])
    else:
        logits_of(model, held_out, slice(0, 1), None)  # warmup: the first call unpacks weights
    if which.get("layers"):
        save_file({name: output.cpu() for name, output in layer_outputs(
            model, lambda: logits_of(model, held_out, slice(0, 1), None)).items()}, which["layers"])
    return {
        **read_through(model, held_out, request),
        **sizes(model),
        **({"samples": samples(model, which["path"], options, request)} if "prompts" in request else
           {"sample": sample(model, which["path"], options, request)}),
    }


def _load(path: str, **options: Any) -> Any:
    """Load a causal model, or a multimodal one, whose language model may serve as a teacher."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        return AutoModelForMultimodalLM.from_pretrained(path, **options)


def sizes(model: torch.nn.Module) -> dict[str, int]:
    """The number of a model's weights, and the bytes that its parameters take.

    Scales and shapes of quantized weights are parameters, too, but do not count as weights.
    """
    return {"parameters": sum(parameter.numel() for name, parameter in model.named_parameters()
                              if not name.endswith(("_scale", "_shape", "_zero_point"))),
            "parameter_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())}


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


def read_through(model: torch.nn.Module, held_out: dict[str, torch.Tensor], request: dict[str, Any]
                 ) -> dict[str, float]:
    """Bits per byte over all held-out rows, and the median tokens per second of a micro-batch."""
    nats, speeds = 0.0, []
    for begin in range(0, len(held_out["input_ids"]), request["micro_batch"]):
        part = slice(begin, begin + request["micro_batch"])
        started = time.perf_counter()
        logits = logits_of(model, held_out, part, None)
        if logits.is_cuda:
            torch.cuda.synchronize()
        speeds.append(held_out["input_ids"][part].numel() / (time.perf_counter() - started))
        targets = held_out["targets"][part].to(logits.device)
        nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                                        ignore_index=IGNORED, reduction="sum"))
    return {"bits_per_byte": nats / math.log(2) / max(1, int(held_out["bytes"].sum())),
            "tokens_per_second": statistics.median(speeds)}


def logits_of(model: Any, held_out: dict[str, torch.Tensor], rows: slice, length: int | None) -> torch.Tensor:
    """(rows, length, vocabulary) logits of packed held-out rows.

    If rotary frequencies depend on the largest position in a batch, each document gets a forward of its own.
    """
    inputs = {name: held_out[name][rows, :length].to(model.device) for name in ("input_ids", "position_ids")}
    if not any("longrope" in str(getattr(module, "rope_type", "")) for module in model.modules()):
        return model(**inputs, use_cache=False).logits
    read = []
    for ids, positions in zip(*inputs.values(), strict=True):
        sizes = torch.diff(torch.argwhere(positions == 0).flatten(), append=positions.new_tensor([len(positions)]))
        parts = zip(ids.split(sizes.tolist()), positions.split(sizes.tolist()), strict=True)
        read.append(torch.cat([model(input_ids=part[None], position_ids=at[None], use_cache=False).logits[0]
                               for part, at in parts]))
    return torch.stack(read)


def sample(model: Any, path: str, options: dict[str, Any], request: dict[str, Any]) -> str:
    """The greedy continuation of the request's one prompt."""
    return samples(model, path, options, {**request, "prompts": [request["prompt"]]})[0]["text"]


def samples(model: Any, path: str, options: dict[str, Any], request: dict[str, Any]) -> list[dict[str, Any]]:
    """What a model writes to each prompt of the request, with its most probable tokens.

    A text is continued, and the result begins with it. A chat (a list of messages) is answered, and the result is the
    answer alone.
    """
    own = {} if request.get("tokenizer") else options
    tokenizer = AutoTokenizer.from_pretrained(request.get("tokenizer") or path, trust_remote_code=False, **own)
    return [{"prompt": prompt, "text": _written(model, tokenizer, prompt, request["sample_tokens"])}
            for prompt in request["prompts"]]


def _written(model: Any, tokenizer: Any, prompt: str | list[dict[str, Any]], count: int) -> str:
    chat = not isinstance(prompt, str)
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
                                        ).input_ids if chat else \
        tokenizer(prompt, return_tensors="pt", add_special_tokens=True).input_ids
    ids = ids.to(model.device)
    room = getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + count
    count = max(1, min(count, room - ids.shape[1]))
    # generate() takes what is left out from the model's generation config, which may hold penalties. Only its
    # end-of-sequence tokens are wanted.
    ends = model.generation_config.eos_token_id
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    own, model.generation_config = model.generation_config, GenerationConfig(
        max_new_tokens=count, eos_token_id=ends, pad_token_id=padding)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False)
    model.generation_config = own
    return tokenizer.decode(out[0, ids.shape[1]:] if chat else out[0], skip_special_tokens=True)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main(measure, sys.argv[1], sys.argv[2])
