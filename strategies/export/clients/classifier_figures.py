"""Figures of a classifier from its logits, with only NumPy: for the scripts that measure one in its runtime."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

IGNORED, BINS = -100, 15


def figures(logits: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Cross-entropy in nats, accuracy, macro F1, expected calibration error, and the confusion: true class by answer.

    Args:
        logits: (..., classes).
        targets: (...) class numbers, or `IGNORED`.
    """
    classes = logits.shape[-1]
    kept = targets.reshape(-1) != IGNORED
    scores, truth = logits.reshape(-1, classes)[kept].astype(np.float64), targets.reshape(-1)[kept]
    scores -= scores.max(-1, keepdims=True)
    shares = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    answer, rows = scores.argmax(-1), len(truth)
    confidence, hit = np.exp(shares.max(-1)), answer == truth
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (truth, answer), 1)
    each = [2 * confusion[one, one] / total for one in range(classes)
            if (total := confusion[one].sum() + confusion[:, one].sum())]
    place = np.clip(np.ceil(confidence * BINS).astype(int), 1, BINS) - 1
    gap = sum(abs(confidence[place == one].sum() - hit[place == one].sum()) for one in range(BINS))
    found = {"cross_entropy": float(-shares[np.arange(rows), truth].mean()), "accuracy": float(hit.mean()),
             "macro_f1": float(np.mean(each)), "calibration_error": float(gap / rows)} if rows else dict.fromkeys(
                 ("cross_entropy", "accuracy", "macro_f1", "calibration_error"), math.nan)
    return {**found, "rows": rows, "confusion": confusion.tolist()}
