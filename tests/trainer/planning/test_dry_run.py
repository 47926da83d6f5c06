"""`--dry-run`: what would run, from shapes alone; and every shipped experiment."""

import json

import pytest

from tests.conftest import ROOT, TINY, launch, train_py
from trainer.experiment.load import read_experiment

CONFIGS = sorted(file for file in (ROOT / "configs").glob("*.yaml") if not file.name.startswith("sweep-"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_experiment_dry_runs_without_network_and_leaves_nothing(file, tmp_path):
    done = train_py("--config", str(file), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("effective batch", "learning rate", "student parameters", "Memory at the peak",
                 "optimizer state", "activations", "peak"):
        assert part in done.stdout
    assert f"{file}:" in done.stdout and "default" in done.stdout, "every value says where it was written"
    assert not list(tmp_path.iterdir())


def test_the_launch_on_two_ranks_of_the_documents_is_possible():
    page = (ROOT / "docs" / "how-to" / "many-nodes.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("launch/two_cpu"))
    script, *arguments = line.split()
    assert script == "launch/two_cpu_ranks.sh"
    done = launch(*arguments, "--dry-run", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 per micro-batch x 1 accumulated x 2 processes" in done.stdout


def test_the_pages_show_the_parts_of_the_quickstart_that_no_search_changes():
    """The others follow from the number of threads, shares of recomputation from timing."""
    done = train_py("--config", "configs/quickstart.yaml", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    memory = json.loads(done.stdout)["plan"]["memory"]
    page, readme = (ROOT / "docs" / "how-to" / "fit-a-budget.md").read_text(), (ROOT / "README.md").read_text()
    for name in ("optimizer state", "teacher", "weights", "batch"):
        line = f"    {name:<28} {memory['parts'][name]:>16,} bytes  "
        assert line in page and (line in readme or name in ("weights", "batch"))
    assert f"which needs {memory['keep_all'] / 2**20:.0f} MiB if everything is kept" in page


def test_dry_run_sees_that_a_local_file_is_missing():
    done = train_py("--config", "configs/quickstart.yaml", "--dry-run", "data.path=nope.jsonl")
    assert done.returncode == 2 and "data.path = 'nope.jsonl': there is no such file or folder" in done.stderr


def test_dry_run_sees_that_no_tokenizer_is_there_as_the_run_does(write_experiment):
    file = str(write_experiment(data={"tokenizer": {"train_vocabulary": None}}))
    for more in (["--dry-run"], []):
        done = train_py("--config", file, *more)
        assert done.returncode == 2 and "data.tokenizer: no model brings a tokenizer" in done.stderr, done.stderr
    done = train_py("--config", file, "--dry-run", "data.tokenizer.train_vocabulary=2048")
    assert done.returncode == 0, "the way out works"


def test_plan_is_exact(write_experiment):
    file = write_experiment(training={"steps": 10, "batch_size": 12, "micro_batch": 3},
                            student={"quantization": {"bits": 4, "group_size": 16}},
                            teacher={"architecture": TINY, "train": {"steps": 1}})
    done = train_py("--config", str(file), "--dry-run", "--json", "optimizer.lr=0.5")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    plan = said["plan"]
    assert said["origins"]["optimizer.lr"] == "override `optimizer.lr=0.5`"
    assert (plan["accumulation"], plan["tokens_per_step"], plan["steps"]) == (4, 12 * 32, 10)
    assert len(plan["learning_rates"]) == 10 and max(rate for _, rate in plan["learning_rates"]) <= 0.5
    hidden, inner, vocabulary = 32, 64, 300
    linear = hidden * hidden * 2 + hidden * (hidden // 2) * 2 + 3 * hidden * inner
    parameters = vocabulary * hidden + 3 * (linear + 2 * hidden) + hidden
    assert plan["parameters"] == {"student": parameters, "teacher": parameters}
    assert plan["student_bytes"] == 4 * (parameters - 3 * linear) + 3 * (linear // 2 + 4 * linear // 16 + 7 * 16)
    assert plan["ledger"]["weights"] == plan["ledger"]["gradients"] == plan["ledger"]["teacher"] == 4 * parameters
    tensors = 3 * 9 + 2
    assert plan["ledger"]["optimizer_state"] == 8 * parameters + 4 * tensors, "two moments, and the step of each tensor"
    assert plan["ledger"]["total"] == sum(v for k, v in plan["ledger"].items() if k != "total")


def test_published_sizes_of_hub_models():
    """The dimensions beside the hub ids are those of the models: their published parameter counts follow from them."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.models.build import count_parameters
    from trainer.models.configs import student_config, teacher_config

    published = {"Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304, "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
                 "Qwen/Qwen2.5-0.5B": 494_032_768, "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
                 "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248}
    seen = set()
    for file in CONFIGS:
        experiment = read_experiment(file).experiment
        if not experiment.data.is_language:
            continue
        teacher = teacher_config(experiment.teacher, 2048, offline=True)
        student = student_config(experiment.student, teacher, 2048, offline=True)
        for model, config in ((experiment.teacher, teacher), (experiment.student, student)):
            if model is not None and model.path in published:
                with torch.device("meta"):
                    assert count_parameters(AutoModelForCausalLM.from_config(config)) == published[model.path]
                seen.add(model.path)
    assert seen == set(published)
