"""Figures of a finished run that settings of a sweep can be ranked by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.run.folder import RunFolder, not_written, read_json
from trainer.run.held_out import FIGURES


@dataclass(frozen=True)
class Metric:
    """A figure of a run.

    Attributes:
        meaning: what it is, with its unit.
        highest: whether more of it is better.
        read: reads it from a finished run.
        language: whether it is of language models (True) or of classifiers (False); None for both.
    """

    meaning: str
    highest: bool
    read: Callable[[RunFolder], float]
    language: bool | None = None

    @property
    def better(self) -> str:
        """Which way is better, in words."""
        return "higher is better" if self.highest else "lower is better"


def _compared(name: str) -> Callable[[RunFolder], float]:
    return lambda folder: read_json(folder.comparison)["student"][name]


def _receipt(name: str) -> Callable[[RunFolder], float]:
    return lambda folder: read_json(folder.receipt)[name]


def _lines(folder: RunFolder) -> list[dict[str, Any]]:
    from trainer.run.metrics import read_lines  # imports torch, which a sweep does not need otherwise

    return read_lines(folder.metrics)


def _held_out(name: str) -> Callable[[RunFolder], float]:
    return lambda folder: [line["held_out"][name] for line in _lines(folder) if "held_out" in line][-1]


def _seconds(folder: RunFolder) -> float:
    return sum(line["seconds"] for line in _lines(folder) if "loss" in line)


def _of_classes() -> dict[str, Metric]:
    """What classifiers are measured by, of the exported student and at the last evaluation in training."""
    found = {}
    for name, meaning in (("accuracy", "share of right answers on held-out rows"),
                          ("macro_f1", "mean of the classes' F1 on held-out rows"),
                          ("calibration_error", "expected calibration error on held-out rows")):
        highest = FIGURES[name].higher
        found[name] = Metric(f"{meaning}, of the exported student", highest, _compared(name), False)
        found[f"held_out.{name}"] = Metric(f"{meaning}, at the last evaluation in training", highest, _held_out(name),
                                           False)
    return found


METRICS = {
    "bits_per_byte": Metric("bits per byte of held-out text, of the exported student", False,
                            _compared("bits_per_byte"), True),
    **_of_classes(),
    "bytes_on_disk": Metric("bytes of the exported weight files", False, _receipt("bytes_on_disk")),
    "tokens_per_second": Metric("tokens per second of the exported student in transformers", True,
                                _compared("tokens_per_second"), True),
    "rows_per_second": Metric("rows per second of the exported student in transformers", True,
                              _compared("rows_per_second"), False),
    "argmax_agreement": Metric("share of answers in which the exported file agrees with the trained student", True,
                               _receipt("argmax_agreement")),
    "held_out.bits_per_byte": Metric("bits per byte of held-out text, at the last evaluation in training", False,
                                     _held_out("bits_per_byte"), True),
    "held_out.cross_entropy": Metric("nats per token or row held out, at the last evaluation in training", False,
                                     _held_out("cross_entropy")),
    "memory_peak": Metric("bytes of memory at the peak of the run", False,
                          lambda folder: read_json(folder.measured)["memory_peak"]),
    "seconds": Metric("seconds of the training steps", False, _seconds),
}
ALWAYS = ("bytes_on_disk",)  # shown beside the one that is asked for; size is what a student is made for


def figures(folder: RunFolder, metric: str) -> dict[str, float]:
    """The metric and what is always shown, of a finished run.

    Raises:
        UserError: a file of the run is malformed.
    """
    found = {}
    for name in dict.fromkeys((metric, *ALWAYS)):
        try:
            found[name] = float(METRICS[name].read(folder))
        except (LookupError, TypeError, ValueError, OSError) as error:
            if type(error).__name__ == "UserError":
                raise
            raise not_written(folder.path, f"it does not say its {name}") from error
    return found
