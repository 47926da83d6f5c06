"""Mistakes in a sweep file: one message each, with its line and a way out, before anything is started."""

import json
from typing import get_args

import pytest

from trainer import cli
from trainer.sweep.settings import Settings, short_names, text_of, word
from trainer.sweep.sweep_file import MetricName, read_sweep
from trainer.sweep.sweep_metrics import METRICS

ONE = "grid: {optimizer.lr: [1e-3, 1e-2]}"


@pytest.fixture
def sweep_file(write_experiment, tmp_path, monkeypatch):
    """Writes a sweep of a tiny experiment, and returns its file."""
    monkeypatch.chdir(tmp_path)
    write_experiment("base")

    def write(*lines: str, experiment: str = "base.yaml"):
        file = tmp_path / "sweep.yaml"
        file.write_text("\n".join([f"experiment: {experiment}", *lines]) + "\n")
        return file
    return write


@pytest.mark.parametrize("lines, parts", [
    ([ONE, "metrics: loss"], ["sweep.yaml:3: metrics = 'loss': no such key", "did you mean `metric`?"]),
    ([ONE, "metric: bits_per_bite"], ["sweep.yaml:3: metric = 'bits_per_bite'", "did you mean `bits_per_byte`?"]),
    ([ONE, "jobs: 0"], ["sweep.yaml:3: jobs = 0", "must be greater than 0", "Runs at a time"]),
    ([ONE, "seeds: [0, 1, 0]"], ["sweep.yaml:3: seeds", "the seed 0 stands twice"]),
    ([ONE, "seeds: []"], ["sweep.yaml:3: seeds", "the list is empty"]),
    ([ONE, "seeds: [-1]"], ["sweep.yaml:3: seeds.0 = -1", "greater than or equal to 0"]),
    ([ONE, "name: a/b"], ["sweep.yaml:3: name = 'a/b'", "only letters, digits"]),
    ([ONE, "list: [{optimizer.lr: 1}]"], ["sweep.yaml:3: list", "settings are named by grid already"]),
    ([], ["sweep.yaml: nothing differs between the runs", "grid: {optimizer.lr: [1e-4, 3e-4]}"]),
    (["seeds: [3]"], ["nothing differs between the runs"]),
    (["grid:", "  optimizer.lr: []"], ["sweep.yaml:3: grid.optimizer.lr = []", "the list is empty"]),
    (["grid:", "  optimizer.lr: 0.1"], ["sweep.yaml:3: grid.optimizer.lr = 0.1", "a list of values", "[0.1]"]),
    (["grid:", "  training.steps: [4]", "  optimizer.lrr: [1]"],
     ["sweep.yaml:4: optimizer.lrr = 1: no such key", "did you mean `optimizer.lr`?"]),
    (["grid:", "  optimizer.lr: [1, -1]"], ["sweep.yaml:3: optimizer.lr = -1", "(in the setting optimizer.lr=-1)"]),
    (["list:", "- {}", "- {optimizer.lr: x}"], ["sweep.yaml:4: optimizer.lr = 'x'", "in the setting optimizer.lr=x"]),
    ([ONE, "overrides:", "  learning_rate: 1"], ["sweep.yaml:4: learning_rate = 1", "did you mean `optimizer.lr`?"]),
    ([ONE, "overrides:", "  optimizer: {lr: 1}"], ["sweep.yaml:4: overrides.optimizer.lr = 1", "varied by this sweep"]),
    ([ONE, "overrides:", "  data: {a: 1}", "  data.a: 1"], ["sweep.yaml:5: overrides.data.a", "stands twice"]),
    ([ONE, "overrides:", "  seed: 1"], ["sweep.yaml:4: overrides.seed = 1", "`seeds` of the sweep"]),
    (["grid:", "  run.folder: [a, b]"], ["sweep.yaml:3: grid.run.folder = 'a'", "a folder of its own"]),
    (["grid: {optimizer.lr: [1e-3, 0.001]}"], ["sweep.yaml:2: grid: lr-0.001 is the same experiment", "setting 2 as "
                                                                                                        "setting 1"]),
    (["list:", "- {}", "- {optimizer.lr: 3e-3}"], ["sweep.yaml:4: list.1", "is the same experiment as as-it-is"]),
    ([f"grid: {{optimizer.lr: {[*range(1, 1002)]}}}"], ["sweep.yaml:2: grid: these are 1,001 runs, over 1,000"]),
    (["search: {trials: 0, space: {optimizer.lr: {low: 1, high: 2}}}"], ["search.trials = 0"]),
    (["search: {trials: 5, space: {}}"], ["search.space = {}", "nothing is searched"]),
    (["search:", "  trials: 5", "  space:", "    optimizer.lr: {low: 2, high: 1}"],
     ["sweep.yaml:5: search.space.optimizer.lr.low = 2", "the range is empty"]),
    (["search:", "  trials: 5", "  space:", "    optimizer.lr: {low: 0, high: 1, log: true}"],
     ["sweep.yaml:5: search.space.optimizer.lr.low = 0", "begins above zero"]),
    (["search:", "  trials: 5", "  space:", "    optimizer.lr: {low: 1}"], ["sweep.yaml:5:", "both `low` and `high`"]),
    (["search:", "  trials: 5", "  space:", "    optimizer.lr: {low: 1, high: 2, lgo: true}"],
     ["sweep.yaml:5: search.space.optimizer.lr.lgo", "no such key"]),
    (["search:", "  trials: 5", "  space:", "    student.quantization.bits: [4, 99]"],
     ["sweep.yaml:5: student.quantization.bits = 99"]),
    (["search: {trials: 2000, space: {optimizer.lr: {low: 1, high: 2}}}"], ["these are 2,000 runs"]),
])
def test_mistakes_in_a_sweep_file(lines, parts, sweep_file, tmp_path, capsys):
    file = sweep_file(*lines)
    before = {*tmp_path.iterdir()}
    assert cli.limbeck(["sweep", str(file)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("error: ") == 1 and not said.out
    for part in parts:
        assert part in said.err, said.err
    assert {*tmp_path.iterdir()} == before, "a refused sweep leaves nothing behind"


def test_files_that_are_not_there_and_files_that_are_no_sweep(sweep_file, tmp_path, capsys):
    def refused(file):
        assert cli.limbeck(["sweep", str(file)]) == 2
        return capsys.readouterr().err

    assert "nowhere.yaml: there is no such file" in refused("nowhere.yaml")
    assert "this is an experiment, and a sweep is needed" in refused("base.yaml")
    assert "sweep.yaml:1: experiment = 'nowhere.yaml': there is no such file" in refused(
        sweep_file(ONE, experiment="nowhere.yaml"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "base.yaml").write_bytes((tmp_path / "base.yaml").read_bytes())
    (tmp_path / "base.yaml").unlink()
    (tmp_path / "there" / "sweep.yaml").write_bytes(sweep_file(ONE).read_bytes())
    assert "did you mean there/base.yaml? Paths begin at the working folder" in refused("there/sweep.yaml")


def test_folders_that_are_not_the_sweeps(sweep_file, tmp_path, capsys):
    import fcntl

    def refused():
        assert cli.limbeck(["sweep", str(file)]) == 2
        return capsys.readouterr().err

    file = sweep_file(ONE, "folder: there")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_text("a")
    assert "sweep.yaml:3: folder = 'there': the folder exists and is not the folder of a sweep" in refused()
    (tmp_path / "there" / "a.txt").rename(tmp_path / "there" / "sweep.json")
    assert "is not as a run writes it: no JSON" in refused()
    empty = {"name": "x", "experiment": "e", "metric": "seconds", "keys": {}, "searched": False, "total": 0, "runs": []}
    (tmp_path / "there" / "sweep.json").write_text(json.dumps({**empty, "name": "../x"}))
    assert "is not as a run writes it: name" in refused()
    (tmp_path / "there" / "sweep.json").write_text(json.dumps(empty))
    run = tmp_path / "there" / "runs" / "lr-0.01" / "seed-0"
    run.mkdir(parents=True)
    (run / "a.txt").write_text("a")
    assert "seed-0': the folder exists and is not a run folder" in refused()
    (run / "a.txt").unlink()
    with (tmp_path / "there" / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "folder = 'there': another sweep is using this folder now" in refused()
    with (run / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "seed-0': another run is using this folder now" in refused()


def test_a_search_without_optuna(sweep_file, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.limbeck(["sweep", str(sweep_file("search: {trials: 2, space: {optimizer.lr: {low: 1, high: 2}}}"))]) == 2
    said = capsys.readouterr().err
    assert "sweep.yaml:2: search: optuna, which proposes the values, is not installed" in said
    assert "pip install 'limbeck[search]'" in said


def test_settings_are_experiments_with_names_of_their_own(sweep_file):
    source = read_sweep(sweep_file("overrides: {training: {steps: 7}}", "list:", "- {}", "- optimizer: {lr: 1e-5}",
                                   "- {optimizer.lr: 0.2, report.prompt: 'a b'}", "- {optimizer.lr: 0.12345678901}"))
    settings = Settings(source)
    found = settings.named()
    assert settings.keys == ["optimizer.lr", "report.prompt"]
    assert [one.label for one in found][:2] == ["as-it-is", "lr-1e-05"]
    assert found[2].label.startswith("lr-0.2_prompt-a-b-") and found[3].label.startswith("lr-0.123457-")
    for one, rate in zip(found, (3e-3, 1e-5, 0.2, 0.12345678901), strict=True):
        experiment = one.source.experiment
        assert (experiment.optimizer.lr, experiment.training.steps, experiment.training.batch_size) == (rate, 7, 8)


def test_labels_that_are_alike_are_told_apart(sweep_file):
    """Here the end of a key is in a value, where it reads as another key."""
    source = read_sweep(sweep_file("list:", "- {report.prompt: a_steps-7}", "- {report.prompt: a, training.steps: 7}",
                                   "- {report.prompt: b}"))
    first, second, third = (one.label for one in Settings(source).named())
    assert first != second and third == "prompt-b"
    assert first.startswith("prompt-a_steps-7-") and second.startswith("prompt-a_steps-7-")


def test_words_are_read_back_as_they_were():
    import yaml

    from trainer.experiment.plain_yaml import composed, constructed

    for value in (1e-5, 1e22, 0.1, 3, True, None, "1e-5", "null", "a: b #c", "ä\n\"'\\", [1, "x"],
                  {"a": {"b": [None]}}):
        key, _, text = word("some.key", value).partition("=")
        root = composed(text)
        assert constructed(root, (), "", {}) == value or isinstance(root, yaml.ScalarNode) and value is None


def test_short_names_tell_keys_apart():
    assert short_names(["optimizer.lr", "teacher.train.lr", "training.steps", "lr"]) == {
        "optimizer.lr": "optimizer.lr", "teacher.train.lr": "train.lr", "training.steps": "steps", "lr": "lr"}
    assert text_of("a/b") == ("a-b", False) and text_of(1e-05) == ("1e-05", True) and text_of(1.0) == ("1", True)
    assert text_of("..") == ("..", True) and text_of(True) == ("true", True)


def test_every_metric_can_be_read():
    assert set(METRICS) == set(get_args(MetricName))


def test_the_schema_for_editors_knows_the_keys_of_both(sweep_file):
    import jsonschema

    from tests.conftest import ROOT
    from trainer.experiment.plain_yaml import read_values
    from trainer.sweep.sweep_schema import sweep_schema

    validator = jsonschema.Draft202012Validator(sweep_schema())

    def wrong(**keys):
        return list(validator.iter_errors({"experiment": "a.yaml", **keys}))

    assert not list(validator.iter_errors(read_values(ROOT / "configs" / "sweep-learning-rate.yaml")[0]))
    assert not wrong(overrides={"objective": {"cross_entropy": 1}, "teacher.architecture.hidden_size": 3})
    assert not wrong(search={"trials": 1, "space": {"optimizer.lr": {"low": 1, "high": 2}, "training.steps": [1, 2]}})
    assert wrong(grid={"optimizer.lrr": [1]}) and wrong(grid={"optimizer.lr": ["x"]}) and wrong(grid={"seed": [1]})
    assert wrong(overrides={"training.steps": "x"}) and wrong(list=[{"training.stepss": 1}]) and wrong(job=1)
    assert wrong(search={"trials": 1, "space": {"optimizer.lr": {"lo": 1}}})


def test_overrides_after_the_file_are_of_the_sweep_or_of_all_runs(sweep_file):
    file = sweep_file("overrides: {training: {steps: 7, epochs: null}}", "seeds: [0, 1]", "grid:",
                      "  optimizer.lr: [1e-3, 1e-2]")
    source = read_sweep(file, ["jobs=2", "seeds=[5]", "training.steps=3", "grid.optimizer.lr=[0.1, 0.2, 0.3]",
                               "overrides.report.prompt=a", "schedule={warmup: 0.5}"])
    sweep = source.sweep
    assert (sweep.jobs, sweep.seeds, sweep.grid) == (2, (5,), {"optimizer.lr": (0.1, 0.2, 0.3)})
    first, *_ = found = Settings(source).named()
    assert len(found) == 3
    experiment = first.source.experiment
    assert (experiment.training.steps, experiment.report.prompt, experiment.optimizer.lr) == (3, "a", 0.1)
    assert experiment.schedule.warmup == 0.5


@pytest.mark.parametrize("words, parts", [
    (["job=2"], ["override `job=2`: job = 2: no such key", "did you mean `jobs`?"]),
    (["jobs=0"], ["override `jobs=0`: jobs = 0", "must be greater than 0"]),
    (["training.step=5"], ["override `training.step=5`: training.step = 5: no such key", "`training.steps`"]),
    (["optimizer.lr=1e-4"], ["override `optimizer.lr=1e-4`: overrides.optimizer.lr", "varied by this sweep"]),
    (["seed=3"], ["override `seed=3`: overrides.seed = 3", "`seeds` of the sweep"]),
    (["jobs"], ["override `jobs`: an override is written key=value", "jobs=2, or training.steps=200 for all runs"]),
])
def test_mistakes_in_overrides_name_them(sweep_file, capsys, words, parts):
    assert cli.limbeck(["sweep", str(sweep_file(ONE)), "--dry-run", *words]) == 2
    said = capsys.readouterr().err
    for part in parts:
        assert part in said
