"""What the planner tries and searches is found once in a session of tests, by the process that needs it first.

A run times the operations of its blocks and searches for ways to run them, which takes longer than all else of a small
one, and most of the tests' blocks are alike. Here an operation is timed once for each rank, so that equal blocks have
equal prices, and what was searched for with them lies in a folder of the session's. So do plans without a budget, of
which every rank of every run makes one; of ranks that need the same one, the others wait for the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

FOLDER = "LIMBECK_TESTS_SEARCHES"  # the environment's variable that holds the folder


def share() -> None:
    """Have the planner of this process look there first. To be called once what tests import is there."""
    from strategies.rematerialization import planner
    from strategies.rematerialization.price import block_options, costs

    if "trainer.planning.plan" in sys.modules:
        _share_plans()
    if hasattr(planner.options, "kept"):
        return

    def timed(node: Any, args: Any, kwargs: Any) -> Any:
        return "seconds", os.environ.get("RANK", "0"), costs._key(node)  # ranks differ in their prices, as elsewhere

    def searched(name: str, captured: Any, seconds: Any, workspace: Any, *effort: Any, store: Any = None, **named: Any
                 ) -> Any:
        if store is not None:
            return None  # it is to be asked itself
        return (name, captured.signature, seconds.tobytes(), workspace.tobytes(), effort, sorted(named.items()),
                block_options.LEVELS, block_options.MOVES)

    costs._timed = _kept(costs._timed, timed)
    for name in ("options", "keep_lines"):
        setattr(planner, name, _kept(getattr(planner, name), partial(searched, name)))


def _share_plans() -> None:
    """Plans without a budget, and what is planned around a step, where all that they depend on is equal."""
    import torch

    from trainer import preparation
    from trainer.planning import plan

    if hasattr(plan._around, "kept"):
        return

    def step(*asked: Any) -> Any:
        experiment, topology, teacher, student, *refuted = asked
        if experiment.memory.bytes is not None or refuted:
            return None  # it holds the models that were studied
        return "step", plan._studied(experiment, topology, teacher, student), torch.cuda.is_available()

    def around(experiment: Any, topology: Any, *asked: Any) -> Any:
        *configs, rows, done = asked
        return ("around", described(experiment, configs), topology.to_dict(), rows, done,
                plan._activations.__qualname__, torch.cuda.is_available())

    def checkpoint(experiment: Any, *configs: Any) -> Any:
        return "checkpoint", described(experiment, configs)

    def described(experiment: Any, configs: Sequence[Any]) -> list[Any]:
        return [experiment.model_dump_json(exclude={"name", "run", "report"}), *(
            None if config is None else config.to_json_string(use_diff=False) for config in configs)]

    plan.plan_step, plan._around = _kept(plan.plan_step, step), _kept(plan._around, around)
    preparation.planned_bytes = _kept(preparation.planned_bytes, checkpoint)


def _kept(find: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose results are read from the session's folder where they are there, unless they have no key."""
    @wraps(find)
    def again(*args: Any, **named: Any) -> Any:
        name = key(*args, **named) if os.environ.get(FOLDER) else None
        if name is None:
            return find(*args, **named)
        file = Path(os.environ[FOLDER]) / hashlib.sha256(repr(name).encode()).hexdigest()
        with suppress(FileNotFoundError):
            return pickle.loads(file.read_bytes())
        with open(f"{file}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, or its process dies
            with suppress(FileNotFoundError):
                return pickle.loads(file.read_bytes())
            found = find(*args, **named)
            with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as whole:
                pickle.dump(found, whole)
            os.replace(whole.name, file)
            return found

    again.kept = True
    return again
