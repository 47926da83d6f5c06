"""Held-out loss of quantized students, and what quantization-aware training costs, beside torchao's.

    python -m benchmarks.quantization.trained_quantized [--seeds 3] [--json FILE]

For each seed a small Llama is trained on the source of the Python library that runs this. Then, at each scheme, with a
scale for 32 weights:

- it is rounded as it is, to nearest (`rtn`) and as GPTQ does (`gptq`);
- it is trained on for some steps with quantized weights (`qat`), by ours and by torchao's fake quantizers: same
  weights to begin with, same rows, same optimizer, same steps;
- ours is trained the same with a teacher: half cross-entropy, half forward KL from the trained model itself after as
  many more steps in full precision, which is also what quantized students are to be compared with (`qat +
  distillation`), or forward KL alone from a larger model that was trained for longer (`qat + larger teacher`).

torchao has no ternary weights: there its two bits stand beside them. Losses are cross-entropies per token of held-out
text, of the quantized model. Costs are of a step of a wider model: medians over rounds in which all take turns, and
peak bytes. torchao: `pip install torchao`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.quickstart import machine, show
from strategies.distillation.losses.divergences import Divergence
from strategies.distillation.losses.response import IGNORED, ResponseObjective
from strategies.memory.meter import measure
from strategies.quantization.post_training import quantize
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer
from trainer.data.batches import model_inputs
from trainer.data.dataset import PreparedData, prepare_text
from trainer.experiment.load import read_experiment

ROOT = Path(__file__).parents[2]
GROUP = 32
SCHEMES: dict[str, dict[str, Any]] = {"8 bits": {"bits": 8}, "4 bits": {"bits": 4}, "3 bits": {"bits": 3},
                                      "2 bits": {"bits": 2}, "ternary": {"kind": "ternary"}}
OWN, LARGER = "qat + distillation", "qat + larger teacher"
METHODS = ("rtn", "gptq", "qat", "qat, learned scales", OWN, LARGER, "torchao qat")
# What a student minimizes beside each teacher. One that knows no more than the student could needs the text beside it.
OBJECTIVES = {OWN: ResponseObjective(0.5, (Divergence("forward_kl", 0.5),)),
              LARGER: ResponseObjective(0.0, (Divergence("forward_kl", 1.0),))}
ALONE = ResponseObjective(divergences=())
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True}
LARGE = {**SMALL, "hidden_size": 192, "intermediate_size": 576, "num_attention_heads": 6}
WIDE = {**SMALL, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "vocab_size": 1024}
BATCH, CALIBRATED = 8, 64


def main(arguments: list[str] | None = None) -> int:
    """Train, print the tables, and write what was found."""
    chosen = parser().parse_args(arguments)
    torch.set_num_threads(chosen.threads or torch.get_num_threads())
    rows = losses(chosen) if chosen.seeds else []
    found = {"settings": {name: value for name, value in vars(chosen).items() if name != "json"}, "machine": machine(),
             "versions": {name: version(name) for name in ("torch", "torchao") if find_spec(name)},
             "rows": rows, "costs": costs(chosen.rounds) if chosen.rounds else []}
    tables = [made for made, wanted in ((losses_table, chosen.seeds), (costs_table, chosen.rounds)) if wanted]
    show("\n\n".join(made(found) for made in tables), found, chosen.json)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, default=3, help="of losses; 0 for costs alone")
    made.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--base-steps", type=int, default=800, help="of the model in full precision")
    made.add_argument("--steps", type=int, default=200, help="of training with quantized weights")
    made.add_argument("--larger-steps", type=int, default=1500, help="of the larger teacher, which is trained once")
    made.add_argument("--lr", type=float, default=1e-3, help="of training with quantized weights, falling to a tenth")
    made.add_argument("--rounds", type=int, default=7, help="that costs are timed; 0 for losses alone")
    made.add_argument("--threads", type=int)
    made.add_argument("--json", type=Path)
    return made


# ---- losses

def losses(chosen: argparse.Namespace) -> list[dict]:
    """A row for each seed, scheme and method."""
    text = prepare_text(read_experiment(ROOT / "configs" / "quickstart.yaml").experiment)
    larger = trained_larger(text, chosen) if LARGER in chosen.methods else None
    rows = [] if larger is None else [
        {"seed": 0, "scheme": "full precision", "method": "larger", "loss": held_out(larger, text)}]
    return rows + [row for seed in range(chosen.seeds) for row in of_seed(seed, text, larger, chosen)]


def trained_larger(text: PreparedData, chosen: argparse.Namespace) -> nn.Module:
    """The larger teacher."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LARGE, vocab_size=len(text.tokenizer)))
    train(model, text, 2000, chosen.larger_steps, 2e-3)
    return model


def of_seed(seed: int, text: PreparedData, larger: nn.Module | None, chosen: argparse.Namespace) -> Iterator[dict]:
    """One model, and a row for each scheme and method."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, vocab_size=len(text.tokenizer)))
    train(base, text, seed, chosen.base_steps, 4e-3)
    whole = held_out(base, text)
    yield {"seed": seed, "scheme": "full precision", "method": "none", "loss": whole}
    teacher = copy.deepcopy(base)
    train(teacher, text, seed + 1000, chosen.steps, chosen.lr)
    yield {"seed": seed, "scheme": "full precision", "method": "trained on", "loss": held_out(teacher, text)}
    for scheme in chosen.schemes:
        for method in chosen.methods:
            if method == "torchao qat" and not find_spec("torchao"):
                continue
            model = copy.deepcopy(base)
            if method in ("rtn", "gptq"):
                rule = None if method == "gptq" and scheme != "ternary" else "mse"  # which of the two is better for it
                quantizer = WeightQuantizer(group_size=GROUP, rule=rule, **SCHEMES[scheme])
                quantize(model, calibration(text, seed), quantizer, method=method)
            else:
                with_weights(model, scheme, method)
                train(model, text, seed + 1000, chosen.steps, chosen.lr, {OWN: teacher, LARGER: larger}.get(method),
                      OBJECTIVES.get(method, ALONE))
            row = {"seed": seed, "scheme": scheme, "method": method, "loss": held_out(model, text)}
            print(f"seed {seed}, {scheme}, {method}: {row['loss']:.4f} (full precision {whole:.4f})", flush=True)
            yield row


def with_weights(model: nn.Module, scheme: str, method: str) -> None:
    """Make linear layers see quantized weights, by ours or torchao's."""
    if method == "torchao qat":
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        bits = SCHEMES[scheme].get("bits", 2)
        weights = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), group_size=GROUP, is_symmetric=True)
        quantize_(model, QATConfig(weight_config=weights, step="prepare"),
                  filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
        return
    rule = {"qat": None if scheme in ("8 bits", "ternary") else "mse"}.get(method, "learned")
    prepare(model, WeightQuantizer(group_size=GROUP, rule=rule, **SCHEMES[scheme]))


def train(
    model: nn.Module, text: PreparedData, seed: int, steps: int, lr: float, teacher: nn.Module | None = None,
    objective: ResponseObjective = ALONE
) -> None:
    """AdamW on rows in an order that follows from the seed."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.1 + 0.9 * (1 - step / steps)))
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(steps):
        rows = [text.train[order[(step * BATCH + number) % len(order)]] for number in range(BATCH)]
        loss(model, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, objective, teacher).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def calibration(text: PreparedData, seed: int) -> list[dict[str, Any]]:
    """Rows of the training text."""
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [text.train[number] for number in order[:CALIBRATED]]
    return [model_inputs({name: torch.stack([row[name] for row in rows[begin:begin + BATCH]]) for name in rows[0]})
            for begin in range(0, CALIBRATED, BATCH)]


def loss(model: nn.Module, batch: dict[str, torch.Tensor], objective: ResponseObjective,
         teacher: nn.Module | None = None) -> torch.Tensor:
    """Mean over target tokens."""
    teacher_targets = None
    if teacher is not None:
        with torch.no_grad():
            teacher_targets = teacher(**model_inputs(batch)).logits
    total, _ = objective(model(**model_inputs(batch)).logits, teacher_targets, batch["targets"])
    return total / (batch["targets"] != IGNORED).sum()


@torch.no_grad()
def held_out(model: nn.Module, text: PreparedData) -> float:
    """Cross-entropy per token, nats."""
    rows, total = text.held_out, 0.0
    for begin in range(0, len(rows["input_ids"]), BATCH):
        part = {name: tensor[begin:begin + BATCH] for name, tensor in rows.items()}
        total += float(loss(model, part, ALONE)) * int((part["targets"] != IGNORED).sum())
    return total / int((rows["targets"] != IGNORED).sum())


# ---- costs

def costs(rounds: int) -> list[dict]:
    """Seconds and peak bytes of a step of a wider model: plain, and with weights of each kind."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **WIDE))
    ids = torch.randint(0, WIDE["vocab_size"], (BATCH, WIDE["max_position_embeddings"]))
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    for scheme, method in (("none", "plain"), *((scheme, method) for scheme in ("8 bits", "4 bits", "2 bits")
                                                for method in ("qat", "qat, learned scales", "torchao qat"))):
        if method == "torchao qat" and not find_spec("torchao"):
            continue
        model = copy.deepcopy(plain)
        if method != "plain":
            with_weights(model, scheme, method)
        steps[scheme, method] = lambda model=model: _step(model, ids)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            begun = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - begun)
    found = []
    for (scheme, method), step in steps.items():
        measured = measure(step, torch.device("cpu"), [])
        found.append({"scheme": scheme, "method": method, "seconds": statistics.median(times[scheme, method]),
                      "peak_bytes": measured.peak})
    return found


def _step(model: nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


# ---- printing

def losses_table(found: dict) -> str:
    """Losses of each scheme and method, in Markdown."""
    rows, settings = found["rows"], found["settings"]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    lines = [f"| scheme | {' | '.join(methods)} |", "|---|" + "---:|" * len(methods)]
    for scheme in dict.fromkeys(row["scheme"] for row in rows if row["method"] in METHODS):
        of = {method: {row["seed"]: row["loss"] for row in rows if (row["scheme"], row["method"]) == (scheme, method)}
              for method in methods}
        plain = of.get("qat", {})
        shown = [f"{statistics.mean(losses.values()):.4f}" + (
            "" if method == "qat" or not plain else
            f" ({_spread([loss - plain[seed] for seed, loss in losses.items()], '+.4f')})")
            for method, losses in of.items()]
        lines.append(f"| {scheme} | {' | '.join(shown)} |")
    whole, after = (_spread([row["loss"] for row in rows if row["method"] == method])
                    for method in ("none", "trained on"))
    larger = [row["loss"] for row in rows if row["method"] == "larger"]
    lines += [f"\nCross-entropy per token on held-out text, mean of {settings['seeds']} seeds; in brackets what it is "
              f"above `qat` of the same seed, mean ± standard deviation. The model in full precision has {whole}, "
              f"and {after} after {settings['steps']} more steps. As many are with quantized weights."
              f"{f' The larger teacher has {larger[0]:.4f}.' if larger else ''}"]
    return "\n".join(lines)


def costs_table(found: dict) -> str:
    """What a step costs beside a plain one, in Markdown."""
    lines = ["| training with | step time, of plain | peak, MB | of plain |", "|---|---:|---:|---:|"]
    base = next(row for row in found["costs"] if row["method"] == "plain")
    lines += [f"| {row['scheme']}, {row['method']} | x{row['seconds'] / base['seconds']:.2f} | "
              f"{row['peak_bytes'] / 1e6:.1f} | x{row['peak_bytes'] / base['peak_bytes']:.2f} |"
              for row in found["costs"] if row is not base]
    return "\n".join(lines)


def _spread(values: list[float], form: str = ".4f") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {spread:.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
