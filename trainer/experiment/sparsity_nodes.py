"""Experiment nodes for the sparsity of the student: which of its weights are zero, and when they become so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from trainer.errors import UserError, error_context
from trainer.experiment.node import Fraction, Node, PathName, Positive
from trainer.experiment.quantization_nodes import Quantization

if TYPE_CHECKING:  # pragma: no cover - imported for annotations only
    import torch
    from torch import nn

    from strategies.pruning.unstructured.gradual import CubicSchedule
    from strategies.pruning.unstructured.sparse_weights import SparseWeights
    from strategies.pruning.unstructured.sparsity_pattern import Pattern

GRADUAL = ("magnitude", "movement")  # methods that can prune in training


class SparsitySchedule(Node):
    """When weights are pruned in training: the sparsity grows by a cubic schedule (Zhu and Gupta 2018)."""

    begin: Fraction = 0.1
    """Fraction of the run's steps after which pruning begins."""
    end: Fraction = 0.7
    """Fraction of the run's steps after which the sparsity is reached; the rest of the run heals."""
    every: Positive = 10
    """Steps between changes."""

    @model_validator(mode="after")
    def _in_order(self) -> SparsitySchedule:
        if self.end < self.begin:
            raise UserError("end", f"pruning begins at {self.begin:g} of the run", value=self.end,
                            way_out="choose an `end` at or after `begin`")
        return self


class Sparsity(Node):
    """Weights of the student that are zero: found once before training, or during it, and kept so until the export."""

    method: Literal["magnitude", "wanda", "sparsegpt", "movement", "lottery", "keep"] = "sparsegpt"
    """Once: magnitude, wanda, sparsegpt, lottery; in training: movement, magnitude with `schedule`; keep: as it is."""
    sparsity: float | None = None
    """Share of the weights of each layer that are zero."""
    pattern: str | None = None
    """N:M in place of `sparsity`: of every M consecutive weights in a row N are kept, as in 2:4."""
    schedule: SparsitySchedule | None = None
    """Prune step by step during training (magnitude, movement)."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Name patterns (shell wildcards) of layers that are left alone; embeddings always are."""
    calibration_rows: Positive = 128
    """Rows of the training data on which inputs of layers are measured (wanda, sparsegpt)."""
    trained: PathName | None = None
    """Folder of the student of the round before, whose smallest weights are left out (lottery)."""

    @property
    def is_gradual(self) -> bool:
        """Whether weights are pruned during training."""
        return self.method == "movement" or self.schedule is not None

    @property
    def is_one_shot(self) -> bool:
        """Whether weights are pruned once, before training."""
        return self.method != "keep" and not self.is_gradual

    @model_validator(mode="after")
    def _one_way(self) -> Sparsity:
        if self.method == "keep":
            for name in ("sparsity", "pattern", "schedule", "trained"):
                if (value := getattr(self, name)) is not None:
                    raise UserError(name, "keep leaves the zeros as they are in the student's own weights",
                                    value=value if isinstance(value, (float, str)) else value.model_dump(),
                                    way_out="leave it out, or choose another `method`")
            return self
        with error_context("pattern" if self.pattern is not None else "sparsity", value=self.pattern or self.sparsity,
                           way_out="set one of them, for example `sparsity: 0.5`; the other is left out"):
            self.build(1)
        if self.schedule is not None and self.method not in GRADUAL:
            raise UserError("schedule", f"{self.method} prunes once, before training", value=self.schedule.model_dump(),
                            way_out="leave it out, or use magnitude or movement")
        if (self.trained is None) == (self.method == "lottery"):
            raise UserError("trained", "lottery prunes by the weights that a training has found", value=self.trained,
                            way_out="name the exported student of the round before, or leave `trained` out with "
                            "another `method`")
        return self

    @property
    def wanted(self) -> Pattern:
        """The zeros that are asked for, at the end of a schedule."""
        from strategies.pruning.unstructured.sparsity_pattern import Pattern

        return Pattern.parse(self.sparsity, self.pattern)

    def keeper(self, model: nn.Module, steps: int) -> SparseWeights:
        """What keeps the zeros of a model in a training of so many steps, and makes those of a schedule.

        Args:
            model: without wrappers; its parameters may be sharded.

        Raises:
            ValueError: see `prunable`.
        """
        from strategies.pruning.unstructured.gradual import GradualPruning
        from strategies.pruning.unstructured.prunable_layers import prunable, weight_names
        from strategies.pruning.unstructured.sparse_weights import SparseWeights

        layers = prunable(model, self.ignore)
        if not self.is_gradual:
            return SparseWeights(model, weight_names(model, layers))
        return GradualPruning(model, layers, self.wanted, self.build(steps),
                              "movement" if self.method == "movement" else "magnitude")

    def check(self, model: nn.Module) -> None:
        """Raise `ValueError` if a model has no layer to prune, or one whose inputs do not divide; shapes are enough."""
        from strategies.pruning.unstructured.prunable_layers import prunable, rows_of

        for name, layer in prunable(model, self.ignore).items():
            if self.pattern is not None:
                self.wanted.check(rows_of(layer, layer.weight).shape[1], name)

    def bytes_in_training(self, model: nn.Module) -> tuple[int, int]:
        """Bytes of masks in training, and of the scores of movement, which are in checkpoints, too."""
        from strategies.pruning.unstructured.prunable_layers import prunable

        count = sum(layer.weight.numel() for layer in prunable(model, self.ignore).values()
                    if layer.weight.requires_grad)
        return count, 4 * count if self.method == "movement" else 0

    def build(self, steps: int) -> CubicSchedule:
        """The schedule in steps of a run of so many. The last change is before the last step, which heals it."""
        from strategies.pruning.unstructured.gradual import CubicSchedule

        own = self.schedule or SparsitySchedule()
        last = max(0, steps - 1)
        return CubicSchedule(min(round(own.begin * steps), last), min(round(own.end * steps), last), own.every,
                             self.wanted.sparsity)

    def has_final_sparsity(self, step: int, steps: int) -> bool:
        """Whether the student has all of its zeros at a step, counted from 0."""
        return not self.is_gradual or step >= self.build(steps).end

    def cut(self, model: nn.Module, batches: Iterable[dict[str, Any]],
            trained: Callable[[str], torch.Tensor] | None = None) -> dict[str, Any]:
        """Prune a model once, in place; returns the record.

        Args:
            batches: calibration batches; not read by lottery.
            trained: for lottery, returns a parameter of the model of the round before, by its name.

        Raises:
            ValueError: see `one_shot` and `winning_ticket`.
        """
        from strategies.pruning.unstructured.lottery import winning_ticket
        from strategies.pruning.unstructured.prune_once import one_shot

        how: dict[str, Any] = {"sparsity": self.sparsity, "pattern": self.pattern, "ignore": self.ignore}
        if self.method == "lottery":
            assert trained is not None
            return winning_ticket(model, trained, **how)
        assert self.method in ("magnitude", "wanda", "sparsegpt"), "the others do not prune once"
        return one_shot(model, batches, method=self.method, **how)


def check_sparse_quantization(asked: Sparsity, quantization: Quantization | None) -> None:
    """Raise `UserError` if quantization leaves no weight at zero."""
    kinds = [] if quantization is None else [quantization.kind, *(layers.kind for layers in quantization.layers)]
    if "binary" in kinds:
        raise UserError("sparsity", "binary weights are -1 and 1, and none of them zero", value=asked.method,
                        way_out="set quantization.kind to ternary or int, or remove one of the two")


def check_sparse_run(asked: Sparsity, steps: int | None, engine: str | None, in_backward: bool, adapter: bool,
                     exported: str | None) -> None:
    """Raise `UserError` for settings of a run with which zeros would not come, or not stay.

    Args:
        steps: of the training.
        engine: of `sharding`.
        in_backward: of the optimizer.
        adapter: whether the student has an adapter.
        exported: how that is exported.
    """
    if asked.is_gradual and steps == 0:
        raise UserError("student.sparsity.method", "weights are pruned in training, and nothing is trained",
                        value=asked.method, way_out="use sparsegpt, wanda, or magnitude without `schedule`, or train "
                        "for some steps")
    if adapter and exported != "separate":
        raise UserError("student.sparsity", "an adapter that is merged fills the zeros of its base", value=asked.method,
                        way_out="set export.adapter: separate, with which the base stays as it is, or remove "
                        "student.adapter")
    if engine == "zero":
        raise UserError("sharding.engine", "ZeRO holds weights in flat parts of several layers, in which zeros are not "
                        "kept", value="zero", way_out="use fsdp2 or ddp, or remove student.sparsity")
    if in_backward:
        raise UserError("optimizer.in_backward", "weights are updated before the zeros among them could be put back",
                        value=True, way_out="leave it out, or remove student.sparsity")
