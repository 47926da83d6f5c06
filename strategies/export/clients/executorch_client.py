"""Load and measure ExecuTorch folders in a separate process, with only `executorch`, `torch` and `transformers`.

    python executorch_client.py request.json answer.json

Request and answer are those of `transformers_client.py`; or, with `kept` among the held-out rows, of
`openvino_client.py`. The script imports nothing of this project, so whatever it can load and compute, anybody can.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from executorch.runtime import Runtime
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging
from transformers_client import logits_of, main, read_through  # beside this file

FILE = "student.pte"


def measure(which: dict[str, Any], held_out: dict[str, torch.Tensor], request: dict[str, Any]) -> dict[str, Any]:
    """The measurements of `transformers_client.measure`, or those of one text at some positions."""
    model = Model(Path(which["path"]) / FILE)
    if "kept" in held_out:
        ids = held_out["input_ids"][:, :model.longest]
        started = time.perf_counter()
        logits = model.after(ids)[0]
        seconds = time.perf_counter() - started
        save_file({"logits": logits[held_out["kept"]].contiguous()}, which["logits"])
        return {"tokens_per_second": ids.numel() / seconds}
    if which.get("logits"):
        rows, length = request["logit_rows"], request["logit_length"]
        save_file({"logits": logits_of(model, held_out, slice(0, rows), length).contiguous()}, which["logits"])
    return {**read_through(model, held_out, request), "parameters": model.number("parameters"),
            "parameter_bytes": (Path(which["path"]) / FILE).stat().st_size, "sample": sample(model, which, request)}


class Model:
    """A program in ExecuTorch that is called as a model of transformers is."""

    device = torch.device("cpu")

    def __init__(self, file: Path):
        self._program = Runtime.get().load_program(file)
        self._forward = self._program.load_method("forward")
        self.longest = self.number("get_max_seq_len")

    def number(self, method: str) -> int:
        """What a method without inputs gives."""
        return int(self._program.load_method(method).execute([])[0])

    def modules(self) -> list[Any]:
        """None: there is nothing to look into."""
        return []

    def after(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """(1, tokens, vocabulary) fp32 logits of one text (1, tokens)."""
        positions = torch.arange(ids.shape[1])[None] if positions is None else positions
        return self._forward.execute([ids.contiguous(), positions.contiguous()])[0].clone()

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> Any:
        """Logits of packed rows, one after the other."""
        if input_ids.shape[1] > self.longest:
            raise ValueError(f"rows of {input_ids.shape[1]} tokens, and this program takes {self.longest} at once")
        return SimpleNamespace(logits=torch.cat([
            self.after(ids[None], positions[None]) for ids, positions in zip(input_ids, position_ids, strict=True)]))


def sample(model: Model, which: dict[str, Any], request: dict[str, Any]) -> str:
    """The greedy continuation of the prompt, computed without a KV cache."""
    tokenizer = AutoTokenizer.from_pretrained(request.get("tokenizer") or which["path"], trust_remote_code=False)
    ends = GenerationConfig.from_pretrained(which["path"]).eos_token_id
    ids = tokenizer(request["prompt"], add_special_tokens=True).input_ids
    for _ in range(min(request["sample_tokens"], model.longest - len(ids))):
        ids.append(int(model.after(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in (ends if isinstance(ends, list) else [ends]):
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main(measure, sys.argv[1], sys.argv[2])
