"""Step times predicted from shapes and data sheets, beside published ones of FSDP and ZeRO-3 on 4 to 1,024 GPUs.

    python -m benchmarks.sharding.scale --json FILE

Compute is the roofline of every operation of a step on fake tensors, with matrix products at the fraction of the data
sheet that a published search over shapes attained; the network is NCCL's own model. There is one calibration: the share
of that roofline's speed which a whole step held in one row for each kind of GPU, of a single node (`calibrates`), and
which `limbeck scale` uses, too. All other rows are predictions; `by_data_sheet` is their ratio without the calibration,
and `one_by_one` is that with it, if no collective ran beside computation.

`growth` is the same for three models under every engine, on 1 to 1,024 GPUs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from benchmarks.rematerialization.frontier import machine
from strategies.memory.ledger import Ledger
from strategies.optimizers.by_name import build
from strategies.rematerialization.price.costs import DEVICES
from strategies.rematerialization.price.unit_seconds import SUSTAINED, unit_seconds
from strategies.sharding.network import NETWORKS, Network
from strategies.sharding.rank_residency import ShardingSetup, residency
from strategies.sharding.step_time import StepTime, UnitSeconds, step_time
from strategies.sharding.traffic import Traffic, traffic_of
from strategies.sharding.zero import bucket_numel
from trainer.distributed.rank_memory import optimizer_bytes

MOSAIC = "mosaicml/llm-foundry: scripts/train/benchmarking/README.md"
AZURE = "microsoft/DeepSpeed: docs/_posts/2022-07-26-deepspeed-azure.md"
FMS = "foundation-model-stack/fms-fsdp: README.md"
TITAN = "pytorch/torchtitan: benchmarks/llama3_h100_202412_torchtitan.md"
GRANITE = "huggingface/blog: deepspeed-to-fsdp-and-back.md"


@dataclass(frozen=True)
class Published:
    """A published throughput.

    Attributes:
        source: repository and file.
        model: name of the shape.
        engine: fsdp2 or zero 3.
        device, ranks, network: hardware; `gbits` per GPU between nodes, if not the network's.
        micro_batch, accumulation, sequence: rows per forward, forwards per step, tokens per row.
        recompute: whether all of a block is recomputed in backward.
        tokens: published tokens per second and GPU.
        pure: whether gradients are reduced in 16 bit, too.
        why: where the prediction is more than 15% off, the reason as far as it is known.
        calibrates: whether the GPU's `SUSTAINED` is from this row.
    """

    source: str
    model: str
    engine: str
    device: str
    ranks: int
    network: str
    micro_batch: int
    accumulation: int
    sequence: int
    recompute: bool
    tokens: float
    pure: bool = False
    gbits: float | None = None
    why: str = ""
    calibrates: bool = False


def gpt(width: int, layers: int, heads: int, vocabulary: int = 50368) -> Callable[[int], GPT2Config]:
    """GPT-2's block, as MPT and Megatron-LM have it up to what costs no time, with a vocabulary padded for speed."""
    return lambda sequence: GPT2Config(
        n_embd=width, n_layer=layers, n_head=heads, vocab_size=vocabulary, n_positions=sequence,
        activation_function="gelu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)


def llama(width: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int) -> Callable[[int], LlamaConfig]:
    """Llama's block."""
    return lambda sequence: LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, vocab_size=vocabulary, max_position_embeddings=sequence, tie_word_embeddings=False)


MODELS = {
    "MPT-3B": gpt(2560, 32, 20), "MPT-7B": gpt(4096, 32, 32), "MPT-13B": gpt(5120, 40, 40),
    "MPT-30B": gpt(7168, 48, 56), "MPT-70B": gpt(8192, 80, 64),
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000), "Llama-2-70B": llama(8192, 28672, 80, 64, 8, 32000),
    "CodeLlama-34B": llama(8192, 22016, 48, 64, 8, 32000), "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "GPT-175B": gpt(12288, 96, 96, 51200), "GPT-530B": gpt(20480, 105, 128, 51200),
    "GPT-1T": gpt(25600, 128, 160, 51200), "GPT-2T": gpt(32768, 160, 128, 51200),
}


def azure(width: int, layers: int, sequence: int, tflops: float) -> float:
    """Tokens per second of a GPU, from TFLOP/s by the formula of that post, in which recomputation counts."""
    operations = 96 * sequence * layers * width**2 * (1 + sequence / (6 * width) + 51200 / (16 * layers * width))
    return tflops * 1e12 / operations * sequence


SHORT = "4,096 tokens a forward: the roofline has matrix products as fast as those of more tokens, and no waiting " \
        "for processes; on one node of 8 the source has 4,792 tokens/s, so it is no matter of the network"
FULL = "not known: with 128 GPUs and twice the tokens the same source is within 15%, so that it is no matter of the " \
       "shapes; 40 GB are nearly full, and torch's allocator may wait for the GPU (Zhao et al. 2023, section 3.4)"
OFFLOAD = "activations and optimizer state were moved to the CPU and back, which is not in the model, with kernels " \
          "of 2022; the source scales from 128 to 1,024 GPUs almost linearly, so little of it is the network's"
PUBLISHED = (
    Published(MOSAIC, "MPT-3B", "fsdp2", "a100-80gb", 8, "dgx-a100", 10, 2, 2048, False, 10811),
    Published(MOSAIC, "MPT-7B", "fsdp2", "a100-80gb", 8, "dgx-a100", 6, 2, 2048, False, 4641,
              calibrates=True),
    Published(MOSAIC, "MPT-7B", "fsdp2", "a100-40gb", 128, "dgx-a100", 18, 1, 2048, True, 3623, pure=True),
    Published(MOSAIC, "MPT-13B", "fsdp2", "a100-80gb", 8, "dgx-a100", 2, 3, 2048, False, 2262),
    Published(MOSAIC, "MPT-13B", "fsdp2", "a100-40gb", 128, "dgx-a100", 16, 1, 2048, True, 1972, pure=True),
    Published(MOSAIC, "MPT-30B", "fsdp2", "a100-80gb", 8, "dgx-a100", 3, 21, 2048, True, 916),
    Published(MOSAIC, "MPT-30B", "fsdp2", "a100-40gb", 128, "dgx-a100", 6, 1, 2048, True, 865, pure=True),
    Published(MOSAIC, "MPT-70B", "fsdp2", "a100-80gb", 64, "dgx-a100", 8, 4, 2048, True, 410, pure=True),
    Published(MOSAIC, "MPT-70B", "fsdp2", "a100-40gb", 128, "dgx-a100", 4, 1, 2048, True, 376, pure=True),
    Published(MOSAIC, "MPT-70B", "fsdp2", "a100-40gb", 64, "dgx-a100", 2, 1, 2048, True, 276, pure=True, why=FULL),
    Published(FMS, "CodeLlama-34B", "fsdp2", "a100-80gb", 128, "dgx-a100", 8, 1, 4096, True, 772, gbits=50),
    Published(FMS, "Llama-2-70B", "fsdp2", "a100-80gb", 128, "dgx-a100", 6, 1, 4096, True, 380, gbits=50),
    Published(MOSAIC, "MPT-7B", "fsdp2", "h100", 8, "dgx-h100", 6, 1, 2048, False, 10643, calibrates=True),
    Published(MOSAIC, "MPT-13B", "fsdp2", "h100", 64, "dgx-h100", 2, 1, 2048, False, 4800, why=SHORT),
    Published(MOSAIC, "MPT-70B", "fsdp2", "h100", 64, "dgx-h100", 8, 4, 2048, True, 1039),
    Published(GRANITE, "Llama-2-7B", "zero 3", "a100-80gb", 4, "dgx-a100", 8, 1, 4096, True, 3094.5),
    Published(GRANITE, "Llama-2-7B", "fsdp2", "a100-80gb", 4, "dgx-a100", 8, 1, 4096, True, 3158.7),
    Published(AZURE, "GPT-175B", "zero 3", "a100-80gb", 256, "dgx-a100", 32, 1, 512, True,
              azure(12288, 96, 512, 204.49)),
    Published(AZURE, "GPT-530B", "zero 3", "a100-80gb", 1024, "dgx-a100", 8, 1, 1024, True,
              azure(20480, 105, 1024, 171.37), why=OFFLOAD),
    Published(AZURE, "GPT-1T", "zero 3", "a100-80gb", 1024, "dgx-a100", 8, 1, 1024, True,
              azure(25600, 128, 1024, 165.36), why=OFFLOAD),
    Published(AZURE, "GPT-2T", "zero 3", "a100-80gb", 1024, "dgx-a100", 8, 1, 1024, True,
              azure(32768, 160, 1024, 157.0), why=OFFLOAD),
)


def model_of(name: str, sequence: int, recompute: bool, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of fake tensors."""
    model = AutoModelForCausalLM.from_config(MODELS[name](sequence), dtype=dtype).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def seconds_of(model: nn.Module, one: Published, units: Sequence[tuple[str, ...]] | None = None
               ) -> dict[tuple[str, ...], UnitSeconds]:
    """Seconds of each unit in a micro-batch, by the data sheet; None for the units of its engine."""
    rows = torch.zeros(one.micro_batch, one.sequence, dtype=torch.int64)

    def loss() -> torch.Tensor:
        logits = model(input_ids=rows, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), rows.flatten())

    units = units or [unit.modules for unit in traffic(model, one).units]
    found = unit_seconds(loss, {"student": model}, {"student": units}, DEVICES[one.device])["student"]
    return {unit: UnitSeconds(*pair) for unit, pair in found.items()}


def setup_of(model: nn.Module, one: Published) -> ShardingSetup:
    """How it is sharded."""
    return ShardingSetup(engine=one.engine.split()[0], ranks=one.ranks, compute=torch.bfloat16, gloo=False,
                         bucket=bucket_numel(model), ahead=bucket_numel(model), accumulates=one.accumulation > 1)


def traffic(model: nn.Module, one: Published) -> Traffic:
    """What is sent: DeepSpeed overlapped communication there, which our engine does not have it do."""
    found = replace(traffic_of(model, [list(model.parameters())], setup_of(model, one)), overlaps=True)
    if not one.pure:
        return found
    return replace(found, units=tuple(replace(unit, reduces=unit.reduces // 2) for unit in found.units))


def ledger_of(model: nn.Module, one: Published, setup: ShardingSetup | None = None) -> Ledger:
    """Bytes of a rank without activations; weights that are updated are fp32."""
    setup, model = setup or setup_of(model, one), model_of(one.model, one.sequence, False, torch.float32)
    optimizer = build(model, "adamw", lr=1e-4, betas=(0.9, 0.95), eps=None, weight_decay=0.1)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state, update = optimizer_bytes(optimizer, setup)
    return Ledger.of(residency(model, groups, setup, optimizer_state=state, update=update), None, 0)


def update_seconds(ledger: Ledger, one: Published) -> float:
    """Seconds in which the optimizer reads and writes a rank's weights and state, and reads its gradients."""
    moved = 2 * (ledger.weights + ledger.fp32_weights + ledger.optimizer_state) + ledger.gradients
    return moved / DEVICES[one.device].bandwidth


def network_for(one: Published) -> Network:
    """The cluster's links."""
    network = NETWORKS[one.network]
    return network if one.gbits is None else replace(network, between=one.gbits * 1e9 / 8)


def predicted(one: Published) -> dict:
    """Step times of a row by the data sheet, calibrated, and calibrated without overlap; and bytes of a rank."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model = model_of(one.model, one.sequence, one.recompute)
        seconds, ledger, sends = seconds_of(model, one), ledger_of(model, one), traffic(model, one)
        parameters = sum(parameter.numel() for parameter in model.parameters())

    def step(share: float, how: Traffic) -> StepTime:
        slower = {unit: UnitSeconds(own.forward / share, own.backward / share) for unit, own in seconds.items()}
        return step_time(how, slower, network_for(one), one.ranks, one.accumulation, update_seconds(ledger, one))

    share = SUSTAINED[one.device]
    return {"parameters": parameters, "model_state_bytes": ledger.model_state, "sheet": step(1.0, sends),
            "step": step(share, sends), "serial": step(share, replace(sends, overlaps=False))}


def row(one: Published) -> dict:
    """A published figure and its prediction."""
    found = predicted(one)
    sheet, step, serial = found.pop("sheet"), found.pop("step"), found.pop("serial")
    tokens = one.micro_batch * one.accumulation * one.sequence
    return {**asdict(one), **found, "predicted_tokens": tokens / step.seconds,
            "ratio": tokens / step.seconds / one.tokens, "by_data_sheet": tokens / sheet.seconds / one.tokens,
            "one_by_one": tokens / serial.seconds / one.tokens, "step_seconds": step.seconds,
            "compute_seconds": step.compute, "network_seconds": step.network, "exposed_seconds": step.exposed,
            "sent_bytes": step.sent}


RANKS = (1, 8, 64, 256, 1024)
ENGINES = {"ddp": ("ddp", 3), "zero 1": ("zero", 1), "zero 2": ("zero", 2), "zero 3": ("zero", 3),
           "fsdp2": ("fsdp2", 3)}
GROWN = ("Llama-3.1-8B", "CodeLlama-34B", "Llama-2-70B")


def growth(name: str) -> list[dict]:
    """One model under each engine as it is set up here, 2 rows of 4,096 tokens per H100 and step, recomputed."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model = model_of(name, 4096, True)
        return [grown(model, name, engine, ranks) for engine in ENGINES for ranks in RANKS]


_seconds: dict[tuple, dict[tuple[str, ...], UnitSeconds]] = {}


def grown(model: nn.Module, name: str, engine: str, ranks: int) -> dict:
    """A step and the bytes of a rank."""
    kind, stage = ENGINES[engine]
    one = Published("", name, engine, "h100", ranks, "dgx-h100", 2, 1, 4096, True, 0)
    setup = replace(setup_of(model, one), engine=kind, stage=stage)
    ledger, sends = ledger_of(model, one, setup), traffic_of(model, [list(model.parameters())], setup)
    share, units = SUSTAINED["h100"], [unit.modules for unit in sends.units]
    key = name, tuple(units)
    if key not in _seconds:
        _seconds[key] = {unit: UnitSeconds(own.forward / share, own.backward / share)
                         for unit, own in seconds_of(model, one, units).items()}
    step = step_time(sends, _seconds[key], network_for(one), ranks, 1, update_seconds(ledger, one))
    return {"model": name, "engine": engine, "ranks": ranks, "step_seconds": step.seconds,
            "network_seconds": step.network, "exposed_seconds": step.exposed, "tokens": 2 * 4096 / step.seconds,
            "sent_bytes": step.sent, "model_state_bytes": ledger.model_state,
            "rank_bytes": ledger.model_state + ledger.gathered + ledger.communication}


def table(rows: list[dict]) -> str:
    """Rows as Markdown, and why some are off."""
    lines = ["| engine | model | GPUs | forwards x rows x tokens | step, s | network, s | tokens/s per GPU | published "
             "| ratio | by data sheet |", "|---|---|---|---|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {one['engine']} | {one['model']} | {one['ranks']} {one['device']} | {one['accumulation']} x "
              f"{one['micro_batch']} x {one['sequence']:,}{', recomputed' if one['recompute'] else ''} | "
              f"{one['step_seconds']:.2f} | {one['network_seconds']:.2f} | "
              f"{one['predicted_tokens']:,.0f} | {one['tokens']:,.0f} | "
              f"{'calibrates' if one['calibrates'] else format(one['ratio'], '.2f')} | {one['by_data_sheet']:.2f} |"
              for one in rows]
    reasons: dict[str, list[str]] = {}
    for one in rows:
        if abs(one["ratio"] - 1) > 0.15:
            reasons.setdefault(one["why"], []).append(f"{one['model']} on {one['ranks']} ({one['one_by_one']:.2f} if "
                                                      "nothing overlapped)")
    others = [one for one in rows if not one["calibrates"]]
    near = sum(abs(one["ratio"] - 1) <= 0.15 for one in others)
    listed = [f"- {', '.join(names)}: {why}." for why, names in reasons.items()]
    return "\n".join([*lines, f"\n{near} of {len(others)} predictions are within 15%. The others:\n", *listed])


def growth_table(rows: list[dict]) -> str:
    """Steps by number of GPUs as Markdown: seconds, and GB of a rank."""
    ranks = list(dict.fromkeys(one["ranks"] for one in rows))
    lines = [f"| model | engine | {' | '.join(f'{count:,}' for count in ranks)} GPUs |",
             f"|---|---|{'---:|' * len(ranks)}"]
    for model, engine in dict.fromkeys((one["model"], one["engine"]) for one in rows):
        own = [one for one in rows if (one["model"], one["engine"]) == (model, engine)]
        cells = [f"{one['step_seconds']:.2f} s, {one['rank_bytes'] / 1e9:,.0f} GB" for one in own]
        lines.append(f"| {model} | {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Predict, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    rows = [row(one) for one in PUBLISHED if one.model in options.models]
    larger = [one for name in GROWN if name in options.models for one in growth(name)]
    print(f"{table(rows)}\n\n{growth_table(larger)}" if larger else table(rows))
    print(f"\n{time.perf_counter() - begun:.1f} s for all of them, without weights")
    if options.json:
        options.json.write_text(json.dumps({
            "machine": machine("cpu"), "sustained": SUSTAINED, "rows": rows, "growth": larger}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
