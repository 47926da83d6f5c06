"""Makes again what values that act only after training have changed: the exported student, a receipt, the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import torch

from trainer.data.dataset import PreparedData
from trainer.experiment.experiment import Experiment
from trainer.models.build import DTYPES
from trainer.run.changes import under
from trainer.run.folder import RunFolder
from trainer.student.compare_student import compare, rebuilt
from trainer.student.early_exits import ExitModel, exits_of_checkpoint, write_early_exits
from trainer.student.export_student import RUNTIMES, check_written, drop_stale, write_others
from trainer.student.other_readers import missing_receipts
from trainer.student.quantize_student import finalize_student
from trainer.student.write_student import logits_to_compare, write_student

EXPORTED = ("student.quantization", "export.dtype", "export.adapter")  # keys that change the exported files themselves


def changes_files(changed: Iterable[str]) -> bool:
    """Whether changed keys act on the exported files themselves."""
    return any(under(key, EXPORTED) for key in changed)


def changes_tasks(changed: Iterable[str]) -> bool:
    """Whether changed keys ask for another evaluation on tasks."""
    return any(under(key, ("evaluate",)) for key in changed)


def remake(experiment: Experiment, folder: RunFolder, text: PreparedData, changed: Iterable[str],
           device: torch.device) -> None:
    """Make again what changed values act on, from the last checkpoint, on one process; nothing is trained.

    Quantization and dtype change the exported student, and so everything after it. Otherwise its files stay as they
    are: a tolerance or a prompt needs another comparison, and `export.to` only the runtimes that are new.

    Args:
        changed: the changed keys.

    Raises:
        RunFailed: the student cannot be taken from the last checkpoint, or the reloaded one differs from it; the one
            before stays.
    """
    if all(under(key, ("evaluate",)) for key in changed):
        return  # the models stay as they are
    whole = changes_files(changed)
    student, export = experiment.student, experiment.export
    before = rebuilt(experiment, folder, folder.student, text, final=False)
    others = any(under(key, ("objective.early_exits",)) for key in changed)
    exits = exits_of_checkpoint(experiment.objective, folder, before, experiment.seed) if whole or others else None
    model = finalize_student(experiment, before, text, folder)
    if whole:
        write_student(folder.unverified, before, model, student, export, experiment.form, text)
    else:
        shutil.rmtree(folder.unverified, ignore_errors=True)
        shutil.copytree(folder.student, folder.unverified)
    trained, exported = logits_to_compare(before, model, student, export, text)
    there = () if whole else [
        name for name in RUNTIMES if not missing_receipts(folder.student_for(name), name, experiment.export)]
    for name in RUNTIMES if whole else ():  # of the student before; one that cannot be written again must not stay
        if name in export.to:
            shutil.rmtree(folder.student_for(name), ignore_errors=True)
    if exits is not None:
        write_early_exits(experiment.name, experiment.objective.early_exits, export, folder, folder.unverified,
                          ExitModel.of(model, exits, DTYPES[export.dtype], text, experiment.training.micro_batch))
    failed = write_others(experiment, folder, model, text, without=there)
    compare(experiment, folder, trained, exported, text, device)
    folder.report.unlink(missing_ok=True)  # of the student before: until it is written again the run is not finished
    if whole:
        drop_stale(folder, experiment.name, experiment.student.quantization, experiment.export)
    check_written(folder, failed)
