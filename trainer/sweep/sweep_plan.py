"""A sweep before its first run: its settings, the runs they make, and what their folders hold already."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console

from trainer.errors import ExperimentErrors
from trainer.experiment.data_nodes import Data
from trainer.run.run_status import in_use
from trainer.sweep.proposals import PLACE, belongs, check_search, propose
from trainer.sweep.settings import Setting, Settings, SweepRun, runs_of
from trainer.sweep.sweep_file import MetricName, SweepSource
from trainer.sweep.sweep_metrics import METRICS, figures
from trainer.sweep.sweep_record import RunRecord, SweepFolder, SweepRecord
from trainer.sweep.sweep_table import rows_of

PATIENCE = 60.0  # seconds for the runs of a sweep that was killed to save and end

console = Console(highlight=False, soft_wrap=True, markup=False)


class SweepPlan:
    """A sweep that is ready to start: its settings are experiments, and its folders are free or its own.

    Args:
        source: the sweep.

    Attributes:
        source: the same.
        settings: makes settings of values.
        seeds: seeds that each setting is run with.
        folder: folder of the sweep.
        runs: the runs known so far, by label and seed, in the order in which they start.
        record: how each of them is doing.

    Raises:
        ExperimentErrors: a mistake in the sweep, or a folder that is not this sweep's.
    """

    def __init__(self, source: SweepSource) -> None:
        self.source, self.settings = source, Settings(source)
        self.folder = SweepFolder(source.folder)
        with source.locating():
            self.folder.check()
            earlier = self.folder.read() if self.folder.record.exists() else None
        known = self._known(earlier)
        base = known[0] if known else self.settings.make({}, PLACE)
        self.seeds = source.sweep.seeds or (base.source.experiment.seed,)
        self.runs: dict[tuple[str, int], SweepRun] = {}
        search = source.sweep.search
        total = len(self.seeds) * (max(search.trials, len(known)) if search else len(known))
        keys = {key: self.settings.short(key) for key in self.settings.keys}
        self.record = SweepRecord(name=source.name, experiment=source.sweep.experiment,
                                  metric=self._metric(base.source.experiment.data), keys=keys,
                                  searched=search is not None, total=total, runs=[])
        said = {(run.label, run.seed): run for run in earlier.runs} if earlier else {}
        for record in self.add(known):
            before = said.get((record.label, record.seed))
            # What was finished and waits now is to be run again: to train for longer, or to be exported otherwise.
            if before is not None and record.state == "waiting" and before.state != "finished":
                record.state, record.said = before.state, before.said
        self.others = len(said.keys() - self.runs.keys())

    def add(self, settings: Sequence[Setting]) -> list[RunRecord]:
        """Add the runs of settings, first all on the first seed, and look at what their folders hold."""
        by_seed = zip(*(runs_of(setting, self.seeds, self.source) for setting in settings), strict=True)
        added = []
        for run in (one for runs in by_seed for one in runs):
            record = RunRecord(label=run.setting.label, values=run.setting.values, seed=run.seed)
            self.runs[run.setting.label, run.seed] = run
            self.look(record)
            self.record.runs.append(record)
            added.append(record)
        return added

    def look(self, record: RunRecord) -> None:
        """Read the figures of a run that is finished already.

        Raises:
            ExperimentErrors: its folder is that of another experiment.
        """
        folder, source = self.folder.run(record), self.runs[record.label, record.seed].source
        with self.source.locating(source.origins):
            folder.check(source.experiment)
            if folder.holds(source.experiment.model_dump(mode="json")):
                record.state, record.said, record.figures = "finished", "", figures(folder, self.record.metric)

    def propose(self) -> list[RunRecord]:
        """The runs of a new setting of the search; [] if there are to be no more."""
        search = self.source.sweep.search
        while search is not None and len(rows := rows_of(self.record)) < search.trials:
            results = {row.label: row.mean if len(row.found) == len(row.runs) else None for row in rows}
            known = {run.label: run.values for run in self.record.runs}
            values = propose(search, METRICS[self.record.metric].highest,
                             [(values, results[label]) for label, values in known.items()])
            if values is None:
                self.record.total = len(self.record.runs)
                break
            try:
                return self.add([self.settings.make(values, PLACE)])
            except ExperimentErrors as error:  # though the ends of all ranges can be combined, these values cannot
                self.record.runs += [RunRecord(label=self.settings.label(values), values=values, seed=seed,
                                               state="failed", said=str(error)) for seed in self.seeds]
        return []

    def check_in_use(self) -> None:
        """Wait for the runs of a sweep that was killed; they save and end once they notice.

        Raises:
            ExperimentErrors: a run that this sweep has not started is using one of the folders, or does not end.
        """
        deadline = time.monotonic() + PATIENCE
        busy = [run for run in self.record.runs if in_use(self.folder.run(run).path)]
        if any(run.state == "running" for run in busy):
            console.print(f"{self.record.name}: waiting for {len(busy)} runs of a killed sweep to save and end")
        for record in busy:
            folder = self.folder.run(record).path
            while in_use(folder):
                if record.state != "running" or time.monotonic() > deadline:
                    raise self.source.wrong("folder", "another run is using this folder now", value=str(folder),
                                            way_out="wait for it to end, or choose another `folder` or `name`")
                time.sleep(0.2)
            record.state = "stopped"
            self.look(record)

    def _metric(self, data: Data) -> MetricName:
        """What settings are ranked by.

        Raises:
            ExperimentErrors: the runs are not measured by it.
        """
        metric: MetricName = self.source.sweep.metric or ("bits_per_byte" if data.is_language else "accuracy")
        if METRICS[metric].language not in (None, data.is_language):
            known = [name for name, one in METRICS.items() if one.language in (None, data.is_language)]
            raise self.source.wrong("metric", f"runs of data.task {data.task} are not measured by it", value=metric,
                                    way_out=f"use one of {', '.join(known)}")
        return metric

    def _known(self, earlier: SweepRecord | None) -> list[Setting]:
        search = self.source.sweep.search
        if search is None:
            return self.settings.named()
        check_search(self.source, self.settings)
        found = []
        for values in {run.label: run.values for run in earlier.runs}.values() if earlier else ():
            if belongs(search, values):
                with suppress(ExperimentErrors):  # of a proposal that was no experiment
                    found.append(self.settings.make(values, PLACE))
        return found
