"""Whole runs with adapters on a frozen base: what is trained, saved, foretold and exported."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import TINY, on_two_ranks, sentences
from tests.trainer.run.test_sharing import hub  # noqa: F401 - a fixture
from trainer import checkpoints, cli
from trainer.data.tokenizers import train_tokenizer
from trainer.early_checks import check_early
from trainer.errors import RunFailed, UserError
from trainer.experiment.data_nodes import Data, Tokenizer
from trainer.experiment.load import read_experiment
from trainer.run.metrics import read_lines


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a small model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {key: value for key, value in TINY.items() if key != "model_type"}
    config = AutoConfig.for_model(TINY["model_type"], **{**shape, "num_hidden_layers": 2}, vocab_size=300)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer([(Data(tokenizer=Tokenizer(train_vocabulary=300)), [{"text": sentences(1, 50)}] * 5)], folder)
    return folder


def adapted(path, rank=4, student=(), **adapter):
    return {"data": {"tokenizer": {"train_vocabulary": None}}, "report": {"control": False},
            "student": {"architecture": None, "path": str(path), "adapter": {"rank": rank, **adapter}, **dict(student)},
            "training": {"micro_batch": 4, "checkpoint_every": 2}}


def losses(file):
    return [line["loss"] for line in read_lines(file) if "loss" in line]


def peaks(folder):
    measured = next(line["memory"]["peak"] for line in read_lines(folder / "metrics.jsonl") if "memory" in line)
    return measured, json.loads((folder / "plan.json").read_text())["memory"]["peak"]


def test_an_adapter_alone_on_a_4_bit_base(run_experiment, base, hub, capsys):  # noqa: F811
    experiment, folder = run_experiment("run", **adapted(base, base="nf4", kind="dora"),
                                        export={"adapter": "separate"})
    receipt, plan = (json.loads(file.read_text()) for file in (folder.receipt, folder.plan))
    assert receipt["holds"] and receipt["largest_difference"] <= 1e-6 and {"peft", "bitsandbytes"} <= {
        *receipt["versions"]} and receipt["notes"] == [f"the adapter alone, for {base} held in nf4"]
    measured, planned = peaks(folder.path)
    assert abs(measured / planned - 1) < 0.03, (measured, planned)
    newest = checkpoints.latest(folder.checkpoints)
    assert all("lora_" in name for name in checkpoints.names(newest))
    assert 4 * plan["parameters"]["adapter"] == plan["ledger"]["gradients"]
    written = json.loads((folder.student / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base) and written["use_dora"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder.student)  # as anybody would
    count = sum(one.numel() for name, one in model.named_parameters() if "lora_" in name)
    assert count == plan["parameters"]["adapter"]
    text, beneath = (folder.student / "README.md").read_text(), AutoModelForCausalLM.from_pretrained(base)
    assert f"An adapter of {count:,} parameters in " in text and ModelCard(text).data.library_name == "peft"
    assert f"| parameters of its base | {beneath.num_parameters():,} |" in text
    size = (folder.student / "adapter_model.safetensors").stat().st_size
    assert f"| bytes of the adapter on disk | {size:,} |" in text
    assert f"| bytes of its base on disk | {(base / 'model.safetensors').stat().st_size:,} |" in text
    assert "its bytes are those of the adapter alone" in folder.report.read_text()
    # Nobody else has its base, a folder here: it goes to the hub with the name of the same weights there, or not.
    push = ["push", str(folder.path), "--to", "me/mine"]
    assert cli.limbeck(push) == 2 and f"limbeck {' '.join(push)} --base OWNER/NAME" in capsys.readouterr().err
    assert cli.limbeck([*push, "--base", "../base"]) == 2 and "no name of a repository" in capsys.readouterr().err
    assert cli.limbeck([*push, "--base", "some/typo"]) == 2 and "the hub has no such model" in capsys.readouterr().err
    assert not hub.repositories
    hub.repositories["some/base"] = (False, {})
    assert cli.limbeck([*push, "--base", "some/base"]) == 0
    files = {name: content for name, content in hub.repositories["me/mine"][1].items() if name != "commits"}
    assert json.loads(files["adapter_config.json"]) == {**written, "base_model_name_or_path": "some/base"}
    assert json.loads(files["receipt.json"]) == {**receipt, "notes": ["the adapter alone, for some/base held in nf4"]}
    card = files["README.md"].decode()
    assert ModelCard(card).data.base_model == "some/base" and "begun as `some/base`" in card
    assert not any(str(base.parent).encode() in content for content in files.values()), "paths of this machine"


def test_a_merge_into_few_bits_says_what_it_loses_and_a_teacher_that_is_the_base_takes_no_memory(run_experiment, base):
    few = {"quantization": {"method": "rtn", "group_size": 16}}
    _, folder = run_experiment("run", **adapted(base, student=few.items()), teacher={"path": str(base)},
                               objective={"cross_entropy": 1.0, "divergence": {"weight": 1.0}})
    receipt, plan = (json.loads(file.read_text()) for file in (folder.receipt, folder.plan))
    assert receipt["holds"] and "nats per token (KL) from the adapted model in training" in receipt["notes"][0]
    assert receipt["difference_from_training"] > 100 * receipt["largest_difference"]
    assert plan["ledger"]["teacher"] == plan["memory"]["parts"].get("teacher", 0) == 0
    measured, planned = peaks(folder.path)
    assert measured <= planned < 1.05 * measured


def test_going_on_is_bitwise_and_only_on_the_same_base(train_here, base, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(base, own)
    asked = adapted(own, base="bfloat16", dropout=0.1)
    once = train_here("once", **asked).unwrapped.state_dict()
    train_here("twice", until=3, **asked)
    twice = train_here("twice", **asked).unwrapped.state_dict()
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())
    train_here("other", until=3, **asked)
    changed = AutoModelForCausalLM.from_pretrained(own)
    changed.model.norm.weight.data += 1
    changed.save_pretrained(own)
    with pytest.raises(RunFailed, match="the base beneath its adapters had other weights"):
        train_here("other", **asked)


def test_a_budget_recomputes_blocks_of_packed_weights(train_here, base):
    free = train_here("free", **adapted(base, base="int8"))
    tight = train_here("tight", **adapted(base, base="int8"), memory={"budget": int(free.plan.memory.peak * 0.8)})
    assert tight.plan.memory.recomputed > 0 and not tight.plan.memory.unplanned
    assert peaks(tight.folder.path)[0] <= tight.plan.memory.budget
    torch.testing.assert_close(losses(tight.folder.metrics), losses(free.folder.metrics), rtol=1e-6, atol=0)


@pytest.mark.parametrize("engine, held", [("fsdp2", "bfloat16"), ("zero", "float32")])
def test_two_ranks_that_share_base_and_adapters_are_as_one(write_experiment, train_here, base, tmp_path, engine, held):
    asked = adapted(base, base=held)
    one = train_here("one", **asked)
    done = on_two_ranks("--config", str(write_experiment("two", **asked)), f"sharding.engine={engine}")
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(losses(tmp_path / "two" / "metrics.jsonl"), losses(one.folder.metrics), rtol=1e-6,
                               atol=0)
    assert json.loads((tmp_path / "two" / "student" / "receipt.json").read_text())["holds"]
    measured, planned = peaks(tmp_path / "two")
    assert measured / 1.005 < planned < 1.03 * measured, (measured, planned)


@pytest.mark.parametrize("changes, key, said", [
    ({"student.adapter.targets": ["q_prj"]}, "student.adapter.targets", "near to it: q_proj"),
    ({"student.adapter.targets": ["lm_head"]}, "student.adapter.targets", "is the output head"),
    ({"student.quantization": {"method": "qat"}}, "student.quantization.method", "changes weights that the adapter"),
    ({"export.adapter": "separate", "student.quantization": {"method": "rtn"}}, "student.quantization",
     "an adapter alone is not quantized"),
    ({"export.adapter": "separate", "export.to": ["gguf"]}, "export.to", "other runtimes read no adapters"),
    ({"export.adapter": "separate", "student.adapter": None}, "export.adapter", "the student has no adapter"),
    ({"student.path": None, "student.architecture": TINY}, "student.adapter", "random weights"),
    ({"sharding.engine": "zero", "student.adapter.base": "int8"}, "student.adapter.base", "casts numbers of one kind"),
    ({"sharding.engine": "fsdp2", "student.adapter.base": "nf4"}, "student.adapter.base", "casts numbers of one kind"),
])
def test_what_cannot_be_is_said_at_once(write_experiment, base, changes, key, said):
    overrides = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    with pytest.raises(ValueError, match=said) as caught:
        check_early(read_experiment(write_experiment(**adapted(base)), overrides).experiment)
    errors = getattr(caught.value, "errors", [caught.value])
    assert key in errors[0].key and isinstance(errors[0], UserError) and errors[0].way_out
