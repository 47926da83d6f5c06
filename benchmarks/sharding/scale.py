"""Step times predicted from shapes and data sheets, beside published ones of FSDP and ZeRO-3 on 4 to 1,024 GPUs.

    python -m benchmarks.sharding.scale --json FILE

Nothing is fitted to these rows. Compute is the roofline of every operation of the step, run on fake tensors, with
matrix products at the fraction of the data sheet that a published search over shapes attained; the network is NCCL's
own model. `sources` says where each published figure is from, and what of it had to be taken for granted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
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
from strategies.rematerialization.price.unit_seconds import unit_seconds
from strategies.sharding.network import NETWORKS
from strategies.sharding.rank_residency import ShardingSetup, residency
from strategies.sharding.step_time import StepTime, UnitSeconds, step_time
from strategies.sharding.traffic import Traffic, traffic_of, whole_units
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
        why: where the prediction is more than 15% off, the reason.
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


def azure(model: str, width: int, layers: int, rows: int, sequence: int, tflops: float) -> float:
    """Tokens per second of a GPU, from TFLOP/s by the formula of that post; its B s tokens are those of one GPU."""
    operations = 96 * sequence * layers * width**2 * (1 + sequence / (6 * width) + 51200 / (16 * layers * width))
    return tflops * 1e12 / operations * sequence


POWER = "the H100 does not hold the attained rate of matrix products for a whole step: it is short of power, and the " \
        "attention and the elementwise kernels of the time were written for the A100"
PUBLISHED = (
    Published(MOSAIC, "MPT-3B", "fsdp2", "a100-80gb", 8, "dgx-a100", 10, 2, 2048, False, 10811),
    Published(MOSAIC, "MPT-7B", "fsdp2", "a100-80gb", 8, "dgx-a100", 6, 2, 2048, False, 4641),
    Published(MOSAIC, "MPT-7B", "fsdp2", "a100-40gb", 128, "dgx-a100", 18, 1, 2048, True, 3623, pure=True),
    Published(MOSAIC, "MPT-13B", "fsdp2", "a100-80gb", 8, "dgx-a100", 2, 3, 2048, False, 2262),
    Published(MOSAIC, "MPT-13B", "fsdp2", "a100-40gb", 128, "dgx-a100", 16, 1, 2048, True, 1972, pure=True),
    Published(MOSAIC, "MPT-30B", "fsdp2", "a100-80gb", 8, "dgx-a100", 3, 21, 2048, True, 916),
    Published(MOSAIC, "MPT-30B", "fsdp2", "a100-40gb", 128, "dgx-a100", 6, 1, 2048, True, 865, pure=True),
    Published(MOSAIC, "MPT-70B", "fsdp2", "a100-80gb", 64, "dgx-a100", 8, 4, 2048, True, 410, pure=True),
    Published(MOSAIC, "MPT-70B", "fsdp2", "a100-40gb", 128, "dgx-a100", 4, 1, 2048, True, 376, pure=True),
    Published(MOSAIC, "MPT-70B", "fsdp2", "a100-40gb", 64, "dgx-a100", 2, 1, 2048, True, 276, pure=True),
    Published(FMS, "CodeLlama-34B", "fsdp2", "a100-80gb", 128, "dgx-a100", 8, 1, 4096, True, 772, gbits=50),
    Published(FMS, "Llama-2-70B", "fsdp2", "a100-80gb", 128, "dgx-a100", 6, 1, 4096, True, 380, gbits=50),
    Published(MOSAIC, "MPT-7B", "fsdp2", "h100", 8, "dgx-h100", 6, 1, 2048, False, 10643, why=POWER),
    Published(MOSAIC, "MPT-13B", "fsdp2", "h100", 64, "dgx-h100", 2, 1, 2048, False, 4800, why=POWER),
    Published(MOSAIC, "MPT-70B", "fsdp2", "h100", 64, "dgx-h100", 8, 4, 2048, True, 1039, why=POWER),
    Published(GRANITE, "Llama-2-7B", "zero 3", "a100-80gb", 4, "dgx-a100", 8, 1, 4096, True, 3094.5),
    Published(GRANITE, "Llama-2-7B", "fsdp2", "a100-80gb", 4, "dgx-a100", 8, 1, 4096, True, 3158.7),
    Published(AZURE, "GPT-175B", "zero 3", "a100-80gb", 256, "dgx-a100", 32, 1, 512, True,
              azure("GPT-175B", 12288, 96, 32, 512, 204.49)),
    Published(AZURE, "GPT-530B", "zero 3", "a100-80gb", 1024, "dgx-a100", 8, 1, 1024, True,
              azure("GPT-530B", 20480, 105, 8, 1024, 171.37)),
    Published(AZURE, "GPT-1T", "zero 3", "a100-80gb", 1024, "dgx-a100", 8, 1, 1024, True,
              azure("GPT-1T", 25600, 128, 8, 1024, 165.36)),
    Published(AZURE, "GPT-2T", "zero 3", "a100-80gb", 1024, "dgx-a100", 8, 1, 1024, True,
              azure("GPT-2T", 32768, 160, 8, 1024, 157.0)),
)


def model_of(name: str, sequence: int, recompute: bool) -> nn.Module:
    """A model of fake tensors in bfloat16."""
    model = AutoModelForCausalLM.from_config(MODELS[name](sequence), dtype=torch.bfloat16).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def seconds_of(model: nn.Module, one: Published) -> dict[tuple[str, ...], UnitSeconds]:
    """Seconds of each unit in a micro-batch."""
    rows = torch.zeros(one.micro_batch, one.sequence, dtype=torch.int64)

    def loss() -> torch.Tensor:
        logits = model(input_ids=rows, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), rows.flatten())

    units = whole_units(model)
    if one.engine == "zero 3":
        units = [unit.modules for unit in traffic(model, one).units]
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


def ledger_of(model: nn.Module, one: Published) -> Ledger:
    """Model state of a rank."""
    setup, optimizer = setup_of(model, one), build(model, "adamw", lr=1e-4, betas=(0.9, 0.95), eps=None,
                                                   weight_decay=0.1)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state, update = optimizer_bytes(optimizer, setup)
    return Ledger.of(residency(model, groups, setup, optimizer_state=state, update=update), None, 0)


def predicted(one: Published) -> tuple[StepTime, Ledger, int]:
    """A step's seconds, a rank's bytes, and the number of parameters."""
    network = NETWORKS[one.network]
    if one.gbits is not None:
        network = replace(network, between=one.gbits * 1e9 / 8)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model = model_of(one.model, one.sequence, one.recompute)
        seconds, ledger = seconds_of(model, one), ledger_of(model, one)
        update = (2 * (ledger.weights + ledger.fp32_weights + ledger.optimizer_state) + ledger.gradients
                  ) / DEVICES[one.device].bandwidth
        step = step_time(traffic(model, one), seconds, network, one.ranks, one.accumulation, update)
        return step, ledger, sum(parameter.numel() for parameter in model.parameters())


def row(one: Published) -> dict:
    """A published figure and its prediction."""
    step, ledger, parameters = predicted(one)
    tokens = one.micro_batch * one.accumulation * one.sequence / step.seconds
    return {**asdict(one), "parameters": parameters, "predicted_tokens": tokens, "ratio": tokens / one.tokens,
            "step_seconds": step.seconds, "compute_seconds": step.compute, "network_seconds": step.network,
            "exposed_seconds": step.exposed, "sent_bytes": step.sent, "model_state_bytes": ledger.model_state}


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    lines = ["| engine | model | GPUs | micro-batch | step, s | network, s | of which exposed | tokens/s per GPU | "
             "published | ratio |", "|---|---|---|---|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {one['engine']} | {one['model']} | {one['ranks']} x {one['device']} | {one['accumulation']} of "
              f"{one['micro_batch']} x {one['sequence']}{', recomputed' if one['recompute'] else ''} | "
              f"{one['step_seconds']:.2f} | {one['network_seconds']:.2f} | {one['exposed_seconds']:.2f} | "
              f"{one['predicted_tokens']:,.0f} | {one['tokens']:,.0f} | {one['ratio']:.2f} |" for one in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Predict, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    rows = [row(one) for one in PUBLISHED if one.model in options.models]
    print(table(rows))
    print(f"\n{time.perf_counter() - begun:.1f} s for all of them, without weights")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
