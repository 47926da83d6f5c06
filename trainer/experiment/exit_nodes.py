"""The experiment node for early exits: heads after some of the student's blocks, where easy inputs leave."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from trainer.errors import UserError
from trainer.experiment.node import Fraction, Node


class EarlyExits(Node):
    """Heads after some of the student's blocks, where inputs leave that they are sure of (survey III-A; BranchyNet)."""

    layers: tuple[int, ...]
    """Blocks after which an exit sits, counted from 0, without the last one, such as [3, 7]."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Weight of all exits together in the loss; each has a part in proportion to the number of blocks before it."""
    cross_entropy: Fraction = 0.5
    """Share of the cross-entropy in an exit's loss; the rest is KL from the student's own last layer."""
    threshold: float = 0.9
    """Probability of the most probable answer from which on an input leaves; the default of the exported code."""

    @model_validator(mode="after")
    def _sits(self) -> EarlyExits:
        if not self.layers:
            raise UserError("layers", "there is no exit without a block after which it sits", value=[],
                            way_out="name blocks, counted from 0, such as [1], or remove `early_exits`")
        if self.layers[0] < 0 or list(self.layers) != sorted(set(self.layers)):
            kept = sorted({layer for layer in self.layers if layer >= 0})
            raise UserError("layers", "blocks are counted from 0, and named once each from the first to the last",
                            value=list(self.layers), way_out=f"write {kept or [1]}")
        if not 0 < self.threshold <= 1:
            raise UserError("threshold", "it is a probability above 0, and at most 1", value=self.threshold,
                            way_out="use 0.9, for example; below the number of answers' inverse every input leaves at "
                            "the first exit")
        return self


def check_exits_fit(asked: EarlyExits | None, *, steps: int | None, engine: str | None, on_policy: bool,
                    adapter_alone: bool, trust: bool) -> None:
    """Raise `UserError` for what exits do not go with in an experiment.

    Args:
        steps: of the training; 0 exports the student as it is.
        engine: of the sharding.
        on_policy: whether the student learns from its own texts.
        adapter_alone: whether an adapter is exported without its base.
        trust: whether the student's own Python code has to run.
    """
    if asked is None:
        return
    key, otherwise = "objective.early_exits", "remove objective.early_exits"
    if steps == 0:
        raise UserError("training.steps", "exits are trained, and nothing is", value=0,
                        way_out=f"train for some steps, or {otherwise}")
    if engine in ("fsdp2", "zero"):
        raise UserError("sharding.engine", f"{engine} shards the student, and exits are trained beside whole weights",
                        value=engine, way_out=f"use ddp, or {otherwise}")
    if on_policy:
        raise UserError("objective.on_policy", "exits learn from the text of the data, and a text that the student "
                        "wrote itself has no targets", way_out=f"remove it, or {otherwise}")
    if adapter_alone:
        raise UserError("export.adapter", "exits are exported with a whole model", value="separate",
                        way_out=f"use merged, or {otherwise}")
    if trust:
        raise UserError(key, "the exported code runs no Python code that ships with a model, as this student needs it",
                        way_out=f"name a model of transformers itself, or {otherwise}")
