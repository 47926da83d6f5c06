"""What torch-pruning makes of a tiny model, saved as transformers saves it: run in a process of its own.

    python -m benchmarks.pruning.peer_cut FAMILY {mlp,everything} FOLDER

Half of the channels of the feed-forward parts, or of everything but the head, are removed by magnitude. Two folders are
written: `as_saved` with the configuration as the peer leaves it, and `mended` with what its user would write into it,
the sizes read off the weights. What failed is in `error.txt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch_pruning
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.pruning.tiny_families import make, rows

UP = ("up_proj", "gate_proj", "gate_up_proj", "c_fc", "intermediate.dense", "dense_h_to_4h", "fc1", "mlp.Wi")


def main(family: str, what: str, folder: Path) -> None:
    """Cut, run, and save."""
    transformers.utils.logging.set_verbosity_error()
    model = make(family)
    model.config.use_cache = False
    before = sum(one.numel() for one in model.parameters())
    size = getattr(model.config, "head_dim", None) or getattr(model.config, "hidden_size", 0) // getattr(
        model.config, "num_attention_heads", 1)
    try:
        pruned(model, what)
        if sum(one.numel() for one in model.parameters()) == before:
            raise RuntimeError("nothing was removed")
        with torch.no_grad():
            logits = model(**rows(model)).logits
        for name, mend in (("as_saved", False), ("mended", True)):
            if mend:
                mended(model, size)
            place = folder / name
            model.save_pretrained(place)
            save_file(rows(model), place / "rows.safetensors")
            save_file({"logits": logits.contiguous()}, place / "expected.safetensors")
    except Exception as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")


def pruned(model: nn.Module, what: str) -> None:
    """Prune by the peer's own tracing; heads are given to it as its guides do for transformers."""
    config = model.config
    heads: dict[nn.Module, int] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "query")):
            heads[module] = config.num_attention_heads
        elif name.endswith(("k_proj", "v_proj", "key", "value")):
            heads[module] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (
        nn.Linear, nn.Conv2d, Conv1D, nn.Embedding))]
    kept = [module for name, module in layers if (not name.endswith(UP) if what == "mlp" else name.endswith((
        "lm_head", "classifier", "score", "classifier.1", "out_proj", "embed_out")))]
    batch = {name: value[:2] for name, value in rows(model, padded=0).items()}
    pruner = torch_pruning.pruner.BasePruner(
        model, batch, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=kept, num_heads=heads, prune_num_heads=what != "mlp", prune_head_dims=False,
        head_pruning_ratio=0.5, output_transform=lambda output: output.logits.sum())
    pruner.step()
    for module in model.modules():  # attention counts its heads itself
        for name in ("num_attention_heads", "num_heads", "num_key_value_heads"):
            projection = getattr(module, "q_proj", getattr(module, "query", None))
            if projection in heads and isinstance(getattr(module, name, None), int):
                setattr(module, name, pruner.num_heads.get(projection, heads[projection]))


def mended(model: nn.Module, size: int) -> None:
    """Write the sizes of the weights into the configuration; `size` is that of a head."""
    config: Any = model.config
    if config.model_type == "resnet":
        config.embedding_size = model.resnet.embedder.embedder.convolution.out_channels
        config.hidden_sizes = [stage.layers[0].layer[-1].convolution.out_channels
                               for stage in model.resnet.encoder.stages]
        return
    if config.model_type == "vit":
        config.hidden_size = model.classifier.in_features
    elif config.model_type != "mobilenet_v2":
        config.hidden_size = model.get_input_embeddings().weight.shape[1]
    found = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    up = next((module for name, module in model.named_modules() if name.endswith(UP)), None)
    if up is not None:
        width = up.weight.shape[1] if isinstance(up, Conv1D) else up.weight.shape[0]
        for name in ("intermediate_size", "n_inner"):
            if hasattr(config, name):
                setattr(config, name, width // (2 if "gate_up_proj" in found or "Wi" in found else 1))
    for query, key in (("q_proj", "k_proj"), ("query", "key")):
        if query in found and key in found:
            config.num_attention_heads = found[query].weight.shape[0] // size
            if hasattr(config, "num_key_value_heads"):
                config.num_key_value_heads, config.head_dim = found[key].weight.shape[0] // size, size


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
