"""Divergences between student and teacher at a temperature: values and gradients for a block of logits.

They stay accurate where the two distributions nearly agree, where subtracting rounded probabilities would cancel.
Everything is written in d = log p - log q, the log ratio of teacher to student, which `pair` computes to full precision
where the two are close: p - q is q expm1(d), and sums of terms of both signs are replaced by sums of nonnegative terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Name = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "total_variation", "uld"]
NAMES: tuple[Name, ...] = get_args(Name)
MIXED = {"jsd": 0.5, "skewed_kl": 0.1, "skewed_reverse_kl": 0.1}  # default share; for the skewed ones DistiLLM's
KINKED = ("total_variation", "uld")
LARGEST = 80.0  # its exp is still finite in fp32; beyond it a share in a mixture is 0 or 1 to working precision


@dataclass(frozen=True)
class Divergence:
    """A divergence between the teacher p and the student q, with its weight in the loss.

    Both are softmax(logits / temperature). Values are multiplied by the square of the temperature, which keeps the
    gradients of the KL divergences on the scale of the cross-entropy's (Hinton et al. 2015, section 2). With
    s = `share`:

    - `forward_kl`: KL(p || q) (survey eq. 15-16)
    - `reverse_kl`: KL(q || p) (Gu et al. 2024)
    - `jsd`: s KL(p || m) + (1 - s) KL(q || m), m = s p + (1 - s) q (Agarwal et al. 2024, eq. 1)
    - `skewed_kl`: KL(p || s p + (1 - s) q) (Ko et al. 2024, DistiLLM, eq. 4)
    - `skewed_reverse_kl`: KL(q || (1 - s) p + s q) (the same paper, eq. 5)
    - `total_variation`: 1/2 sum |p - q|
    - `uld`: sum |sorted p - sorted q|, for vocabularies that have nothing in common (Boizard et al. 2024, eq. 4)

    Near p = q every one of them but the last two is `curvature` times KL, which is 1/2 sum (p - q)^2 / p there: 1 for
    both KLs, s (1 - s) for `jsd` and (1 - s)^2 for the skewed ones. At one weight JSD's gradient is therefore at most a
    quarter of KL's, and beside a cross-entropy its teacher counts for a quarter. `normalized` divides by the curvature,
    which makes weights comparable; as s goes to 0, a normalized JSD becomes KL(p || q).

    Attributes:
        name: one of the above.
        weight: factor in the loss.
        temperature: T > 0.
        share: of the mixture, in (0, 1); None for the default of `MIXED`. Only `jsd`, `skewed_kl` and
            `skewed_reverse_kl` take one.
        normalized: whether the weight is divided by `curvature`. Values are reported as they are without.

    Raises:
        ValueError: an unknown name, a number out of range, or `normalized` without a curvature.
    """

    name: Name = "forward_kl"
    weight: float = 1.0
    temperature: float = 1.0
    share: float | None = None
    normalized: bool = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"there is no divergence {self.name!r}; there are {', '.join(NAMES)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"the temperature is a number above zero, not {self.temperature}")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"the weight is a number from zero on, not {self.weight}")
        if self.share is not None and self.name not in MIXED:
            raise ValueError(f"{self.name} mixes nothing and takes no share; {', '.join(MIXED)} do")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"the share of a mixture lies between 0 and 1, both excluded, not {self.share}: at its "
                             "ends the mixture is one of the two, use forward_kl or reverse_kl")
        if self.normalized and self.name in KINKED:
            raise ValueError(f"{self.name} has a kink where student and teacher agree, and no curvature to divide by")

    @property
    def curvature(self) -> float:
        """The divergence over KL(p || q) in the limit of p = q."""
        share = self.mixed
        return share * (1 - share) if self.name == "jsd" else (1 - share) ** 2

    @property
    def factor(self) -> float:
        """What values and gradients are multiplied by in the loss."""
        return self.weight / self.curvature if self.normalized else self.weight

    @property
    def mixed(self) -> float:
        """The share in use; 0 for a divergence without a mixture."""
        return self.share if self.share is not None else MIXED.get(self.name, 0.0)

    def __call__(self, pair: Pair, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values (rows,), and their gradient with respect to the student's logits / temperature (rows, vocabulary)."""
        share = self.mixed
        if self.name == "jsd":
            first, by_first = _skewed(pair, share, gradient)
            second, by_second = _skewed_reverse(pair, 1 - share, gradient)
            value = first.mul_(share).add_(second, alpha=1 - share)
            if by_first is None or by_second is None:
                return value, None
            return value, by_first.mul_(share).add_(by_second, alpha=1 - share)
        return _ROWS[self.name](pair, share, gradient)


@dataclass(frozen=True)
class Pair:
    """Teacher and student distributions over the same tokens, for a block of rows.

    Attributes:
        p, q: teacher's and student's probabilities (rows, vocabulary).
        d: (rows, vocabulary) log p - log q.
        close: (rows,) whether |d| < 1 for every token.
    """

    p: torch.Tensor
    q: torch.Tensor
    d: torch.Tensor
    close: torch.Tensor


def pair(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> Pair:
    """The distributions, at a temperature, of two blocks of logits (rows, vocabulary) of the same dtype."""
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    log_q, q = _softmax(student)
    log_p, p = _softmax(teacher)
    return Pair(p, q, *_refined(log_p.sub_(log_q), q, student, teacher))


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and probabilities, with a single exponential for both."""
    log_q = logits - logits.amax(-1, keepdim=True)
    q = log_q.exp()
    total = q.sum(-1, keepdim=True)
    return log_q.sub_(total.log()), q.div_(total)


def _refined(d: torch.Tensor, q: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """log p - log q, and which rows are close at every token; these are recomputed from the difference of the logits.

    With e = teacher - student, log p - log q = e - log sum q exp(e), and with c = sum q e the second term is
    c + log1p(sum q expm1(e - c)). In close rows e itself is exact, and nothing larger than the result is subtracted.
    """
    close = d.abs().amax(-1) < 1
    if _unseen(d):
        return torch.where(close[:, None], _close_ratio(q, teacher - student), d), close
    if close.all():
        return _close_ratio(q, teacher - student), close
    if close.any():
        d[close] = _close_ratio(q[close], teacher[close] - student[close])
    return d, close


def _unseen(tensor: torch.Tensor) -> bool:
    """Whether values must not be read on the host: on a GPU that synchronizes, and a fake tensor has none."""
    return tensor.is_cuda or isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor)


def _close_ratio(q: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    e = e - (q * e).sum(-1, keepdim=True)
    return e - torch.log1p((q * torch.expm1(e)).sum(-1, keepdim=True))


def _difference(p: torch.Tensor, q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """p - q without cancellation: the larger of the two times 1 - exp(-|d|), with the sign of d."""
    return torch.expm1(d.abs().neg_()).neg_().mul_(torch.maximum(p, q)).mul_(d.sign())


def _forward(pair: Pair, share: float, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL(p || q) = sum p d + (q - p), and its gradient q - p."""
    p, q, d = pair.p, pair.q, pair.d
    q_minus_p = _difference(p, q, d).neg_()
    terms = _terms_of_close(torch.addcmul(q_minus_p, p, d), p, lambda: d.neg(), pair.close)
    return terms.sum(-1), q_minus_p if gradient else None


def _reverse(pair: Pair, share: float, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL(q || p) = sum -q d + (p - q), and its gradient q (-d - sum q (-d))."""
    p, q, d = pair.p, pair.q, pair.d
    terms = _terms_of_close(torch.addcmul(_difference(p, q, d), q, d, value=-1), q, d.clone, pair.close)
    return terms.sum(-1), _through_softmax(q, -d) if gradient else None


def _terms_of_close(terms: torch.Tensor, first: torch.Tensor, ratio: Callable[[], torch.Tensor], close: torch.Tensor
                    ) -> torch.Tensor:
    """Terms of KL(first || other), replaced in close rows by first (expm1(r) - r) with r = log other - log first.

    p and q are each normalized by their own sum, and the rounding errors of these sums differ by about 1e-7, relative
    to the whole row. A term with both p and q carries that error times r, while the term itself is only of the order
    of r^2 / 2. So in close rows only one of the two may appear.
    """
    if not _unseen(terms) and not close.any():
        return terms
    r = ratio()
    return torch.where(close[:, None], torch.expm1(r).sub_(r).mul_(first), terms, out=terms)


def _skewed(pair: Pair, share: float, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL(p || m), m = s p + (1 - s) q, as sum p log(p / m) + (m - p).

    With x = m / p - 1 = (1 - s) expm1(-d) a term is p (x - log1p(x)). Its derivative with respect to q is
    -(1 - s) p / m, which up to a constant is -(1 - s)^2 expm1(d) / (1 + s expm1(d)).
    """
    p, q, d = pair.p, pair.q, pair.d.clamp(-LARGEST, LARGEST)
    value = _mixture(p, q, -d, 1 - share)
    if not gradient:
        return value, None
    grown = torch.expm1(d)
    slope = grown / (grown * share).add_(1)
    return value, _through_softmax(q, slope.mul_(-(1 - share) ** 2))


def _skewed_reverse(pair: Pair, share: float, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL(q || m), m = (1 - s) p + s q: with x = m / q - 1 = (1 - s) expm1(d) a term is q (x - log1p(x)).

    Its derivative with respect to q is, up to a constant, -log1p(x) + s x / (1 + x).
    """
    p, q, d = pair.p, pair.q, pair.d.clamp(-LARGEST, LARGEST)
    value = _mixture(q, p, d, 1 - share)
    if not gradient:
        return value, None
    x = torch.expm1(d).mul_(1 - share)
    slope = x / (1 + x)
    return value, _through_softmax(q, slope.mul_(share).sub_(torch.log1p(x)))


def _mixture(first: torch.Tensor, other: torch.Tensor, ratio: torch.Tensor, share: float) -> torch.Tensor:
    """KL(first || m) of each row, m = (1 - share) first + share other; `ratio` is log other - log first.

    Each term is first (x - log1p(x)) with x = m / first - 1. Where first is far below other, x is too large to be
    usable, and first x is computed as m - first, which it equals.
    """
    x = torch.expm1(ratio).mul_(share)
    log_m = torch.log1p(x)
    far = torch.addcmul(share * (other - first), first, log_m, value=-1)
    return torch.where(ratio < 1, first * (x - log_m), far).sum(-1)


def _total_variation(pair: Pair, share: float, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """1/2 sum |p - q|; its derivative with respect to q is half the sign of q - p, and 0 where they agree."""
    p, q, d = pair.p, pair.q, pair.d
    p_minus_q = _difference(p, q, d)
    value = p_minus_q.abs().sum(-1).mul_(0.5)
    return value, _through_softmax(q, p_minus_q.sign_().mul_(-0.5)) if gradient else None


def sorted_distance(student: torch.Tensor, teacher: torch.Tensor, temperature: float, gradient: bool
                    ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The universal logit distance of each row, sum over ranks of |p - q|, and its gradient.

    The gradient is with respect to the student's logits / temperature.

    Args:
        student, teacher: (rows, vocabulary) logits, of any two vocabularies; the sorted probabilities of the smaller
            one are padded with zeros.
    """
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    ranked, order = q.sort(-1, descending=True)
    teacher_targets = p.sort(-1, descending=True).values
    common = min(ranked.shape[-1], teacher_targets.shape[-1])
    over = ranked.clone()
    over[:, :common] -= teacher_targets[:, :common]
    value = over.abs().sum(-1) + teacher_targets[:, common:].sum(-1)
    if not gradient:
        return value, None
    return value, _through_softmax(q, torch.empty_like(q).scatter_(-1, order, over.sign_()))


def _through_softmax(q: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Backward of softmax: q (a - sum q a), where `slope` is a, the derivative with respect to q; it is overwritten.

    a is first shifted to be 0 at the most probable token: where that token has nearly all of the mass, only the
    differences of the others from it matter.
    """
    slope.sub_(slope.gather(-1, q.argmax(-1, keepdim=True)))
    mean = (q * slope).sum(-1, keepdim=True)
    return slope.sub_(mean).mul_(q)


_ROWS = {"forward_kl": _forward, "reverse_kl": _reverse, "skewed_kl": _skewed, "skewed_reverse_kl": _skewed_reverse,
         "total_variation": _total_variation}
