"""Clients of exported models in forks of this process, which has imported what they need."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from types import SimpleNamespace
from typing import Any

from strategies.export import receipt


def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess:
    """As `subprocess.run` of a client's command: [interpreter, script, its arguments]."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            _be_client(command[1:], env, said.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return subprocess.CompletedProcess(command, code, "", said.read())


def install() -> None:
    """Have receipts ask such clients, in this process and its forks."""
    receipt.subprocess = SimpleNamespace(run=run)


def _be_client(argv: list[str], environment: dict[str, str], said: int) -> None:
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    code = 1
    try:
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
