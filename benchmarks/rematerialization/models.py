"""The models of the frontier: real shapes, narrow and short enough for a step on CPU to take a fraction of a second.

Each gives a model, a batch, and the blocks (and for convolutional networks the stages) that peers checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers
from torch import nn
from torch.nn import functional as F

WIDTH, LAYERS, VOCABULARY, ROWS, LENGTH = 256, 6, 1024, 4, 128


def language(model: nn.Module, blocks: Callable[[nn.Module], Sequence[nn.Module]]) -> tuple:
    """A language model with tokens to predict."""
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    return model, {"input_ids": tokens, "labels": tokens, "use_cache": False}, list(blocks(model))


def gpt2() -> tuple:
    """GPT-2 with its default dropout of 0.1."""
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=LENGTH,
                                     bos_token_id=0, eos_token_id=0)
    return language(transformers.GPT2LMHeadModel(config), lambda model: model.transformer.h)


def llama() -> tuple:
    """Llama, with grouped queries."""
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=688,
                                      num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2)
    return language(transformers.LlamaForCausalLM(config), lambda model: model.model.layers)


def qwen() -> tuple:
    """Qwen3, deeper, with queries and keys normalized."""
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True)
    return language(transformers.Qwen3ForCausalLM(config), lambda model: model.model.layers)


def vit() -> tuple:
    """ViT, 101 tokens to an image."""
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, image_size=80,
        patch_size=8, num_labels=100))
    batch = {"pixel_values": torch.randn(6, 3, 80, 80), "labels": torch.randint(0, 100, (6,))}
    return model, batch, list(next(part for part in model.modules() if isinstance(part, nn.ModuleList)))


def resnet50() -> tuple:
    """ResNet-50 on small images."""
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=100))
    batch = {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(0, 100, (8,))}
    stages = list(model.resnet.encoder.stages)
    return model, batch, [block for stage in stages for block in stage.layers], stages


class Residual(nn.Module):
    """Norm, activation and convolution twice, beside a shortcut: a residual block of a diffusion model's U-Net."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, before), nn.GroupNorm(8, width)])
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, width, 3, padding=1) for channels in (before, width))
        self.shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, before, H, W] to [N, width, H, W]."""
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(F.silu(norm(y)))
        return y + self.shortcut(x)


class UNet(nn.Module):
    """Stages down and up, and what each leaves on the way down is concatenated on the way up."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, widths[0], 3, padding=1), nn.Conv2d(widths[0], 3, 3, padding=1)
        below = [*widths[1:], widths[-1]]
        self.down = nn.ModuleList(nn.Sequential(Residual(before, width), Residual(width, width))
                                  for before, width in zip([widths[0], *widths], widths, strict=False))
        self.middle = Residual(widths[-1], widths[-1])
        self.up = nn.ModuleList(nn.Sequential(Residual(before + width, width), Residual(width, width))
                                for before, width in zip(below, widths, strict=True))

    def forward(self, noisy: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both [N, 3, H, W]."""
        x, skips = self.enter(noisy), []
        for stage in self.down:
            skips.append(stage(x))
            x = F.avg_pool2d(skips[-1], 2)
        x = self.middle(x)
        for stage in reversed(self.up):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return {"loss": F.mse_loss(self.leave(x), noise)}


def unet() -> tuple:
    """A U-Net that finds the noise in small images."""
    model = UNet()
    batch = {"noisy": torch.randn(4, 3, 48, 48), "noise": torch.randn(4, 3, 48, 48)}
    blocks = [part for part in model.modules() if isinstance(part, Residual)]
    return model, batch, blocks, [*model.down, model.middle, *model.up]


MODELS = {make.__name__: make for make in (gpt2, llama, qwen, vit, resnet50, unet)}
