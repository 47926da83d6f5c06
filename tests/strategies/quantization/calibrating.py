"""Small models with something to calibrate, and rows for it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.conftest import TINY, sentences

KINDS = {"gemma3_text": {"sliding_window": 8, "head_dim": 32, "layer_types": [
    "sliding_attention", "full_attention", "sliding_attention"]}}


def build(kind: str = "llama", **changes) -> nn.Module:
    """A model with norms that are not all one, and biases that are not all zero."""
    torch.manual_seed(3)
    torch.set_num_threads(1)
    config = AutoConfig.for_model(**{**TINY, "hidden_size": 64, "vocab_size": 90, "pad_token_id": 0, "model_type": kind,
                                     **KINDS.get(kind, {}), **changes})
    model = (AutoModel if kind == "bert" else AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def rows(count: int = 4, tokens: int = 24, seed: int = 0, packed: bool = True) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows; packed ones hold two documents each."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 90, (2, tokens), generator=generator) for _ in range(count)]
    half = torch.arange(tokens // 2)
    positions = torch.cat([half, torch.arange(tokens - len(half))]).expand(2, tokens)
    # With a cache transformers takes a packed row for one document.
    more = {"position_ids": positions, "use_cache": False} if packed else {}
    return [{"input_ids": one, **more} for one in ids]


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits.float()


@torch.no_grad()
def plant_outliers(model: nn.Module, size: float = 60.0) -> nn.Module:
    """Have two channels of every norm's output `size` times as large, and what reads them as much smaller."""
    for block in model.model.layers:
        for norm, readers in ((block.input_layernorm, [block.self_attn.q_proj, block.self_attn.k_proj,
                                                       block.self_attn.v_proj]),
                              (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj])):
            norm.weight[[5, 40]] *= size
            for reader in readers:
                reader.weight[:, [5, 40]] /= size
    return model


def trained(steps: int = 120) -> tuple[nn.Module, list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """A model that has learned a little grammar, letter by letter, with calibration and held-out rows of it."""
    model = build(vocab_size=96, num_hidden_layers=2).train()
    letters = torch.tensor([ord(letter) % 96 for letter in sentences(1, 2400)])
    loss_mask, others = letters[:64 * 640].view(-1, 16, 40), letters[64 * 640:70 * 640].view(-1, 16, 40)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(steps):
        ids = loss_mask[step % len(loss_mask)]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), [{"input_ids": ids} for ids in loss_mask[:12]], [{"input_ids": ids} for ids in others]


def divergence(model: nn.Module, reference: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """KL of the model from the reference, in nats a token."""
    total = [nn.functional.kl_div(logits(model, batch).log_softmax(-1), logits(reference, batch).log_softmax(-1),
                                  reduction="none", log_target=True).sum(-1).mean() for batch in batches]
    return float(torch.stack(total).mean())
