"""Ways to run a region that cannot be captured whole: it keeps what autograd keeps, or only its input."""

from __future__ import annotations

from strategies.rematerialization.capture.uncaptured import MeasuredCall
from strategies.rematerialization.price.costs import Device
from strategies.rematerialization.solve.chain_program import CHECKPOINT, KEEP, Option

STATE = 16_384  # bytes of generator states and arguments that a checkpoint keeps


def fallback_options(measured: MeasuredCall, device: Device) -> tuple[tuple[Option, ...], float]:
    """Both ways to run a region as it is, and the seconds of its forward by its matrix products.

    A region keeps what autograd keeps; or it keeps its input only, and what it hands out is there again, beside the
    gradients that arrive, when it has been recomputed.
    """
    seconds = device.overhead + measured.operations / (device.half if measured.half else device.single)
    again = max(measured.forward, measured.kept + measured.handed) + measured.handed
    return (Option(measured.kept, measured.forward, measured.backward, 0.0, mode=KEEP),
            Option(STATE, measured.forward, max(again, measured.backward + measured.handed), seconds,
                   mode=CHECKPOINT)), seconds
