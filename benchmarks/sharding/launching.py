"""Scripts in processes of one machine's CPU, through Accelerate's launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def launched(*command: str | Path, processes: int = 2, **how: Any) -> subprocess.CompletedProcess:
    """Run a script with its arguments; one process needs no launcher.

    Args:
        how: to run it, as `subprocess.run` takes it.
    """
    words = [str(word) for word in command]
    if processes > 1:
        words = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
                 "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                 "--num_cpu_threads_per_process", "1", "--main_process_port", "0", *words]
    return subprocess.run([sys.executable, *words], env=environment(), cwd=ROOT, text=True, **how)


def environment() -> dict[str, str]:
    """This process's, for others that train on CPU.

    With another ninja in PATH than other runs have, DeepSpeed would build its operations again, for a minute.
    """
    return {**os.environ, "ACCELERATE_USE_CPU": "true",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
