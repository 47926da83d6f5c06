"""Error messages for users, and the exit codes of the program."""

from __future__ import annotations

import os
import sys
import time

from trainer.errors import ExperimentErrors, Lost, RunFailed, UserError
from trainer.experiment.load import Source, describe

FAILURE, USER_ERROR, BUDGET_UNMET = 1, 2, 3  # exit codes; those of signals are in trainer.distributed.signals
OTHERS_WAIT = 5.0  # seconds


def exit_code(error: UserError | ExperimentErrors) -> int:
    """The exit code for a user's mistake."""
    return BUDGET_UNMET if type(error).__name__ == "BudgetUnmet" else USER_ERROR


def messages(error: UserError | ExperimentErrors, source: Source | None = None, place: str = "command line") -> str:
    """One message per mistake; without a source, whose lines could be named, each is located at `place`."""
    if isinstance(error, ExperimentErrors):
        return "\n".join(f"error: {describe(one, error.origins, error.place)}" for one in error.errors)
    origins, place = (source.origins, source.file) if source else ({}, place)
    return f"error: {describe(error, origins, place)}"


def failure(error: Exception) -> str | None:
    """The message for an error that ends a run; None for an unexpected error, whose traceback should be shown."""
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
    """Whether an error means that another process is gone or stuck, so that this one cannot shut down in order."""
    if isinstance(error, OSError | RunFailed):
        return isinstance(error, Lost)
    from trainer.distributed.watchdog import lost

    return lost(error)


def tell(text: str) -> None:
    """Print a message to standard error, from rank 0 first, since the other ranks mostly have the same message.

    Other ranks wait before they print: if rank 0 failed as well, the launcher has ended them by then.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(OTHERS_WAIT)
        text = f"process {rank}: {text}"
    print(text, file=sys.stderr, flush=True)
