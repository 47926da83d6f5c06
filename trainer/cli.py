"""The two command lines: `train.py`, run by a launcher, and `limbeck`, which needs no launcher."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from trainer.command_line import limbeck_parser, parse_train
from trainer.distributed import signals
from trainer.errors import ExperimentErrors, OtherRun, RunFailed, Stopped, UserError
from trainer.experiment.explain import schema
from trainer.experiment.load import Source, read_experiment
from trainer.failures import FAILURE, OTHERS_WAIT, USER_ERROR, exit_code, failure, is_lost, messages, tell
from trainer.quick_imports import import_heavy, uncollected
from trainer.run.folder import RunFolder
from trainer.run.run_status import status


def train(arguments: list[str]) -> int:
    """Run `train.py`: read the experiment, then run it, or only show what would run. Returns the exit code."""
    source = None
    try:
        options = parse_train(arguments)
        with uncollected():  # some values are checked by modules that import torch
            source = read_experiment(options.config, options.overrides)
        if options.dry_run:
            # Heavy imports, so only once the experiment is known to be valid.
            import_heavy()
            from trainer.stages.run_stages import dry_run

            dry_run(source, as_json=options.json)
        else:
            return _run_experiment(source)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except (UserError, ExperimentErrors) as error:
        tell(messages(error, source))
        return exit_code(error)
    except (RunFailed, OSError, RuntimeError) as error:
        said = failure(error)
        if said is None:
            raise
        tell(said)
        if is_lost(error):
            signals.end(FAILURE)
        return FAILURE
    except KeyboardInterrupt:
        tell("interrupted; start the same command again to go on from its last checkpoint, if it has one")
        return signals.AT_ONCE
    return 0


def _run_experiment(source: Source) -> int:
    """Run an experiment with signal handlers installed, and record how it ended. Returns the exit code."""
    experiment, process = source.experiment, int(os.environ.get("RANK", 0))
    note = signals.EndNote(experiment)
    note.begin_again()
    try:
        with signals.handle_signals(_leaving(note)):
            import_heavy()
            from trainer.stages.run_stages import run

            run(source)
    except Stopped as stop:
        if process == 0:
            note.leave(str(stop), signals.AGAIN_LATER, step=stop.step, signal=stop.signal, process=stop.process)
            print(stop, file=sys.stderr, flush=True)
        else:
            note.wait(OTHERS_WAIT)
        return signals.AGAIN_LATER
    except (UserError, ExperimentErrors) as error:
        # Recorded, since the launcher now signals the other processes: no stop by a user.
        if not isinstance(error, OtherRun):  # then the folder, and the note in it, are not of this run
            note.leave(messages(error, source), exit_code(error), process=process)
        raise
    except (RunFailed, OSError, RuntimeError) as error:
        if (said := failure(error)) is not None:
            note.leave(said, FAILURE, process=process)
        raise
    return 0


def _leaving(note: signals.EndNote) -> Callable[[str, int], None]:
    """Make the callback that reports a signal which ends the process without waiting for the end of a step."""
    def say(signal: str, code: int) -> None:
        process = int(os.environ.get("RANK", 0))
        what = "outside of training: what was half done is done again" if code == signals.AGAIN_LATER else \
            "at once: steps since the newest checkpoint are done again"
        said = f"stopped by {signal} on process {process}, {what}; start the same command again to go on"
        if note.leave(said, code, step=None, signal=signal, process=process):
            print(said, file=sys.stderr, flush=True)
        Console().show_cursor()
    return say


def limbeck(arguments: list[str]) -> int:
    """Run the `limbeck` console command. Returns the exit code."""
    options, parser = Namespace(), limbeck_parser()
    try:
        options = parser.parse_args(arguments)
        if options.verb is None:
            parser.print_help(sys.stderr)
            return USER_ERROR
        return VERBS[options.verb](options)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except (UserError, ExperimentErrors) as error:
        tell(messages(error, place=getattr(options, "run", "command line")))
        return USER_ERROR
    except (RunFailed, OSError, RuntimeError) as error:
        said = failure(error)
        if said is None:
            raise
        tell(said)
        return FAILURE


def _init(options: Namespace) -> int:
    from trainer.starter import write_starter

    print(write_starter(Path(options.folder)))
    return 0


def _schema(options: Namespace) -> int:
    from trainer.sweep.sweep_schema import sweep_schema

    text = json.dumps(sweep_schema() if options.sweep else schema(), indent=2) + "\n"
    if options.file is None:
        print(text, end="")
        return 0
    try:
        Path(options.file).write_text(text)
    except OSError as error:
        raise UserError("", f"cannot write {options.file}: {error.strerror}",
                        way_out="name a file in a folder that is there and can be written") from error
    return 0


def _show_data(options: Namespace) -> int:
    if options.config is None:
        raise UserError("", "no experiment given", way_out="limbeck show-data --config FILE [key=value ...]")
    source = read_experiment(options.config, options.overrides)
    from trainer.data.show_data import show_data  # a heavy import
    from trainer.models.build import quiet_libraries

    quiet_libraries()
    try:
        show_data(source.experiment, Console(highlight=False))
    except UserError as error:
        raise ExperimentErrors([error], source.origins, source.file) from error
    return 0


def _status(options: Namespace) -> int:
    folder = _run_named(options)
    if (folder / "sweep.json").exists():
        from trainer.sweep.run_sweep import sweep_status

        said, code, _ = sweep_status(folder)
        said = f"{folder}: {said}"
    elif (folder / "stages.json").exists():
        from trainer.stages.stages_status import stages_status

        said, code = stages_status(folder)
    else:
        said, code = status(folder)
    print(said)
    return code


def _run_named(options: Namespace) -> Path:
    """The folder of a run, given by itself or by the arguments of `train.py`."""
    if options.config is not None:
        return Path(read_experiment(options.config, options.overrides).experiment.folder)
    if len(options.overrides) != 1:
        verb = options.verb
        raise UserError("", "name one run", way_out=f"limbeck {verb} RUN, or limbeck {verb} --config FILE "
                        "[key=value ...]")
    return Path(options.overrides[0])


def _finished_stage(run: str) -> Path:
    """The run folder of the last finished stage, if a folder is one of stages; else the folder itself."""
    if not (Path(run) / "stages.json").exists():
        return Path(run)
    from trainer.stages.stage_record import last_run

    return last_run(run)


def _watch(options: Namespace) -> int:
    from trainer.run.watch import Looks, Watch, watch

    if not 0 < options.every < float("inf"):
        raise UserError("", f"--every {options.every:g} is no time between two looks",
                        way_out="give seconds, for example --every 5")
    folder = _run_named(options)
    if (folder / "sweep.json").exists():
        from trainer.sweep.watch_sweep import WatchSweep

        looks: Looks = WatchSweep(folder)
    elif (folder / "stages.json").exists():
        from trainer.stages.stages_status import WatchStages

        looks = WatchStages(folder)
    else:
        looks = Watch(folder)
    try:
        return watch(looks, options.every, options.once, Console(highlight=False))
    except KeyboardInterrupt:
        return signals.AT_ONCE


def _report(options: Namespace) -> int:
    from trainer.run.foreign_folder import show_links
    from trainer.run.report import write_report

    show_links(RunFolder(options.run))
    if (Path(options.run) / "sweep.json").exists():
        from trainer.sweep.run_sweep import report_sweep

        report_sweep(Path(options.run))
    elif (Path(options.run) / "stages.json").exists():
        from trainer.stages.stage_report import write_stages_report

        print(write_stages_report(Path(options.run)))
    else:
        print(write_report(Path(options.run)))
    return 0


def _export(options: Namespace) -> int:
    from trainer.student.export_student import export

    print(export(_finished_stage(options.run), options.to, options.trust_remote_code, options.reader))
    return 0


def _push(options: Namespace) -> int:
    from trainer.student.push_student import push

    try:
        print(push(_finished_stage(options.run), options.to, options.runtime, options.private, options.base))
    except KeyboardInterrupt:
        tell("interrupted: until all of it has arrived, the repository is as it was before, or empty; start the same "
             "command again")
        return signals.AT_ONCE
    return 0


def _evaluate(options: Namespace) -> int:
    from trainer.student.judge_folder import judge_folder

    for name in ("limit", "tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name}", "this has to be 1 or more", value=value, way_out="leave it out, or give more")
    teacher, tasks, output = (None if one is None else Path(one)
                              for one in (options.teacher, options.tasks, options.output))
    print(judge_folder(_finished_stage(options.run), tasks, options.limit, teacher, output, options.tokens,
                       options.trust_remote_code))
    return 0


def _sweep(options: Namespace) -> int:
    """Run a sweep in child processes of `train.py`."""
    from trainer.starter import shipped
    from trainer.sweep.run_sweep import run_sweep
    from trainer.sweep.sweep_file import read_sweep
    from trainer.sweep.sweep_plan import SweepPlan

    def dry_run(plan: SweepPlan) -> None:
        from trainer import pipeline  # a heavy import
        from trainer.sweep.show_sweep import show_sweep

        show_sweep(plan, pipeline.planned)

    return run_sweep(read_sweep(options.sweep, options.overrides), [sys.executable, str(shipped("train.py"))],
                     dry_run if options.dry_run else None)


def _generate(options: Namespace) -> int:
    from trainer.experiment.model_nodes import Teacher
    from trainer.models.build import quiet_libraries

    quiet_libraries()
    from trainer.teacher.generate_answers import Generation, decoding_of, generate, named_options

    kind = next((one for one in ("messages", "prompt", "text") if getattr(options, one) is not None), None)
    given = {"dtype": options.dtype} if options.dtype else {}
    with named_options():
        asked = Generation(
            Teacher(path=options.teacher, revision=options.revision, trust_remote_code=options.trust_remote_code,
                    **given),
            options.prompts, Path(options.to), decoding_of(options), kind, kind and getattr(options, kind),
            options.tools, options.system, options.split, options.limit, options.first_tokens, options.batch_size,
            options.seed, options.unfinished)
        said = generate(asked)
    if int(os.environ.get("RANK", 0)) == 0:
        print(said)
    return 0


def _scale(options: Namespace) -> int:
    if options.config is None:
        raise UserError("", "no experiment given", way_out="limbeck scale --config FILE [key=value ...]")
    source = read_experiment(options.config, options.overrides)
    from trainer.pipeline import scaled

    try:
        scaled(source, _ranks(options.ranks), options.engines, options.network, options.gbits, options.json)
    except UserError as error:
        raise ExperimentErrors([error], source.origins, source.file) from error
    return 0


def _ranks(text: str) -> list[int]:
    """Numbers of ranks from the command line."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise UserError("--ranks", "these are numbers of ranks, separated by commas", value=text,
                        way_out="for example --ranks 1,8,64")
    return numbers


VERBS = {"init": _init, "schema": _schema, "show-data": _show_data, "status": _status, "watch": _watch,
         "report": _report, "export": _export, "push": _push, "evaluate": _evaluate, "sweep": _sweep,
         "generate": _generate, "scale": _scale}
