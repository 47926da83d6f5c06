"""Reports a measured step that exceeded the budget: by how much, and which changes would keep it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from strategies.memory.units import parse_bytes
from strategies.rematerialization.price.step_trace import CannotPlan
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.nodes import Memory
from trainer.planning.refusal import BudgetUnmet
from trainer.planning.step_memory import MemoryPlan, StepStudy
from trainer.planning.step_plan import choose
from trainer.run.metrics import readable
from trainer.run.pace import readable_beside

MIB = 2**20


@dataclass(frozen=True)
class Exceeded:
    """A step whose measured peak exceeded the budget.

    Attributes:
        step: number of the step.
        measured: the highest peak over processes, in bytes.
        planned: the predicted peak, in bytes; None where the architecture cannot be planned.
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
        """The problem, in words."""
        planned = "" if self.planned is None else f"; {readable_beside(self.planned, self.measured)} were planned"
        return (f"step {self.step} took {readable(self.measured)} ({self.measured:,} bytes), {self.above:,} bytes or "
                f"{self.above / self.budget:.1%} more than the budget{planned}")


def above_budget(memory: Memory, planned: MemoryPlan | None, step: int, measured: int) -> Exceeded | None:
    """The excess of a measured step; None if it kept the budget or there is none."""
    budget = memory.bytes
    if budget is None or measured <= budget:
        return None
    return Exceeded(step, measured, None if planned is None else planned.peak, budget)


def ways_out(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig, topology: Topology,
             excess: Exceeded) -> str:
    """Suggest changes that would keep the budget, and a larger budget, in words.

    The step is planned again with `memory.reserve` raised by what it took beyond its plan. Planning works from shapes
    and takes about as long as a dry run.
    """
    before = experiment.memory.reserve
    unknown = excess.measured - (excess.planned or 0) + (0 if before is None else parse_bytes(before))
    reserve = -(-unknown // MIB) * MIB
    larger = f"memory.budget={excess.measured + MIB}"
    if excess.planned is None:
        return f"{larger}; or a smaller training.micro_batch, with which the loss stays the same"
    memory = experiment.memory.model_copy(update={"reserve": str(reserve)})
    with_reserve = f"memory.reserve={reserve}"

    try:
        found = choose(experiment.model_copy(update={"memory": memory}),
                       lambda changed: StepStudy(changed, teacher, student, topology), topology)
    except BudgetUnmet as unmet:
        return f"{larger} {with_reserve}; or {with_reserve} with one of these: {unmet.way_out}"
    except (CannotPlan, UserError, RuntimeError, NotImplementedError):
        return f"{larger} {with_reserve}"
    way = (f"{with_reserve}, left for what no plan knows of (then {readable(found.schedule.peak)} with it, "
           f"{found.schedule.overhead:.0%} recomputed)")
    return f"{way}; or {larger} {with_reserve}"


def unmet(memory: Memory, excess: Exceeded, ways: str, saved: str) -> BudgetUnmet:
    """The error that ends a run with `memory.exceeded: stop`."""
    named = memory.budget is None
    return BudgetUnmet("memory.device" if named else "memory.budget", f"{excess.problem}.\n  {saved}",
                       value=memory.device if named else memory.budget,
                       way_out=f"{ways}; or memory.exceeded=warn, to go on above it")
