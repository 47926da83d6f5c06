"""Names of tensors on disk: transformers stores some weights differently in memory, above all those of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.core_model_loading import revert_weight_conversion

MADE_FROM = "_weight_conversions"  # the conversions, including old names, that a loaded model remembers of its file


def as_saved(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model under the names and in the pieces that its own `save_pretrained` writes.

    The names are those of a model made from its configuration, whatever file its weights came from, so that a student
    has the same names with every sharding engine.
    """
    with _made_afresh(model):
        return dict(revert_weight_conversion(model, dict(tensors)))


def renamed(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names that `save_pretrained` writes, but in the pieces that the model has in memory.

    A tensor that a file would have in other pieces keeps its name, which transformers can read too.
    """
    names = {id(tensor): name for name, tensor in as_saved(model, tensors).items()}
    return {names.get(id(tensor), name): tensor for name, tensor in tensors.items()}


def saved_rows(model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, dict[str, torch.Tensor]]:
    """For each weight, the tensors of the file that hold its rows, and which rows each holds.

    They are found by converting row indices in place of weights, so the result is right whatever transformers does.

    Args:
        shapes: of weights (..., outputs, inputs) by name; rows are counted over all but the last dimension.

    Returns:
        For each weight, a dict from a name in the file to the indices (rows,) of its rows. It is empty if the file
        mixes rows of several weights, transposes them, or stores them in more than two dimensions.
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
