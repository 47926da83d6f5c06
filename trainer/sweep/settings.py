"""Settings of a sweep: the combinations of values that are run, each read as an experiment before anything starts."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.errors import ExperimentErrors
from trainer.experiment.load import Source, nearest_origin, read_experiment
from trainer.files import fingerprint
from trainer.sweep.sweep_file import SweepSource
from trainer.sweep.sweep_overrides import leaves

MOST_RUNS = 1000
LONGEST_VALUE, LONGEST_LABEL = 40, 100  # characters of a folder's name
TAKEN = {"seed": "seeds of the runs are in `seeds` of the sweep", "name": "the sweep names its runs itself",
         "run.folder": "the sweep gives each run a folder of its own"}


@dataclass(frozen=True)
class Setting:
    """One combination of values.

    Attributes:
        values: key of the experiment -> value, for what differs between settings.
        label: the name of its folder.
        words: all overrides as `key=value`, those that all settings have included.
        source: the experiment with these values.
    """

    values: dict[str, Any]
    label: str
    words: tuple[str, ...]
    source: Source


@dataclass(frozen=True)
class SweepRun:
    """A setting on one seed.

    Attributes:
        setting: its values.
        seed: seed of the experiment.
        folder: its run folder.
        name: name of the run.
    """

    setting: Setting
    seed: int
    folder: Path
    name: str

    @property
    def source(self) -> Source:
        """The experiment of this run alone."""
        whole = self.setting.source
        run = whole.experiment.run.model_copy(update={"folder": str(self.folder)})
        changes = {"name": self.name, "seed": self.seed, "run": run}
        return Source(whole.experiment.model_copy(update=changes), whole.file, whole.origins)

    def words(self, threads: int) -> list[str]:
        """What `train.py` is given for this run: the file, and every override."""
        own = [word("name", self.name), word("seed", self.seed), word("run.folder", str(self.folder))]
        if self.setting.source.experiment.run.threads is None:
            own.append(word("run.threads", threads))
        return ["--config", self.setting.source.file, *self.setting.words, *own]


class Settings:
    """Makes settings of the values that a sweep file names.

    Args:
        source: the sweep.

    Attributes:
        keys: keys of the experiment that differ between settings.

    Raises:
        ExperimentErrors: a key that the sweep itself decides, or one that is written in two places.
    """

    def __init__(self, source: SweepSource) -> None:
        self._source, sweep = source, source.sweep
        self._common = dict(self._placed("overrides", leaves(sweep.overrides)))
        varied = [*sweep.grid, *(key for one in sweep.list for key, _ in leaves(one)),
                  *(sweep.search.space if sweep.search else ())]
        self.keys = list(dict.fromkeys(varied))
        self._short = short_names(self.keys)
        for key in self.keys:
            if key in self._common:
                raise source.wrong(f"overrides.{key}", "the key is varied by this sweep, so that this value would be "
                                   "lost", value=self._common[key], way_out="keep it in one of the two places")

    def short(self, key: str) -> str:
        """The end of a key, as much of it as tells it from the other keys."""
        return self._short[key]

    def named(self) -> list[Setting]:
        """The settings of a grid or a list; one without values of its own if only seeds differ.

        Raises:
            ExperimentErrors: a value or a combination is no experiment, two are the same, or there are too many.
        """
        sweep, seeds = self._source.sweep, len(self._source.sweep.seeds or (0,))
        count = len(sweep.list) if sweep.list else 1
        for values in sweep.grid.values():
            count *= len(values)
        if count * seeds > MOST_RUNS:
            raise self._source.wrong("list" if sweep.list else "grid", f"these are {count * seeds:,} runs, over "
                                     f"{MOST_RUNS:,}", way_out="name fewer values or seeds, or use `search`")
        found: list[Setting] = []
        same: dict[str, int] = {}
        for number, (place, values) in enumerate(self._combinations()):
            found.append(self.make(values, place))
            experiment = fingerprint(found[-1].source.experiment.model_dump(mode="json"))
            if experiment in same:
                first = found[same[experiment]]
                raise self._source.wrong(place, f"{found[-1].label} is the same experiment as {first.label}: setting "
                                         f"{number + 1} as setting {same[experiment] + 1}", way_out="name each once")
            same[experiment] = number
        labels = Counter(one.label for one in found)
        return [one if labels[one.label] == 1 else replace(one, label=f"{one.label}-{fingerprint(one.values)[:8]}")
                for one in found]

    def make(self, values: dict[str, Any], place: str) -> Setting:
        """The setting with these values, read as an experiment.

        Args:
            values: key of the experiment -> value.
            place: key of the sweep file that they are written under.

        Raises:
            ExperimentErrors: it is no experiment; each mistake is located in the sweep file if it was written there.
        """
        placed = [("overrides", self._common), (place, dict(self._placed(place, values.items())))]
        words = {word(key, value): nearest_origin(self._source.origins, (*above.split("."), *key.split(".")),
                                                  self._source.file)
                 for above, some in placed for key, value in some.items()}
        label = self.label(values)
        try:
            source = read_experiment(self._source.sweep.experiment, tuple(words), words)
        except ExperimentErrors as error:
            for one in error.errors if values else ():
                one.problem += f" (in the setting {', '.join(f'{key}={value}' for key, value in values.items())})"
            raise
        return Setting(values, label, tuple(words), source)

    def _combinations(self) -> Iterator[tuple[str, dict[str, Any]]]:
        sweep = self._source.sweep
        if sweep.list:
            yield from ((f"list.{number}", dict(leaves(one))) for number, one in enumerate(sweep.list))
        elif sweep.grid:
            yield from (("grid", dict(zip(sweep.grid, values, strict=True)))
                        for values in itertools.product(*sweep.grid.values()))
        else:
            yield "", {}

    def _placed(self, place: str, pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Pairs of key and value written under a key of the sweep file, once they are known to be for it to say."""
        seen = set()
        for key, value in pairs:
            if key in TAKEN:
                raise self._source.wrong(f"{place}.{key}", TAKEN[key], value=value, way_out="remove it here; "
                                         "`seeds`, `name` and `folder` are keys of the sweep")
            if key in seen:
                raise self._source.wrong(f"{place}.{key}", "the key stands twice, once taken apart", value=value,
                                         way_out="remove one of the two")
            seen.add(key)
            yield key, value

    def label(self, values: dict[str, Any]) -> str:
        """A name for a folder that says the values; it depends on nothing but them and the keys that are varied."""
        texts = {key: text_of(value) for key, value in values.items()}
        label = "_".join(f"{self._short[key]}-{text}" for key, (text, _) in texts.items()) or "as-it-is"
        if all(exact for _, exact in texts.values()) and len(label) <= LONGEST_LABEL:
            return label
        return f"{label[:LONGEST_LABEL]}-{fingerprint(values)[:8]}"


def runs_of(setting: Setting, seeds: Iterable[int], source: SweepSource) -> list[SweepRun]:
    """The runs of a setting, one for each seed."""
    return [SweepRun(setting, seed, run_folder(source.folder, setting.label, seed),
                     f"{source.name}.{setting.label}.{seed}") for seed in seeds]


def run_folder(sweep: Path, label: str, seed: int) -> Path:
    """Run folder of a setting on a seed, within the folder of its sweep."""
    return sweep / "runs" / label / f"seed-{seed}"


def word(key: str, value: Any) -> str:
    """An override as it is typed, with a value that YAML reads back unchanged."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def short_names(keys: list[str]) -> dict[str, str]:
    """Key -> as many of its last names as tell it from the other keys."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        found[key] = next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)
    return found


def text_of(value: Any) -> tuple[str, bool]:
    """A value in the letters of a folder's name, and whether that says it exactly."""
    if isinstance(value, float):
        text = f"{value:.6g}"
        return text.replace("e+", "e"), float(text) == value
    raw = value if isinstance(value, str) else json.dumps(value)
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", raw)[:LONGEST_VALUE].strip("-" if isinstance(value, str) else "")
    return clean or "empty", clean == raw
