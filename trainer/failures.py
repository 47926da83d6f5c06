"""What a person is told when something fails, and with which code the program ends."""

from __future__ import annotations

import os
import sys
import time

from trainer.errors import ExperimentErrors, Lost, RunFailed, UserError
from trainer.experiment.load import Source, describe

FAILURE, USER_ERROR, BUDGET_UNMET = 1, 2, 3  # exit codes; those of signals are in trainer.distributed.signals
OTHERS_WAIT = 5.0  # seconds


def exit_code(error: UserError | ExperimentErrors) -> int:
    """The exit code of a mistake in what was asked for."""
    return BUDGET_UNMET if type(error).__name__ == "BudgetUnmet" else USER_ERROR


def messages(error: UserError | ExperimentErrors, source: Source | None = None, place: str = "command line") -> str:
    """One message for each mistake. Without a source, whose lines it would name, a mistake is one in `place`."""
    if isinstance(error, ExperimentErrors):
        return "\n".join(f"error: {describe(one, error.origins, error.place)}" for one in error.errors)
    origins, place = (source.origins, source.file) if source else ({}, place)
    return f"error: {describe(error, origins, place)}"


def failure(error: Exception) -> str | None:
    """What is to be said of a run that cannot go on; None of an error that nobody has foreseen."""
    if isinstance(error, RunFailed):
        return f"error: {error}"
    if isinstance(error, OSError):
        return (f"error: cannot read or write {error.filename or 'a file'}: {error.strerror or error}\n"
                "  -> check the path, its permissions and the free space; start the same command again to go on")
    if type(error).__name__ == "OutOfMemoryError":
        return (f"error: the device is out of memory: {error}\n  -> lower training.micro_batch (the loss stays the "
                "same) or data.sequence_length; --dry-run shows where the bytes go")
    if is_lost(error):
        return ("error: another process ended, or did not come, while this one waited for it outside of training\n"
                f"  (it was told: {str(error).partition(chr(10))[0]})\n"
                "  -> see what the other said; start the same command again to go on")
    return None


def is_lost(error: Exception) -> bool:
    """Whether another process is gone or stuck, so that this one cannot be torn down in good order."""
    if isinstance(error, OSError | RunFailed):
        return isinstance(error, Lost)
    from trainer.distributed.watchdog import lost

    return lost(error)


def tell(text: str) -> None:
    """On standard error, from the first process: the others mostly have the same to say.

    Another process speaks after a while: where the first one failed too, the launcher has ended this one by then.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(OTHERS_WAIT)
        text = f"process {rank}: {text}"
    print(text, file=sys.stderr, flush=True)
