"""Mixtures of experts and GPT-2 in whole runs: quantized, balanced, shared out, exported, or refused early."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from strategies.quantization.qat import quantized_layers
from tests.conftest import train_py
from tests.trainer.distributed.test_sharding import ENGINES, LOSS, alone, on_ranks, relative
from tests.trainer.test_bad_input import refused

MIXTRAL = {"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4,
           "output_router_logits": True, "router_aux_loss_coef": 0.3}
GRANITE = {**{name: value for name, value in MIXTRAL.items() if name != "output_router_logits"},
           "model_type": "granitemoe"}


def test_every_engine_trains_experts_and_balances_them_as_one_process(write_experiment, train_here, tmp_path):
    settings = {"student": {"architecture": MIXTRAL,
                            "quantization": {"bits": 4, "group_size": 16, "scales": "learned"}},
                "training": {"steps": 2, "micro_batch": 2, "evaluate_every": 2, "checkpoint_every": 2}}
    trainer = train_here("alone", **settings)
    one, layers = alone(trainer), dict(quantized_layers(trainer.unwrapped))
    assert sum("experts" in name for name in layers) == 4
    runs = [{"name": name, "file": str(write_experiment(name, **settings)), "overrides": ENGINES[name]}
            for name in ("ddp", "fsdp2", "zero3")]
    for name, found in on_ranks(runs, tmp_path / "ranks").items():
        assert relative(one["loss"], found["loss"]) < 10 * LOSS, name
        assert one["weights"].keys() == found["weights"].keys(), name


@pytest.mark.parametrize(("name", "architecture"), [("mixtral", MIXTRAL), ("gpt2", {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64})])
def test_a_run_ends_with_a_receipt_of_packed_weights(write_experiment, tmp_path, name, architecture):
    file = write_experiment(name, student={"architecture": architecture, "quantization": {"bits": 4, "group_size": 16}},
                            report={"control": False})
    values = yaml.safe_load(file.read_text())
    values["student"]["architecture"] = architecture  # and none of what tests' own has
    file.write_text(yaml.safe_dump(values))
    done = train_py("--config", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of the file, stay in full precision: embeddings" in done.stdout.replace("\n", " ")
    student = tmp_path / name / "student"
    receipt = json.loads((student / "receipt.json").read_text())
    assert receipt["holds"] and receipt["largest_difference"] == 0.0
    packed = {tensor for tensor in load_file(student / "model.safetensors") if tensor.endswith("weight_packed")}
    wanted = "block_sparse_moe.experts.3.w2.weight_packed" if name == "mixtral" else "h.1.mlp.c_proj.weight_packed"
    assert any(tensor.endswith(wanted) for tensor in packed)
    plain = AutoModelForCausalLM.from_pretrained(student)
    assert all(parameter.dtype is torch.float32 for parameter in plain.parameters() if parameter.is_floating_point())


def test_what_would_stay_in_full_precision_is_refused_and_its_way_out_works(write_experiment, tmp_path):
    asked = {"architecture": GRANITE, "quantization": {"bits": 4, "group_size": 16}}
    done = refused(write_experiment(student=asked), tmp_path, parts=[
        "student.quantization.ignore = ['lm_head']", "% of the student's weights", "would stay in full precision",
        "one tensor of all experts", "if that is wanted, name them"])
    names = done.stderr[done.stderr.index("name them, ignore: ") + len("name them, ignore: "):]
    patterns, _ = json.JSONDecoder().raw_decode(names)
    asked["quantization"]["ignore"] = patterns
    plan = train_py("--config", str(write_experiment(student=asked)), "--dry-run")
    assert plan.returncode == 0, plan.stderr[-2000:]
    assert "named in `ignore`" in plan.stdout and "no balancing loss is added for the routers" in plan.stdout
