"""Compact forms of a teacher's distribution over a large vocabulary: tokens drawn from it, or its most probable ones.

Results have the layout of `cache_reader`: ragged for draws, since most positions have few distinct tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from strategies.distillation.losses.teacher_targets import SampledTargets

BLOCK = 2**26  # bytes of one block of rows in float64; a few such buffers are alive at a time


def draw_samples(logits: torch.Tensor, draws: int, temperature: float, seed: int, numbers: torch.Tensor
                 ) -> dict[str, torch.Tensor]:
    """Tokens drawn with replacement from p = softmax(logits / temperature), and how often each was drawn.

    count / draws is an unbiased estimate of p, so the gradient of the cross-entropy with it is an unbiased estimate of
    that with p (Anshumann et al. 2025, arXiv 2503.16870, random sampling, here with p itself as the proposal). The
    draws at a position depend only on `seed` and on the position's number, not on batching. Log-probabilities are
    computed in fp32, but the cumulative sum in float64: in fp32 its last digit exceeds the probability of most tokens
    of a large vocabulary.

    Args:
        logits: (rows, vocabulary) of any floating dtype; -inf for a token that is never drawn.
        draws: N >= 1, number of draws for each row.
        temperature: T > 0.
        seed: at least 0.
        numbers: (rows,) integers of at least 0, unique to each position in the whole data set, for example
            row * length + position.

    Returns:
        On the logits' device: `distinct` (rows,) int64, number of distinct tokens of each row; and concatenated over
        rows, `ids` int64, ascending within a row, `counts` int64, which sum to N for each row, and `log_p` fp32.

    Raises:
        ValueError: a number is out of range, or logits do not define a distribution.
    """
    _check(logits, "draws", draws, temperature)
    if seed < 0:
        raise ValueError(f"seed is an integer from 0 on, not {seed}")
    if numbers.shape != logits.shape[:1] or (numbers < 0).any():
        raise ValueError(f"numbers of shape {tuple(numbers.shape)} do not number the rows of logits of shape "
                         f"{tuple(logits.shape)}: give one from 0 on for each row")
    places = torch.from_numpy(_uniform(draws, seed, numbers.cpu().numpy())).to(logits.device)
    found = [_drawn(log_p, places[rows]) for rows, log_p in _blocks(logits, temperature)]
    return {name: torch.cat([block[name] for block in found]) for name in found[0]}


def top_k(logits: torch.Tensor, k: int, temperature: float) -> dict[str, torch.Tensor]:
    """The most probable tokens under softmax(logits / temperature), and the total probability of all others, in fp32.

    The total is summed over the other tokens; 1 - (sum of the top k) would cancel where it is small.

    Args:
        logits: (rows, vocabulary) of any floating dtype.
        k: tokens of each row; the whole vocabulary if that is smaller.
        temperature: T > 0.

    Returns:
        On the logits' device: `ids` (rows, min(k, vocabulary)) int64, most probable first, `log_p` of the same shape,
        fp32, and `log_tail` (rows,) fp32, -inf if no token is left.

    Raises:
        ValueError: a number is out of range, or logits do not define a distribution.
    """
    _check(logits, "k", k, temperature)
    found = []
    for _, log_p in _blocks(logits, temperature):
        chosen, ids = log_p.topk(min(k, logits.shape[-1]), -1)
        found.append({"ids": ids, "log_p": chosen,
                      "log_tail": log_p.scatter_(-1, ids, -torch.inf).logsumexp(-1)})
    return {name: torch.cat([block[name] for block in found]) for name in found[0]}


def sampled_targets(content: dict[str, torch.Tensor], draws: int, temperature: float) -> SampledTargets:
    """Pad the ragged draws of `draw_samples` or the cache to (rows, most distinct tokens), as a loss takes them.

    An unused slot repeats its row's first token with a share of 0, so that no other token gets involved.
    """
    distinct = content["distinct"]
    place = torch.arange(int(distinct.max()) if len(distinct) else 0, device=distinct.device)
    used = place < distinct[:, None]
    start = (distinct.cumsum(0) - distinct)[:, None]
    at = torch.where(used, start + place, start)
    shares = torch.where(used, content["counts"][at].float() / draws, 0)
    return SampledTargets(content["ids"][at], shares, content["log_p"][at].float(), temperature)


def _check(logits: torch.Tensor, name: str, number: int, temperature: float) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits are of shape {tuple(logits.shape)}, and (rows, vocabulary) is expected")
    if number < 1:
        raise ValueError(f"{name} is an integer from 1 on, not {number}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is a number above zero, not {temperature}")


def _blocks(logits: torch.Tensor, temperature: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield blocks of rows with new fp32 tensors of log-probabilities; one empty block if there are no rows."""
    size = max(1, BLOCK // (8 * logits.shape[-1]))
    for first in range(0, max(1, len(logits)), size):
        rows = slice(first, first + size)
        log_p = (logits[rows].float() / temperature).log_softmax(-1)
        broken = log_p.isnan().any(-1).nonzero()
        if len(broken):
            raise ValueError(f"logits of row {first + int(broken[0])} make no distribution (NaN, +inf, or -inf "
                             "throughout): a teacher that overflows in float16 needs bfloat16 or float32")
        yield rows, log_p


def _drawn(log_p: torch.Tensor, places: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inverse-transform sampling: count the tokens at `places` (rows, draws) in [0, 1) of the cumulative sums."""
    draws = places.shape[-1]
    sums = log_p.double().exp_().cumsum_(-1)
    # right=True skips tokens of probability 0, which add nothing to the sum.
    drawn = torch.searchsorted(sums, places * sums[:, -1:], right=True).sort(-1).values
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    at = is_new.flatten().nonzero()[:, 0]
    counts = torch.diff(at, append=at.new_tensor([drawn.numel()]))
    ids = drawn.flatten()[at]
    return {"distinct": is_new.sum(-1), "ids": ids, "counts": counts, "log_p": log_p[at // draws, ids]}


def _uniform(draws: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """(rows, draws) float64 in [0, 1), each row a function of seed and number alone, by the counter-based Philox.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Runs of consecutive numbers take a single call.
    """
    counters = -(-draws // 4)  # each counter value yields four 64-bit words
    bits = np.empty((len(numbers), 4 * counters), np.uint64)
    edges = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        if stop > start:
            stream = np.random.Philox(key=seed, counter=int(numbers[start]) * counters)
            bits[start:stop] = stream.random_raw((stop - start) * 4 * counters).reshape(-1, 4 * counters)
    return (bits[:, :draws] >> np.uint64(11)) * 2.0**-53
