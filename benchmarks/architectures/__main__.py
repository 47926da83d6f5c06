"""Every causal architecture that the installed transformers knows, at tiny dimensions, through what a run does with it.

    python -m benchmarks.architectures [--types llama,gpt2] [--checks loss,layers] [--jobs 1] [--again] --json FILE

A row for each type, with these checks. `causal`: a model that sees what comes after is refused. `loss`: padded rows
against each document alone in transformers, loss and gradients. `packing`: the same of packed rows, in one micro-batch
and in two. `memory`: planned bytes of a step against those measured. `layers`: two layers of a teacher against the
teacher whose other blocks are skipped. `quantized`: 4 bits trained, exported, loaded by transformers. `onnx`, `gguf`:
that student, and one in full precision, for these runtimes. `ddp`, `fsdp2`, `zero`: two steps on two processes, put
together, against one process.

Each type runs in a fork of this process, which has imported everything, with a limit of seconds and bytes. FILE is
written after each, and what it holds of this version of the libraries is not done again, unless `--again` is given.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.architectures.dimensions import types  # noqa: E402
from benchmarks.architectures.table import CHECKS, table  # noqa: E402
from benchmarks.rematerialization.frontier import machine  # noqa: E402

SECONDS = 300
# What a fork would import else, time and again; what is optional may be missing.
NEEDED = {"": ["trainer.pipeline", "trainer.cli", "benchmarks.architectures.checks",
               "benchmarks.architectures.trained_on_ranks",
               "transformers.integrations.compressed_tensors", "transformers.quantizers.auto"],
          "onnx": ["onnx", "onnx_ir", "onnxscript", "onnxruntime", "torch.onnx", "strategies.export.onnx.onnx_folder",
                   "torch.onnx._internal.exporter._core", "torch.onnx._internal.exporter._registration"],
          "gguf": ["gguf", "strategies.export.gguf.gguf_file"],
          "fsdp2": ["torch.distributed.fsdp", "strategies.sharding.fsdp2"],
          "zero": ["deepspeed", "strategies.sharding.zero", "deepspeed.ops.op_builder.all_ops",
                   "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer"]}


def get_ready(checks: list[str]) -> None:
    """Import what forks need, quietly, and have clients forked too."""
    import logging

    import torch

    from benchmarks.architectures import forks
    from trainer.models.build import quiet_libraries

    torch.set_num_threads(1)
    for check in ("", *checks):
        for name in NEEDED.get(check, ()):
            with suppress(ImportError):
                import_module(name)
    quiet_libraries()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    os.environ["TQDM_DISABLE"] = "1"
    forks.install()
    gc.collect()
    gc.freeze()


def examined(base: Path, model_type: str, checks: list[str]) -> dict[str, Any]:
    """The row of a type, from a fork of this process."""
    file = base / f"{model_type}.jsonl"
    begun, child = time.monotonic(), os.fork()
    if not child:
        _be_one(base, model_type, checks, file)
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > begun + SECONDS:
            os.killpg(child, signal.SIGKILL)
            done = os.waitpid(child, 0)
            break
        time.sleep(0.02)
    row: dict[str, Any] = {"type": model_type, "checks": {}}
    for line in file.read_text().splitlines() if file.exists() else ():
        told = json.loads(line)
        row["checks"] |= told.pop("checks", {})
        row |= told
    if done[1] and not row.get("not_built"):
        ended = f"ended with status {done[1]} after {time.monotonic() - begun:.0f} s"
        left = {check: {"verdict": "traceback", "said": f"the process {ended}"} for check in checks}
        row["checks"] = left | row["checks"]
    shutil.rmtree(base / model_type, ignore_errors=True)
    file.unlink(missing_ok=True)
    return row


def _be_one(base: Path, model_type: str, checks: list[str], file: Path) -> None:
    """In a fork: build the model, check it, and write lines of what was found."""
    import resource

    from benchmarks.architectures.checks import examine
    from benchmarks.architectures.tiny_models import Room

    code = 1
    try:
        os.setpgrp()
        grown = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 6 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (grown, grown))
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)

        def write(values: dict[str, Any]) -> None:
            with file.open("a") as handle:
                handle.write(json.dumps(values) + "\n")

        room = Room(base, model_type)
        try:
            model = room.make_model()
        except RuntimeError as error:
            write({"not_built": str(error)[:300]})
        else:
            write({"class": type(model).__name__, "parameters": sum(one.numel() for one in model.parameters())})
            del model
            examine(room, checks, lambda name, verdict: write({"checks": {name: verdict}}))
        write({"cpu_seconds": round(sum(os.times()[:4]), 1)})
        code = 0
    finally:
        os._exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Run, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", type=lambda text: text.split(","), help="all by default")
    parser.add_argument("--checks", type=lambda text: text.split(","), default=list(CHECKS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="do again what FILE holds")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    if unknown := sorted({*options.checks} - {*CHECKS}):
        parser.error(f"no such check: {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    wanted = options.types or types()
    if unknown := sorted({*wanted} - {*types()}):
        parser.error(f"transformers has no causal model of these types: {', '.join(unknown)}")
    found = _kept(options.json)
    left = [(name, checks) for name in wanted if (checks := [
        check for check in options.checks if options.again or not _known(found["rows"].get(name, {}), check)])]
    run(left, found, options)
    print(table({**found, "rows": list(found["rows"].values())}))
    return 0


def run(left: list[tuple[str, list[str]]], found: dict[str, Any], options: argparse.Namespace) -> None:
    """Examine what is left, several at a time where asked for, and write the file after each."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    from benchmarks.architectures.tiny_models import share

    get_ready(options.checks)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        share(Path(name))
        for done in as_completed([pool.submit(examined, Path(name), *one) for one in left]):
            row = done.result()
            before = found["rows"].get(row["type"], {"checks": {}})
            found["rows"][row["type"]] = {**before, **row, "checks": {**before["checks"], **row["checks"]}}
            _write(options.json, found)
            bad = {check: one["verdict"] for check, one in row["checks"].items()
                   if one["verdict"] not in ("right", "refused")}
            print(f"{row['type']}: {row.get('not_built') or bad or 'right or refused'} "
                  f"({row.get('cpu_seconds', '?')} s)", file=sys.stderr, flush=True)


def _known(row: dict[str, Any], check: str) -> bool:
    return "not_built" in row or check in row.get("checks", {})


def _kept(file: Path) -> dict[str, Any]:
    """What a file holds of these versions of the libraries, its rows by type."""
    now = {"command": "python -m benchmarks.architectures", "machine": machine("cpu"), "rows": {}}
    if file.exists():
        then = json.loads(file.read_text())
        if then["machine"].partition("; ")[2] == now["machine"].partition("; ")[2]:
            now["rows"] = {row["type"]: row for row in then["rows"]}
    return now


def _write(file: Path, found: dict[str, Any]) -> None:
    """Rows in the order of their types; the file is whole at any time."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps({**found, "rows": sorted(found["rows"].values(), key=lambda row: row["type"])},
                                  indent=1) + "\n")
    partial.replace(file)


if __name__ == "__main__":
    raise SystemExit(main())
