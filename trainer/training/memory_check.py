"""A measured step above the budget: how much, and what of that which was tried keeps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list
from transformers import PretrainedConfig

from strategies.memory.units import parse_bytes
from strategies.rematerialization.price.step_trace import CannotPlan
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.planning.refusal import BudgetUnmet
from trainer.planning.step_memory import MemoryPlan, choose, study_experiment
from trainer.run.metrics import Metrics, ProgressReporter, readable
from trainer.training.saving import save

if TYPE_CHECKING:  # pragma: no cover - the loop imports this module
    from trainer.training.loop import Trainer

MIB = 2**20


@dataclass(frozen=True)
class Exceeded:
    """A step that took more than the budget.

    Attributes:
        step: which.
        measured: bytes at its peak, of the process with the highest.
        planned: bytes that were planned; None where the architecture cannot be planned.
        budget: bytes allowed.
    """

    step: int
    measured: int
    planned: int | None
    budget: int

    @property
    def above(self) -> int:
        """Bytes above the budget."""
        return self.measured - self.budget

    @property
    def problem(self) -> str:
        """What is wrong."""
        planned = "" if self.planned is None else f"; {readable(self.planned)} were planned"
        return (f"step {self.step} took {readable(self.measured)} ({self.measured:,} bytes), {self.above:,} bytes or "
                f"{self.above / self.budget:.1%} more than the budget{planned}")


def above_budget(experiment: Experiment, planned: MemoryPlan | None, step: int, measured: int) -> Exceeded | None:
    """The excess of a measured step, if there is any."""
    budget = experiment.memory.bytes
    if budget is None or measured <= budget:
        return None
    return Exceeded(step, measured, None if planned is None else planned.peak, budget)


def ways_out(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig, processes: int,
             excess: Exceeded) -> str:
    """Changes that keep the budget, planned with what this step took beyond its plan left free; and a larger budget.

    Planned from shapes, which takes about as long as a dry run.
    """
    before = experiment.memory.reserve
    unknown = excess.measured - (excess.planned or 0) + (0 if before is None else parse_bytes(before))
    reserve = -(-unknown // MIB) * MIB
    larger = f"memory.budget={excess.measured + MIB}"
    if excess.planned is None:
        return f"{larger}; or a smaller training.micro_batch, with which the loss stays the same"
    memory = experiment.memory.model_copy(update={"reserve": str(reserve)})
    with_reserve = f"memory.reserve={reserve}"

    def again(changed: Experiment, regions: bool, tile: int | None):  # noqa: ANN202 - a Planner
        return study_experiment(changed, teacher, student, processes, regions, tile)

    try:
        found = choose(experiment.model_copy(update={"memory": memory}), again, processes=processes)
    except BudgetUnmet as unmet:
        return f"{larger} {with_reserve}; or {with_reserve} with one of these: {unmet.way_out}"
    except (CannotPlan, UserError, RuntimeError, NotImplementedError):
        return f"{larger} {with_reserve}"
    way = (f"{with_reserve}, left for what no plan knows of (then {readable(found.schedule.peak)} with it, "
           f"{found.schedule.overhead:.0%} recomputed)")
    return f"{way}; or {larger} {with_reserve}"


def keep_budget(trainer: Trainer, measured: int, metrics: Metrics, progress: ProgressReporter) -> None:
    """Say of a step that has just been measured that it was above the budget, if it was; and stop if that is asked for.

    Args:
        measured: bytes at the peak of the process with the highest; all processes know it.

    Raises:
        BudgetUnmet: with `memory.exceeded: stop`, once a checkpoint of this moment is written.
    """
    experiment = trainer.experiment
    excess = above_budget(experiment, trainer.memory, trainer.step, measured)
    if excess is None:
        return
    trainer.watch.at(f"the plan that step {trainer.step} did not keep")
    ways = [""]
    if trainer.accelerator.is_main_process:
        ways = [ways_out(experiment, trainer.teacher_config, trainer.unwrapped.config,
                         trainer.accelerator.num_processes, excess)]
    broadcast_object_list(ways)
    metrics.write({"step": trainer.step, "exceeded": {**asdict(excess), "above": excess.above, "way_out": ways[0]}})
    if experiment.memory.exceeded == "warn":
        progress.say(f"warning: {excess.problem}\n  -> {ways[0]}")
        return
    save(trainer)
    trainer.finish_saving()
    newest = trainer.checkpoints.last
    kept = "no checkpoint could be written" if newest is None else f"{newest.name} is saved"
    raise _unmet(experiment, excess, ways[0], f"{kept}; the run goes on from there with one of these")


def _unmet(experiment: Experiment, excess: Exceeded, ways: str, saved: str) -> BudgetUnmet:
    named = experiment.memory.budget is None
    return BudgetUnmet("memory.device" if named else "memory.budget", f"{excess.problem}.\n  {saved}",
                       value=experiment.memory.device if named else experiment.memory.budget,
                       way_out=f"{ways}; or memory.exceeded=warn, to go on above it")
