"""The command-line reference: usage and arguments of `train.py` and of each verb of `limbeck`, from their parsers."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator

from benchmarks.tables import ROOT


def command_lines() -> str | None:
    """A section for each command; None where the parsers are not there."""
    if not (ROOT / "trainer" / "command_line.py").exists():
        return None
    from trainer.command_line import limbeck_parser, train_parser

    verbs = next(action for action in limbeck_parser()._actions if isinstance(action.choices, dict))
    parsers = {"train.py": train_parser(), **{f"limbeck {name}": one for name, one in verbs.choices.items()}}
    return "\n".join(line for name, parser in parsers.items() for line in _section(name, parser)).rstrip()


def _section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    usage = inspect.cleandoc(parser.usage or parser.format_usage().removeprefix("usage: "))
    yield f"## {name}\n"
    yield f"{' '.join((parser.description or '').split())}\n"
    yield f"```text\n{usage}\n```\n"
    yield from ("| argument | meaning |", "|---|---|")
    for action in parser._actions:
        if "-h" not in action.option_strings:
            meaning = (action.help or "").replace("show program's version number and exit", "print the version")
            yield f"| `{_word(action)}` | {' '.join(meaning.split())} |"
    yield ""


def _word(action: argparse.Action) -> str:
    shown = str(action.metavar or action.dest).replace("|", "\\|")
    if not action.option_strings:
        return shown
    takes = action.nargs != 0
    return f"{action.option_strings[-1]} {shown}" if takes else action.option_strings[-1]
