"""Names of tensors in a file: transformers keeps some weights otherwise in memory than on disk, experts above all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.core_model_loading import revert_weight_conversion

MADE_FROM = "_weight_conversions"  # what a loaded model remembers of its file, old names among it


def as_saved(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model under the names, and in the pieces, that its own `save_pretrained` writes.

    They are those of a model that was made from its configuration, whatever file its weights once came from: a student
    has the same names after every engine.
    """
    with _made_afresh(model):
        return dict(revert_weight_conversion(model, dict(tensors)))


def renamed(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names that `save_pretrained` writes, but in the pieces that the model has in memory.

    What a file has in other pieces keeps its name, which transformers reads as well.
    """
    names = {id(tensor): name for name, tensor in as_saved(model, tensors).items()}
    return {names.get(id(tensor), name): tensor for name, tensor in tensors.items()}


def saved_rows(model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, dict[str, torch.Tensor]]:
    """For each weight, the names that its rows have in a file, and which rows those are.

    Found by writing row numbers in place of weights, so that it holds for whatever transformers does with them.

    Args:
        shapes: of weights (..., outputs, inputs) by name; rows are counted over all but the last dimension.

    Returns:
        By weight: name in the file -> numbers (rows,) of the rows that it has. Empty where a file mixes rows of several
        weights, turns them around or has more than two dimensions for them.
    """
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in shapes}
    with unset_fake_temporarily(), torch.device("cpu"):
        counts = torch.tensor([0, *(shape[:-1].numel() for shape in shapes.values())])
        ends = counts.cumsum(0)
        numbers = {name: torch.arange(int(begin), int(begin) + shape[:-1].numel()).view(*shape[:-1], 1)
                   for (name, shape), begin in zip(shapes.items(), ends, strict=False)}
        names = list(shapes)
        for saved, rows in as_saved(model, numbers).items():
            of = torch.bucketize(rows.flatten(), ends[1:], right=True).unique().tolist()
            whole = rows.ndim == 2 and rows.shape[1] == 1 and len(of) == 1
            for place in of:
                found[names[place]][saved if whole else ""] = rows.flatten() - ends[place]
    return {name: {} if "" in rows else rows for name, rows in found.items()}


@contextmanager
def _made_afresh(model: nn.Module) -> Iterator[None]:
    remembered = model.__dict__.pop(MADE_FROM, None)
    try:
        yield
    finally:
        if remembered is not None:
            setattr(model, MADE_FROM, remembered)
