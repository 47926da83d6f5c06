"""Settings of an experiment that do not go with its task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.errors import UserError

if TYPE_CHECKING:  # pragma: no cover - imported for annotations only
    from trainer.experiment.experiment import Experiment

OF_TEXT = ("bits_per_byte",)  # held-out figures of language models alone
OF_CLASSES = ("accuracy", "macro_f1", "calibration_error")  # and of classifiers


def check_task_settings(experiment: Experiment) -> None:
    """Raise `UserError` for settings of language models in a classification, and for the reverse."""
    data, best = experiment.data, experiment.training.keep_best
    if data.is_language:
        if best in OF_CLASSES:
            raise UserError("training.keep_best", "a language model is not measured by it", value=best,
                            way_out="use bits_per_byte or cross_entropy, or set data.task to a classification")
        if experiment.teacher is not None and experiment.teacher.targets.source == "logits":
            raise UserError("teacher.targets.source", "whole logits are cached of classifiers: of every token they "
                            "would take too much room", value="logits", way_out="use hidden, samples or top_k, or live")
        return
    if best in OF_TEXT:
        raise UserError("training.keep_best", "a classifier writes no text", value=best,
                        way_out=f"use one of accuracy, macro_f1, calibration_error and cross_entropy, for {data.task}")
    for key, value, problem, way_out in _of_language(experiment):
        if value:
            raise UserError(key, f"{problem}, and the task is {data.task}", value=value, way_out=way_out)


def _of_language(experiment: Experiment) -> list[tuple[str, object, str, str]]:
    """Key, value if it is given, problem and way out of each setting that is for language models alone."""
    objective, student, export, data = experiment.objective, experiment.student, experiment.export, experiment.data
    teacher = experiment.teacher
    others = [name for name in export.to if name != "onnx"]
    return [
        ("objective.on_policy", objective.on_policy and "on_policy", "only a language model writes text to learn from",
         "remove it"),
        ("objective.balancing", objective.balancing, "the routers of a mixture of experts are balanced over text",
         "remove it"),
        ("objective.divergence.name", objective.divergence.name == "uld" and "uld",
         "uld compares models with different tokens, and classes are the same for both", "use forward_kl"),
        ("teacher.targets.source", teacher is not None and teacher.targets.source not in ("live", "logits")
         and teacher.targets.source, "these caches hold what a teacher says of text", "use live, or logits"),
        ("data.images", teacher is not None and teacher.targets.source == "logits" and (
            data.images.flip or data.images.shift) and {"flip": data.images.flip, "shift": data.images.shift},
         "images that are varied in each epoch have no cache of what the teacher says of them (teacher.targets.source)",
         "leave flip and shift out, or use live"),
        ("student.adapter", student.adapter is not None and student.adapter.kind,
         "adapters are on language models", "remove it, and train all weights"),
        ("export.to", others, "these runtimes read language models",
         "use onnx" if "onnx" not in export.to else "keep onnx alone"),
        ("export.readers", list(export.readers), "these runtimes are asked for their next token", "leave it out"),
    ]
