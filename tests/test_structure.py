"""Who may import whom, and that the two commands of the README do what they say; `tests/docs` has the rest of it."""

import ast
import os
import re
import subprocess

import pytest
import yaml

from tests.conftest import ROOT

FILES = [file for folder in ("trainer", "strategies", "benchmarks") for file in (ROOT / folder).rglob("*.py")]


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("file", [file for file in FILES if "strategies" in file.parts], ids=lambda file: file.stem)
def test_strategies_stand_alone(file):
    own = file.relative_to(ROOT / "strategies").parts[0]
    for module in imports(file):
        assert module.split(".")[0] not in ("trainer", "limbeck", "train"), f"{file} imports {module}"
        if module.startswith("strategies."):
            assert module.split(".")[1] in (own, "common", "memory"), f"{file} imports {module}"


def test_clients_know_nothing_of_this_project():
    files = (ROOT / "strategies" / "export" / "clients").glob("*.py")
    modules = {module.split(".")[0] for file in files for module in imports(file)}
    assert not modules & {"strategies", "trainer", "limbeck"}


def test_readme_opens_with_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    first = re.search(r"```sh\n(.*?)```", readme, re.DOTALL).group(1).split("\n")
    assert first[:2] == ["make quickstart", "make test"]


def test_make_targets_do_what_the_readme_shows_as_plain_commands():
    dry = subprocess.run(["make", "-n", "quickstart", "test"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "accelerate launch" in dry and "train.py --config configs/quickstart.yaml" in dry and "/pytest" in dry
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_a_gpu_machine_gets_no_pins(tmp_path):
    """`make setup` adds the CPU constraint only where nvidia-smi is not found."""
    def commands(path):
        return subprocess.run(["make", "-nB", "setup"], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "PATH": path}).stdout

    nvidia = tmp_path / "nvidia-smi"
    nvidia.write_text("#!/bin/sh\n")
    nvidia.chmod(0o755)
    assert "constraints-cpu.txt" not in commands(f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if subprocess.run(["which", "nvidia-smi"], capture_output=True).returncode:
        assert "-c constraints-cpu.txt" in commands(os.environ["PATH"])


def test_quickstarts_one_line_changes_are_valid(tmp_path):
    """Each commented line of the quickstart put in the place of its own."""
    from trainer.experiment.load import read_experiment

    text = (ROOT / "configs" / "quickstart.yaml").read_text()
    for key in ("teacher", "data"):
        line = re.search(rf"^#   ({key}: .*?)(?:      .*)?$", text, re.MULTILINE).group(1)
        values = yaml.safe_load(text) | yaml.safe_load(line)
        file = tmp_path / f"{key}.yaml"
        file.write_text(yaml.safe_dump(values))
        assert "/" in str(getattr(read_experiment(file).experiment, key).path)


def test_launch_topologies():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "launch" / "one_process.yaml"))
    assert config.num_processes == 1 and config.mixed_precision == "no"
