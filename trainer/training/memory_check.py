"""The memory of a step, measured while it runs, told beside what was planned, and held against the budget."""

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
    """Measures one step of a process and says whether it kept the budget.

    Args:
        settings: the budget, and what follows where it is exceeded.
        planned: bytes that were foretold; None where the architecture cannot be planned.
        ranks: of which the one with the highest peak counts.
        resident: modules, optimizers and tensors that hold memory between steps.
        ways_out: finds changes that keep the budget; on the first process.
    """

    def __init__(self, settings: Memory, planned: MemoryPlan | None, ranks: RankGroup,
                 resident: Callable[[], list[object]], ways_out: Callable[[Exceeded], str]) -> None:
        self.settings, self.planned, self.ranks = settings, planned, ranks
        self._resident, self._ways_out = resident, ways_out

    def measured(self, run: Callable[[], Any]) -> tuple[Any, Measured]:
        """What a step gives, and what it took."""
        given: list[Any] = []
        found = measure(lambda: given.append(run()), self.ranks.device, self._resident())
        return given[0], found

    def report(self, step: int, found: Measured, metrics: Metrics, progress: ProgressReporter) -> int:
        """Write what was measured, of the process with the highest peak, and say it beside what was planned.

        Returns:
            Bytes at that peak.
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
        """Say of a step that has just been measured that it was above the budget, if it was; stop if that is asked for.

        Args:
            measured: bytes at the peak of the process with the highest; all processes know it.
            save: writes a checkpoint of this moment, and says what is safe.

        Raises:
            BudgetUnmet: with `memory.exceeded: stop`, once a checkpoint of this moment is written.
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
