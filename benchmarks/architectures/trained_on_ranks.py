"""The same two steps on one process and, shared out, on two: what is put together again is the same model."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.architectures.tiny_models import Room
from benchmarks.architectures.verdicts import apart, judged, verdict_of
from benchmarks.sharding import sharded_runs as launched
from strategies.common.cpu_products import fp32_products
from trainer.data.dataset import prepare_text
from trainer.run.metrics import console

ENGINES = {"ddp": {"engine": "ddp"}, "fsdp2": {"engine": "fsdp2"}, "zero": {"engine": "zero"}}
WEIGHTS = 1e-4  # of the largest move of a weight; Adam divides by gradients that are nearly zero
SECONDS = 90


def check_engines(room: Room, names: list[str]) -> dict[str, dict[str, Any]]:
    """For each engine: weights that two processes trained, put together, against those of one."""
    one = verdict_of(lambda: _trained(room, "one", {"engine": "none"}, 0))
    if one["verdict"] != "right":
        return dict.fromkeys(names, one)
    alone = load_file(room.folder / "one.safetensors")
    begun = {name: parameter.detach() for name, parameter in room.plain().state_dict().items()}
    moved = max(float((alone[name] - begun[name]).abs().max()) for name in alone if name in begun)
    return {name: verdict_of(lambda name=name: _compared(room, name, alone, moved)) for name in names}


def _compared(room: Room, name: str, alone: dict[str, torch.Tensor], moved: float) -> dict[str, Any]:
    said = _on_two(room, name)
    if said is not None:
        return said
    found = load_file(room.folder / f"{name}.safetensors")
    if missing := {*alone} ^ {*found}:
        return judged(False, missing=sorted(missing)[:3])
    difference = max(float((found[key].double() - alone[key].double()).abs().max()) for key in alone)
    logits = apart(found["logits of it"], alone["logits of it"])
    return judged(difference <= 5e-2 * moved and logits <= WEIGHTS, difference=difference, moved=moved, logits=logits)


def _trained(room: Room, name: str, sharding: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train two steps, and write the whole student and its logits on the main process.

    The matrix products of one process are those of several, since engines are compared, and no libraries.
    """
    from benchmarks.architectures.checks import APART, prepared, unplanned

    asked = room.experiment(name, sharding=sharding, data=APART, training={
        "batch_size": 8, "micro_batch": 4, "steps": 2, "evaluate_every": 100, "checkpoint_every": 100})
    text = prepare_text(asked)
    with unplanned(), console.capture(), fp32_products(torch.device("cpu"), faster=False):
        trainer = prepared(asked, text)
        trainer.train()
    if rank == 0:
        model = trainer.whole().eval()
        with torch.no_grad():
            logits = model(input_ids=next(room.documents())[None], use_cache=False).logits
        save_file({**{key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()},
                   "logits of it": logits.contiguous()}, room.folder / f"{name}.safetensors")
    trainer.accelerator.wait_for_everyone()
    return {"verdict": "right"}


def _on_two(room: Room, name: str) -> dict[str, Any] | None:
    """Train on two forked ranks; the verdict of the first that did not come to an end, or None."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {_fork(room, name, rank, port): rank for rank in range(2)}
    deadline, said = time.monotonic() + SECONDS, None
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in ranks:
            rank = ranks.pop(child)
            file = room.folder / f"{name}-{rank}.json"
            if status and said is None:
                said = _read(file) or {"verdict": "traceback", "said": f"a rank ended with status {status}"}
                deadline = min(deadline, time.monotonic() + 3)
        elif time.monotonic() > deadline:
            said = said or {"verdict": "traceback", "said": f"two ranks did not end within {SECONDS} s"}
            for child in ranks:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            deadline += SECONDS
        else:
            time.sleep(0.02)
    return said


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None


def _fork(room: Room, name: str, rank: int, port: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"})
        launched.ON_CPU = "true"
        found = verdict_of(lambda: _trained(room, name, ENGINES[name], rank))
        if found["verdict"] == "right":
            code = 0
        else:
            (room.folder / f"{name}-{rank}.json").write_text(json.dumps(found))
    finally:
        os._exit(code)
