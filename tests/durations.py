"""How long tests take: which of them are slow or long, and the order in which files are handed to the workers.

`pytest --record-durations` writes durations.json anew, best on a machine that does nothing else. A run of some files
changes what is known of those alone.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("durations.json")
SLOW = 1.5  # seconds: `make test-fast` leaves out what takes longer, and what needs a fixture that does
LONG = 15.0  # seconds: what takes longer is of `make test-long`, and not of `make test`
WORTH_A_LINE = 0.5
OPTION = "--record-durations"


def known() -> dict[str, dict[str, float]]:
    """Seconds of the files, and of those tests and shared fixtures that take long enough to be written down."""
    return json.loads(FILE.read_text()) if FILE.exists() else {"files": {}, "tests": {}, "fixtures": {}}


def arrange(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark slow and long tests; where there are workers, the longest files come first, so that they end together."""
    seconds = known()
    long = {name for name, taken in seconds["tests"].items() if taken > LONG}
    slow = {kind: {name for name, taken in seconds[kind].items() if taken > SLOW} for kind in ("tests", "fixtures")}
    for item in items:
        file = item.nodeid.partition("::")[0]
        fixtures = {f"{file}::{name}" for name in getattr(item, "fixturenames", ())}
        if item.nodeid in slow["tests"] or fixtures & slow["fixtures"]:
            item.add_marker(pytest.mark.slow)
        if item.nodeid in long:
            item.add_marker(pytest.mark.long)
    if hasattr(config, "workerinput"):
        left_out = long if "not long" in config.option.markexpr else ()
        taken = defaultdict(float, seconds["files"])
        for name in left_out:
            taken[name.partition("::")[0]] -= seconds["tests"][name]
        # Rounded: a set has another order in each worker, so that sums of the same seconds differ in their last bits.
        items.sort(key=lambda item: -round(taken[item.nodeid.partition("::")[0]], 1))


class Recorder:
    """Measures, and writes when the session ends; of workers, what each of them has measured.

    Args:
        config: of this process.
        start: brings up what all tests have in common, which is nobody's own time.
    """

    def __init__(self, config: pytest.Config, start: Callable[[], None]) -> None:
        self.config, self.start = config, start
        self.found: dict[str, dict[str, float]] = {"files": defaultdict(float), "tests": {}, "fixtures": {}}
        self.shared = 0.0

    def pytest_collection_finish(self) -> None:
        self.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request) -> Iterator[None]:
        begin, before = time.monotonic(), self.shared
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":  # of several cases the longest
                inside = self.shared - before
                name = f"{request.node.nodeid.partition('::')[0]}::{fixturedef.argname}"
                own = time.monotonic() - begin - inside
                self.found["fixtures"][name] = max(own, self.found["fixtures"].get(name, 0.0))
                self.shared += own

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item) -> Iterator[None]:
        begin, self.shared = time.monotonic(), 0.0
        try:
            return (yield)
        finally:
            whole = time.monotonic() - begin
            self.found["files"][item.nodeid.partition("::")[0]] += whole
            self.found["tests"][item.nodeid] = whole - self.shared

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        for kind, found in getattr(node, "workeroutput", {}).get("durations", {}).items():
            self.found[kind].update(found)

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workerinput"):
            self.config.workeroutput["durations"] = {kind: dict(found) for kind, found in self.found.items()}
            return
        merged = {kind: self._merged(kind, before) for kind, before in known().items()}
        FILE.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")

    def _merged(self, kind: str, before: dict[str, float]) -> dict[str, float]:
        """What was known of other files than those that ran, and what was found now."""
        ran = self.found["files"]
        kept = {name: taken for name, taken in before.items() if name.partition("::")[0] not in ran}
        return kept | {name: round(taken, 1) for name, taken in self.found[kind].items()
                       if kind == "files" or taken >= WORTH_A_LINE}
