"""Bits allocated by sensitivity against the same bits everywhere, at equal bytes: what was foretold and what is.

    python -m benchmarks.quantization.bit_allocation [--json FILE] [--picture FILE] [--text FILE] [--steps 300]
                                                   [--blocks 4]

A small language model of bytes is trained here on the text. Its layers' sensitivities are measured on a calibration
part (the divergence from full precision with that layer alone quantized), and estimated from squared gradients. For the
bytes of each uniform scheme the best allocation by either is then applied as a whole, and its divergence measured on
text that neither training nor calibration saw. No weight is trained after quantization.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rematerialization.frontier import machine
from strategies.quantization.allocation import Allocation, allocate, curve, draw_curve, label, rows, uniform
from strategies.quantization.qat import prepare
from strategies.quantization.sensitivity import candidates, estimate, measure

LENGTH = 128


def main(arguments: list[str] | None = None) -> int:
    """Train, measure, allocate, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__), help="left out: a file of Python's own")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    options = parser.parse_args(arguments)
    model, parts, trained_loss = train(options.text, options.steps, options.blocks)
    result = compare(model, parts, options.group_size, options.picture)
    result |= {"command": " ".join(["python -m benchmarks.quantization.bit_allocation", *sys.argv[1:]]),
               "machine": machine("cpu"), "training_loss": trained_loss}
    print(table(result["rows"]))
    print(f"\nDivergence in nats per byte of text. Measuring took {result['seconds_measuring']:.1f} s, estimating "
          f"{result['seconds_estimating']:.1f} s, each allocation {result['seconds_allocating']:.3f} s.")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def train(text: Path, steps: int, blocks: int) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor], float]:
    """A model of bytes, calibration and held-out rows [rows, bytes], and the last training loss in nats."""
    torch.manual_seed(0)
    data = torch.tensor(list(text.read_bytes()))
    every = data[:len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    shuffled = every[torch.randperm(len(every))]
    tenth = max(1, len(every) // 10)
    parts = {"held_out": shuffled[:tenth][:32], "calibration": shuffled[tenth:2 * tenth][:32]}
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = shuffled[2 * tenth:][torch.randint(len(every) - 2 * tenth, (8,))]
        loss = functional.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), parts, loss.item()


def compare(model: LlamaForCausalLM, parts: dict[str, torch.Tensor], group_size: int, picture: Path | None) -> dict:
    """Allocations at the bytes of each uniform scheme, by measured and by estimated sensitivities."""
    choices = candidates(group_size)
    losses = {name: divergence(model, ids) for name, ids in parts.items()}
    begun = time.perf_counter()
    measured = measure(model, choices, losses["calibration"])
    after_measuring = time.perf_counter()
    estimated = estimate(model, choices, fisher_loss, parts["calibration"].split(1))
    ended = time.perf_counter()
    found, spent = [], 0.0
    for same in uniform(measured):
        row = {"scheme": label(next(iter(same.choice.values()))), "bytes": same.bytes,
               "uniform": figures(model, same, losses)}
        for name, sensitivity in (("measured", measured), ("estimated", estimated)):
            start = time.perf_counter()
            best = allocate(sensitivity, same.bytes)
            spent += time.perf_counter() - start
            row[name] = {**rows([best])[0], **figures(model, best, losses)}
        found.append(row)
    front = curve(measured)
    together = [figures(model, one, losses) for one in front]
    if picture:
        draw_curve(front, uniform(measured), picture, [one["calibration"] for one in together])
    return {"rows": found, "curve": [{**row, **one} for row, one in zip(rows(front), together, strict=True)],
            "sensitivities": {"layers": [names[0] for names in measured.layers], "measured": measured.rises.tolist(),
                              "estimated": estimated.rises.tolist()},
            "seconds_measuring": after_measuring - begun, "seconds_estimating": ended - after_measuring,
            "seconds_allocating": spent / (2 * len(found))}


def divergence(model: LlamaForCausalLM, ids: torch.Tensor):
    """KL(full precision || as it is) on rows [rows, bytes], a mean over bytes, as a function of a model."""
    with torch.no_grad():
        full = model(ids).logits.double().log_softmax(-1)

    @torch.no_grad()
    def loss(other: LlamaForCausalLM) -> float:
        own = other(ids).logits.double().log_softmax(-1)
        return functional.kl_div(own, full, log_target=True, reduction="sum").item() / ids.numel()

    return loss


def fisher_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with bytes drawn from the model itself; see `estimate` for the root."""
    logits = model(ids).logits.flatten(0, 1)
    with torch.no_grad():
        targets = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    return functional.cross_entropy(logits, targets, reduction="sum") / len(targets) ** 0.5


def figures(model: LlamaForCausalLM, allocation: Allocation, losses: dict) -> dict:
    """Divergences with all layers quantized at once, and what was foretold."""
    student = copy.deepcopy(model)
    prepare(student, next(iter(allocation.choice.values())), rules=allocation.rules)
    return {"predicted": allocation.rise, **{name: loss(student) for name, loss in losses.items()}}


def table(found: list[dict]) -> str:
    """Rows as Markdown."""
    lines = ["| scheme | bytes | uniform: predicted | measured | held-out | allocated: predicted | measured | held-out "
             "| by estimate: held-out | held-out, uniform / allocated |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in found:
        same, best, guess = row["uniform"], row["measured"], row["estimated"]
        lines.append(f"| {row['scheme']} | {row['bytes']:,} | " + " | ".join(
            f"{value:.3g}" for value in (same["predicted"], same["calibration"], same["held_out"], best["predicted"],
                                         best["calibration"], best["held_out"], guess["held_out"]))
            + f" | {same['held_out'] / best['held_out']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
