"""bf16 and fp16 under every engine: fp32 weights are updated, and every rank takes the same decision."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import TINY, sentences
from tests.trainer.checkpoints.test_sharded_checkpoints import losses, same_tensors, tensors_of
from tests.trainer.distributed.test_sharding import ENGINES, on_ranks, relative, weights_apart
from tests.trainer.test_bad_input import saved_model

UNTIED = {**TINY, "tie_word_embeddings": False}
SETTINGS = {"student": {"architecture": UNTIED},
            "training": {"steps": 10, "micro_batch": 2, "evaluate_every": 100, "checkpoint_every": 100}}
HALF = {"bf16": 2e-2, "fp16": 4e-3}  # how far losses may be from those in fp32


def same_on_both(found: dict) -> list[dict]:
    """What the ranks decided in each step, which has to be the same."""
    first, second = found["decisions"]
    assert first == second
    return first


@pytest.mark.timeout(600)
def test_half_precision_follows_fp32(write_experiment, train_here, tmp_path):
    """Losses near fp32's, in every engine; fp16 begins with a scale far too high: it backs off, skips, and grows."""
    plain = losses(train_here("alone", **SETTINGS).folder.path)
    runs = [{"name": f"{engine}-{dtype}", "file": str(write_experiment(f"{engine}-{dtype}", **SETTINGS)),
             "fp16": dtype == "fp16", "overrides": [*how, f"precision.dtype={dtype}"]}
            for engine, how in ENGINES.items() for dtype in HALF]
    scaled = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 12}}
    runs += [{"name": f"{engine}-scaled", "file": str(write_experiment(f"{engine}-scaled", **scaled)), "fp16": True,
              "overrides": [*how, "precision.dtype=fp16", "precision.loss_scale.initial=4194304",
                            "precision.loss_scale.growth_interval=2"]} for engine, how in ENGINES.items()]
    found = on_ranks(runs, tmp_path / "ranks")
    for engine in ENGINES:
        for dtype, tolerance in HALF.items():
            name = f"{engine}-{dtype}"
            assert relative(plain, found[name]["loss"]) < tolerance, name
            assert plain != found[name]["loss"], "something else than fp32 was computed"
            assert found[name]["dtypes"] == ["torch.float32"], "the weights that are updated are fp32"
            assert {tensor.dtype for tensor in found[name]["weights"].values()} == {torch.float32}
            rounded = {key: tensor.bfloat16().float() for key, tensor in found[name]["weights"].items()}
            assert weights_apart(found[name]["weights"], rounded) > 1e-4, "and not fp32 that bf16 was put into"
            assert all(step["skipped"] == 0 for step in same_on_both(found[name])), name
        steps = same_on_both(found[f"{engine}-scaled"])
        scales, skipped = [step["scale"] for step in steps], [step["skipped"] for step in steps]
        assert skipped[2] == 3 and scales[2] == 2.0**19, engine
        assert 3 <= skipped[-1] < 9, engine
        assert any(after > before for before, after in zip(scales, scales[1:], strict=False)), "it never grew"
        assert all(step["nonfinite"] == 0 for step in steps), "an overflow of the scale is no failure"
        curve = found[f"{engine}-scaled"]["loss"]
        assert curve[-1] < curve[0] - 0.05, engine


@pytest.mark.timeout(600)
def test_updates_smaller_than_half_precision_resolves(write_experiment, tmp_path):
    """With so small a learning rate hardly a bf16 weight would ever move; the fp32 ones do."""
    changes = {**SETTINGS, "optimizer": {"lr": 1e-7, "weight_decay": 0}, "schedule": {"shape": "constant", "warmup": 0},
               "training": {**SETTINGS["training"], "steps": 6, "checkpoint_every": 1, "keep_checkpoints": 6}}
    on_ranks([{"name": engine, "file": str(write_experiment(engine, **changes)),
               "overrides": [*how, "precision.dtype=bf16"]} for engine, how in ENGINES.items()], tmp_path / "ranks")
    for engine in ENGINES:
        before, after = (torch.cat(list(tensors_of(tmp_path / engine / "checkpoints" / step)["model"].values()))
                         for step in ("step-00000001", "step-00000006"))
        moved, would_have = (before != after), (before.bfloat16() != after.bfloat16())
        assert moved.float().mean() > 0.7, f"{engine}; tokens that are not in the text have no gradient"
        assert would_have.float().mean() < 0.05, engine
        assert 1e-8 < float((after - before).abs().max()) < 1e-6, engine


@pytest.mark.timeout(600)
def test_what_is_not_finite_on_one_rank_reaches_no_weight(write_experiment, tmp_path):
    """A NaN, and an infinite loss whose gradient is finite, on one rank only: both skip the step, under any engine.

    Neither weights nor optimizer state know of it, and the step after it is taken.
    """
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 4, "checkpoint_every": 1,
                                         "keep_checkpoints": 4}}
    engines = {**ENGINES, "in_backward": [*ENGINES["fsdp2"], "optimizer.in_backward=true", "training.clip=null",
                                          "training.micro_batch=4"]}
    runs = [{"name": f"{engine}-{kind}-{dtype}", "fp16": dtype == "fp16", "poison": [kind, 3],
             "file": str(write_experiment(f"{engine}-{kind}-{dtype}", **settings)),
             "overrides": [*how, f"precision.dtype={dtype}", "precision.loss_scale.initial=1024"]}
            for engine, how in engines.items() for kind, dtype in (("nan", "fp32"), ("nan", "bf16"), ("inf", "fp16"))
            if (engine, dtype) != ("in_backward", "fp16")]
    found = on_ranks(runs, tmp_path / "ranks")
    for run in runs:
        name = run["name"]
        steps = same_on_both(found[name])
        assert [step["nonfinite"] for step in steps] == [0, 0, 1, 0], name
        assert found[name]["loss"][2] == run["poison"][0], name
        before, skipped, after = (tensors_of(tmp_path / name / "checkpoints" / f"step-0000000{step}")
                                  for step in (2, 3, 4))
        for kind in ("model", "optimizer"):
            assert same_tensors(before[kind], skipped[kind]), (name, kind)
            assert not same_tensors(skipped[kind], after[kind]), (name, kind)

HALVES = {**{f"zero{stage}-bf16": [*ENGINES[f"zero{stage}"], "precision.dtype=bf16"] for stage in (1, 2, 3)},
          **{f"zero{stage}-fp16": [*ENGINES[f"zero{stage}"], "precision.dtype=fp16"] for stage in (1, 3)},
          "zero2-offload": [*ENGINES["zero2"], "precision.dtype=bf16", "sharding.offload.optimizer=true"],
          "zero3-offload": [*ENGINES["zero3"], "precision.dtype=bf16", "sharding.offload.parameters=true",
                            "sharding.offload.optimizer=true"]}


def put_together(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The fp32 weights with which a run began or went on, flat, put together of what each rank held of them."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for rank in (0, 1):
        for key, tensor in load_file(folder / f"{name}-begins-{rank}.safetensors").items():
            parameter, _, start = key.partition("@")
            parts.setdefault(parameter, {})[int(start)] = tensor
    whole = {}
    for parameter, found in parts.items():
        starts, end = sorted(found), 0
        for start in starts:
            assert start == end, f"{parameter}: nobody holds {end} to {start}"
            end += found[start].numel()
        whole[parameter] = torch.cat([found[start] for start in starts])
    return whole


@pytest.mark.timeout(600)
def test_the_first_step_begins_from_the_file_to_the_last_bit(write_experiment, tmp_path):
    """fp32 weights are those of the file, or of the checkpoint that another engine wrote, whatever forward runs in."""
    torch.manual_seed(7)
    uneven = {**UNTIED, "hidden_size": 33, "num_attention_heads": 3, "head_dim": 16}
    fp32 = saved_model(tmp_path / "fp32", sentences(1, 200), **uneven)
    bf16 = shutil.copytree(fp32, tmp_path / "bf16")
    AutoModelForCausalLM.from_pretrained(fp32, dtype=torch.bfloat16).save_pretrained(bf16)
    settings = {**SETTINGS, "student": {"architecture": None, "path": str(fp32)},
                "data": {"tokenizer": {"train_vocabulary": None}},
                "training": {**SETTINGS["training"], "steps": 2, "checkpoint_every": 2}}
    runs = [{"name": name, "file": str(write_experiment(name, **settings)), "overrides": how, "begins": True,
             "fp16": name.endswith("fp16"), "until": 1} for name, how in HALVES.items()]
    runs.append({**runs[-1], "name": "of-bf16", "overrides": [
        *ENGINES["zero2"], "precision.dtype=bf16", f"student.path={bf16}", f"run.folder={tmp_path / 'b'}"]})
    longer = {**settings, "training": {**settings["training"], "steps": 12, "keep_checkpoints": 12}}
    over = str(write_experiment("over", **longer))
    way = ["zero3", "zero3", "zero1", "fsdp2", "zero2"]
    runs += [{"name": f"over-{part}", "file": over, "overrides": [*ENGINES[engine], "precision.dtype=bf16"],
              "begins": True, "until": 2 * (part + 1)} for part, engine in enumerate(way)]
    on_ranks(runs, tmp_path / "ranks")
    for name in (*HALVES, "of-bf16"):
        file = load_file((bf16 if name == "of-bf16" else fp32) / "model.safetensors")
        assert same_tensors(put_together(tmp_path / "ranks", name),
                            {key: tensor.float().flatten() for key, tensor in file.items()}), name
    for part in range(1, len(way)):
        saved = tensors_of(tmp_path / "over" / "checkpoints" / f"step-{2 * part:08d}")["model"]
        assert same_tensors(put_together(tmp_path / "ranks", f"over-{part}"), saved), (way[part - 1], way[part])
