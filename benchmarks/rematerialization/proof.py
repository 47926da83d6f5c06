"""How much of a long chain's recomputation a better schedule could save at most, by number of blocks.

    python -m benchmarks.rematerialization.proof [--blocks 8 32 128] [--share 0.6] [--json FILE]

A Llama 1,024 wide with sequences of 2,048 and tensors without data is planned for a device's data sheet, within a share
of the peak of keeping everything. `recomputed` is the share of the blocks' time that is recomputed, `gap` the proven
upper bound on what any schedule of these blocks could save of it, in the same unit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rematerialization.frontier import machine
from strategies.rematerialization.price.costs import DEVICES
from strategies.rematerialization.rematerialize import study


def main(arguments: list[str] | None = None) -> int:
    """Plan for every number of blocks and print a line for each; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--share", type=float, default=0.6, help="budget as a share of the peak of keeping everything")
    parser.add_argument("--plan-for", choices=list(DEVICES), default="h100")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    for blocks in options.blocks:
        rows.append(planned(blocks, options))
        print("{blocks:4} blocks: {recomputed:.2%} of their time recomputed, of which a better schedule could save at "
              "most {gap:.2%}; {cpu_seconds:.1f} s of CPU".format(**rows[-1]), flush=True)
    if options.json:
        written = {"machine": machine("cpu"), "priced_for": options.plan_for, "share": options.share, "rows": rows}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0


def planned(blocks: int, options: argparse.Namespace) -> dict:
    """The figures for one number of blocks; seconds are of analysis and plan together."""
    config = LlamaConfig(vocab_size=options.vocabulary, hidden_size=options.hidden, num_hidden_layers=blocks,
                         intermediate_size=11 * options.hidden // 4, num_attention_heads=options.hidden // 64,
                         max_position_embeddings=2 * options.length)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LlamaForCausalLM(config).train()
        tokens = torch.zeros(options.batch, options.length, dtype=torch.long)
    began = time.process_time()
    planner = study(model, {"input_ids": tokens, "labels": tokens, "use_cache": False}, device=options.plan_for,
                    autocast=torch.bfloat16)
    everything = planner.keep_all().peak
    plan = planner.plan(int(options.share * everything))
    return {"blocks": blocks, "keep_all_peak": everything, "budget": plan.budget, "peak": plan.peak,
            "recomputed": plan.overhead, "gap": plan.gap, "cpu_seconds": round(time.process_time() - began, 2)}


if __name__ == "__main__":
    sys.exit(main())
