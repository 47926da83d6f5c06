"""Options of a region that cannot be captured: keep what autograd keeps, or keep only its input."""

from __future__ import annotations

from strategies.rematerialization.capture.uncaptured import MeasuredCall
from strategies.rematerialization.price.costs import Device
from strategies.rematerialization.solve.chain_program import CHECKPOINT, KEEP, Option

STATE = 16_384  # bytes of RNG states and arguments that a checkpoint keeps


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
