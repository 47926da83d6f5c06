"""Who may import whom, and that a reader finds what the README says."""

import ast
import os
import re
import subprocess
import sys

import pytest
import yaml

from benchmarks.tables import DOCUMENTS, with_tables
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


def test_readme_opens_with_the_two_commands_and_its_files_exist():
    readme = (ROOT / "README.md").read_text()
    first = re.search(r"```sh\n(.*?)```", readme, re.DOTALL).group(1).split("\n")
    assert first[:2] == ["make quickstart", "make test"]
    for path in re.findall(r"\]\(([^)h][^)]*)\)", readme):
        assert (ROOT / path).exists(), path


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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_readme_table_comes_from_the_committed_results(document):
    written = (ROOT / document).read_text()
    assert with_tables(written) == written, "run `python -m benchmarks.tables`"


def test_readmes_own_loop_example_runs():
    """The snippet under 'In your own training loop', with a model and logits put before it."""
    snippet = re.search(r"```python\n(import limbeck.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    before = ("import torch\nmodel = torch.nn.Sequential(torch.nn.Linear(32, 8))\n"
              "student_logits, teacher_logits = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)\n"
              "targets = torch.randint(0, 8, (2, 3))\n")
    after = "loss.backward()\nassert terms['forward_kl'] > 0\n"
    done = subprocess.run([sys.executable, "-c", before + snippet + after], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readmes_yaml_is_an_experiment(tmp_path):
    from trainer.experiment.load import read_experiment

    file = tmp_path / "readme.yaml"
    file.write_text(re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1))
    assert read_experiment(file).experiment.student.quantization.bits == 4


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
