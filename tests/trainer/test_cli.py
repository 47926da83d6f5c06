"""What is met before anything heavy is imported."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT, train_py
from trainer import __version__, cli
from trainer.command_line import RUNTIMES, limbeck_parser, parse_train
from trainer.errors import UserError

HEAVY = "{'torch', 'transformers', 'datasets', 'accelerate', 'numpy'}"
VERBS = ("init", "schema", "show-data", "status", "watch", "report", "export", "push", "evaluate", "sweep",
         "generate", "scale")


def typed(*arguments, capsys):
    """Exit code, standard output and standard error of `limbeck`."""
    code = cli.limbeck(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_help_imports_nothing_heavy_and_lists_every_key():
    code = (f"import sys; from trainer.cli import limbeck, train; train(['--help']); limbeck(['export', '--help']); "
            f"limbeck(['--version']); limbeck(['exprot']); heavy = {HEAVY} & set(sys.modules); assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "temperature: 2.0" in done.stdout and "--dry-run" in done.stdout
    assert re.search(r"Exit codes:\n.*^  75 +stopped by a signal", done.stdout, re.DOTALL | re.MULTILINE)


def test_wrong_key_exits_2_with_its_place(write_experiment):
    file = write_experiment(optimizer={"learning_rate": 1})
    done = train_py("--config", str(file))
    assert done.returncode == 2
    line = file.read_text().splitlines().index("  learning_rate: 1") + 1
    assert f"error: {file}:{line}: optimizer.learning_rate = 1: no such key" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments, parts", [
    ("optimizer.lr=1", ["no experiment given", "pass one, for example --config"]),
    ("--optimizer.lr=1", ["write it without dashes: optimizer.lr=1"]),
    ("--optimizer.lr 1", ["no such option: --optimizer.lr", "write it without dashes: optimizer.lr=VALUE"]),
    ("--config a --config b", ["--config is given twice", "give one experiment"]),
    ("--config a --config=b", ["--config is given twice"]),
    ("--confg x", ["no such option: --confg", "did you mean --config?"]),
    ("--confg=x", ["no such option: --confg=x", "did you mean --config?"]),
    ("--config a --dry", ["no such option: --dry", "did you mean --dry-run?"]),
    ("--config a -j", ["no such option: -j", "see train.py --help"]),
    ("--config a b=1 -1", ["no such option: -1"]),
    ("--config", ["--config: expected one argument", "--config FILE [key=value ...]"]),
    ("--config a --json", ["--json goes with --dry-run", "add --dry-run to print the plan as JSON"]),
    ("--config a --json=3 --dry-run", ["--json: ignored explicit argument '3'"]),
])
def test_mistakes_after_train_py(arguments, parts, capsys):
    assert cli.train(arguments.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: command line: ") and said.err.count("error: ") == 1 and not said.out
    for part in parts:
        assert part in said.err


@pytest.mark.parametrize("arguments", [
    ["--config", "F", "a=-1", "--dry-run", "b=x y=z", "--json", "c.d={e: 1, f: -2}", "g=--h"],
    ["a=-1", "--dry-run", "--config=F", "b=x y=z", "c.d={e: 1, f: -2}", "--json", "g=--h"],
    ["--json", "--dry-run", "a=-1", "b=x y=z", "c.d={e: 1, f: -2}", "g=--h", "--config", "F"],
])
def test_overrides_stand_anywhere_and_keep_their_order(arguments):
    options = parse_train(arguments)
    assert options.overrides == ["a=-1", "b=x y=z", "c.d={e: 1, f: -2}", "g=--h"]
    assert options.config == "F" and options.dry_run and options.json


def test_an_option_with_spaces_is_no_override():
    with pytest.raises(UserError, match="no such option: --report.prompt=a b"):
        parse_train(["--config", "F", "--report.prompt=a b"])


def test_overrides_reach_the_experiment(write_experiment, capsys):
    assert cli.train(["optimizer.lr=-1", "--config", str(write_experiment()), "--dry-run", "report.prompt=a b=c"]) == 2
    said = capsys.readouterr().err
    assert "override `optimizer.lr=-1`: optimizer.lr = -1" in said and "report.prompt" not in said


@pytest.mark.parametrize("arguments, parts", [
    ("exprot", ["no such verb: exprot", "did you mean export?"]),
    ("disitll", ["no such verb: disitll",
                 "one of init, schema, show-data, status, watch, report, export, push, evaluate, sweep"]),
    ("--wrong", ["no such option: --wrong", "see limbeck --help"]),
    ("--to onnx", ["--to goes with export"]),
    ("schema --out", ["no such option: --out", "see limbeck schema --help"]),
    ("schema a b", ["one word too many: b", "limbeck schema [FILE] [--sweep]"]),
    ("schema no/such/folder.json", ["cannot write no/such/folder.json"]),
    ("export", ["the following arguments are required: RUN, --to", "limbeck export RUN --to onnx|gguf"]),
    ("export r", ["the following arguments are required: --to"]),
    ("export r --to onxx", ["no such runtime: onxx", "did you mean onnx?"]),
    ("export r --ot onnx", ["no such option: --ot", "did you mean --to?"]),
    ("report r --trust-remote-code", ["--trust-remote-code goes with export"]),
    ("report r --config x", ["--config goes with show-data and status and watch and scale"]),
    ("report nowhere", ["not a finished run: experiment.yaml is missing"]),
    ("sweep", ["the following arguments are required: SWEEP", "limbeck sweep SWEEP [--dry-run] [key=value ...]"]),
    ("sweep a --jobs 2", ["no such option: --jobs"]),
    ("sweep nowhere.yaml", ["error: nowhere.yaml: there is no such file"]),
    ("show-data", ["no experiment given", "limbeck show-data --config FILE [key=value ...]"]),
    ("status", ["name one run", "limbeck status RUN, or limbeck status --config FILE"]),
    ("status a b", ["name one run"]),
    ("watch", ["name one run", "limbeck watch RUN, or limbeck watch --config FILE"]),
    ("watch nowhere", ["error: command line: 'nowhere': this is not a run folder"]),
    ("watch r --every 0", ["--every 0 is no time between two looks", "give seconds, for example --every 5"]),
    ("watch r --every soon", ["--every: invalid float value: 'soon'", "limbeck watch RUN [--every SECONDS]"]),
    ("status r --once", ["--once goes with watch"]),
    ("generate", ["the following arguments are required: TEACHER, --prompts, --to"]),
    ("generate t --prompts p --to o --message m", ["no such option: --message", "did you mean --messages?"]),
    ("generate t --prompts p --to o --prompt a --text b", ["--text: not allowed with argument --prompt"]),
    ("generate t --prompts p --to o --dtype bf16", ["no such value of --dtype: bf16", "one of float32, bfloat16"]),
    ("generate t --prompts p --to o --new-tokens 0", ["--new-tokens = 0: this is a number from 1 on"]),
    ("generate t --prompts p --to o --temperature -1", ["the temperature is a number from 0 on, not -1.0"]),
    ("generate t --prompts p --to o --top-p 0.9", ["top_p is for sampling, and at temperature 0 nothing is drawn"]),
    ("generate t --prompts p --to o --beams 4 --temperature 1", ["a beam search draws nothing"]),
    ("generate t --prompts p --to o --answers 4", ["4 answers at temperature 0 are the same"]),
    ("generate ./t --prompts p --to o", ["TEACHER = './t': there is no such folder"]),
    ("status nowhere", ["error: command line: 'nowhere': this is not a run folder"]),
])
def test_mistakes_after_limbeck(arguments, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = typed(*arguments.split(), capsys=capsys)
    assert code == 2 and err.startswith("error: ") and err.count("error: ") == 1 and not out
    for part in parts:
        assert part in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_its_help(verb, capsys):
    code, out, err = typed(verb, "--help", capsys=capsys)
    assert code == 0 and not err and f"usage: limbeck {verb} " in out
    assert verb in typed("--help", capsys=capsys)[1]


def test_verbs_and_runtimes_are_those_that_are_carried_out():
    from trainer.student import export_student

    assert tuple(cli.VERBS) == VERBS == tuple(limbeck_parser().siblings)
    assert tuple(export_student.RUNTIMES) == RUNTIMES


def test_no_verb_shows_the_help_where_errors_go(capsys):
    code, out, err = typed(capsys=capsys)
    assert code == 2 and not out and "usage: limbeck VERB ..." in err


def test_version_and_schema_from_any_folder(tmp_path, capsys):
    done = subprocess.run([sys.executable, "-m", "limbeck", "--version"], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, f"limbeck {__version__}\n")
    assert cli.train(["--version"]) == 0 and capsys.readouterr().out == done.stdout
    assert typed("schema", str(tmp_path / "schema.json"), capsys=capsys)[0] == 0
    assert json.loads((tmp_path / "schema.json").read_text())["properties"]["teacher"]


def test_public_names_all_import():
    import limbeck

    assert dir(limbeck) == sorted(limbeck.__all__)
    assert set(limbeck.__all__) == {*limbeck._PUBLIC, "__version__"}
    for name in limbeck.__all__:
        assert getattr(limbeck, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Lmab'"):
        limbeck.Lmab  # noqa: B018
