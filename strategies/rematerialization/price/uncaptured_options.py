"""Options without a graph: keep what autograd keeps, or keep only the input."""

from __future__ import annotations

import numpy as np

from strategies.rematerialization.capture.uncaptured import MeasuredCall
from strategies.rematerialization.price.costs import Device
from strategies.rematerialization.solve.chain_program import CHECKPOINT, KEEP, Option

STATE = 16_384  # bytes of RNG states and arguments that a checkpoint keeps


def unchanged_option(measured: MeasuredCall, workspace: np.ndarray, forward: int) -> Option:
    """A captured region run unchanged, as if there were no plan: it recomputes nothing and keeps what autograd keeps.

    Args:
        measured: what that needs.
        workspace: (operations,) bytes that each operation of its graph needs beyond tensors; the largest of a phase is
            added to that phase's peak.
        forward: number of operations of the forward.
    """
    ahead, back = (int(part.max(initial=0)) for part in (workspace[:forward], workspace[forward:]))
    return Option(measured.kept, measured.forward + ahead, measured.backward + back, 0.0, mode=KEEP)


def fallback_options(measured: MeasuredCall, device: Device) -> tuple[tuple[Option, ...], float]:
    """Both options of an uncaptured region, and the seconds of its forward, from its matrix products.

    The region keeps what autograd keeps; or it keeps only its input, and once recomputed its outputs are resident again
    beside the incoming gradients.
    """
    seconds = device.overhead + measured.operations / (device.half if measured.half else device.single)
    again = max(measured.forward, measured.kept + measured.handed) + measured.handed
    return (Option(measured.kept, measured.forward, measured.backward, 0.0, mode=KEEP),
            Option(STATE, measured.forward, max(again, measured.backward + measured.handed), seconds,
                   mode=CHECKPOINT)), seconds
