"""Experiment node for structured pruning: what of the student is cut away before it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from trainer.errors import UserError
from trainer.experiment.node import Node, Positive

if TYPE_CHECKING:  # pragma: no cover - imported for annotations only
    from strategies.pruning.structured.cut import Cut

Kept = int | float  # a count, or a fraction; `Cut` says which are none
KINDS = ("heads", "kv_heads", "mlp", "width", "layers", "experts", "channels")


class Prune(Node):
    """Cut whole units of the student before it is trained; each key says what remains: a fraction, or a count."""

    heads: Kept | None = None
    """Query heads, the same number in each group that shares keys and values."""
    kv_heads: Kept | None = None
    """Key-value heads, with the query heads that share them."""
    mlp: Kept | None = None
    """Channels within each feed-forward part, and within each expert."""
    width: Kept | None = None
    """Channels of the residual stream (hidden_size); where heads make up the width, `heads` is needed, too."""
    width_by: Literal["selection", "rotation"] = "selection"
    """Keep the channels with the highest scores, or rotate to principal components first; this unties a tied head."""
    layers: Kept | None = None
    """Blocks, ranked by how much each changes the hidden states, whatever `importance` is."""
    experts: Kept | None = None
    """Experts of each mixture, ranked by the weight with which tokens are routed to them."""
    channels: Kept | None = None
    """Channels of convolutions; a fraction, as layers have different numbers of them."""
    importance: Literal["activations", "gradient", "magnitude"] = "activations"
    """Rank units by norms of activations, by first-order change of the loss (|w||g|), or by norms of weights."""
    calibration_rows: Positive = 128
    """Rows of the training data on which units are scored."""
    multiple_of: Positive = 1
    """Round the counts of mlp, width and channels down to a multiple of this."""

    @model_validator(mode="after")
    def _cuts(self) -> Prune:
        if all(getattr(self, name) is None for name in KINDS):
            raise UserError("", "nothing is cut", way_out=f"give at least one of {', '.join(KINDS)}, for example "
                            "`mlp: 0.5`, or remove `prune`")
        with pruning_errors(self, ""):
            self.build()
        return self

    def build(self) -> Cut:
        from strategies.pruning.structured.cut import Cut

        return Cut(**self.model_dump(exclude={"importance", "calibration_rows"}))


@contextmanager
def pruning_errors(prune: Prune, key: str = "student.prune") -> Iterator[None]:
    """Turn errors of a cut into `UserError`s for the key of the unit that they begin with.

    Args:
        key: dotted key of the node; empty while it is validated.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        named = name in type(prune).model_fields
        problem, _, way_out = (rest if named else str(error)).rpartition("; ")
        if not problem:
            problem, way_out = way_out, f"leave `{name}` out" if named else "cut another kind of unit"
        place = ".".join(part for part in (key, name if named else "") if part)
        raise UserError(place, problem, value=getattr(prune, name) if named else prune.model_dump(
            exclude_defaults=True), way_out=way_out) from error
