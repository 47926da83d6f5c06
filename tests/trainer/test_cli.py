"""What is met before anything heavy is imported."""

import json
import subprocess
import sys

from tests.conftest import ROOT, train_py


def test_help_imports_nothing_heavy_and_lists_every_key():
    code = ("import sys; from trainer.cli import train; train(['--help']); "
            "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules); "
            "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "temperature: 2.0" in done.stdout and "--dry-run" in done.stdout


def test_wrong_key_exits_2_with_its_place(write_experiment):
    file = write_experiment(optimizer={"learning_rate": 1})
    done = train_py("--config", str(file))
    assert done.returncode == 2
    line = file.read_text().splitlines().index("  learning_rate: 1") + 1
    assert f"error: {file}:{line}: optimizer.learning_rate = 1: no such key" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_config_and_wrong_option():
    assert "pass one, for example --config" in train_py("optimizer.lr=1").stderr
    assert "write it without dashes: optimizer.lr=1" in train_py("--optimizer.lr=1").stderr
    assert "--config is given twice" in train_py("--config", "a", "--config", "b").stderr
    done = train_py("--confg", "x")
    assert done.returncode == 2 and "no such option: --confg" in done.stderr


def test_limbeck_schema_and_unknown_verb(tmp_path):
    def limbeck(*arguments):
        return subprocess.run([sys.executable, str(ROOT / "limbeck.py"), *arguments], capture_output=True, text=True,
                              cwd=tmp_path)

    assert "limbeck schema [FILE]" in limbeck("schema", "--help").stdout and not list(tmp_path.iterdir())
    done = limbeck("schema", "--out")
    assert done.returncode == 2 and "no such option: --out" in done.stderr and not list(tmp_path.iterdir())
    done = limbeck("schema", "no/such/folder.json")
    assert done.returncode == 2 and "cannot write no/such/folder.json" in done.stderr

    assert limbeck("schema", str(tmp_path / "schema.json")).returncode == 0
    assert json.loads((tmp_path / "schema.json").read_text())["properties"]["teacher"]
    assert limbeck("disitll").returncode == 2
    done = limbeck("report", str(tmp_path))
    assert done.returncode == 2 and "not a finished run: experiment.yaml is missing" in done.stderr


def test_public_names_all_import():
    import limbeck

    assert dir(limbeck) == sorted(limbeck.__all__)
    for name in limbeck.__all__:
        assert getattr(limbeck, name) is not None
