"""Greedy text of one student in every runtime that it is exported for: are the tokens equal, and how many a second.

    python -m benchmarks.generation [--model FOLDER] [--bits 4] [--tokens 256] [--json FILE]

Without `--model` a small Llama of random weights is taken. The student is written for transformers, ONNX Runtime and
llama.cpp. Each measurement is a process of its own, which loads the student, says a few tokens to warm up, and is timed
while it goes on from a prompt for as many tokens as asked. They take turns, and the medians are shown. "onnx, no cache"
is the same graph, which gets all tokens anew for each. llama.cpp (`pip install xllamacpp`) and onnxruntime-genai are
left out where they are not installed, or cannot hold the student.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.quantization.runtimes import ROOT, SHAPE
from benchmarks.quickstart import machine, show
from strategies.export.clients import onnx_client
from strategies.export.gguf.gguf_file import write_gguf
from strategies.export.hf.transformers_folder import write_folder
from strategies.export.onnx.onnx_folder import write_onnx
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer
from trainer.data.dataset import prepare_text
from trainer.experiment.load import read_experiment

PROMPT = "Once upon a time there was a"
WARMUP = 4  # tokens
SLOW = 120.0  # seconds; what took longer is not measured again
PACKAGES = {"transformers": "transformers", "onnx": "onnxruntime", "onnx, no cache": "onnxruntime",
            "onnxruntime-genai": "onnxruntime_genai", "llama.cpp": "xllamacpp"}


def main(arguments: list[str] | None = None) -> int:
    """Write the student, have every runtime continue the prompt, print the table, and write what was found."""
    chosen = parser().parse_args(arguments)
    if chosen.run:
        print(json.dumps(generated(chosen.run, Path(chosen.folder), chosen)))
        return 0
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory(prefix="limbeck-generation-") as room:
        skipped = written(Path(room), chosen)
        runtimes = [name for name in PACKAGES if name not in skipped]
        rows = [measured(name, Path(room), chosen) for name in runtimes]
        for _ in range(chosen.repeats - 1):
            for row in rows:
                if row["seconds"][0] <= SLOW:
                    row["seconds"] += measured(row["runtime"], Path(room), chosen)["seconds"]
    wanted = rows[0]["tokens"]
    for row in rows:
        row["equal"] = next((at for at, pair in enumerate(zip(row.pop("tokens"), wanted, strict=True))
                             if pair[0] != pair[1]), len(wanted))
        row["tokens_per_second"] = len(wanted) / statistics.median(row["seconds"])
    found = {"settings": {"model": Path(chosen.model).name if chosen.model else "a random Llama", "bits": chosen.bits,
                          "tokens": chosen.tokens, "threads": chosen.threads}, "machine": machine(),
             "versions": {PACKAGES[name]: version(PACKAGES[name].replace("_", "-")) for name in runtimes},
             "skipped": skipped, "rows": rows}
    show(table(found), found, chosen.json)
    return int(any(row["equal"] < len(wanted) for row in rows if row["runtime"] != "llama.cpp"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="a transformers folder")
    made.add_argument("--bits", type=int, choices=(2, 4, 8), help="of the weights; without it they stay as they are")
    made.add_argument("--tokens", type=int, default=256)
    made.add_argument("--prompt", default=PROMPT)
    made.add_argument("--repeats", type=int, default=3, help="measurements of each runtime")
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument("--json", type=Path)
    made.add_argument("--run", choices=list(PACKAGES), help=argparse.SUPPRESS)  # of the processes it starts
    made.add_argument("--folder", help=argparse.SUPPRESS)
    return made


def written(room: Path, chosen: argparse.Namespace) -> dict[str, str]:
    """Write the student for all runtimes; returns why some are left out, by name."""
    torch.manual_seed(0)
    if chosen.model:
        tokenizer = AutoTokenizer.from_pretrained(chosen.model)
        model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    else:
        tokenizer = prepare_text(read_experiment(ROOT / "configs" / "quickstart.yaml").experiment).tokenizer
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "llama", **{**SHAPE, "max_position_embeddings": 1024}, vocab_size=len(tokenizer)))
    if chosen.bits:
        prepare(model, WeightQuantizer(chosen.bits, 32, torch.float16))  # as llama.cpp has scales
    model.eval()
    write_folder(room / "transformers", model, tokenizer)
    notes = write_onnx(room / "onnx", model, tokenizer)
    if notes:
        raise SystemExit("\n".join(notes))
    skipped = {name: f"{package} is not installed" for name, package in PACKAGES.items() if find_spec(package) is None}
    try:
        write_gguf(room / "student.gguf", model, tokenizer, torch.float32)
    except ValueError as error:
        skipped.setdefault("llama.cpp", str(error))
    return skipped


def measured(name: str, room: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.generation", "--run", name, "--folder", str(room), "--prompt",
               chosen.prompt, "--tokens", str(chosen.tokens), "--threads", str(chosen.threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name}: {chosen.tokens / found['seconds'][0]:.2f} tokens/s", flush=True)
    return found


def generated(name: str, room: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Load the student in a runtime, and time how it continues the prompt."""
    torch.set_num_threads(chosen.threads)
    prompt = AutoTokenizer.from_pretrained(room / "transformers")(chosen.prompt).input_ids
    go_on = GENERATORS[name](room, chosen.threads, len(prompt) + chosen.tokens)
    go_on(prompt, WARMUP)
    started = time.perf_counter()
    tokens = go_on(prompt, chosen.tokens)
    return {"runtime": name, "seconds": [time.perf_counter() - started], "tokens": tokens}


GoOn = Callable[[list[int], int], list[int]]


def by_transformers(room: Path, threads: int, room_for: int) -> GoOn:
    """transformers' `generate`, with its own cache."""
    model = AutoModelForCausalLM.from_pretrained(room / "transformers", dtype=torch.float32).eval()

    def go_on(prompt: list[int], count: int) -> list[int]:
        how = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            return model.generate(torch.tensor([prompt]), generation_config=how)[0, len(prompt):].tolist()

    return go_on


def by_onnx(room: Path, threads: int, room_for: int) -> GoOn:
    """The exported graph, with its cache."""
    session = onnx_client.open_session(room / "onnx", threads)
    return lambda prompt, count: list(onnx_client.greedy(session, prompt, count))


def by_onnx_without_cache(room: Path, threads: int, room_for: int) -> GoOn:
    """The exported graph, which gets all tokens each time."""
    session = onnx_client.open_session(room / "onnx", threads)
    return lambda prompt, count: list(onnx_client.greedy(session, prompt, count, cached=False))


def by_genai(room: Path, threads: int, room_for: int) -> GoOn:
    """onnxruntime-genai, which reads the exported folder."""
    import onnxruntime_genai

    file = room / "onnx" / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    config["model"]["eos_token_id"] = config["model"]["vocab_size"] - 1  # the others are not to stop either
    file.write_text(json.dumps(config))
    model = onnxruntime_genai.Model(str(room / "onnx"))

    def go_on(prompt: list[int], count: int) -> list[int]:
        how = onnxruntime_genai.GeneratorParams(model)
        how.set_search_options(max_length=len(prompt) + count, do_sample=False)
        generator = onnxruntime_genai.Generator(model, how)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(prompt):]]

    return go_on


def by_llama_cpp(room: Path, threads: int, room_for: int) -> GoOn:
    """llama.cpp, with keys and values in float32."""
    from benchmarks.quantization.llama_cpp import LlamaCpp

    runtime = LlamaCpp(room / "student.gguf", room_for + 1, threads)
    return runtime.greedy


GENERATORS = {"transformers": by_transformers, "onnx": by_onnx, "onnx, no cache": by_onnx_without_cache,
              "onnxruntime-genai": by_genai, "llama.cpp": by_llama_cpp}


def table(found: dict) -> str:
    """A line for each runtime: tokens a second, against ONNX without a cache, and tokens equal to transformers'."""
    settings, rows = found["settings"], found["rows"]
    slow = next(row["tokens_per_second"] for row in rows if row["runtime"] == "onnx, no cache")
    lines = ["| runtime | tokens/s (fastest) | of ONNX without a cache | tokens as transformers' |",
             "|---|---:|---:|---:|"]
    lines += [f"| {row['runtime']} | {row['tokens_per_second']:.1f} ({settings['tokens'] / min(row['seconds']):.1f}) | "
              f"x{row['tokens_per_second'] / slow:.1f} | {row['equal']} of {settings['tokens']} |" for row in rows]
    bits = f"{settings['bits']} bits" if settings["bits"] else "float32"
    runs = max(len(row["seconds"]) for row in rows)
    lines.append(f"\n{settings['model']} in {bits}, {settings['tokens']} tokens, {settings['threads']} threads; "
                 f"medians of {runs}, and what takes over {SLOW:.0f} s is measured once.")
    lines += [f"Left out: {name}: {why}." for name, why in found["skipped"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
