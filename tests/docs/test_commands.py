"""What the pages tell a reader to write and to type: experiments are read, commands are run or dry-run, Python runs.

A command that cannot run here is marked in its page with `<!-- not run here: why -->`; its files and its syntax are
checked all the same.
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, PreTrainedTokenizerFast

from docs.generate import pages
from tests.conftest import ROOT, merge
from tests.trainer.teacher.test_distilling import bpe
from trainer.data.tokenizers import END

PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in pages()
         if "_build" not in page.parts and page.name != "log.md"}
BASE = {"teacher": {"path": "some/teacher"}, "student": {"path": "some/student"}, "data": {"path": "some/data"},
        "training": {"steps": 10}}
TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": True}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def blocks(text, language):
    """Blocks of code of a page, each with whether it is marked as not run here."""
    found = re.findall(rf"(<!-- not run here: [^\n]+ -->\n)?^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(bool(marked), block) for marked, block in found]


YAMLS = [(page, block) for page, text in PAGES.items() for _, block in blocks(text, "yaml")]
COMMANDS = [(page, marked, command) for page, text in PAGES.items() for marked, block in blocks(text, "sh")
            for command in block.replace("\\\n", " ").strip().split("\n")]


SWEEPS = [(page, block) for page, block in YAMLS if yaml.safe_load(block).keys() & {"grid", "list", "search"}]
YAMLS_OF_EXPERIMENTS = [one for one in YAMLS if one not in SWEEPS]


def whole(block):
    """An experiment that a block is, or that it becomes with what it leaves out."""
    values = yaml.safe_load(block)
    if {"student", "training"} <= set(values):
        return values
    base = dict(BASE)
    if "from_student" in values.get("teacher", {}):
        del base["teacher"]
    if "from_teacher" in values.get("student", {}) or "architecture" in values.get("student", {}):
        del base["student"]
    values = merge(base, values)
    if "steps" in values["training"] and "epochs" in values["training"]:
        del values["training"]["steps"]
    return values


@pytest.fixture(autouse=True)
def with_packages(monkeypatch):
    """A reader has the packages of a section, which need not be installed here: students are checked from shapes."""
    for module in ("executorch.executorch_folder", "hf.ctranslate2_folder"):
        monkeypatch.setattr(f"strategies.export.{module}.is_installed", lambda _: True)


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory):
    """A folder as a reader has it who has distilled a student and saved the pages' experiments and sweeps."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "launch", "docs", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    for _, block in YAMLS:
        if named := re.match(r"# (\S+\.yaml)\n", block):
            (folder / named[1]).write_text(block)
    student = folder / "runs" / "my-distill" / "student"
    student.mkdir(parents=True)
    (student / "config.json").write_text(json.dumps({**TINY, "architectures": ["LlamaForCausalLM"]}))
    (student.parent / "experiment.yaml").write_text((folder / "my-distill.yaml").read_text())
    (student.parent / "checkpoints" / "step-00000100").mkdir(parents=True)
    PreTrainedTokenizerFast(tokenizer_object=bpe(300), eos_token=END, pad_token=END).save_pretrained(student)
    (folder / "my-chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n")
    return folder


@pytest.mark.parametrize(("page", "block"), YAMLS_OF_EXPERIMENTS,
                         ids=[f"{page}-{number}" for number, (page, _) in enumerate(YAMLS_OF_EXPERIMENTS)])
def test_every_yaml_is_an_experiment(page, block, tmp_path):
    from trainer.experiment.load import read_experiment

    file = tmp_path / "block.yaml"
    file.write_text(yaml.safe_dump(whole(block), sort_keys=False))
    experiment = read_experiment(file).experiment
    if experiment.export.to:  # what it is exported for can hold it, here of a small Llama
        from trainer.models.build import export_skeleton
        from trainer.student.export_student import check_runtimes

        with torch.device("meta"):
            form = experiment.form
            here = experiment.export.model_copy(update={"readers": ()})  # their packages need not be installed
            check_runtimes(here, form, export_skeleton(form, LlamaConfig(**TINY)))


@pytest.mark.parametrize(("page", "block"), SWEEPS, ids=[f"{page}-{number}" for number, (page, _) in enumerate(SWEEPS)])
def test_every_sweep_is_one_of_experiments(page, block, reader_folder, tmp_path, monkeypatch):
    from trainer.sweep.sweep_file import read_sweep
    from trainer.sweep.sweep_plan import SweepPlan

    monkeypatch.chdir(reader_folder)
    (tmp_path / "block.yaml").write_text(block)
    assert SweepPlan(read_sweep(tmp_path / "block.yaml")).record.total > 1


def test_saved_experiments_have_names_of_their_own():
    names = [named[1] for _, block in YAMLS if (named := re.match(r"# (\S+\.yaml)\n", block))]
    assert len(names) == len(set(names)) and "my-run.yaml" in names


@pytest.mark.parametrize(("page", "marked", "command"), COMMANDS,
                         ids=[f"{page}-{command[:60]}" for page, _, command in COMMANDS])
def test_every_command(page, marked, command, reader_folder, monkeypatch):
    monkeypatch.chdir(reader_folder)
    words = shlex.split(command, comments=True)
    for kind, check in KINDS.items():
        if re.match(kind, " ".join(words)):
            return check(words, reader_folder)
    raise AssertionError(f"{page}: nothing here knows how to check `{command}`")


def experiment_of(words):
    """Read the experiment of a command, with its overrides."""
    from trainer.experiment.load import read_experiment

    after = words[words.index("--config") + 1:]
    assert {word for word in after[1:] if "=" not in word} <= {"--dry-run", "--json"}, words
    return read_experiment(after[0], [word for word in after[1:] if "=" in word])


def dry_run(words, folder):
    """Dry-run a launched or plain `train.py`; where shapes are known only to a hub, or planning is long, read it."""
    launcher = words[words.index("--config_file") + 1] if "--config_file" in words else None
    assert launcher is None or (ROOT / launcher).exists()
    rest = words[words.index("train.py"):] if "train.py" in words else words
    source = experiment_of(rest)
    experiment = source.experiment
    from_hub = any(model is not None and model.path and not model.architecture and not (folder / model.path).exists()
                   for model in (experiment.teacher, experiment.student))
    if from_hub or experiment.memory.bytes is not None or experiment.name in DRY_RUN_ELSEWHERE:
        return
    from trainer import cli

    DRY_RUN_ELSEWHERE.add(experiment.name)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        overrides = [word for word in rest if "=" in word]
        code = cli.train(["--config", source.file, *overrides, "--dry-run", "--json"])
    shown = json.loads(said.getvalue())
    assert code == 0 and all(one["plan"]["parameters"]["student"] for one in shown.get("stages", [shown]))


# Dry-run already, here or in tests/trainer/planning: the quickstart with budgets, models of several billion weights.
DRY_RUN_ELSEWHERE = {"llama-70b-to-8b", "qwen2.5-1.5b-to-0.5b"}


def make(words, folder):
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pip(words, folder):
    extras = {extra for word in words for found in re.findall(r"\[(.*?)\]", word) for extra in found.split(",")}
    assert extras <= set(PYPROJECT["project"]["optional-dependencies"])


def benchmark(words, folder):
    """The module is there, and knows each option that is given."""
    spec = importlib.util.find_spec(words[2])
    places = spec.submodule_search_locations
    text = (Path(spec.origin) if places is None else Path(places[0]) / "__main__.py").read_text()
    for other in re.findall(r"made = (\w+)\.parser\(\)", text):  # a command line that goes on from another's
        text += next((ROOT / "benchmarks").rglob(f"{other}.py")).read_text()
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in text, f"{words[2]} has no option {option}"


def script(words, folder):
    """A launch script: its syntax, the files it names, and the experiment it is given."""
    file = ROOT / next(word for word in words if word.startswith("launch/"))
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    for named in re.findall(r"\$(?:root|here)/([\w/.]+)", file.read_text()):
        assert named.startswith(".venv") or (ROOT / named).exists() or named == "limbeck.py", named
    experiment_of(words)


def verb(words, folder):
    """A verb of `limbeck`: a known one with known options; an experiment is read."""
    known = {"schema": {}, "show-data": {"--config"}, "status": {"--config"}, "report": {}, "init": {},
             "watch": {"--config", "--every", "--once"}, "export": {"--to", "--reader", "--trust-remote-code"},
             "push": {"--to", "--private", "--runtime", "--base"}, "sweep": {"--dry-run"},
             "evaluate": {"--tasks", "--limit", "--teacher", "--output", "--tokens", "--trust-remote-code"},
             "generate": {"--prompts", "--to", "--limit", "--first-tokens", "--new-tokens", "--temperature", "--dtype",
                          "--batch-size"},
             "scale": {"--config", "--ranks", "--engines", "--network", "--gbits", "--json"}}
    assert words[1] in known and {word for word in words if word.startswith("--")} <= set(known[words[1]])
    if words[1] == "scale":
        from trainer.command_line import limbeck_parser

        read = limbeck_parser().parse_args(words[1:])
        experiment_of(["--config", read.config, *read.overrides])
    elif "--config" in words:
        experiment_of(words)
    if words[1] == "generate":
        from trainer.command_line import limbeck_parser

        assert limbeck_parser().parse_args(words[1:]).to
    if words[1] == "sweep":
        from trainer.sweep.sweep_file import read_sweep
        from trainer.sweep.sweep_plan import SweepPlan

        overrides = [word for word in words[3:] if "=" in word]
        assert SweepPlan(read_sweep(words[2], overrides)).record.total > 1
    for option in {"export": ["--to"], "push": ["--runtime"]}.get(words[1], ()):
        from trainer.student.export_student import RUNTIMES

        assert option not in words or words[words.index(option) + 1] in RUNTIMES
    reference = PAGES["docs/reference/command-line.md"]
    assert f"## limbeck {words[1]}\n" in reference


def generate(words, folder):
    """`limbeck generate` in several processes."""
    verb(["limbeck", *words[words.index("generate"):]], folder)


KINDS = {
    r"make ": make,
    r"pip install ": pip,
    r"accelerate launch .*-m limbeck generate ": generate,
    r"(accelerate launch|python train\.py) ": dry_run,
    r"(launch/\S+\.sh|sbatch launch/) ?": script,
    r"python -m benchmarks\.": benchmark,
    r"limbeck ": verb,
}


def test_only_what_needs_other_machines_is_marked():
    marked = [command for _, marked, command in COMMANDS if marked]
    assert len(marked) == 3 and all(re.search(r"sbatch|one_node|many_nodes", command) for command in marked)


LOADS = "AutoTokenizer.from_pretrained("  # what a reader has only after a run


def python_of(page):
    """The Python of a page as one script, without what needs a finished run."""
    found = [block for _, block in blocks(PAGES[page], "python")]
    return "\n".join(block for block in found if LOADS not in block)


@pytest.mark.parametrize("page", [page for page in PAGES if LOADS in PAGES[page] or blocks(PAGES[page], "python")])
def test_every_python_block_is_python(page):
    for _, block in blocks(PAGES[page], "python"):
        compile(block, page, "exec")
        import limbeck

        for name in re.findall(r"limbeck\.(\w+)", block):
            assert hasattr(limbeck, name), f"{page}: limbeck.{name}"


def test_the_python_of_the_readme_runs():
    before = ("import torch\nmodel = torch.nn.Sequential(torch.nn.Linear(32, 8))\n"
              "student_logits, teacher_logits = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)\n"
              "targets = torch.randint(0, 8, (2, 3))\n")
    runs(before + python_of("README.md") + "loss.backward()\nassert terms['forward_kl'] > 0\n")


def test_the_own_loop_of_its_page_runs():
    after = "\nassert plan.peak <= 24 * 2**20 and len(names) == 14 and float(total) > 0\n"
    said = runs(python_of("docs/how-to/own-loop.md") + after)
    assert "forward_kl" in said and "layers are trained with 4-bit weights" in said


def runs(script):
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
