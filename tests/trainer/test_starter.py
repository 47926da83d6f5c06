"""`limbeck init`, from the tree and from a wheel that is installed away from it."""

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trainer import __version__, cli
from trainer.starter import starting_files

BUILT_FROM = ("limbeck", "trainer", "strategies", "configs", "launch")
FILES = {"experiment.yaml", "experiment.schema.json", "train.py", "launch/one_process.yaml", "launch/one_node.yaml",
         "launch/many_nodes.yaml", "launch/slurm.sh", "launch/two_cpu_ranks.sh"}


def shell(command: str, cwd: Path, path: Path) -> subprocess.CompletedProcess:
    """A command line as a person types it, whose interpreter looks for packages in one place first."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Where a wheel of a copy of the tree is installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "train.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for command in (["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "tree")],
                    ["install", "--no-deps", "--no-index", "--find-links", str(folder), "--no-compile", "--target",
                     str(folder / "installed"), "limbeck"]):
        done = subprocess.run([*pip, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "installed"


def test_what_is_written_is_the_quickstart_and_what_launches_it(tmp_path, capsys):
    folder = tmp_path / "my first" / "run"
    assert cli.limbeck(["init", str(folder)]) == 0
    said = capsys.readouterr().out
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == FILES
    text = (folder / "experiment.yaml").read_text()
    assert text == (ROOT / "configs" / "quickstart.yaml").read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=experiment.schema.json"
    for script in (folder / "launch").glob("*.sh"):
        assert script.stat().st_mode & stat.S_IXUSR
    assert f"  cd '{folder}'\n" in said


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "slurm.sh").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    assert cli.limbeck(["init", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"error: command line: {tmp_path} has launch/slurm.sh already; nothing was written" in said
    assert "-> name a new folder" in said and len(list(tmp_path.rglob("*"))) == 3
    (tmp_path / "launch" / "slurm.sh").unlink()
    assert cli.limbeck(["init", str(tmp_path)]) == 0, "other files may be there"
    assert cli.limbeck(["init", str(tmp_path)]) == 2 and "and more of these files already" in capsys.readouterr().err
    assert cli.limbeck(["init", str(tmp_path / "notes.txt" / "run")]) == 2
    assert f"{tmp_path / 'notes.txt'} is a file" in capsys.readouterr().err


def test_the_wheel_has_what_is_needed_and_nothing_else(installed):
    (wheel,) = installed.parent.glob("*.whl")
    assert wheel.name == f"limbeck-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {str(file.relative_to(ROOT)) for name in ("limbeck", "trainer", "strategies")
            for file in (ROOT / name).rglob("*.py")}
    data = {f"limbeck/{folder}/{file.name}" for folder in ("configs", "launch") for file in (ROOT / folder).iterdir()}
    typed = {f"{name}/py.typed" for name in ("limbeck", "trainer", "strategies")}
    assert {name for name in names if ".dist-info/" not in name} == code | data | typed | {"train.py"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    metadata = next(file for file in installed.glob("limbeck-*.dist-info/METADATA")).read_text()
    assert "License-Expression: Apache-2.0" in metadata and f"Version: {__version__}" in metadata


def test_an_installed_wheel_works_from_any_folder(installed, tmp_path):
    done = shell("python -m limbeck --version && python -c 'import limbeck, strategies, trainer\n"
                 "print(limbeck.__file__, trainer.__file__, strategies.__file__)'", tmp_path, installed)
    version, places = done.stdout.splitlines()
    assert version == f"limbeck {__version__}" and places.count(str(installed)) == 3, done.stderr
    assert shell("python -m limbeck schema", tmp_path, installed).stdout == starting_files()["experiment.schema.json"]
    done = shell("python -m limbeck init run", tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "run" / name).read_text() for name in FILES} == starting_files(), "as from the tree"
    into, dry_run, launch = re.findall(r"^  (\S.*)$", done.stdout, re.MULTILINE)
    assert into == "cd run" and launch.startswith("accelerate launch ") and launch.endswith(dry_run[len("python"):-10])
    done = shell(f"{into} && {dry_run}", tmp_path, installed)
    assert done.returncode == 0 and "experiment.yaml:" in done.stdout, done.stderr
