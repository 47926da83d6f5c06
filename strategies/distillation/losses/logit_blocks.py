"""All terms of the response loss on a block of logits, small enough for a CPU's cache: values and gradient together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch

from strategies.distillation.losses.divergences import Divergence, Pair, pair, sorted_distance
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.teacher_targets import SampledTargets, SharedVocabulary, TopTargets

Taught = torch.Tensor | SampledTargets | TopTargets | None


class Terms:
    """The weighted terms of a `ResponseObjective`, evaluated on blocks of logits.

    Attributes:
        names: terms with a nonzero weight, in the order in which `on_block` returns their values.
    """

    def __init__(self, cross_entropy: float, label_smoothing: float, z_loss: float,
                 divergences: tuple[Divergence, ...]) -> None:
        self.cross_entropy, self.label_smoothing, self.z_loss = cross_entropy, label_smoothing, z_loss
        self.divergences = sorted((one for one in divergences if one.weight), key=lambda one: one.temperature)
        hard = (("cross_entropy", cross_entropy), ("z_loss", z_loss))
        self.weights = {name: weight for name, weight in hard if weight}
        self.weights |= {one.name: one.factor for one in self.divergences}
        self.names = tuple(self.weights)

    def on_block(
        self,
        products: torch.Tensor,
        head: Head,
        targets: torch.Tensor,
        teacher_targets: Taught,
        common: SharedVocabulary | None,
        asked: torch.Tensor | None,
        gradient: bool,
    ) -> torch.Tensor:
        """Return the unweighted values of the terms (terms,), summed over rows; `products` become the gradient.

        Args:
            products: (rows, vocabulary) of the student's hidden states and head; overwritten with the gradient of the
                weighted loss with respect to them.
            head: the student's.
            targets: (rows,) tokens.
            teacher_targets: the teacher's (rows, vocabulary) logits, or its compact targets for these rows.
            common: columns that are compared; None if the vocabularies are the same.
            asked: (rows,) True where there are teacher targets; None for all.
            gradient: whether to compute the gradient; if not, `products` are not overwritten with it.
        """
        logits = head.shape(products)
        values = dict.fromkeys(self.names, products.new_zeros(()))
        total = None
        if "cross_entropy" in values or "z_loss" in values:
            total = self._with_text(logits, targets, values, gradient)
        for value, by, columns, one in self._with_teacher(logits, teacher_targets, common, gradient):
            scale = one.temperature**2
            if asked is not None:
                value = torch.where(asked, value, 0)
                by = None if by is None else by.mul_(asked[:, None])
            values[one.name] = value.sum() * scale
            if by is not None:
                total = _added(total, by.mul_(one.factor * one.temperature), columns, logits)
        if gradient:
            products.copy_(head.unshape_(total, logits))
        return torch.stack([values[name] for name in self.names])

    def _with_text(self, logits: torch.Tensor, targets: torch.Tensor, values: dict[str, torch.Tensor],
                   gradient: bool) -> torch.Tensor | None:
        """Cross-entropy with smoothing (Szegedy et al. 2016, sec. 7), and z-loss (Chowdhery et al. 2022, sec. 5)."""
        smoothing, at = self.label_smoothing, targets[:, None]
        log_q = logits.log_softmax(-1)
        log_z = (logits.gather(-1, at) - log_q.gather(-1, at))[:, 0] if self.z_loss else None
        if self.cross_entropy:
            value = -log_q.gather(-1, at).sum()
            if smoothing:
                value = (1 - smoothing) * value - smoothing * log_q.mean(-1).sum()
            values["cross_entropy"] = value
        if log_z is not None:
            values["z_loss"] = log_z.square().sum()
        if not gradient:
            return None
        slope = log_q.exp_()
        slope.mul_(self.cross_entropy if log_z is None else (self.cross_entropy + 2 * self.z_loss * log_z)[:, None])
        if self.cross_entropy and smoothing:
            slope.sub_(self.cross_entropy * smoothing / logits.shape[-1])
        return slope.scatter_add_(-1, at, slope.new_full(at.shape, -self.cross_entropy * (1 - smoothing)))

    def _with_teacher(
        self, logits: torch.Tensor, teacher_targets: Taught, common: SharedVocabulary | None, gradient: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, SharedVocabulary | None, Divergence]]:
        """Yield for each divergence the rows' values, the gradient by logits / temperature, its columns, and itself."""
        for temperature, several in groupby(self.divergences, key=lambda one: one.temperature):
            found: Pair | None = None
            for one in several:
                if one.name == "uld":
                    found_here = sorted_distance(
                        columns(logits, common, "student"),
                        columns(teacher_targets, common, "teacher"),
                        temperature,
                        gradient,
                    )
                    yield *found_here, common, one
                elif isinstance(teacher_targets, SampledTargets):
                    yield *_sampled(logits, teacher_targets, common, gradient), common, one
                elif isinstance(teacher_targets, TopTargets):
                    yield *_top(logits, teacher_targets, common, one, gradient), common, one
                else:
                    found = found or pair(
                        columns(logits, common, "student"), columns(teacher_targets, common, "teacher"), temperature
                    )
                    yield *one(found, gradient), common, one


def columns(logits: torch.Tensor, common: SharedVocabulary | None, whose: str) -> torch.Tensor:
    """The columns of logits that belong to the common tokens; `whose` is "student" or "teacher"."""
    if common is None:
        return logits
    index = getattr(common, whose)
    size = common.teacher_size if whose == "teacher" and common.teacher_size is not None else common.size
    return logits[:, :size] if index is None else logits.index_select(-1, index)


def _added(
    total: torch.Tensor | None, by: torch.Tensor, common: SharedVocabulary | None, logits: torch.Tensor
) -> torch.Tensor:
    """Add a gradient for the common columns to `total`, in place unless it is None."""
    if common is None or by.shape[-1] == logits.shape[-1]:
        return by if total is None else total.add_(by)
    total = torch.zeros_like(logits) if total is None else total
    if common.student is None:
        total[:, :common.size] += by
        return total
    return total.index_add_(-1, common.student, by)


def _sampled(logits: torch.Tensor, teacher_targets: SampledTargets, common: SharedVocabulary | None, gradient: bool
             ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An unbiased estimate of KL(p || q) and of its gradient q - p, with the shares of drawn tokens in place of p.

    The value, sum share (log p - log q), is 0 for identical models whatever was drawn; their gradient is 0 on average.
    """
    log_q = (columns(logits, common, "student") / teacher_targets.temperature).log_softmax(-1)
    value = (teacher_targets.shares * (teacher_targets.log_p - log_q.gather(-1, teacher_targets.ids))).sum(-1)
    return value, log_q.exp_().scatter_add_(-1, teacher_targets.ids, -teacher_targets.shares) if gradient else None


def _top(
    logits: torch.Tensor,
    teacher_targets: TopTargets,
    common: SharedVocabulary | None,
    divergence: Divergence,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A divergence between distributions over k + 1 outcomes: the teacher's top k tokens, and "any other token".

    Its gradient reaches every logit: those of the k tokens directly, all others through their total probability.
    """
    log_q = (columns(logits, common, "student") / teacher_targets.temperature).log_softmax(-1)
    chosen = log_q.gather(-1, teacher_targets.ids)
    if teacher_targets.ids.shape[-1] == log_q.shape[-1]:  # no other token: both log-probabilities would be -inf
        value, by = divergence(pair(chosen, teacher_targets.log_p, 1.0), gradient)
        return value, None if by is None else torch.zeros_like(log_q).scatter_(-1, teacher_targets.ids, by)
    others = log_q.scatter(-1, teacher_targets.ids, -torch.inf).logsumexp(-1, keepdim=True)
    coarse = torch.cat([chosen, others], -1)
    theirs = torch.cat([teacher_targets.log_p, teacher_targets.log_tail[..., None]], -1)
    found = pair(coarse, theirs, 1.0)
    value, by = divergence(found, gradient)
    if by is None:
        return value, None
    # A logit gets the gradient of the outcome that its token belongs to, in proportion to its share of the outcome's
    # probability.
    spread = by[:, -1:] * (log_q - others).exp_()
    return value, spread.scatter_(-1, teacher_targets.ids, by[:, :-1])
