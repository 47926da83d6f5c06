"""What of an answer is compared with the right one: all of it, its last number, or what a pattern finds."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from trainer.experiment.evaluate_nodes import Task

# A minus counts where it is no subtraction: the last number of "16-3" is 3.
NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")


def extracted(task: Task, text: str) -> str | None:
    """What of an answer is compared; None if it has nothing of the kind.

    Numbers are compared by value: 1,234.50 is 1234.5.
    """
    if task.extract == "none":
        return text.strip()
    found = list(re.finditer(task.pattern, text)) if task.pattern is not None else list(NUMBER.finditer(text))
    if not found:
        return None
    if task.extract == "last_number":
        return _number(found[-1][0])
    groups = [one for one in found[-1].groups() if one is not None]
    return (groups or [found[-1][0]])[0].strip()


def right_of(task: Task, answer: str) -> str | None:
    """What of the right answer is compared; one that a pattern does not fit is compared as a whole."""
    found = extracted(task, answer)
    return answer.strip() if found is None and task.extract == "regex" else found


def _number(text: str) -> str:
    try:
        return format(Decimal(text.replace(",", "")).normalize(), "f")
    except InvalidOperation:
        return text
