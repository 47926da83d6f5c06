"""Tiny models and comparisons that the tests of rematerialization share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from strategies.rematerialization import planner
from strategies.rematerialization.execute import segments
from strategies.rematerialization.execute.installed import Planned
from strategies.rematerialization.price import block_options
from strategies.rematerialization.solve.chain_program import Block, Segment
from strategies.rematerialization.solve.solver import solve

VOCABULARY, WIDTH, HEADS, ROWS, LENGTH = 48, 32, 4, 2, 12


@contextmanager
def quick(monkeypatch, levels: tuple[float, ...]) -> Iterator[None]:
    """One thread, few options for each block, short searches, and segments that drop even the smallest tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(block_options, "LEVELS", levels)
    monkeypatch.setattr(segments, "SMALL", 0)
    monkeypatch.setattr(planner, "LEAST_MOVES", 100_000)
    monkeypatch.setattr(planner, "solve", lambda graph, budget, seconds, **asked: solve(graph, budget, min(seconds, 1),
                                                                                       **asked))
    yield
    torch.set_num_threads(threads)


def tokens(rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
    """(rows, length) numbers of tokens, the same each time."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def text_batch(**more) -> dict[str, object]:
    """A batch for a causal language model."""
    return {"input_ids": tokens(), "labels": tokens(), **more}


def results(model: nn.Module, batch: object, autocast: torch.dtype | None = None, loss=None, backward=None) -> dict:
    """Loss, gradients and buffers of one step; the model's buffers and gradients are afterwards as before."""
    from strategies.rematerialization.rematerialize import loss_of

    buffers = copy.deepcopy(dict(model.named_buffers()))
    model.zero_grad()
    torch.manual_seed(11)
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        value = (loss or loss_of)(model, batch)
    (backward or torch.Tensor.backward)(value)
    found = {"loss": value.detach().clone(), "generator": torch.get_rng_state()}
    found |= {f"gradient of {name}": parameter.grad.clone() for name, parameter in model.named_parameters()
              if parameter.grad is not None}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return found


def assert_equal(found: dict, expected: dict, what: object = "") -> None:
    """Bitwise, not-a-numbers included."""
    assert found.keys() == expected.keys(), what
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong, f"{what}: {wrong[:6]}, off by " + str([(found[name] - expected[name]).abs().max().item()
                                                            for name in wrong[:6] if name != "generator"])


def by_hand(planner, schedule, links=None) -> Planned:
    """A schedule installed without having been chosen for a budget; `links` if not the planner's."""
    planned = Planned([call.module for call in planner.calls], schedule,
                      [link.options for link in links or planner.links], planner.orders)
    planned._functions = planner.__dict__.setdefault("functions", {})  # what was compiled for other schedules serves
    planned.install()
    return planned


def schedules(planner) -> list[tuple]:
    """Forced schedules for a chain of four blocks and more: segments, segments in segments, and options inside."""
    ways = [len(link.options) for link in planner.links]
    count = len(ways)

    def block(position: int, which: int = 0) -> Block:
        return Block(position, which % ways[position])

    def blocks(first: int, last: int, which: int = 0) -> tuple:
        return tuple(block(position, which) for position in range(first, last))

    whole = Segment(0, count, blocks(0, count))
    behind = (*blocks(0, 1, 1), Segment(1, count, blocks(1, count, 2)))
    alone = tuple(Segment(position, position + 1, (block(position, position),)) for position in range(count))
    inner = Segment(1, count, (Segment(1, count - 1, blocks(1, count - 1, -1)), block(count - 1, -1)))
    nested = Segment(0, count, (block(0), inner))  # blocks run four times
    return [(whole,), behind, alone, (nested,)]


def language_model(kind: str, layers: int = 4) -> nn.Module:
    """A tiny model of transformers for text, or for images ("vit", "resnet"), ready to train."""
    import transformers as hf

    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": layers,
              "num_attention_heads": HEADS, "max_position_embeddings": 64}
    if kind in ("llama", "qwen2", "qwen3"):
        config = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config, "qwen3": hf.Qwen3Config}[kind]
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        more = {"head_dim": 8} if kind == "qwen3" else {}
        model = hf.AutoModelForCausalLM.from_config(config(**common, **ends, **more, num_key_value_heads=2))
    elif kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=layers, n_head=HEADS,
                                                 n_positions=64, bos_token_id=0, eos_token_id=1))
    elif kind == "bert":
        model = hf.BertForMaskedLM(hf.BertConfig(**common))
    elif kind == "t5":
        model = hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3,
            num_heads=HEADS, decoder_start_token_id=0, dropout_rate=0.0))
    elif kind == "vit":
        model = hf.ViTForImageClassification(hf.ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS, intermediate_size=48,
            image_size=16, patch_size=4, num_labels=5))
    elif kind == "resnet":
        model = hf.ResNetForImageClassification(hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", num_labels=5))
    else:
        model = UNet()
    return model.train()


def batch_for(kind: str) -> dict[str, object]:
    """What a model of this kind takes."""
    generator = torch.Generator().manual_seed(5)
    if kind in ("vit", "resnet"):
        size = 16 if kind == "vit" else 32
        return {"pixel_values": torch.randn(3, 3, size, size, generator=generator), "labels": torch.tensor([0, 3, 4])}
    if kind == "unet":
        return {"images": torch.randn(2, 3, 16, 16, generator=generator)}
    return text_batch(attention_mask=torch.ones(ROWS, LENGTH, dtype=torch.long)) if kind == "bert" else text_batch()


class UNet(nn.Module):
    """Two levels down and up, with skips and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.level(3, 8), self.level(8, 16)])
        self.middle = self.level(16, 16)
        self.up = nn.ModuleList([self.level(32, 8), self.level(16, 8)])
        self.last = nn.Conv2d(8, 3, 1)

    @staticmethod
    def level(into: int, out: int) -> nn.Module:
        """Two convolutions of the same size."""
        return nn.Sequential(nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.SiLU(),
                             nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), nn.SiLU())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(rows, 3, height, width) -> the loss of giving them back"""
        skips, x = [], images
        for level in self.down:
            skips.append(level(x))
            x = nn.functional.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for level in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = level(torch.cat([x, skips.pop()], 1))
        return {"loss": (self.last(x) - images).square().mean()}
