"""The base class of experiment nodes, and the constrained value types that their fields share."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from strategies.memory.units import parse_bytes
from trainer.errors import error_context

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DeviceName = Literal["h200", "h100", "a100-80gb", "a100-40gb", "l40s", "l4", "v100", "t4", "rtx4090", "rtx3090"]
Dtype = Literal["float32", "bfloat16", "float16"]
PathName = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


def _bytes_as_written(budget: object) -> object:
    if budget is None:
        return None
    with error_context("", value=budget):
        parse_bytes(budget)
    return budget if isinstance(budget, (str, int)) else int(budget)


Bytes = Annotated[str | int | None, BeforeValidator(_bytes_as_written)]  # "6GiB", or a number of bytes


class Node(BaseModel):
    """Base class of the parts of an experiment: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
