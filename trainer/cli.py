"""The command lines: `train.py`, which is launched, and `limbeck`, which needs no launcher."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from trainer.distributed import signals
from trainer.errors import ExperimentErrors, Lost, RunFailed, Stopped, UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.explain import help_text, schema
from trainer.experiment.load import Source, describe, read_experiment
from trainer.run.folder import RunFolder

USER_ERROR, FAILURE, BUDGET_UNMET = 2, 1, 3
OTHERS_WAIT = 5.0  # seconds


def train(arguments: list[str]) -> int:
    """`train.py`: read the experiment, then show what would run or run it. Returns the exit code."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0 if arguments else USER_ERROR
    source = None
    try:
        file, overrides, flags = _parse(arguments)
        source = read_experiment(file, overrides)
        if "--dry-run" in flags:
            from trainer import pipeline  # everything heavy comes with it, after the experiment is known to be good

            pipeline.dry_run(source, as_json="--json" in flags)
        else:
            return _run_experiment(source)
    except (UserError, ExperimentErrors) as error:
        _tell(_messages(error, source))
        return _code(error)
    except (RunFailed, OSError, RuntimeError) as error:
        said = _failure(error)
        if said is None:
            raise
        _tell(said)
        if _is_lost(error):
            signals.end(FAILURE)
        return FAILURE
    except KeyboardInterrupt:
        _tell("interrupted; start the same command again to go on from its last checkpoint, if it has one")
        return signals.AT_ONCE
    return 0


def _run_experiment(source: Source) -> int:
    """Run an experiment, hearing signals, and leave word of how it ended. Returns the exit code."""
    experiment, process = source.experiment, int(os.environ.get("RANK", 0))
    signals.begin_again(experiment)
    try:
        with signals.handle_signals(_leaving(experiment)):
            from trainer import pipeline

            pipeline.run_experiment(source)
    except Stopped as stop:
        if process == 0:
            signals.note(experiment, str(stop), signals.AGAIN_LATER, step=stop.step, signal=stop.signal,
                          process=stop.process)
            print(stop, file=sys.stderr, flush=True)
        else:
            signals.noted(experiment, OTHERS_WAIT)
        return signals.AGAIN_LATER
    except UserError as error:  # where it is another process's alone, a launcher signals this one: that is no stop
        if error.key != "run.folder":  # else it is another run's
            signals.note(experiment, _messages(error, source), _code(error), process=process)
        raise
    except (RunFailed, OSError, RuntimeError) as error:
        if (said := _failure(error)) is not None:
            signals.note(experiment, said, FAILURE, process=process)
        raise
    return 0


def _code(error: UserError | ExperimentErrors) -> int:
    return BUDGET_UNMET if type(error).__name__ == "BudgetUnmet" else USER_ERROR


def _failure(error: Exception) -> str | None:
    """What is to be said of a run that cannot go on; None of an error that nobody has foreseen."""
    if isinstance(error, RunFailed):
        return f"error: {error}"
    if isinstance(error, OSError):
        return (f"error: cannot read or write {error.filename or 'a file'}: {error.strerror or error}\n"
                "  -> check the path, its permissions and the free space; start the same command again to go on")
    if type(error).__name__ == "OutOfMemoryError":
        return (f"error: the device is out of memory: {error}\n  -> lower training.micro_batch (the loss stays the "
                "same) or data.sequence_length; --dry-run shows where the bytes go")
    if _is_lost(error):
        return ("error: another process ended, or did not come, while this one waited for it outside of training\n"
                f"  (it was told: {str(error).partition(chr(10))[0]})\n"
                "  -> see what the other said; start the same command again to go on")
    return None


def _is_lost(error: Exception) -> bool:
    """Whether another process is gone or stuck, so that this one cannot be torn down in good order."""
    if isinstance(error, OSError | RunFailed):
        return isinstance(error, Lost)
    from trainer.distributed.watchdog import lost

    return lost(error)


def _leaving(experiment: Experiment) -> Callable[[str, int], None]:
    """What is said of a signal that does not wait for a step."""
    def tell(signal: str, code: int) -> None:
        process = int(os.environ.get("RANK", 0))
        what = "outside of training: what was half done is done again" if code == signals.AGAIN_LATER else \
            "at once: steps since the newest checkpoint are done again"
        said = f"stopped by {signal} on process {process}, {what}; start the same command again to go on"
        if signals.note(experiment, said, code, step=None, signal=signal, process=process):
            print(said, file=sys.stderr, flush=True)
        Console().show_cursor()
    return tell


def _parse(arguments: list[str]) -> tuple[str, list[str], set[str]]:
    file, overrides, flags = None, [], set()
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config" or argument.startswith("--config="):
            if file is not None:
                raise UserError("", "--config is given twice", way_out="give one experiment; key=value changes it")
            file = argument.partition("=")[2] or next(rest, None)
        elif argument in ("--dry-run", "--json"):
            flags.add(argument)
        elif argument.startswith("-"):
            bare = argument.lstrip("-")
            raise UserError("", f"no such option: {argument}",
                            way_out=f"write it without dashes: {bare}" if "=" in bare else "see train.py --help")
        else:
            overrides.append(argument)
    if "--json" in flags and "--dry-run" not in flags:
        raise UserError("", "--json goes with --dry-run", way_out="add --dry-run to print the plan as JSON")
    if file is None:
        raise UserError("", "no experiment given", way_out="pass one, for example --config configs/quickstart.yaml")
    return file, overrides, flags


def _messages(error: UserError | ExperimentErrors, source: Source | None) -> str:
    if isinstance(error, ExperimentErrors):
        return "\n".join(f"error: {describe(one, error.origins, error.place)}" for one in error.errors)
    origins, place = (source.origins, source.file) if source else ({}, "command line")
    return f"error: {describe(error, origins, place)}"


def _tell(text: str) -> None:
    """On standard error, from the first process: the others mostly have the same to say.

    Another process speaks after a while: where the first one failed too, the launcher has ended this one by then.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(OTHERS_WAIT)
        text = f"process {rank}: {text}"
    print(text, file=sys.stderr, flush=True)


LIMBECK = """\
limbeck VERB ...

  limbeck schema [FILE]   write the JSON Schema of experiment files, for editors (default: standard output)
  limbeck show-data --config FILE [key=value ...]
                          show a few records of the training data as they will be learned, and where rows cut them off
  limbeck status RUN      tell how a run is doing or how it ended; RUN is its folder, or --config FILE [key=value ...]
                          Exit code: 0 finished, 75 stopped by a signal and to be started again, 1 anything else
  limbeck report RUN      write report.md and its pictures of a run folder again
  limbeck export RUN --to onnx|gguf [--trust-remote-code]
                          write a finished run's student for another runtime, and check it there; code that comes with
                          its model runs only if you say so here, whatever the folder says

Training is launched: accelerate launch train.py --config FILE (see train.py --help).
"""


def limbeck(arguments: list[str]) -> int:
    """The `limbeck` console command. Returns the exit code."""
    known = ("-h", "--help", "--to", "--config", "--trust-remote-code")
    wrong = next((one for one in arguments if one.startswith("-") and one.partition("=")[0] not in known), None)
    if wrong is not None:
        _tell(f"error: no such option: {wrong}")
        arguments = []
    elif {"-h", "--help"} & set(arguments):
        arguments = ["--help"]
    elif "--trust-remote-code" in arguments and arguments[:1] != ["export"]:
        _tell("error: --trust-remote-code goes with export")
        arguments = []
    trust, arguments = "--trust-remote-code" in arguments, [one for one in arguments if one != "--trust-remote-code"]
    match arguments:
        case ["schema", *file] if len(file) < 2:
            text = json.dumps(schema(), indent=2) + "\n"
            try:
                Path(file[0]).write_text(text) if file else print(text, end="")
            except OSError as error:
                _tell(f"error: cannot write {file[0]}: {error.strerror}")
                return USER_ERROR
        case ["show-data", *rest] if rest:
            return _show_data(rest)
        case ["status", first, *rest] if first.startswith("-") or not rest:
            return _status([first, *rest])
        case ["report", folder]:
            from trainer.run.foreign_folder import show_links
            from trainer.run.report import write_report

            try:
                show_links(RunFolder(folder))
                print(write_report(Path(folder)))
            except UserError as error:
                _tell(f"error: {describe(error, {}, folder)}")
                return USER_ERROR
        case ["export", folder, "--to", runtime]:
            from trainer.student.export_student import export

            try:
                print(export(Path(folder), runtime, trust))
            except (UserError, ExperimentErrors) as error:
                _tell(_messages(error, None) if isinstance(error, ExperimentErrors) else
                      f"error: {describe(error, {}, folder)}")
                return USER_ERROR
            except RunFailed as error:
                _tell(f"error: {error}")
                return FAILURE
        case ["--help"]:
            print(LIMBECK, end="")
        case _:
            print(LIMBECK, end="", file=sys.stderr)
            return USER_ERROR
    return 0


def _show_data(arguments: list[str]) -> int:
    """Of an experiment that is named as for `train.py`."""
    source = None
    try:
        file, overrides, _ = _parse(arguments)
        source = read_experiment(file, overrides)
        from trainer.data.show_data import show_data  # everything heavy comes with it
        from trainer.models.build import quiet_libraries

        quiet_libraries()
        show_data(source.experiment, Console(highlight=False))
    except (UserError, ExperimentErrors) as error:
        _tell(_messages(error, source))
        return USER_ERROR
    return 0


def _status(arguments: list[str]) -> int:
    """Of a run that is named by its folder, or by what `train.py` is given."""
    try:
        if arguments[0].startswith("-"):
            file, overrides, _ = _parse(arguments)
            arguments = [read_experiment(file, overrides).experiment.folder]
        said, code = signals.status(Path(arguments[0]))
    except (UserError, ExperimentErrors) as error:
        _tell(_messages(error, None))
        return USER_ERROR
    print(said)
    return code
