"""Accuracy, F1 and calibration of a classifier, from counts that can be summed over batches and processes."""

from __future__ import annotations

import math
from typing import Any

import torch

BINS = 15  # of confidence, as in Guo et al. 2017


class ClassificationCounts:
    """Counts of a classifier's answers on some rows, in float64 on their device.

    Attributes:
        nats: () summed cross-entropy.
        confusion: (classes, classes) rows by true class and by answer.
        bins: (3, `BINS`) of equally wide intervals of confidence: rows, summed confidence, right answers.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu", wide: torch.dtype = torch.float64) -> None:
        self.classes = classes
        self._flat = torch.zeros(1 + classes**2 + 3 * BINS, dtype=wide, device=device)

    @property
    def nats(self) -> torch.Tensor:
        return self._flat[0]

    @property
    def confusion(self) -> torch.Tensor:
        return self._flat[1:1 + self.classes**2].view(self.classes, self.classes)

    @property
    def bins(self) -> torch.Tensor:
        return self._flat[1 + self.classes**2:].view(3, BINS)

    @torch.no_grad()
    def add(self, logits: torch.Tensor, targets: torch.Tensor, ignored: int = -100) -> None:
        """Count the answers to some rows.

        Args:
            logits: (..., classes).
            targets: (...) class numbers; `ignored` where there is none.
            ignored: that number.
        """
        kept = targets.flatten() != ignored
        scores, truth = logits.reshape(-1, self.classes)[kept].float(), targets.flatten()[kept]
        log_shares = scores.log_softmax(-1).to(self._flat.dtype)
        confidence, answer = log_shares.exp().max(-1)
        one = torch.ones_like(confidence)
        self._flat[0] -= log_shares.gather(-1, truth[:, None]).sum()
        self.confusion.view(-1).index_add_(0, truth * self.classes + answer, one)
        place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # intervals (0, 1/15], (1/15, 2/15], ...
        for row, values in zip(self.bins, (one, confidence, (answer == truth).to(one)), strict=True):
            row.index_add_(0, place, values)

    def numbers(self) -> torch.Tensor:
        """All counts as one vector, to be summed over processes."""
        return self._flat

    def take(self, numbers: torch.Tensor) -> ClassificationCounts:
        """The counts in a vector of `numbers`."""
        found = ClassificationCounts(self.classes)
        found._flat = numbers.detach().to("cpu", torch.float64)
        return found

    def figures(self) -> dict[str, Any]:
        """The figures of all rows counted; NaN if a row's logits had one, which is no answer and must not count as one.

        Returns:
            cross_entropy: nats per row.
            accuracy: share of right answers.
            macro_f1: mean of the F1 of the classes that a row or an answer has (0 of a class that is never met).
            calibration_error: expected calibration error with `BINS` bins (Guo et al. 2017, eq. 3).
        """
        rows = float(self.confusion.sum())
        if not rows or self.nats.isnan():
            return dict.fromkeys(("cross_entropy", "accuracy", "macro_f1", "calibration_error"), math.nan)
        right = self.confusion.diagonal()
        met = self.confusion.sum(0) + self.confusion.sum(1)  # 2 true positives + false positives + false negatives
        each = 2 * right[met > 0] / met[met > 0]
        counts, confidence, hits = self.bins
        gaps = (confidence - hits).abs().sum()
        return {"cross_entropy": float(self.nats) / rows, "accuracy": float(right.sum()) / rows,
                "macro_f1": float(each.mean()), "calibration_error": float(gaps) / rows}

    def table(self) -> list[list[int]]:
        """The confusion as whole numbers: a row for each true class, a column for each answer."""
        return self.confusion.long().tolist()
