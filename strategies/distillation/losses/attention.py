"""Attention distillation: self-relations of values, queries or keys (MiniLM), and attention maps (TinyBERT).

Everything is computed in at least fp32, and only the student gets gradients. Positions that a token may not attend to
have no influence, even if they hold NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch.autograd.function import once_differentiable

from strategies.distillation.losses.features import check_mask, check_positions, full_precision, wide

BLOCK = {"cpu": 2**22, "cuda": 2**26}
"""Bytes of attention scores that exist at a time, by device; about ten tensors of this size are alive at once."""


def visible_pairs(real: torch.Tensor, position_ids: torch.Tensor | None = None, *, causal: bool) -> torch.Tensor:
    """The attention mask (batch, query, key): which keys each query may attend to.

    Args:
        real: (batch, sequence) bool, True for positions that are not padding.
        position_ids: (batch, sequence), restarting at 0 with every document of a row; None if rows are not packed.
        causal: whether a position attends only to itself and earlier ones, as in decoders.

    Raises:
        ValueError: `real` is not bool, or `position_ids` has another shape.
    """
    check_mask("real", real, tuple(real.shape))
    pairs = real[:, :, None] & real[:, None, :]
    if position_ids is not None:
        if position_ids.shape != real.shape:
            raise ValueError(f"position_ids of shape {tuple(position_ids.shape)} are not those of `real`, "
                             f"{tuple(real.shape)}")
        document = (position_ids == 0).cumsum(1)
        pairs = pairs & (document[:, :, None] == document[:, None, :])
    return pairs.tril() if causal else pairs


def relation_sum(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor, visible: torch.Tensor, heads: int
                 ) -> torch.Tensor:
    """KL between self-relations of teacher and student in nats, mean over relation heads, summed over tokens.

    Widths are split into `heads` relation heads of d dimensions, whatever the models' own heads are. With V of one
    head:

        R = softmax(V V^T / sqrt(d))
        1 / heads * sum over heads a and tokens t of KL(R_teacher[a, t] || R_student[a, t])

    Source: the value relation of MiniLM (Wang et al. 2020, section 3.2); relation heads, and relations of queries and
    keys, are MiniLMv2's (Wang et al. 2021, section 3.1). Divided by the number of tokens, this is their loss. The
    softmax runs over the positions that a token may attend to. The KL is computed as sum p (d + expm1(-d)) with
    d = log p - log q, which avoids cancellation where the two are close. Value and gradient are computed together, for
    a block of queries at a time, so that at most `BLOCK` bytes of scores exist unless a single query has more.

    Args:
        student, teacher: (batch, sequence, width) values, queries or keys, all heads concatenated; widths may differ.
        kept: (batch, sequence) bool mask of the tokens t that are summed over.
        visible: (batch, sequence, sequence) bool, as from `visible_pairs`: which keys a query attends to.
        heads: number of relation heads.

    Raises:
        ValueError: `heads` does not divide both widths, positions do not match, or a mask is not bool.
    """
    check_positions(student, teacher, kept)
    check_mask("visible", visible, (*kept.shape, kept.shape[1]))
    _check_heads(heads, student.shape[-1], teacher.shape[-1])
    unseen = ~(kept | (visible & kept[:, :, None]).any(1))[..., None]
    ours, theirs = (wide(x).masked_fill(unseen, 0).unflatten(-1, (heads, -1)).transpose(1, 2)
                    for x in (student, teacher.detach()))
    with full_precision(student):
        return _RelationKL.apply(ours, theirs, kept, visible)


def attention_map_sum(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor, visible: torch.Tensor, *,
                      average_heads: bool = False) -> torch.Tensor:
    """Squared error of attention maps, mean over heads and over visible keys, summed over tokens.

    Source: TinyBERT (Jiao et al. 2020, eq. 7), whose mean is over all keys. The two agree if all keys are visible;
    if not, this one does not depend on padding. The paper fits the scores before the softmax, while transformers'
    `output_attentions` are the probabilities after it; either can be passed.

    Args:
        student, teacher: (batch, heads, sequence, sequence) attention of queries to keys.
        kept: (batch, sequence) bool mask of the queries that are summed over.
        visible: (batch, sequence, sequence) bool, as from `visible_pairs`: the keys that a query attends to.
        average_heads: compare means over heads; numbers of heads may then differ.

    Raises:
        ValueError: numbers of heads or positions do not match, or a mask is not bool.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"student and teacher of shapes {tuple(student.shape)} and {tuple(teacher.shape)} are not "
                         "maps of the same positions; run both on the same batch")
    check_mask("kept", kept, (student.shape[0], student.shape[2]))
    check_mask("visible", visible, (student.shape[0], *student.shape[2:]))
    if average_heads:
        student, teacher = (wide(x).mean(1, keepdim=True) for x in (student, teacher))
    elif student.shape[1] != teacher.shape[1]:
        raise ValueError(f"student and teacher have {student.shape[1]} and {teacher.shape[1]} heads; compare their "
                         "means with average_heads=True, or values with relation_sum, for which the numbers may differ")
    seen = visible & kept[:, :, None]
    apart = (wide(student) - wide(teacher.detach())).masked_fill(~seen[:, None], 0)
    return (apart.square().mean(1).sum(-1) / seen.sum(-1).clamp(min=1)).sum()


def _check_heads(heads: int, student_width: int, teacher_width: int) -> None:
    if heads < 1 or student_width % heads or teacher_width % heads:
        common = gcd(student_width, teacher_width)
        both = [number for number in range(1, common + 1) if common % number == 0]
        raise ValueError(f"heads = {heads} does not divide the widths {student_width} of the student and "
                         f"{teacher_width} of the teacher; these divide both: {', '.join(map(str, both))}")


class _RelationKL(torch.autograd.Function):
    """`relation_sum` of student and teacher (batch, heads, sequence, d), whose d may differ."""

    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor, visible: torch.Tensor
                ) -> torch.Tensor:
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = student.new_zeros(())
        block = BLOCK.get(student.device.type, BLOCK["cpu"])
        for rows, queries in _blocks(*student.shape[:3], block):
            part = None if gradient is None else gradient[rows]
            counts, seen = kept[rows, None, queries], visible[rows, None, queries]
            total += _on_block(student[rows], teacher[rows], counts, seen, queries, part)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, by_total: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * by_total, None, None, None


def _blocks(batch: int, heads: int, sequence: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and queries whose scores take about `block` bytes: whole rows if they fit, else part of a row."""
    query = 4 * heads * sequence
    rows, queries = max(1, block // (query * sequence)), min(sequence, max(1, block // query))
    for row in range(0, batch, rows):
        for first in range(0, sequence, queries):
            yield slice(row, row + rows), slice(first, first + queries)


def _on_block(student: torch.Tensor, teacher: torch.Tensor, counts: torch.Tensor, seen: torch.Tensor, queries: slice,
              gradient: torch.Tensor | None) -> torch.Tensor:
    """The KL of a block of queries; adds to `gradient` that of the student's vectors (rows, heads, sequence, d)."""
    heads, scale = student.shape[1], student.shape[-1]**-0.5
    log_q, log_p = _log_relations(student, queries, seen), _log_relations(teacher, queries, seen)
    d = (log_p - log_q).masked_fill(~(seen & counts[..., None]), 0)
    p, q = log_p.exp_(), log_q.exp_()
    near = d.abs() < 1  # elsewhere nothing cancels, and expm1 may be infinite where p is 0
    small = torch.where(near, d, 0)
    value = torch.where(near, p * (small + torch.expm1(-small)), p * d + (q - p)).sum() / heads
    if gradient is not None:
        slope = torch.where(near, -q * torch.expm1(small), q - p).mul_(scale / heads)  # q - p: by the scores
        gradient[:, :, queries] += slope @ student
        gradient += slope.mT @ student[:, :, queries]
    return value


def _log_relations(vectors: torch.Tensor, queries: slice, seen: torch.Tensor) -> torch.Tensor:
    """Log-relations (rows, heads, queries, sequence); for a query without visible keys, arbitrary but finite."""
    scores = (vectors[:, :, queries] * vectors.shape[-1]**-0.5) @ vectors.mT
    return scores.masked_fill_(~seen, torch.finfo(scores.dtype).min).log_softmax(-1)
