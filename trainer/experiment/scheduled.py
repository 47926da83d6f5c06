"""Numbers that may move during a run: one value, or points with straight lines between them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticKnownError

from trainer.errors import UserError
from trainer.experiment.node import Fraction, Weight

WAY_OUT = "write a number, or points [fraction of the run, number] such as [[0, 1], [0.5, 0.1]]"


def scheduled(number: Any) -> Any:
    """The type of a key that takes one number or points (fraction of the run, number), each valid for type `number`."""
    share, one = TypeAdapter(Fraction), TypeAdapter(number)

    def read(value: Any) -> Any:
        if isinstance(value, dict):
            raise UserError("", "is no list of points [fraction of the run, number]", value=value, way_out=WAY_OUT)
        if not isinstance(value, (list, tuple)):
            return _valid(one, value)
        if not value or not all(isinstance(point, (list, tuple)) and len(point) == 2 for point in value):
            raise UserError("", "is no list of points [fraction of the run, number]", value=value, way_out=WAY_OUT)
        if wrong := next((at for at, _ in value if isinstance(at, (int, float)) and not 0 <= at <= 1), None):
            raise UserError("", f"the first number of a point is a fraction of the run, from 0 to 1, and {wrong:g} is "
                            "none", value=value, way_out=f"{WAY_OUT}; for a step, its number divided by training.steps")
        points = tuple((_valid(share, at), _valid(one, to)) for at, to in value)
        shares = [at for at, _ in points]
        if shares[0] != 0 or shares != sorted(set(shares)):
            raise UserError("", "the fractions of a schedule rise, and the first is 0", value=value, way_out=WAY_OUT)
        return points

    # Numbers are read before the union is tried, whose own errors would name each of its variants.
    return Annotated[number | tuple[tuple[Fraction, number], ...], BeforeValidator(read)]


def _valid(adapter: TypeAdapter, value: Any) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise PydanticKnownError(first["type"], first.get("ctx")) from None


ScheduledWeight = scheduled(Weight)
ScheduledFraction = scheduled(Fraction)
ScheduledShare = scheduled(Annotated[float, Field(gt=0, lt=1)])
ScheduledTemperature = scheduled(Annotated[float, Field(gt=0, allow_inf_nan=False)])


def moves(value: Any) -> bool:
    """Whether a value is a schedule; as plain data, too."""
    return isinstance(value, (list, tuple))


def value_at(value: Any, fraction: float) -> Any:
    """The value at a fraction of the run, on the line between the points around it; after the last, the last one's."""
    if not moves(value):
        return value
    for (begin, before), (end, after) in zip(value, value[1:], strict=False):
        if fraction < end:
            return before + (after - before) * (fraction - begin) / (end - begin)
    return value[-1][1]


def highest(value: Any) -> Any:
    """The largest value of the run; a value that does not move is itself."""
    return max(number for _, number in value) if moves(value) else value


def lowest(value: Any) -> Any:
    """The smallest value of the run."""
    return min(number for _, number in value) if moves(value) else value


def shown(value: Any) -> str:
    """For reports: `1`, or `1 -> 0 (at 50%)`."""
    if not moves(value):
        return f"{value:g}"
    (_, first), *others = value
    return " -> ".join([f"{first:g}", *(f"{number:g} (at {share:.0%})" for share, number in others)])
