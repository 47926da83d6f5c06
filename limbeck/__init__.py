"""Limbeck: distill a large teacher into a compressed student, within a memory budget.

This is the public API, for use from your own scripts:

    import limbeck

    source = limbeck.read_experiment("configs/quickstart.yaml", ["optimizer.lr=1e-4"])
    folder = limbeck.run(source)

`rematerialize`, `WeightQuantizer`, `prepare_qat`, `ResponseObjective`, `Lamb`, `Adafactor` and `write_student` also
work on their own, in any training loop; `Lamb` and `Adafactor` also compute correct updates for parameters sharded by
FSDP2.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer import __version__

__all__ = [
    "ActivationQuantizer", "Adafactor", "Distillation", "Divergence", "Experiment", "Head", "HiddenTargets", "Lamb",
    "ResponseObjective", "RunFailed", "Stopped", "Trainer", "UserError", "WeightQuantizer", "parameter_groups",
    "prepare_qat", "quantize", "read_experiment", "rematerialize", "run", "write_report", "write_student",
    "__version__",
]

if TYPE_CHECKING:  # so that type checkers and editors can resolve the names in _PUBLIC
    from strategies.distillation.losses.divergences import Divergence
    from strategies.distillation.losses.heads import Head
    from strategies.distillation.losses.response import ResponseObjective
    from strategies.distillation.losses.teacher_targets import HiddenTargets
    from strategies.distillation.step import Distillation
    from strategies.export.hf.transformers_folder import write_folder as write_student
    from strategies.optimizers.adafactor import Adafactor
    from strategies.optimizers.groups import parameter_groups
    from strategies.optimizers.lamb import Lamb
    from strategies.quantization.activations import ActivationQuantizer
    from strategies.quantization.post_training import quantize
    from strategies.quantization.qat import prepare as prepare_qat
    from strategies.quantization.quantizer import WeightQuantizer
    from strategies.rematerialization.rematerialize import rematerialize
    from trainer.errors import RunFailed, Stopped, UserError
    from trainer.experiment.experiment import Experiment
    from trainer.experiment.load import read_experiment
    from trainer.run.report import write_report
    from trainer.script import Trainer
    from trainer.stages.run_stages import run as run

_PUBLIC = {  # name -> (module, attribute); imported on first use, so that `import limbeck` is cheap
    "Experiment": ("trainer.experiment.experiment", "Experiment"),
    "read_experiment": ("trainer.experiment.load", "read_experiment"),
    "run": ("trainer.stages.run_stages", "run"),
    "Trainer": ("trainer.script", "Trainer"),
    "ResponseObjective": ("strategies.distillation.losses.response", "ResponseObjective"),
    "Divergence": ("strategies.distillation.losses.divergences", "Divergence"),
    "Distillation": ("strategies.distillation.step", "Distillation"),
    "Head": ("strategies.distillation.losses.heads", "Head"),
    "HiddenTargets": ("strategies.distillation.losses.teacher_targets", "HiddenTargets"),
    "WeightQuantizer": ("strategies.quantization.quantizer", "WeightQuantizer"),
    "rematerialize": ("strategies.rematerialization.rematerialize", "rematerialize"),
    "Lamb": ("strategies.optimizers.lamb", "Lamb"),
    "Adafactor": ("strategies.optimizers.adafactor", "Adafactor"),
    "parameter_groups": ("strategies.optimizers.groups", "parameter_groups"),
    "ActivationQuantizer": ("strategies.quantization.activations", "ActivationQuantizer"),
    "prepare_qat": ("strategies.quantization.qat", "prepare"),
    "quantize": ("strategies.quantization.post_training", "quantize"),
    "write_student": ("strategies.export.hf.transformers_folder", "write_folder"),
    "write_report": ("trainer.run.report", "write_report"),
    "UserError": ("trainer.errors", "UserError"),
    "RunFailed": ("trainer.errors", "RunFailed"),
    "Stopped": ("trainer.errors", "Stopped"),
}


if not TYPE_CHECKING:  # with a module __getattr__, a type checker would accept any name as defined
    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
        module, attribute = _PUBLIC[name]
        return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
