"""Limbeck: a large teacher and a budget in, a small student that is real out.

The public face, for scripts of one's own:

    import limbeck

    source = limbeck.read_experiment("configs/quickstart.yaml", ["optimizer.lr=1e-4"])
    folder = limbeck.run(source)

`rematerialize`, `WeightQuantizer`, `prepare_qat`, `ResponseObjective`, `Lamb`, `Adafactor` and `write_student` also
serve alone, in anybody's training loop; `Lamb` and `Adafactor` are right on parameters that FSDP2 has sharded, too.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

_PUBLIC = {  # name -> where it lives; imported when first used, so that `import limbeck` costs nothing
    "Experiment": ("trainer.experiment.experiment", "Experiment"),
    "read_experiment": ("trainer.experiment.load", "read_experiment"),
    "run": ("trainer.pipeline", "run_experiment"),
    "Trainer": ("trainer.training.loop", "Trainer"),
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
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__


def main() -> int:
    """The `limbeck` console command."""
    from trainer.cli import limbeck

    return limbeck(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
