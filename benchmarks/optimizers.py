"""Optimizers beside their peers, in one run: bytes of state, time of a step, and how right LAMB's trust ratios are.

    python -m benchmarks.optimizers [--json FILE] [--repeats N] [--threads N] [--device cpu]

Every optimizer has its own copy of the same fp32 weights, shaped as a Llama of 10 million parameters, and the same
gradients. Steps are taken in turn, one of each optimizer in every round, so that what else the machine does falls on
all; `seconds` is the median of the rounds, `ratio` the median over rounds of the time over that of torch's fused AdamW
in the same round; `of_threads` has both for other numbers of threads. State bytes are those of distinct storages,
scalars and code maps included. A peer that is not installed is listed as absent. Muon's row includes the AdamW of
embeddings and norms that is part of it. A sharded row has all weights in one flat part, as ZeRO does, in a group of one
rank: what a rank computes, without its all-reduces.

`in_backward`: forward and backward of linear layers of the same shapes, with steps in the backward, over the same with
the norm of all gradients, a check that it is finite, and a step after it (CPU seconds on CPU).

`muon_floor`: multiplications and additions of Muon's products, and what they take at the rate of a large product.

`first_step`: seconds of LAMB's first step in a process: by operations of torch, and compiled, with numba's import,
where nothing is on disk and where what numba compiled before is.

`trust_ratio_error` is the largest relative difference, over all parameters and 5 steps, between LAMB's trust ratios in
fp32 and a float64 computation of the paper's algorithm: whole, and in 2 and 3 flat parts whose sums are added up
here as ranks would. `fp32_norm_error` is that of `torch.linalg.vector_norm` on the same weights, for comparison.
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
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.rematerialization.frontier import machine
from strategies.common.shards import Layout, Piece, lay_out, layout_of
from strategies.memory.meter import resident_tensors
from strategies.optimizers import lamb
from strategies.optimizers.adafactor import Adafactor
from strategies.optimizers.adamw import adamw
from strategies.optimizers.adamw8bit import AdamW8bit
from strategies.optimizers.in_backward import StepInBackward
from strategies.optimizers.lamb import Lamb
from strategies.optimizers.muon import Muon
from strategies.optimizers.norms import squared_norm

WIDTH, INNER, LAYERS, VOCABULARY = 256, 688, 10, 8192
BETAS, LR, STEPS = (0.9, 0.999), 1e-3, 5
PACKAGES = ("torch", "transformers", "bitsandbytes", "pytorch_optimizer", "torchao")
Weights = dict[str, torch.Tensor]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=21, help="rounds that are timed")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2],
                        help="on CPU; the first, which other processes disturb least if it is 1, is that of all rows")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads[0])
    weights = llama_weights(options.device)
    result = {"machine": machine(options.device), "versions": versions(),
              "parameters": sum(value.numel() for value in weights.values()),
              "rows": rows(weights, options.repeats, options.device, options.threads)}
    torch.set_num_threads(options.threads[0])
    result |= {"in_backward": in_backward_rows(options.repeats, options.device),
               "muon_floor": muon_floor(options.device), "trust_ratio_error": trust_ratio_errors(weights)}
    if options.device == "cpu":
        result["first_step"] = first_steps()
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def llama_weights(device: str) -> Weights:
    """Tensors shaped as those of a Llama with a tied head, from a fixed seed."""
    shapes = {"embedding": (VOCABULARY, WIDTH), "norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"{layer}.{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "o")}
        shapes |= {f"{layer}.gate": (INNER, WIDTH), f"{layer}.up": (INNER, WIDTH), f"{layer}.down": (WIDTH, INNER)}
        shapes |= {f"{layer}.norm1": (WIDTH,), f"{layer}.norm2": (WIDTH,)}
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(device) for name, shape in shapes.items()}


def gradients(weights: Weights, step: int) -> Weights:
    """Gradients of a step, from a fixed seed."""
    generator = torch.Generator().manual_seed(1 + step)
    return {name: (torch.randn(value.shape, generator=generator) * 1e-3).to(value.device)
            for name, value in weights.items()}


def versions() -> dict[str, str | None]:
    """Of the packages that are compared; None where one is absent."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# ---- time and bytes

def contestants() -> list[tuple[str, str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]]:
    """Name, source, and how it is made; imports happen inside, where they may fail."""
    def matrices_apart(params: list[nn.Parameter]) -> list[dict]:
        matrices = [one for one in params if one.ndim == 2 and one.shape[0] != VOCABULARY]
        others = [one for one in params if one.ndim != 2 or one.shape[0] == VOCABULARY]
        return [{"params": matrices, "weight_decay": 0.0, "muon": True},
                {"params": others, "weight_decay": 0.0, "muon": False}]

    def from_pytorch_optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import Lamb as Theirs

        return Theirs(params, lr=LR, betas=BETAS)

    def from_transformers(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor as Theirs

        return Theirs(params, lr=LR, scale_parameter=True, relative_step=False, warmup_init=False)

    def from_bitsandbytes(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit as Theirs

        return Theirs(params, lr=LR, betas=BETAS, weight_decay=0.0)

    def from_torchao(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit as Theirs

        return Theirs(params, lr=LR, betas=BETAS, weight_decay=0.0)

    def sharded(kind: type[torch.optim.Optimizer]) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda params: kind([as_one_part(params)], lr=LR)

    return [
        ("AdamW", "torch, fused", lambda params: adamw([{"params": params, "weight_decay": 0.0}], lr=LR, betas=BETAS,
                                                       eps=1e-8)),
        ("LAMB", "limbeck", lambda params: Lamb(params, lr=LR, betas=BETAS)),
        ("LAMB", "limbeck, sharded", sharded(Lamb)),
        ("LAMB", "pytorch_optimizer", from_pytorch_optimizer),
        ("Adafactor", "limbeck", lambda params: Adafactor(params, lr=LR)),
        ("Adafactor", "limbeck, sharded", sharded(Adafactor)),
        ("Adafactor", "torch", lambda params: torch.optim.Adafactor(params, lr=LR)),
        ("Adafactor", "transformers", from_transformers),
        ("AdamW8bit", "limbeck, with bitsandbytes", lambda params: AdamW8bit(params, lr=LR, betas=BETAS)),
        ("AdamW8bit", "bitsandbytes", from_bitsandbytes),
        ("AdamW8bit", "torchao", from_torchao),
        ("Muon", "limbeck, with torch", lambda params: Muon(matrices_apart(params), lr=LR)),
    ]


def as_one_part(params: list[nn.Parameter]) -> torch.Tensor:
    """All parameters and gradients laid end to end in one tensor that a group of one rank shares."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    values = {str(number): param.detach() for number, param in enumerate(params)}
    total = sum(param.numel() for param in params)
    flat = flat_part(values, 0, total, dist.group.WORLD)
    flat.grad = torch.cat([param.grad.reshape(-1) for param in params])
    return flat


def rows(weights: Weights, repeats: int, device: str, threads: list[int]) -> list[dict]:
    """One row for each contestant: state bytes and times, or why it is absent."""
    slopes, found, running = gradients(weights, 0), [], []
    for name, source, make in contestants():
        row = {"optimizer": name, "source": source}
        found.append(row)
        try:
            optimizer = begun(make, weights, slopes)
        except (ImportError, ValueError) as error:
            row["absent"] = str(error)
            continue
        running.append((row, optimizer))
    times = {number: in_turn([optimizer for _, optimizer in running], repeats, device, number) for number in threads}
    count = sum(value.numel() for value in weights.values())
    for number, (row, optimizer) in enumerate(running):
        row |= {"state_bytes_per_parameter": resident_tensors(optimizer) / count, **times[threads[0]][number],
                "of_threads": {str(other): times[other][number] for other in threads[1:]}}
    return found


def in_turn(optimizers: list[torch.optim.Optimizer], repeats: int, device: str, threads: int) -> list[dict]:
    """Median seconds of each one's steps, and of their ratios to the first one's."""
    torch.set_num_threads(threads)
    for optimizer in optimizers:
        optimizer.step()
    times = [[seconds(optimizer.step, device) for optimizer in optimizers] for _ in range(repeats)]
    return [{"seconds": statistics.median(each[number] for each in times),
             "ratio": statistics.median(each[number] / each[0] for each in times)} for number in range(len(optimizers))]


def begun(make: Callable, weights: Weights, slopes: Weights) -> torch.optim.Optimizer:
    """An optimizer of its own copy of the weights, after two steps: state exists, compilers have compiled."""
    params = [nn.Parameter(value.clone()) for value in weights.values()]
    for param, slope in zip(params, slopes.values(), strict=True):
        param.grad = slope
    optimizer = make(params)
    for _ in range(2):
        optimizer.step()
    return optimizer


def seconds(work: Callable[[], object], device: str) -> float:
    """Time of something, such as a step."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def cpu_seconds(work: Callable[[], object], device: str) -> float:
    """CPU time of something, in which other processes count less."""
    began = time.process_time()
    work()
    return time.process_time() - began


# ---- steps in the backward

def in_backward_rows(repeats: int, device: str) -> list[dict]:
    """For each of our optimizers, time with steps in the backward over that with a step after it, in turn."""
    found = []
    for name, source, make in contestants():
        if (name, source) in {("AdamW", "torch, fused"), ("LAMB", "limbeck"), ("Adafactor", "limbeck")}:
            turns = [training(make, device, inside) for inside in (False, True)]
            for turn in turns * 2:
                turn()
            times = [[(cpu_seconds if device == "cpu" else seconds)(turn, device) for turn in turns]
                     for _ in range(repeats)]
            found.append({"optimizer": name, "plain_seconds": statistics.median(each[0] for each in times),
                          "ratio": statistics.median(inside / plain for plain, inside in times)})
    return found


def training(make: Callable, device: str, inside: bool, tokens: int = 64) -> Callable[[], None]:
    """A training step of 10 layers of matrices in a row."""
    torch.manual_seed(0)
    layers = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, INNER), nn.ReLU(),
                            nn.Linear(INNER, WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH))
              for _ in range(LAYERS)]
    net, given = nn.Sequential(*layers).to(device), torch.randn(tokens, WIDTH, device=device)
    optimizer = make(list(net.parameters()))
    steps = StepInBackward(optimizer) if inside else None

    def turn() -> None:
        if steps is not None:
            steps.reset()
        net(given).square().mean().backward()
        if steps is None:
            if bool(sum(squared_norm(param.grad) for param in net.parameters()).isfinite()):
                optimizer.step()
            optimizer.zero_grad()

    return turn


# ---- Muon's products

def muon_floor(device: str, size: int = 2048, repeats: int = 5) -> dict[str, float]:
    """FLOPs of 5 Newton-Schulz iterations of all matrices, and seconds at the rate of one large bfloat16 product."""
    shapes = [(WIDTH, WIDTH)] * 4 * LAYERS + [(WIDTH, INNER)] * 3 * LAYERS
    flops = sum(5 * (2 * small * small * large + 2 * small**3 + 2 * small * small * large) for small, large in shapes)
    square = torch.randn(size, size, device=device).bfloat16()
    times = [seconds(lambda: square @ square, device) for _ in range(repeats)]
    rate = 2 * size**3 / statistics.median(times)
    return {"flops": flops, "flops_per_second": rate, "seconds": flops / rate}


# ---- start

FIRST = """import time; began = time.perf_counter()
import torch; from torch import nn; torch.set_num_threads(1)
from strategies.optimizers.lamb import Lamb; from strategies.optimizers import passes
weight = nn.Parameter(torch.zeros(64)); weight.grad = torch.ones(64); optimizer = Lamb([weight])
optimizer.compiled = COMPILED; began = time.perf_counter(); optimizer.step(); print(time.perf_counter() - began)"""


def first_steps() -> dict[str, float]:
    """Seconds of a first step: by operations of torch, compiled with nothing on disk, and from disk."""
    with tempfile.TemporaryDirectory() as folder:
        def once(compiled: bool) -> float:
            code = FIRST.replace("COMPILED", str(compiled))
            return float(subprocess.run([sys.executable, "-c", code], env=os.environ | {"NUMBA_CACHE_DIR": folder},
                                        capture_output=True, text=True, check=True).stdout)

        return {"without": once(False), "nothing on disk": once(True), "from disk": once(True)}


# ---- trust ratios

def trust_ratio_errors(weights: Weights) -> dict[str, float]:
    """Largest relative errors against float64."""
    wanted = reference_ratios(weights)
    total = sum(value.numel() for value in weights.values())
    cuts = {"whole": (0, total), "2 parts": (0, total // 2 + 77, total),
            "3 parts": (0, 2_100_001, total // 3 * 2 + 5, total)}
    found = {name: max(abs(float(ratios[key] / wanted[step][key]) - 1)
                       for step, ratios in enumerate(ratios_in_parts(weights, edges)) for key in weights)
             for name, edges in cuts.items()}
    norms = [float(torch.linalg.vector_norm(value) / torch.linalg.vector_norm(value.double())) - 1
             for value in weights.values()]
    return found | {"fp32_norm_error": max(map(abs, norms))}


def reference_ratios(weights: Weights, eps: float = 1e-6) -> list[Weights]:
    """Trust ratios of each step by algorithm 2 of You et al. 2020 (arXiv 1904.00962), in float64."""
    found: list[Weights] = [{} for _ in range(STEPS)]
    slopes = [gradients(weights, step) for step in range(STEPS)]
    for name, weight in weights.items():
        weight, mean, square = weight.double(), 0, 0
        for step in range(STEPS):
            slope = slopes[step][name].double()
            mean = BETAS[0] * mean + (1 - BETAS[0]) * slope
            square = BETAS[1] * square + (1 - BETAS[1]) * slope**2
            update = mean / (1 - BETAS[0] ** (step + 1)) / ((square / (1 - BETAS[1] ** (step + 1))).sqrt() + eps)
            found[step][name] = weight.norm() / update.norm()
            weight = weight - LR * found[step][name] * update
    return found


def ratios_in_parts(weights: Weights, edges: tuple[int, ...]) -> list[Weights]:
    """Trust ratios of each step where each part holds the elements between two edges; their partial sums are added."""
    parts = [flat_part(weights, begin, end) for begin, end in pairwise(edges)]
    optimizers = [Lamb([part], lr=LR, betas=BETAS) for part in parts]
    found = []
    for step in range(STEPS):
        slopes = gradients(weights, step)
        for part, (begin, end) in zip(parts, pairwise(edges), strict=True):
            part.grad = flat_part(slopes, begin, end)
        held = [_batches(optimizer, part) for part, optimizer in zip(parts, optimizers, strict=True)]
        norms = sum(torch.cat([lamb._shares(batch) for batch in own]) for own in held)
        for own, optimizer in zip(held, optimizers, strict=True):
            for batch, shares in zip(own, norms.split([len(batch) for batch in own]), strict=True):
                optimizer._step_shared(batch, shares)
        found.append(dict(optimizers[0].trust_ratios))
    return found


def _batches(optimizer: Lamb, part: torch.Tensor) -> list:
    state = optimizer.state.setdefault(part, {}) or optimizer.fresh_state(part)
    optimizer.state[part] = state
    state["step"] += 1
    return list(optimizer._batches([(part, optimizer.param_groups[0], layout_of(part))]))


def flat_part(values: Weights, begin: int, end: int, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Elements `begin` to `end` of all parameters laid end to end, with what they are."""
    flat = torch.cat([value.reshape(-1) for value in values.values()])[begin:end].clone()
    at, pieces = 0, []
    for name, value in values.items():
        start, stop = (min(max(edge - at, 0), value.numel()) for edge in (begin, end))
        pieces.append(Piece(name, tuple(value.shape), start, stop, max(at + start - begin, 0)))
        at += value.numel()
    lay_out(flat, Layout(tuple(pieces), group))
    return flat


# ---- printing

def table(result: dict) -> str:
    """Rows and errors, for people."""
    lines = ["| optimizer | source | state bytes per parameter | step, ms | ratio | other threads |",
             "|---|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        if "absent" in row:
            lines.append(f"| {row['optimizer']} | {row['source']} | absent: {row['absent']} | | | |")
        else:
            lines.append(f"| {row['optimizer']} | {row['source']} | {row['state_bytes_per_parameter']:.4f} | "
                         f"{row['seconds'] * 1e3:.2f} | x{row['ratio']:.2f} | "
                         + ", ".join(f"{threads}: x{one['ratio']:.2f}" for threads, one in row["of_threads"].items())
                         + " |")
    lines += ["", *(f"{row['optimizer']} in backward: x{row['ratio']:.3f}" for row in result["in_backward"])]
    floor = result["muon_floor"]
    lines.append(f"Muon's products: {floor['flops'] / 1e9:.1f} GFLOP, {floor['seconds'] * 1e3:.1f} ms at "
                 f"{floor['flops_per_second'] / 1e9:.0f} GFLOP/s")
    lines.append(f"first step, seconds: {result.get('first_step')}")
    errors = ", ".join(f"{name} {error:.1e}" for name, error in result["trust_ratio_error"].items())
    return "\n".join([*lines, "", f"LAMB's trust ratios against float64: {errors}"])


if __name__ == "__main__":
    raise SystemExit(main())
