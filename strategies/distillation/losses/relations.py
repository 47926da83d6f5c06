"""Relational knowledge distillation (RKD): match the geometry of the teacher's embeddings, not the embeddings.

Relations are taken between the samples of a batch, for classifiers, or between tokens of the same row, for language
models. The latter do not couple rows, so the sum is the same however rows are split into micro-batches. Widths of
student and teacher may differ. Everything is computed in at least fp32, and only the student gets gradients.

The paper's losses are sums over pairs and triples. These are means over pairs and triples, times the number of samples
or tokens. So they are sums over samples or tokens like the other losses, and the loss per token does not grow with the
length of the row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from strategies.distillation.losses.features import check_mask, check_positions, full_precision, unit, wide


def sample_distances_sum(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Distance-wise RKD between the samples of a batch, times their number (survey eq. 18; Park et al. 2019, eq. 5-6).

    With psi(i, j) = ||x_i - x_j|| / mu, and mu the mean of that distance over all pairs i != j:

        mean over i != j of huber(psi_teacher(i, j) - psi_student(i, j)),
        huber(a) = a^2 / 2 where |a| <= 1, else |a| - 1/2

    Samples are coupled, so the loss depends on the size of micro-batches. A batch of one has no pairs and a loss of 0.
    Where two samples coincide, the gradient of their distance is 0.

    Args:
        student, teacher: (samples, width) embeddings.

    Raises:
        ValueError: numbers of samples differ, or embeddings are not (samples, width).
    """
    return _over_samples(_distances, student, teacher)


def sample_angles_sum(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Angle-wise RKD between the samples of a batch, times their number (survey eq. 19; Park et al. 2019, eq. 7-8).

    With e(i, j) the unit vector from x_j to x_i, or 0 where the two coincide, and psi(i, j, k) = <e(i, j), e(k, j)>:

        mean over distinct i, j, k of huber(psi_teacher(i, j, k) - psi_student(i, j, k))

    This allocates a few fp32 tensors each of samples^2 * width and samples^3 elements. With fewer than three samples
    the loss is 0.

    Args:
        student, teacher: (samples, width) embeddings.

    Raises:
        ValueError: numbers of samples differ, or embeddings are not (samples, width).
    """
    return _over_samples(_angles, student, teacher)


def token_distances_sum(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor, tokens: int = 32
                        ) -> torch.Tensor:
    """Distance-wise RKD, mean over token pairs of a row, times the row's tokens in the mask, summed over rows.

    See `sample_distances_sum`.

    Args:
        student, teacher: (batch, sequence, width) hidden states.
        kept: (batch, sequence) bool mask of tokens.
        tokens: most tokens of each row that are compared: the first and last in the mask, and evenly spaced ones
            between.

    Raises:
        ValueError: positions do not match, the mask is not bool, or `tokens` is less than two.
    """
    return _over_tokens(_distances, student, teacher, kept, tokens, 2)


def token_angles_sum(student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor, tokens: int = 16
                     ) -> torch.Tensor:
    """Angle-wise RKD, mean over token triples of a row, times the row's tokens in the mask, summed over rows.

    See `sample_angles_sum`. This allocates a few fp32 tensors of batch * tokens^2 * (width + tokens) elements in all.

    Args:
        student, teacher: (batch, sequence, width) hidden states.
        kept: (batch, sequence) bool mask of tokens.
        tokens: most tokens of each row that are compared: the first and last in the mask, and evenly spaced ones
            between.

    Raises:
        ValueError: positions do not match, the mask is not bool, or `tokens` is less than three.
    """
    return _over_tokens(_angles, student, teacher, kept, tokens, 3)


def _over_samples(relate, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(f"student and teacher of shapes {tuple(student.shape)} and {tuple(teacher.shape)}: both are "
                         "(samples, width), with as many samples")
    everything = torch.ones(1, len(student), dtype=torch.bool, device=student.device)
    with full_precision(student):
        value = relate(wide(student)[None], wide(teacher.detach())[None], everything)
    return value.sum() * len(student)


def _over_tokens(relate, student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor, tokens: int, least: int
                 ) -> torch.Tensor:
    check_positions(student, teacher, kept)
    if tokens < least:
        raise ValueError(f"tokens = {tokens}: it takes {least} to have a relation")
    positions, there = evenly_spaced(kept, tokens)
    ours, theirs = (wide(_at(x, positions)).masked_fill(~there[..., None], 0) for x in (student, teacher.detach()))
    with full_precision(student):
        value = relate(ours, theirs, there)
    return (value * kept.sum(1)).sum()


def evenly_spaced(kept: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of at most `tokens` evenly spaced tokens of each row, from the first in the mask to the last.

    They are computed without synchronizing with the device.

    Args:
        kept: (batch, sequence) bool mask of tokens.
        tokens: most positions of each row.

    Returns:
        Positions (batch, at most tokens), and a bool tensor of the same shape: whether a slot holds a token.

    Raises:
        ValueError: the mask is not bool.
    """
    check_mask("kept", kept, tuple(kept.shape))
    slots = torch.arange(min(tokens, kept.shape[1]), device=kept.device)
    count = kept.sum(1, keepdim=True)
    taken = count.clamp(max=len(slots))
    rank = slots * (count - 1) // (taken - 1).clamp(min=1)
    positions = torch.searchsorted(kept.cumsum(1), rank + 1)
    return positions.clamp(max=kept.shape[1] - 1), slots < taken


def _at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hidden states (batch, positions, width) at positions (batch, positions)."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def _distances(student: torch.Tensor, teacher: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Mean loss over pairs (rows,) of points (rows, points, width)."""
    among = _distinct(there)
    return _mean(F.huber_loss(_relative(student, among), _relative(teacher, among), reduction="none"), among)


def _relative(points: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Distances (rows, points, points) divided by their mean over pairs.

    cdist must not use matrix products here, as it does for many points: they subtract squares, which cancels where
    points are close together and far from the origin, as hidden states are.
    """
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").masked_fill(~among, 0)
    mean = _mean(distances, among)[:, None, None]
    return distances / torch.where(mean > 0, mean, 1)


def _angles(student: torch.Tensor, teacher: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Mean loss over triples (rows,) of points (rows, points, width)."""
    pairs = _distinct(there)
    among = pairs[:, :, :, None] & pairs[:, :, None, :] & pairs[:, None, :, :]
    return _mean(F.huber_loss(_cosines(student), _cosines(teacher), reduction="none"), among)


def _cosines(points: torch.Tensor) -> torch.Tensor:
    """Cosines (rows, j, i, k) of the angles at j between i and k."""
    from_j = unit(points[:, None] - points[:, :, None])
    return from_j @ from_j.mT


def _distinct(there: torch.Tensor) -> torch.Tensor:
    """Which pairs (rows, points, points) consist of two different points that both exist."""
    others = ~torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
    return there[:, :, None] & there[:, None, :] & others


def _mean(values: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Mean (rows,) of each row's values in the mask `among`; 0 for a row with none."""
    return values.masked_fill(~among, 0).flatten(1).sum(1) / among.flatten(1).sum(1).clamp(min=1)
