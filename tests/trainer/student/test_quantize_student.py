"""Training with quantized weights, in whole runs of tiny models: what is trained, saved, gone on from, shared out."""

import pytest
import torch

from strategies.quantization.qat import quantized_layers
from tests.trainer.distributed.test_sharding import ENGINES, LOSS, alone, on_ranks, relative
from tests.trainer.teacher.test_distilling import losses
from tests.trainer.test_bad_input import refused

LEARNED = {"student": {"quantization": {"bits": 3, "group_size": 16, "scales": "learned", "embeddings": True,
                                       "ignore": ["*.k_proj"]}}}
FALLING = [[0, 8], [0.5, 4], [0.75, 2]]
SCHEDULE = {"student": {"quantization": {"bits": 2, "scales": "learned", "bits_schedule": FALLING}},
            "training": {"steps": 8, "evaluate_every": 4, "checkpoint_every": 4}}


def layers(trainer) -> dict:
    return dict(quantized_layers(trainer.unwrapped))


@pytest.mark.parametrize("asked", [
    {"bits": 2, "symmetric": False, "group_size": 16, "scales": "mse"}, {"kind": "binary", "per_tensor": True},
    {"kind": "fp8", "activations": {"kind": "fp8"}}])
def test_every_kind_learns(train_here, asked):
    trainer = train_here("kind", student={"quantization": asked}, training={"steps": 12})
    found = losses(trainer)
    assert found[-1] < 0.97 * found[0]
    assert {layer.quantizer.kind for layer in layers(trainer).values()} == {asked.get("kind", "int")}


def test_learned_scales_are_trained_and_saved(train_here):
    trainer = train_here("learned", **LEARNED)
    found = layers(trainer)
    assert {"model.embed_tokens", "lm_head"} <= set(found)
    assert {layer.quantizer.bits for layer in found.values()} == {3} and not any("k_proj" in name for name in found)
    whole = trainer.whole()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, dict(trainer.unwrapped.named_parameters())[name]), name
    start = found["model.layers.0.mlp.up_proj"].quantizer.first_ratio(found["model.layers.0.mlp.up_proj"].weight)
    kept = found["model.layers.0.mlp.up_proj"]._ratio()
    assert (kept - start).abs().max() > 1e-4
    decays = {name: group["weight_decay"] for group in trainer.engine.optimizer.param_groups for name in group["names"]}
    assert all(not decay for name, decay in decays.items() if name.endswith("log_ratio"))


def test_every_engine_trains_learned_scales_as_one_process(write_experiment, train_here, tmp_path):
    settings = {**LEARNED, "data": {"packing": False}, "training": {"steps": 6, "micro_batch": 2}}
    rounded = ("student.quantization.embeddings=false", "student.quantization.activations={}")
    one = alone(train_here("alone", overrides=rounded, **settings))
    runs = [{"name": name, "file": str(write_experiment(name, **settings)), "overrides": [*ENGINES[name], *rounded]}
            for name in ("ddp", "fsdp2", "zero3")]
    for name, found in on_ranks(runs, tmp_path / "ranks").items():
        # Weights are not compared: one that is rounded the other way moves its neighbors by a step of Adam.
        assert relative(one["loss"], found["loss"]) < 10 * LOSS, name
        assert relative(one["gradient_norm"], found["gradient_norm"]) < 100 * LOSS, name


def test_bits_fall_by_their_schedule_and_a_run_goes_on_in_the_middle_of_it(train_here):
    whole = train_here("whole", **SCHEDULE)
    assert {layer.quantizer.bits for layer in layers(whole).values()} == {2}
    first = train_here("parts", until=5, **SCHEDULE)
    assert {layer.quantizer.bits for layer in layers(first).values()} == {4}
    second = train_here("parts", **SCHEDULE)
    assert losses(second) == losses(whole)
    for (name, one), (_, other) in zip(whole.unwrapped.named_parameters(), second.unwrapped.named_parameters(),
                                       strict=True):
        assert torch.equal(one, other), name


def test_a_plan_of_memory_changes_no_loss(train_here):
    free = train_here("free", **SCHEDULE)
    peak = free.plan.memory and free.plan.memory.peak
    tight = train_here("tight", **{**SCHEDULE, "memory": {"budget": 1_400_000 if peak is None else int(0.9 * peak)}})
    assert losses(tight) == pytest.approx(losses(free), rel=1e-5)


@pytest.mark.parametrize(("asked", "parts"), [
    ({"bits": 4, "group_size": 12}, ["student.quantization.group_size = 12", "do not divide its 32 inputs"]),
    ({"bits": 4, "layers": [{"match": "*.ups", "bits": 8}]}, ["student.quantization", "'*.ups'", "matches no layer"]),
    ({"symmetric": False, "activations": {}}, ["student.quantization", "zero points", "activations"]),
    ({"method": "rtn", "budget": 30_000}, ["student.quantization.budget = 30000", "2 bits in every layer", "bytes on"]),
])
def test_what_cannot_be_quantized_is_said_before_anything_starts(write_experiment, tmp_path, asked, parts):
    refused(write_experiment(student={"quantization": asked}), tmp_path, parts=parts)
