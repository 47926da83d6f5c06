"""Figures of held-out data by name: what they are called, and whether higher is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A figure of held-out data.

    Attributes:
        words: what it is called.
        higher: whether higher is better.
        share: whether it is a share, shown in percent.
    """

    words: str
    higher: bool = False
    share: bool = False

    def shown(self, value: float) -> str:
        """A value for people, without its name."""
        return f"{value:.2%}" if self.share else f"{value:.4f}"


FIGURES = {
    "bits_per_byte": Figure("bits per byte"),
    "cross_entropy": Figure("cross-entropy"),
    "accuracy": Figure("accuracy", higher=True, share=True),
    "macro_f1": Figure("macro F1", higher=True, share=True),
    "calibration_error": Figure("calibration error", share=True),
}


def main_figure(found: Mapping[str, Any]) -> str:
    """The figure by which a model is judged first, of those that were measured: bits per byte, or accuracy."""
    return "bits_per_byte" if "bits_per_byte" in found else "accuracy"


def compared(receipt: Mapping[str, Any]) -> str:
    """What `tokens_compared` of a receipt counts."""
    return "answers compared" if "accuracy" in receipt else "tokens compared"


def in_words(found: Mapping[str, Any], name: str | None = None) -> str:
    """A figure with its name: `1.2345 bits per byte`, or `accuracy 93.10%`."""
    name = name or main_figure(found)
    figure = FIGURES[name]
    value = figure.shown(found[name])
    return f"{figure.words} {value}" if figure.share else f"{value} {figure.words}"
