"""Settings of an experiment that do not go with its task."""

from __future__ import annotations

import difflib

from trainer.errors import UserError
from trainer.experiment.data_nodes import Data
from trainer.experiment.model_nodes import Student, Teacher
from trainer.experiment.nodes import Export
from trainer.experiment.objective_nodes import Objective

OF_TEXT = ("bits_per_byte",)  # held-out figures of language models alone
OF_CLASSES = ("accuracy", "macro_f1", "calibration_error")  # and of classifiers


def check_best(data: Data, best: str | None) -> None:
    """Raise `UserError` for a `training.keep_best` that the models of a task are not measured by."""
    if data.is_language and best in OF_CLASSES:
        raise UserError("training.keep_best", "a language model is not measured by it", value=best,
                        way_out="use bits_per_byte or cross_entropy, or set data.task to a classification")
    if not data.is_language and best is not None and (best in OF_TEXT or "." in best):
        bare = best.removeprefix("held_out.")
        near = difflib.get_close_matches(bare, (*OF_CLASSES, "cross_entropy"), 1, 0.5)
        raise UserError("training.keep_best", "a classifier writes no text, and is measured on held-out rows alone",
                        value=best, way_out=f"did you mean `{near[0]}`?" if near else "use one of accuracy, macro_f1, "
                        f"calibration_error and cross_entropy, for {data.task}")


def check_language(teacher: Teacher | None) -> None:
    """Raise `UserError` for settings of classifiers in an experiment on language models."""
    if teacher is not None and teacher.targets.source == "logits":
        raise UserError("teacher.targets.source", "whole logits are cached of classifiers: of every token they would "
                        "take too much room", value="logits", way_out="use hidden, samples or top_k, or live")


def check_classification(data: Data, objective: Objective, student: Student, teacher: Teacher | None, export: Export
                         ) -> None:
    """Raise `UserError` for settings of language models in a classification."""
    for key, value, problem, way_out in _of_language(data, objective, student, teacher, export):
        if value:
            raise UserError(key, f"{problem}, and the task is {data.task}", value=value, way_out=way_out)


def _of_language(data: Data, objective: Objective, student: Student, teacher: Teacher | None, export: Export
                 ) -> list[tuple[str, object, str, str]]:
    """Key, value if it is given, problem and way out of each setting that is for language models alone."""
    source, others = teacher and teacher.targets.source, [name for name in export.to if name != "onnx"]
    varied = {name: value for name in ("flip", "shift") if (value := getattr(data.images, name))}
    return [
        ("objective.on_policy", objective.on_policy and "on_policy", "only a language model writes text to learn from",
         "remove it"),
        ("objective.balancing", objective.balancing, "the routers of a mixture of experts are balanced over text",
         "remove it"),
        ("objective.divergence.name", objective.divergence.name == "uld" and "uld",
         "uld compares models with different tokens, and classes are the same for both", "use forward_kl"),
        ("teacher.targets.source", source not in (None, "live", "logits") and source,
         "these caches hold what a teacher says of text", "use live, or logits"),
        ("data.images", source == "logits" and varied,
         "images that are varied in each epoch have no cache of what the teacher says of them (teacher.targets.source)",
         "leave flip and shift out, or use live"),
        ("student.adapter", student.adapter is not None and student.adapter.kind,
         "adapters are on language models", "remove it, and train all weights"),
        ("export.to", others, "these runtimes read language models",
         "use onnx" if "onnx" not in export.to else "keep onnx alone"),
        ("export.readers", list(export.readers), "these runtimes are asked for their next token", "leave it out"),
    ]
