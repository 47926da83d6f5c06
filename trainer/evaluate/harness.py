"""Tasks of EleutherAI's lm-evaluation-harness, an optional package, judged with the model as it is loaded here."""

from __future__ import annotations

import difflib
import io
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.evaluate.asking import Reader
from trainer.evaluate.exact_match import end_tokens, greedy
from trainer.evaluate.intervals import Outcomes, Z, value_of
from trainer.evaluate.judge import Judgement
from trainer.experiment.evaluate_nodes import Task
from trainer.model_files import first_line


def check_harness(task: Task, key: str) -> None:
    """Raise `UserError` if lm-evaluation-harness is missing, or has no such task, or cannot load its data.

    Args:
        key: key of the task in the experiment.
    """
    if find_spec("lm_eval") is None:
        raise UserError(f"{key}.kind", "lm-evaluation-harness, whose task this is, is not installed", value=task.name,
                        way_out="pip install 'limbeck[eval]', or write a task of your own, with a `path` to a JSONL "
                        "file")
    if task.path is not None and not Path(task.path).is_dir():
        raise UserError(f"{key}.path", "there is no such folder of task files", value=task.path,
                        way_out="name a folder with the YAML files of tasks, as the harness's --include_path")
    if task.path is not None and not task.trust_remote_code:
        raise UserError(f"{key}.trust_remote_code", "functions and templates in the harness's task files are programs, "
                        "which are run only if you say so", value=False,
                        way_out=f"read the files in {task.path}; if you trust them, add trust_remote_code: true")
    manager = _manager(task.path)
    if task.name not in manager.all_tasks:
        near = difflib.get_close_matches(task.name, manager.all_tasks, 1, 0.6)
        where = f"{task.path} has no such task" if task.path else "lm-evaluation-harness has no such task"
        few = ", ".join(sorted(manager.all_tasks)[:10])
        raise UserError(f"{key}.name", where, value=task.name, way_out=f"did you mean `{near[0]}`?" if near else
                        f"its tasks are {few}" if task.path and few else "see lm_eval ls tasks")
    try:
        with _quiet():
            manager.load([task.name])
    except Exception as error:  # task files are programs of others, and data sets fail in many ways
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{key}.name", f"lm-evaluation-harness cannot load this task: {why}", value=task.name,
                        way_out="without a network only tasks whose data are here can be loaded: give `path`, a folder "
                        "of task files that name local data") from error


@cache
def _manager(path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=path, include_defaults=path is None)


def judge_by_harness(reader: Reader, task: Task) -> Judgement:
    """Judge a model on a task of the harness, on this process alone; greedy generation is as for own tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    began = time.perf_counter()
    rows = max(1, reader.tokens // min(1024, reader.length))
    stops = end_tokens(reader.plain, reader.tokenizer)
    with _quiet(), greedy(reader.plain, reader.tokenizer, stops, None):
        model = HFLM(pretrained=reader.plain, tokenizer=reader.tokenizer, batch_size=rows, max_length=reader.length)
        found = simple_evaluate(model=model, tasks=[task.name], task_manager=_manager(task.path), limit=task.limit,
                                num_fewshot=task.shots or None, apply_chat_template=task.chat, bootstrap_iters=0,
                                log_samples=True)
    values = found["results"][task.name]
    outcomes, known = {}, {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not isinstance(value, (int, float)) or name.endswith("_stderr") or not filtered:
            continue
        called = name if filtered == "none" else f"{name}.{filtered}"
        own = _outcomes(found.get("samples", {}).get(task.name, []), name, filtered)
        if own and abs(value_of(own) - value) < 1e-6 * abs(value) + 1e-9:
            outcomes[called] = own
        else:
            known[called] = _known(value, values.get(f"{name}_stderr,{filtered}"))
    return Judgement(outcomes, known=known, seconds=time.perf_counter() - began)


def _outcomes(samples: list[dict[str, Any]], name: str, filtered: str) -> Outcomes:
    """The metric of each record; none where it is neither a number nor a likelihood of some bytes."""
    own = [one.get(name) for one in samples if one.get("filter", "none") == filtered]
    if name == "bits_per_byte" and all(isinstance(one, tuple) for one in own):
        return [(-nats / math.log(2), float(size)) for nats, size in own]
    return [(float(one), 1.0) for one in own] if all(isinstance(one, (bool, int, float)) for one in own) else []


def _known(value: float, error: Any) -> tuple[float, ...]:
    """The value, and its interval where the harness estimates a standard error."""
    known = isinstance(error, (int, float)) and math.isfinite(error)
    return (float(value), value - Z * error, value + Z * error) if known else (float(value),)


@contextmanager
def _quiet() -> Iterator[None]:
    """Context in which the harness's own log says only errors."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):  # its progress bars
            yield
    finally:
        log.setLevel(before)
