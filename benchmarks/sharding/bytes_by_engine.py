"""Model state of each rank for large models that are not there, beside the formulas of the ZeRO paper.

    python -m benchmarks.sharding.bytes_by_engine --json FILE [--ranks 8 64]

Rajbhandari et al. 2020 (section 3.1, section 5, figure 1): training with Adam in mixed precision takes 16 bytes for
each of PSI parameters: 2 of weights, 2 of gradients, and K = 12 of fp32 weights and moments. On N ranks, stage 1 takes
4 PSI + 12 PSI / N, stage 2 2 PSI + 14 PSI / N, stage 3 16 PSI / N. `ours` is what the ledger counts from shapes,
padding and whole parameters at the edges of partitions included; `besides` is what the formulas leave out: weights
gathered, and buffers of sums.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from benchmarks.rematerialization.frontier import machine
from strategies.memory.ledger import Ledger
from strategies.optimizers.by_name import build
from strategies.sharding.rank_residency import ShardingSetup, residency
from strategies.sharding.zero import bucket_numel
from trainer.distributed.rank_memory import optimizer_bytes

MODELS = {
    "Llama-70B": LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                             num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False),
    "Qwen-7B": Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                           num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}
FORMULAS = {
    "ddp": ("16 PSI", lambda psi, n: 16 * psi), "zero 1": ("4 PSI + 12 PSI / N", lambda psi, n: 4 * psi + 12 * psi / n),
    "zero 2": ("2 PSI + 14 PSI / N", lambda psi, n: 2 * psi + 14 * psi / n),
    "zero 3": ("16 PSI / N", lambda psi, n: 16 * psi / n), "fsdp2": ("16 PSI / N", lambda psi, n: 16 * psi / n),
}


def row(name: str, engine: str, ranks: int) -> dict:
    """One model, engine and number of ranks."""
    kind, _, stage = engine.partition(" ")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32)
        psi = sum(parameter.numel() for parameter in model.parameters())
        setup = ShardingSetup(engine=kind, ranks=ranks, stage=int(stage or 3), compute=torch.bfloat16,
                      bucket=bucket_numel(model), ahead=bucket_numel(model), gloo=False)
        optimizer = build(model, "adamw", lr=1e-4, betas=(0.9, 0.95), eps=None, weight_decay=0.1)
        groups = [list(group["params"]) for group in optimizer.param_groups]
        state, update = optimizer_bytes(optimizer, setup)
        ledger = Ledger.of(residency(model, groups, setup, optimizer_state=state, update=update), None, 0)
    text, formula = FORMULAS[engine]
    published = formula(psi, ranks)
    return {"model": name, "parameters": psi, "engine": engine, "ranks": ranks, "formula": text,
            "published_bytes": published, "ours_bytes": ledger.model_state, "ratio": ledger.model_state / published,
            "gathered_bytes": ledger.gathered, "communication_bytes": ledger.communication,
            "weights_bytes": ledger.weights + ledger.fp32_weights, "gradients_bytes": ledger.gradients,
            "optimizer_state_bytes": ledger.optimizer_state}


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    lines = ["| model | ranks | engine | formula | formula, GB | ours, GB | ratio | besides: gathered, buffers, GB |",
             "|---|---:|---|---|---:|---:|---:|---:|"]
    lines += [f"| {one['model']} | {one['ranks']} | {one['engine']} | {one['formula'].replace('PSI', 'Ψ')} | "
              f"{one['published_bytes'] / 1e9:.2f} | {one['ours_bytes'] / 1e9:.2f} | {one['ratio']:.4f} | "
              f"{one['gathered_bytes'] / 1e9:.2f}, {one['communication_bytes'] / 1e9:.2f} |" for one in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Count, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    rows = [row(name, engine, ranks) for name in MODELS for ranks in options.ranks for engine in FORMULAS]
    print(table(rows))
    print(f"\n{time.perf_counter() - begun:.1f} s for all of them, without weights")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
