"""Which values of a run may change after it has begun, and the way out for those that may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.errors import OtherRun
from trainer.experiment.objective_nodes import Objective
from trainer.experiment.renamed import BEFORE

# Keys that a resumed run may change: where it is kept, how it logs, how often it evaluates and saves. None of them
# changes what is learned. Another micro-batch splits the same sum differently; with dropout it draws other masks, which
# are as good. Another engine computes the same; in half precision it rounds at other points.
FREE = ("run", "report", "evaluate", "memory", "sharding", "training.evaluate_every", "training.checkpoint_every",
        "training.keep_checkpoints", "training.background_saves", "training.micro_batch", "data.workers",
        "export.tolerance", "export.to", "export.license", "teacher.take_turns")

# Keys that affect only the exported files and the report, if training does not use quantized weights.
AFTERWARDS = ("student.quantization", "export", "report", "evaluate", "objective.early_exits.threshold")
# Those of them that affect only these even if it does.
IN_ANY_CASE = ("report", "evaluate", "export.to", "export.readers", "export.tolerance", "export.license",
               "objective.early_exits.threshold")

# Keys by which a run goes on for longer. What was trained stays as it is.
LONGER = ("training.steps", "training.epochs", "schedule.restarts")

Changes = dict[str, tuple[Any, Any]]


def is_free(key: str) -> bool:
    """Whether a resumed run may change a key, since it does not change what is learned."""
    return under(key, FREE)


def under(key: str, places: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of some keys, or below one of them."""
    return any(key == place or key.startswith(f"{place}.") for place in places)


def longer(changes: Changes, reached: int, follows_steps: bool) -> list[str]:
    """Changed keys by which a run goes on for longer than it was to, if they do so and nothing trained was otherwise.

    Args:
        changes: values then and now, by dotted key.
        reached: step of the newest checkpoint.
        follows_steps: whether something follows a schedule over the whole run, such as bits of the quantization or
            cached targets of a warm start, which would begin to move again.
    """
    found = [key for key in changes if key in LONGER]
    wanted = [key for key in found if key != "schedule.restarts"]
    if follows_steps or not wanted or any(_shortens(*changes[key]) for key in wanted):
        return []
    then, now = changes.get("schedule.restarts", ([], []))
    begun_anew = [one for one in now or [] if one not in (then or [])]
    return found if (now or [])[:len(then or [])] == (then or []) and all(one >= reached for one in begun_anew) else []


def _shortens(then: Any, now: Any) -> bool:
    return then is None or now is None or now <= then


def over_the_run(values: dict[str, Any]) -> str | None:
    """The first key of an experiment's values that follows a schedule over the whole run; None if none does."""
    if (values["student"].get("quantization") or {}).get("bits_schedule"):
        return "student.quantization.bits_schedule"
    pruned = values["student"].get("sparsity") or {}
    if pruned.get("schedule") or pruned.get("method") == "movement":
        return "student.sparsity"
    if ((values.get("teacher") or {}).get("targets") or {}).get("until"):
        return "teacher.targets.until"
    found = Objective.model_validate(values["objective"]).scheduled
    return f"objective.{found[0]}" if found else None


def refused(path: Path, changes: Changes, keys: list[str], reached: int, values: dict[str, Any]) -> OtherRun:
    """The error for changed values with which a run cannot go on in its folder; names what can be done instead.

    Args:
        path: the run folder.
        changes: values then and now, by dotted key.
        keys: those that are refused.
        reached: step of the newest checkpoint.
        values: the recorded values of the experiment.
    """
    shown = "; ".join(f"{key} was {changes[key][0]!r} and is {changes[key][1]!r}" for key in keys[:3])
    more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
    return OtherRun(keys[0], f"{path} belongs to another experiment: {shown}{more}", value=changes[keys[0]][1],
                    way_out=_way_out(path, keys, reached, values))


def _way_out(path: Path, keys: list[str], reached: int, values: dict[str, Any]) -> str:
    other = "choose another `run.folder` or `name`, or move this folder away"
    origin = f"`student: {{from_run: {path}}}`"
    if (schedule := over_the_run(values)) and all(key in LONGER for key in keys):
        what = "its bits follow" if schedule.endswith("bits_schedule") else f"{schedule} follows"
        return (f"{what} a schedule over the whole run, which cannot be made longer; to go on from its weights "
                f"start a student with {origin}, in another `run.folder` or `name`")
    if all(key in BEFORE for key in keys):
        said = ", ".join(f"`{key}: {BEFORE[key]}`" for key in keys)
        return f"the run began when this was not there yet; write {said} to go on as it began; or {other}"
    if values["student"].get("adapter"):
        return (f"to go on from its weights, name the merged student as `student: {{path: {path}/student}}`, in "
                f"another `run.folder` or `name`; to begin anew, {other}")
    if all(key in LONGER for key in keys):
        ends = [key for key in keys if key != "schedule.restarts"]
        hint = f"{reached} steps are done: a run can go on for longer with a higher " \
               f"{ends[0] if ends else 'training.steps'}, and its schedule restart at {reached} or later"
        return f"{hint}; for a run of its own, {other}"
    if reached and not any(key.startswith(("student.", "data.tokenizer", "name")) for key in keys):
        return (f"to go on from its weights with other values, start the student with {origin} "
                f"and no other origin, in another `run.folder` or `name`; to begin anew, {other}")
    return other
