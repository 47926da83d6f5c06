"""Small real things that many tests use: a corpus, an experiment on it, a way to launch it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests import clients, durations, searches
from tests.clients import CLIENTS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PYTHONPATH = os.environ.get("PYTHONPATH")  # as whoever runs the tests has set it
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in two processes, and are small
if str(Path(sys.executable).parent) not in os.environ["PATH"].split(os.pathsep):
    # With a ninja for some processes and none for others DeepSpeed would build its operations again and again.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}


def pytest_addoption(parser) -> None:
    """See tests/durations.py."""
    parser.addoption(durations.OPTION, action="store_true", help="write tests/durations.json anew")


def pytest_configure(config) -> None:
    """All processes of a session look into one folder for what the planner has searched."""
    if config.getoption(durations.OPTION):
        config.pluginmanager.register(durations.Recorder(config, lambda: forked(print, ())))
    if not hasattr(config, "workerinput"):
        os.environ[searches.FOLDER] = tempfile.mkdtemp(prefix="limbeck-searches-")


def pytest_unconfigure(config) -> None:
    """It goes with the session."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(searches.FOLDER), ignore_errors=True)


def pytest_collection_modifyitems(config, items) -> None:
    """Slow ones are marked, and long files begin early."""
    durations.arrange(config, items)


def pytest_collection_finish() -> None:
    """What all tests have imported is looked through at no collection of garbage any more."""
    if "strategies.rematerialization.planner" in sys.modules:
        searches.share()
    if "strategies.export.receipt" in sys.modules:
        fork_clients()
    gc.collect()
    gc.freeze()


def sentences(seed: int, count: int) -> str:
    """Text with something to learn, the same on every machine: a small grammar driven by a fixed generator."""
    state, lines = seed * 2654435761 % 2**32 + 1, []
    subjects, verbs = ["cat", "dog", "bird", "fish", "fox"], ["sees", "likes", "finds", "takes"]
    objects = ["bread", "milk", "corn"]
    for _ in range(count):
        words = []
        for choice in (subjects, verbs, objects):
            state = (state * 1664525 + 1013904223) % 2**32
            words.append(choice[(state >> 16) % len(choice)])
        lines.append(f"The {words[0]} {words[1]} the {words[2]}.")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 40 text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(sentences(number, 6 + number % 5))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache for the session, as one user would have it."""
    return tmp_path_factory.mktemp("cache")


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` written into its nested dictionaries."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


@pytest.fixture
def write_experiment(corpus, cache, tmp_path):
    """Writes a tiny experiment, with changes, and returns its file."""
    def write(name: str = "tiny", **changes: Any) -> Path:
        values = {
            "name": name,
            "student": {"architecture": TINY},
            "data": {"path": str(corpus), "sequence_length": 32, "tokenizer": {"train_vocabulary": 300},
                     "validation": {"fraction": 0.1, "rows": 6}},
            "optimizer": {"lr": 3e-3},
            "training": {"steps": 4, "batch_size": 8, "micro_batch": 8, "evaluate_every": 4, "checkpoint_every": 4},
            "report": {"sample_tokens": 4, "prompt": "The"},
            "run": {"folder": str(tmp_path / name), "cache": str(cache), "threads": 1},
        }
        file, values = tmp_path / f"{name}.yaml", merge(values, changes)
        other = changes.get("student", {}).get("architecture") or {}
        if other.get("model_type", TINY["model_type"]) != TINY["model_type"]:  # whose dimensions have other names
            values["student"]["architecture"] = other
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file
    return write


@pytest.fixture
def train_here(write_experiment):
    """Trains a tiny student in this process and returns its trainer: the loop alone, without export and report.

    One that is to go on `until` a step is interrupted there, and leaves the checkpoints before it.
    """
    def train(name: str = "tiny", overrides: tuple[str, ...] = (), until: int | None = None, **changes: Any):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        from trainer.data.dataset import prepare_text
        from trainer.distributed.launch import start
        from trainer.experiment.load import read_experiment
        from trainer.preparation import Launched, prepare
        from trainer.run.folder import RunFolder

        searches.share()
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        experiment = read_experiment(write_experiment(name, **changes), list(overrides)).experiment
        how = Launched(*start(experiment))
        trainer = prepare(experiment, experiment, RunFolder(experiment.folder), how, prepare_text(experiment))
        with _interrupted(trainer, until):
            trainer.train()
        return trainer
    return train


@pytest.fixture
def run_experiment(write_experiment):
    """A whole run in this process; its experiment and folder."""
    def go(name: str = "tiny", **changes: Any):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        import limbeck
        from trainer.run.folder import RunFolder

        searches.share()
        fork_clients()
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        source = limbeck.read_experiment(write_experiment(name, **changes))
        return source.experiment, RunFolder(limbeck.run(source))
    return go


@contextmanager
def _interrupted(trainer: Any, until: int | None) -> Iterator[None]:
    plain = trainer.train_step

    def step(inputs):
        if trainer.state.step == until:
            raise KeyboardInterrupt
        return plain(inputs)

    trainer.train_step = step
    with suppress(KeyboardInterrupt):
        yield


def launch(*arguments: str, processes: int = 1, cwd: Path = ROOT, timeout: int = 300) -> subprocess.CompletedProcess:
    """`accelerate launch train.py ...` in processes of their own, as a person would on CPU."""
    assert processes in (1, 2)
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train.py")]
    if processes == 2:
        command = [str(ROOT / "launch" / "two_cpu_ranks.sh")]
    return subprocess.run([*command, *arguments], cwd=cwd, timeout=timeout, capture_output=True, text=True)


FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.ready"])
_clients: list[subprocess.Popen] = []


def train_py(*arguments: str, cwd: Path = ROOT, timeout: int = 300) -> subprocess.CompletedProcess:
    """`python train.py ...` in a process of its own, forked from one that has imported what it needs.

    An interpreter that is to look elsewhere for packages is started anew.
    """
    if os.environ.get("PYTHONPATH") != PYTHONPATH:
        return subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], cwd=cwd, timeout=timeout,
                              capture_output=True, text=True)
    return forked(_train, arguments, cwd=cwd, timeout=timeout)


def on_two_ranks(*arguments: str, timeout: int = 300) -> subprocess.CompletedProcess:
    """`train.py ...` on two processes, which are told what a launcher tells them, forked from one that is ready."""
    return forked(_train, arguments, environments=two_ranks(), timeout=timeout)


def two_ranks() -> list[dict[str, str]]:
    """What a launcher tells two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"} for rank in "01"]


def forked(function: Callable[..., int | None], arguments: Sequence[Any],
           environments: Sequence[dict[str, str]] = ({},), cwd: Path = ROOT, timeout: float = 300
           ) -> subprocess.CompletedProcess:
    """A function in processes of their own, one for each environment. Where one fails the others are told to end.

    Returns:
        The first exit code that is not 0, if there is one, and all that was said.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [[Path(folder) / f"{name}{rank}" for name in ("stdout", "stderr")] for rank in range(len(environments))]
        started = [fork(own, files, function, arguments, cwd) for own, files in zip(environments, said, strict=True)]
        deadline, code = time.monotonic() + timeout, 0
        while True:
            code = code or next((process.exitcode for process in started if process.exitcode), 0)
            alive = [process for process in started if process.exitcode is None]
            if not alive:
                break
            if time.monotonic() > deadline:
                for process in alive:
                    process.kill()
                raise subprocess.TimeoutExpired(str(arguments), timeout)
            for process in alive if code else ():
                process.terminate()
            connection.wait([process.sentinel for process in alive], max(0, deadline - time.monotonic()))
        out, err = ("".join(file.read_text() for file in files if file.exists()) for files in zip(*said, strict=True))
        return subprocess.CompletedProcess(arguments, code, out, err)


def fork(environment: dict[str, str], said: list[Path], function: Callable[..., int | None], arguments: Sequence[Any],
         cwd: Path = ROOT) -> multiprocessing.process.BaseProcess:
    """Start a function in a process with more in its environment; what it says goes to two files."""
    process = FORKED.Process(target=_in_fork, args=(with_clients(environment), str(cwd), said, function, arguments))
    process.start()
    return process


def fork_clients() -> None:
    """Have what this process exports read by clients that are forked, as `tests/ready.py` has for forked processes."""
    from strategies.export import receipt

    def run(*command: Any, **options: Any) -> subprocess.CompletedProcess:
        with_clients({})
        return clients.ask(*command, **options)

    receipt.subprocess = SimpleNamespace(run=run)


def with_clients(environment: dict[str, str]) -> dict[str, str]:
    """This process's environment with more in it, for a forked one that exports: clients are forked as well."""
    if not _clients:
        os.environ[CLIENTS] = str(Path(tempfile.mkdtemp(prefix="limbeck-clients-")) / "socket")
        _clients.append(subprocess.Popen([sys.executable, str(ROOT / "tests" / "clients.py"), os.environ[CLIENTS]],
                                         stdin=subprocess.PIPE, cwd="/"))
    return {**os.environ, **environment}


def _in_fork(environment: dict[str, str], cwd: str, said: list[Path], function: Callable[..., int | None],
             arguments: Sequence[Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, file in zip((1, 2), said, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may not listen to it
    sys.exit(function(*arguments))


def _train(*arguments: str) -> int:
    sys.argv[:] = [str(ROOT / "train.py"), *arguments]
    from trainer.cli import train

    return train(list(arguments))
