"""bf16 and fp16 under every engine: fp32 weights are updated, and every rank takes the same decision."""

import math

import pytest
import torch

from tests.conftest import TINY
from tests.program.test_sharding import ENGINES, on_ranks, relative, weights_apart

UNTIED = {**TINY, "tie_word_embeddings": False}
SETTINGS = {"student": {"architecture": UNTIED},
            "training": {"steps": 10, "micro_batch": 2, "evaluate_every": 100, "checkpoint_every": 100}}
HALF = {"bf16": 2e-2, "fp16": 4e-3}  # how far losses may be from those in fp32


@pytest.mark.timeout(600)
def test_half_precision_follows_fp32(write_experiment, train_here, tmp_path):
    """Losses near fp32's, in every engine; fp16 begins with a scale far too high: it backs off, skips, and goes on."""
    one = train_here("alone", **SETTINGS)
    from trainer.metrics import read_lines

    plain = [line["loss"] for line in read_lines(one.folder.metrics) if "loss" in line]
    runs = [{"name": f"{engine}-{dtype}", "file": str(write_experiment(f"{engine}-{dtype}", **SETTINGS)),
             "fp16": dtype == "fp16", "overrides": [*how, f"precision.dtype={dtype}"]}
            for engine, how in ENGINES.items() for dtype in HALF]
    scaled = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 20}}
    runs += [{"name": f"{engine}-scaled", "file": str(write_experiment(f"{engine}-scaled", **scaled)), "fp16": True,
              "overrides": [*how, "precision.dtype=fp16", "precision.loss_scale.initial=4294967296",
                            "precision.loss_scale.growth_interval=4"]} for engine, how in ENGINES.items()]
    found = on_ranks(runs, tmp_path / "ranks")
    for engine in ENGINES:
        for dtype, tolerance in HALF.items():
            name = f"{engine}-{dtype}"
            assert relative(plain, found[name]["loss"]) < tolerance, name
            assert plain != found[name]["loss"], "something else than fp32 was computed"
            assert {tensor.dtype for tensor in found[name]["weights"].values()} == {torch.float32}
            rounded = {key: tensor.bfloat16().float() for key, tensor in found[name]["weights"].items()}
            assert weights_apart(found[name]["weights"], rounded) > 1e-4, "the weights that are updated are fp32"
        scaled = found[f"{engine}-scaled"]
        skipped = scaled["skipped"][-1]
        assert 3 <= skipped < 18 and scaled["loss_scale"][skipped] < 2.0**32, engine
        assert scaled["loss"][-1] < scaled["loss"][0] - 0.05, engine
        assert all(ranks == ranks[:1] * 2 for ranks in map(list, zip(*scaled["decisions"], strict=True))), engine


@pytest.mark.timeout(600)
def test_updates_smaller_than_half_precision_resolves(write_experiment, tmp_path):
    """With so small a learning rate no bf16 weight would ever move; the fp32 ones do."""
    changes = {**SETTINGS, "optimizer": {"lr": 1e-6}, "schedule": {"shape": "constant", "warmup": 0}}
    runs = []
    for engine, how in ENGINES.items():
        file = str(write_experiment(engine, **changes))
        runs += [{"name": f"{engine}-{until}", "file": file, "until": until,
                  "overrides": [*how, "precision.dtype=bf16"]} for until in (1, 8)]
    found = on_ranks(runs, tmp_path / "ranks")
    for engine in ENGINES:
        before, after = found[f"{engine}-1"]["weights"], found[f"{engine}-8"]["weights"]
        moved = weights_apart(before, after)
        assert 1e-7 < moved < 1e-3, (engine, moved)


@pytest.mark.timeout(600)
def test_what_is_not_finite_on_one_rank_reaches_no_weight(write_experiment, tmp_path):
    """A NaN, and an infinite loss whose gradient is finite, on one rank only: both skip the step, under any engine."""
    runs = []
    for engine, how in ENGINES.items():
        for kind in ("nan", "inf"):
            name = f"{engine}-{kind}"
            file = str(write_experiment(name, **SETTINGS))
            runs += [{"name": f"{name}-before", "file": file, "until": 2, "overrides": how},
                     {"name": f"{name}-after", "file": file, "until": 3, "overrides": how, "poison": kind}]
    found = on_ranks(runs, tmp_path / "ranks")
    for engine in ENGINES:
        for kind in ("nan", "inf"):
            name = f"{engine}-{kind}"
            assert not math.isfinite(float(found[f"{name}-after"]["loss"][-1])), name
            assert weights_apart(found[f"{name}-before"]["weights"], found[f"{name}-after"]["weights"]) == 0, name
