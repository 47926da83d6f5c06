"""What a sweep would run: its runs, and the plan of each setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.load import Source
from trainer.run.metrics import readable
from trainer.sweep.sweep_plan import SweepPlan, console


def show_sweep(plan: SweepPlan, planned: Callable[[Source], Any]) -> None:
    """Print the runs of a sweep in their order, and steps, parameters and bytes of each setting.

    Args:
        plan: the sweep.
        planned: makes the plan of an experiment.

    Raises:
        ExperimentErrors: a setting cannot be planned: a shape or a budget is impossible.
    """
    record = plan.record
    console.print(f"{record.name}: {record.total} runs, {plan.source.sweep.jobs} at a time, ranked by {record.metric}; "
                  f"{record.progress}\n")
    by_label = {run.setting.label: run.setting for run in plan.runs.values()}
    for label, setting in by_label.items():
        console.print(f"  {label}: {_planned(setting.source, planned, label)}")
    if plan.source.sweep.search is not None:
        console.print(f"  {plan.source.sweep.search.trials - len(by_label)} settings are yet to be proposed within "
                      f"{', '.join(record.keys)}")
    if record.runs:
        console.print("\nRuns, in their order:")
    for run in record.runs:
        console.print(f"  {run.title}  {run.state}  {plan.folder.run(run).path}")


def _planned(source: Source, planned: Callable[[Source], Any], label: str) -> str:
    try:
        plan = planned(source)
    except UserError as error:
        error.problem += f" (in the setting {label})"
        raise ExperimentErrors([error], source.origins, source.file) from error
    steps = "steps as the data has" if plan.steps is None else f"{plan.steps:,} steps"
    peak = "" if plan.memory is None else f", {readable(plan.memory.peak)} at the peak of a step"
    return f"{steps}, {plan.parameters['student']:,} parameters, {readable(plan.student_bytes)} of tensors{peak}"
