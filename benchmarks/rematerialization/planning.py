"""Time and host memory of planning a large model that is not there: a Llama of 70 billion parameters without data.

    python -m benchmarks.rematerialization.planning --json FILE [--blocks 80] [--share 0.5] [--profile]

The model is built, captured, priced for a device's data sheet and planned for a budget between the proven least and
what keeping all needs. `seconds` count from the end of imports, `host_bytes` is the most that the process ever held.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import resource
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from strategies.rematerialization.price.costs import DEVICES
from strategies.rematerialization.rematerialize import study

SECONDS, HOST_BYTES = 10.0, 4 * 2**30
"""What we want to stay under."""


def main(arguments: list[str] | None = None) -> int:
    """Plan, print and write the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--plan-for", choices=list(DEVICES), default="h100", help="device priced")
    parser.add_argument("--share", type=float, default=0.5, help="of the way from the proven least to keep-all")
    parser.add_argument("--profile", action="store_true", help="print where the time goes; this takes time itself")
    options = parser.parse_args(arguments)
    with cProfile.Profile() if options.profile else nullcontext() as profile:
        figures = run(options)
    if profile is not None:
        pstats.Stats(profile, stream=sys.stdout).sort_stats("cumulative").print_stats(45)
    print(summary(figures))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def run(options: argparse.Namespace) -> dict:
    """Every stage once; returns its seconds and what was planned."""
    moments = [time.perf_counter()]

    def since() -> float:
        moments.append(time.perf_counter())
        return moments[-1] - moments[-2]

    model, batch = large(options.blocks, options.batch, options.length, getattr(torch, options.dtype))
    seconds = {"build": since()}
    planner = study(model, batch, device=options.plan_for)
    seconds["study"] = since()
    everything = planner.keep_all()
    seconds["options"] = since()
    budget = round(planner.least_bound + options.share * (everything.peak - planner.least_bound))
    plan = planner.plan(budget)
    seconds["plan"] = since()
    memory, total = host_bytes(), sum(seconds.values())
    least = planner.least  # which no plan asks for
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "blocks": options.blocks,
            "batch": [options.batch, options.length], "dtype": options.dtype, "priced_for": options.plan_for,
            "seconds": total, "seconds_by_stage": seconds, "host_bytes": memory, "seconds_for_least": since(),
            "keep_all_peak": everything.peak, "least_peak": least.peak, "least_bound": planner.least_bound,
            "budget_bytes": budget, "predicted_peak": plan.peak, "overhead": plan.overhead, "gap": plan.gap,
            "fallbacks": plan.fallbacks, "machine": machine()}


def large(blocks: int, batch: int, length: int, dtype: torch.dtype) -> tuple[LlamaForCausalLM, dict]:
    """A model of Llama 70B's shape and a batch for it, of tensors without data."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=blocks, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=max(8192, length), dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = LlamaForCausalLM(config).train()
            tokens = torch.zeros(batch, length, dtype=torch.long)
    finally:
        torch.set_default_dtype(before)
    return model, {"input_ids": tokens, "labels": tokens, "use_cache": False}


def host_bytes() -> int:
    """Most bytes that this process has had in memory."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def machine() -> str:
    """What the figures were measured on."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}"


def summary(figures: dict) -> str:
    """The figures as text."""
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures["seconds_by_stage"].items())
    met = figures["seconds"] < SECONDS and figures["host_bytes"] < HOST_BYTES
    size = f"{figures['parameters']:,} parameters"
    return (f"{size} in {figures['blocks']} blocks: {figures['seconds']:.1f} s ({stages}), "
            f"{figures['host_bytes'] / 2**30:.2f} GiB of host memory; aim of {SECONDS:.0f} s and "
            f"{HOST_BYTES / 2**30:.0f} GiB {'met' if met else 'missed'}\n"
            f"keep-all {figures['keep_all_peak']:,} bytes, least {figures['least_peak']:,} (proven: "
            f"{figures['least_bound']:,}); budget {figures['budget_bytes']:,}: peak {figures['predicted_peak']:,}, "
            f"recomputation {figures['overhead']:.1%}, at most {figures['gap']:.1%} above the best")


if __name__ == "__main__":
    sys.exit(main())
