"""Divergences between two softened distributions: value and gradient of a block of logits, exact where they agree too.

A difference of two nearly equal distributions loses its digits when each is rounded first. So everything here is
written in d = log p - log q, the log ratio of teacher to student, which `pair` finds to full precision where the two
are close; p - q is q expm1(d), and sums of terms of both signs are replaced by sums in which no term is negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Name = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "total_variation", "uld"]
NAMES: tuple[Name, ...] = get_args(Name)
MIXED = {"jsd": 0.5, "skewed_kl": 0.1, "skewed_reverse_kl": 0.1}  # default share; the skewed ones' as in DistiLLM
LARGEST = 80.0  # exp of it is still a number in fp32; beyond it a share in a mixture is 0 or 1 to all digits


@dataclass(frozen=True)
class Divergence:
    """A divergence of the student q from its teacher p, with its weight in the loss.

    Both are softmax(logits / temperature), and values are multiplied by the temperature's square, which keeps the
    gradient of the Kullback-Leibler ones on the scale of the cross-entropy's (Hinton et al. 2015, section 2). With
    s = `share`:

    - `forward_kl`: KL(p || q) (survey eq. 15-16)
    - `reverse_kl`: KL(q || p) (Gu et al. 2024)
    - `jsd`: s KL(p || m) + (1 - s) KL(q || m), m = s p + (1 - s) q (Agarwal et al. 2024, eq. 1)
    - `skewed_kl`: KL(p || s p + (1 - s) q) (Ko et al. 2024, DistiLLM, eq. 4)
    - `skewed_reverse_kl`: KL(q || (1 - s) p + s q) (the same, its eq. 5)
    - `total_variation`: 1/2 sum |p - q|
    - `uld`: sum |sorted p - sorted q|, for vocabularies that have nothing in common (Boizard et al. 2024, eq. 4)

    Attributes:
        name: which.
        weight: factor in the loss.
        temperature: T > 0.
        share: of the mixture, in (0, 1); None for its usual one. Only `jsd`, `skewed_kl`, `skewed_reverse_kl` have one.

    Raises:
        ValueError: a name that is not one of these, or a number out of range.
    """

    name: Name = "forward_kl"
    weight: float = 1.0
    temperature: float = 1.0
    share: float | None = None

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

    @property
    def mixed(self) -> float:
        """The share in use; 0 where nothing is mixed."""
        return self.share if self.share is not None else MIXED.get(self.name, 0.0)

    def __call__(self, pair: Pair, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Value of each row (rows,), and the gradient by the softened student logits (rows, vocabulary)."""
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
    """Two distributions over the same tokens, rows at a time.

    Attributes:
        p, q: teacher's and student's probabilities (rows, vocabulary).
        d: log p - log q.
        close: (rows,) where no token's d is 1 or more in size.
    """

    p: torch.Tensor
    q: torch.Tensor
    d: torch.Tensor
    close: torch.Tensor


def pair(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> Pair:
    """The softened distributions of two blocks of logits (rows, vocabulary) of one dtype."""
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    log_q, q = _softmax(student)
    log_p, p = _softmax(teacher)
    return Pair(p, q, *_refined(log_p.sub_(log_q), q, student, teacher))


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of probabilities, and probabilities, with one exponential for both."""
    log_q = logits - logits.amax(-1, keepdim=True)
    q = log_q.exp()
    total = q.sum(-1, keepdim=True)
    return log_q.sub_(total.log()), q.div_(total)


def _refined(d: torch.Tensor, q: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """log p - log q, and the rows in which the two are close all over.

    There it is found from the difference of the logits, which is exact there.

    With e = teacher - student, log p - log q = e - log sum q exp(e), and with c = sum q e the last is
    c + log1p(sum q expm1(e - c)): nothing is subtracted that is larger than the result.
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
    """Whether numbers are not to be looked at: on a GPU, which that would keep waiting, or where there are none."""
    return tensor.is_cuda or isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor)


def _close_ratio(q: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    e = e - (q * e).sum(-1, keepdim=True)
    return e - torch.log1p((q * torch.expm1(e)).sum(-1, keepdim=True))


def _difference(p: torch.Tensor, q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """p - q with the digits that subtraction loses: the larger of the two times 1 - exp(-|d|), with the sign of d."""
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
    """Terms of KL(first || other), in close rows as first (expm1(r) - r) with r = log other - log first.

    p and q were normalized each by its own sum, whose roundings differ by some 1e-7 of all of a row. A term of both
    carries that times r, while the term itself is r^2 / 2; so that here only one of the two may occur.
    """
    if not _unseen(terms) and not close.any():
        return terms
    r = ratio()
    return torch.where(close[:, None], torch.expm1(r).sub_(r).mul_(first), terms, out=terms)


def _skewed(pair: Pair, share: float, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL(p || m), m = s p + (1 - s) q, as sum p log(p / m) + (m - p).

    With x = m / p - 1 = (1 - s) expm1(-d) a term is p (x - log1p(x)). Its derivative by q is -(1 - s) p / m, up to a
    constant -(1 - s)^2 expm1(d) / (1 + s expm1(d)).
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

    Its derivative by q is, up to a constant, -log1p(x) + s x / (1 + x).
    """
    p, q, d = pair.p, pair.q, pair.d.clamp(-LARGEST, LARGEST)
    value = _mixture(q, p, d, 1 - share)
    if not gradient:
        return value, None
    x = torch.expm1(d).mul_(1 - share)
    slope = x / (1 + x)
    return value, _through_softmax(q, slope.mul_(share).sub_(torch.log1p(x)))


def _mixture(first: torch.Tensor, other: torch.Tensor, ratio: torch.Tensor, share: float) -> torch.Tensor:
    """KL(first || m), m = (1 - share) first + share other, of rows; `ratio` is log other - log first.

    Term by term first (x - log1p(x)), x = m / first - 1; where first is far below other, x is no number of use, and
    first x is what it stands for, m - first.
    """
    x = torch.expm1(ratio).mul_(share)
    log_m = torch.log1p(x)
    far = torch.addcmul(share * (other - first), first, log_m, value=-1)
    return torch.where(ratio < 1, first * (x - log_m), far).sum(-1)


def _total_variation(pair: Pair, share: float, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """1/2 sum |p - q|; its derivative by q is half the sign of q - p, 0 where they agree."""
    p, q, d = pair.p, pair.q, pair.d
    p_minus_q = _difference(p, q, d)
    value = p_minus_q.abs().sum(-1).mul_(0.5)
    return value, _through_softmax(q, p_minus_q.sign_().mul_(-0.5)) if gradient else None


def sorted_distance(student: torch.Tensor, teacher: torch.Tensor, temperature: float, gradient: bool
                    ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The universal logit distance of rows, sum over ranks of |p - q|, and its gradient by the softened student logits.

    Args:
        student, teacher: (rows, vocabulary) logits, of any two vocabularies; the shorter one goes on with zeros.
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
    """q (a - sum q a), the gradient by the logits of q of a sum whose derivative by q is a. `slope` is overwritten.

    Counted from a at the most probable token: where q is nearly all there, what the others differ by it is what counts.
    """
    slope.sub_(slope.gather(-1, q.argmax(-1, keepdim=True)))
    mean = (q * slope).sum(-1, keepdim=True)
    return slope.sub_(mean).mul_(q)


_ROWS = {"forward_kl": _forward, "reverse_kl": _reverse, "skewed_kl": _skewed, "skewed_reverse_kl": _skewed_reverse,
         "total_variation": _total_variation}
