"""The response loss of a tile on a CPU by compiled kernels, whose rows are shared out to threads.

A chain of torch operations over a block of logits waits for all threads after each of them. Beside other work, where a
thread is put aside for milliseconds, it took 12 times as long as alone. Here a thread takes a few rows at a time, from
logits to gradient, and they meet once per tile; and what a chain reads and writes 20 times passes by three times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from strategies.common.kernel_threads import in_threads
from strategies.common.planned_device import kind_of
from strategies.distillation.losses.divergences import Divergence
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.logit_blocks import Taught, Terms

LEAST = 512  # columns from which rows are worth it; few classes are not
PIECES = 4  # of a tile for each thread: one that is put aside then holds up the others for little


def applies(products: torch.Tensor, terms: Terms, teacher_targets: Taught, whole: bool) -> bool:
    """Whether the kernels compute these terms.

    Args:
        products: (rows, vocabulary) of the student's hidden states and head.
        teacher_targets: of these rows.
        whole: whether student and teacher are compared in all of their columns.
    """
    if kind_of(products) != "cpu" or products.dtype is not torch.float32 or products.shape[1] < LEAST:
        return False
    taught = terms.divergences
    return not taught or (whole and len(taught) == 1 and taught[0].name != "uld"
                          and isinstance(teacher_targets, torch.Tensor)
                          and teacher_targets.dtype is torch.float32 and teacher_targets.shape == products.shape)


def on_tile(terms: Terms, products: torch.Tensor, head: Head, targets: torch.Tensor,
            teacher_logits: torch.Tensor | None, asked: torch.Tensor | None, gradient: bool) -> torch.Tensor:
    """As `Terms.on_block`, for a whole tile; `teacher_logits` (rows, vocabulary) are overwritten."""
    if isinstance(products, FakeTensor) or not len(products):
        return products.new_zeros(len(terms.names))
    from strategies.distillation.losses import row_kernels as kernels  # not imported before it is needed: numba
    from strategies.distillation.losses import slope_kernels

    logits = products if head.scale == 1 else products.mul_(head.scale)
    if head.cap is not None:
        logits.div_(head.cap).tanh_().mul_(head.cap)
    text = kernels.Text(float(terms.cross_entropy), float(terms.label_smoothing), float(terms.z_loss))
    shape = kernels.Shape(np.float32(1 / head.cap if head.cap else 0.0), np.float32(head.scale))
    values, places = np.zeros((len(products), 3)), targets.numpy()
    own = logits.numpy()
    least, most = targets.aminmax()
    if least < 0 or most >= own.shape[1]:  # the kernels do not ask
        raise IndexError(f"index {int(least if least < 0 else most)} is out of bounds: a target is one of "
                         f"{own.shape[1]} tokens")
    if teacher_logits is None:
        _for_rows(len(own), lambda begin, end: kernels.text_rows(own, places, begin, end, text, shape, values,
                                                                  gradient))
    else:
        divergence = terms.divergences[0]
        kernel = kernels.forward_kl_rows if divergence.name == "forward_kl" else slope_kernels.slope_rows
        said = np.ones(len(own), dtype=np.bool_) if asked is None else asked.numpy()
        theirs, taught = teacher_logits.numpy(), kernels.Taught(*_taught(divergence))
        _for_rows(len(own), lambda begin, end: kernel(own, theirs, said, places, begin, end, text, taught, shape,
                                                       values, gradient))
    return _named(terms, torch.from_numpy(values.sum(0))).to(products.dtype)


def _taught(divergence: Divergence) -> tuple[int, np.float32, np.float32, np.float32, np.float32, float]:
    """The numbers of `row_kernels.Taught`: which kind, weights of both KLs, the teacher's share of the mixture."""
    from strategies.distillation.losses.slope_kernels import MIXTURE, REVERSE, VARIATION

    share = divergence.mixed
    kind, first, second, teacher_share = {
        "forward_kl": (REVERSE, 1.0, 0.0, 0.0),  # whose kernel asks for no kind
        "reverse_kl": (REVERSE, 0.0, 1.0, 0.0), "total_variation": (VARIATION, 0.0, 0.0, 0.0),
        "jsd": (MIXTURE, share, 1 - share, share), "skewed_kl": (MIXTURE, 1.0, 0.0, share),
        "skewed_reverse_kl": (MIXTURE, 0.0, 1.0, 1 - share)}[divergence.name]
    numbers = (np.float32(value) for value in (first, second, teacher_share, 1 / divergence.temperature))
    return kind, *numbers, float(divergence.factor * divergence.temperature)


def _named(terms: Terms, sums: torch.Tensor) -> torch.Tensor:
    """(terms,) unweighted values in the order of `terms.names`, from those of cross-entropy, z-loss, divergence."""
    of = {"cross_entropy": sums[0], "z_loss": sums[1]}
    of |= {one.name: sums[2] * one.temperature**2 for one in terms.divergences}
    return torch.stack([of[name] for name in terms.names])


def _for_rows(rows: int, work: Callable[[int, int], None]) -> None:
    """Call `work(begin, end)` for all rows, from as many threads as torch has."""
    size = -(-rows // (torch.get_num_threads() * PIECES))
    in_threads(lambda begin: work(begin, min(begin + size, rows)), range(0, rows, size))
