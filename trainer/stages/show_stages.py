"""What stages would do: an overview of all, and the plan of each that is not an export."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from trainer.early_checks import next_start
from trainer.experiment.load import Source
from trainer.planning.plan import Plan
from trainer.planning.show_plan import plan_json, print_columns, show_plan
from trainer.run.metrics import console, readable
from trainer.stages.check_stages import check_stages
from trainer.stages.stage_record import StagesFolder
from trainer.stages.stage_settings import StageSettings, settings_of


def dry_run_stages(source: Source, as_json: bool) -> None:
    """Show the stages of an experiment, without leaving any file.

    Raises:
        ExperimentErrors: a mistake in one of them.
    """
    StagesFolder(source.experiment.folder).check()
    stages = settings_of(source)
    plans = check_stages(stages)
    if int(os.environ.get("RANK", 0)) != 0:
        return
    starts = [next_start(stage.source.experiment) for stage in stages]
    if as_json:
        found = [json.loads(plan_json(stage.source, plan, (), start))
                 for stage, plan, start in zip(stages, plans, starts, strict=True)]
        print(json.dumps({"stages": found}, indent=2))
        return
    print_columns(f"Stages of {source.experiment.name}: what each starts from, trains and hands on", [
        _row(stage, stages, plan, start) for stage, plan, start in zip(stages, plans, starts, strict=True)])
    for stage, plan, start in zip(stages, plans, starts, strict=True):
        if stage.kind != "export":
            times = "" if stage.until is None else f", up to {stage.until.rounds} rounds; this is the first"
            console.print(f"\nStage {stage.number + 1} of {len(stages)}: {stage.kind}{times}")
            show_plan(stage.source, plan, (), start)


def _row(stage: StageSettings, stages: Sequence[StageSettings], plan: Plan, start: str) -> tuple[str, ...]:
    """A line of the overview."""
    before = f"from {stages[stage.number - 1].label}" if stage.number else "from `student` of the file"
    experiment = stage.source.experiment
    if stage.kind == "export":
        does = f"nothing is trained; for {', '.join(experiment.export.to) or 'transformers alone'}"
    elif plan.steps == 0:
        does = "nothing is trained"
    else:
        does = ("trained" if plan.steps is None else f"{plan.steps:,} steps") + (
            " with the teacher" if experiment.uses_teacher else "")
    if stage.until is not None:
        does += f"; up to {stage.until.rounds} rounds"
    hands = f"{plan.parameters['student']:,} parameters, {readable(plan.student_bytes)}"
    return stage.label, before, does, hands, start
