"""Measures the memory of one training step, reports it next to the plan, and checks it against the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from strategies.memory.meter import Measured, measure
from strategies.memory.plot import curve, thinned
from trainer.distributed.rank_group import RankGroup
from trainer.experiment.nodes import Memory
from trainer.planning.exceeded import Exceeded, above_budget, unmet
from trainer.planning.step_memory import POINTS, MemoryPlan
from trainer.run.metrics import Metrics, ProgressReporter, readable


class MemoryCheck:
    """Measures one training step and checks whether it stayed within the budget.

    Args:
        settings: the budget, and what to do when it is exceeded.
        planned: the predicted memory; None where the architecture cannot be planned.
        ranks: the processes of the run; the highest peak among them counts.
        resident: returns the modules, optimizers and tensors that hold memory between steps.
        ways_out: finds changes that would keep the budget; called on the first process only.
    """

    def __init__(self, settings: Memory, planned: MemoryPlan | None, ranks: RankGroup,
                 resident: Callable[[], list[object]], ways_out: Callable[[Exceeded], str]) -> None:
        self.settings, self.planned, self.ranks = settings, planned, ranks
        self._resident, self._ways_out = resident, ways_out

    def measured(self, run: Callable[[], Any]) -> tuple[Any, Measured]:
        """Run a step; return its result and the memory measured meanwhile."""
        given: list[Any] = []
        found = measure(lambda: given.append(run()), self.ranks.device, self._resident())
        return given[0], found

    def report(self, step: int, found: Measured, metrics: Metrics, progress: ProgressReporter) -> int:
        """Log the measurement and print it next to the plan, for the process with the highest peak.

        Returns:
            Peak memory of that process, in bytes.
        """
        own = torch.tensor([found.peak, found.base], device=self.ranks.device)
        every = self.ranks.gather(own).view(-1, 2).tolist()
        found = replace(found, peak=max(peak for peak, _ in every), base=max(base for _, base in every))
        drawn = curve(found)
        metrics.write({"step": step, "memory": {
            "peak": found.peak, "base": found.base, "peaks": [peak for peak, _ in every], "reserved": found.reserved,
            "marks": drawn.marks,
            "curve": [[float(at), int(count)] for at, count in thinned(drawn, POINTS)]}})
        held = "" if found.reserved is None else f", {readable(found.reserved)} reserved"
        planned = "" if self.planned is None else f", {readable(self.planned.peak)} planned"
        budget = "" if self.settings.bytes is None else f", budget {readable(self.settings.bytes)}"
        progress.say(f"step {step}: memory peak {readable(found.peak)} measured{held}{planned}{budget}")
        return found.peak

    def keep_budget(self, step: int, measured: int, metrics: Metrics, progress: ProgressReporter,
                    save: Callable[[], str]) -> None:
        """Warn or stop, as `memory.exceeded` says, if the measured step exceeded the budget.

        Args:
            measured: the highest peak over processes, in bytes; the same value on every process.
            save: writes a checkpoint now and returns a message that names the newest one.

        Raises:
            BudgetUnmet: with `memory.exceeded: stop`, after a checkpoint has been written.
        """
        excess = above_budget(self.settings, self.planned, step, measured)
        if excess is None:
            return
        self.ranks.at(f"the plan that step {step} did not keep")
        ways = [self._ways_out(excess) if self.ranks.main else ""]
        broadcast_object_list(ways)
        metrics.write({"step": step, "exceeded": {**asdict(excess), "above": excess.above, "way_out": ways[0]}})
        if self.settings.exceeded == "warn":
            progress.say(f"warning: {excess.problem}\n  -> {ways[0]}")
            return
        raise unmet(self.settings, excess, ways[0], f"{save()}; the run goes on from there with one of these")
