"""What came of a check."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.errors import ExperimentErrors, RunFailed, UserError

RIGHT, REFUSED, WRONG, TRACEBACK, ABSENT = "right", "refused", "wrong", "traceback", "not tried"
ROOT = Path(__file__).parents[2]


def right(**figures: Any) -> dict[str, Any]:
    """As it should be."""
    return {"verdict": RIGHT, **figures}


def judged(holds: bool, **figures: Any) -> dict[str, Any]:
    """Right or wrong, with figures."""
    return {"verdict": RIGHT if holds else WRONG, **figures}


def refused(said: str, **figures: Any) -> dict[str, Any]:
    """Before training, with a message."""
    return {"verdict": REFUSED, "said": said, **figures}


def wrong(said: str, **figures: Any) -> dict[str, Any]:
    """Not as it should be, in words."""
    return {"verdict": WRONG, "said": said, **figures}


def verdict_of(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A check's own verdict, or what the exception that ended it means."""
    try:
        return check()
    except (UserError, ExperimentErrors) as error:
        return refused(message(error))
    except RunFailed as error:
        return wrong(f"after training: {str(error)[:300]}")
    except Exception as error:  # of every kind: that is what is looked for
        place = next((frame for frame in reversed(traceback.extract_tb(error.__traceback__))
                      if frame.filename.startswith(str(ROOT))), None)
        where = "" if place is None else f" ({Path(place.filename).relative_to(ROOT)}, in {place.name})"
        said = re.sub(r"\x1b\[[0-9;]*m|/\S*/", "", " ".join(str(error).split()))
        return {"verdict": TRACEBACK, "said": f"{type(error).__name__}: {said[:240]}{where}"}


def message(error: Exception) -> str:
    """A mistake's message in one line, without folders of this machine."""
    first = error.errors[0] if isinstance(error, ExperimentErrors) else error
    return f"{first.key}: {' '.join(first.problem.split())}"[:400]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, as a share of the largest number; infinite where one is not finite."""
    difference = float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30))
    return difference if difference == difference else float("inf")
