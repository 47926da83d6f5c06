"""Predicted steps beside published ones: shapes are the published ones, and what is far off has a reason."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.sharding import scale
from tests.conftest import ROOT

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "sharding-scale.json").read_text())


@pytest.mark.parametrize(("name", "sequence", "parameters"), [
    ("MPT-3B", 2048, 2_651_837_440), ("MPT-7B", 2048, 6_658_859_008), ("MPT-13B", 2048, 12_853_954_560),
    ("MPT-30B", 2048, 29_975_214_080), ("MPT-70B", 2048, 64_862_437_376), ("Llama-3.1-8B", 4096, 8_030_261_248),
    ("Llama-2-7B", 4096, 6_738_415_616)])
def test_shapes_have_as_many_parameters_as_published(name, sequence, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(scale.MODELS[name](sequence))
    assert sum(one.numel() for one in model.parameters()) == parameters


def test_tflops_become_tokens_by_the_formula_of_their_source():
    """By hand for 175B: 6 operations a parameter and token, and 2 more for recomputation, besides the attention."""
    tokens = scale.azure(12288, 96, 512, 204.49)
    assert 204.49e12 / tokens == pytest.approx(8 * (12 * 96 * 12288**2 + 0.75 * 51200 * 12288), rel=0.01)


def test_every_prediction_far_off_has_a_reason_and_others_have_none():
    assert [one.model for one in scale.PUBLISHED] == [row["model"] for row in RESULTS["rows"]]
    for one, row in zip(scale.PUBLISHED, RESULTS["rows"], strict=True):
        assert (row["tokens"], row["why"]) == (one.tokens, one.why)
        assert bool(one.why) == (abs(row["ratio"] - 1) > 0.15), one
    for device in ("a100-80gb", "h100"):
        (row,) = [row for row in RESULTS["rows"] if row["calibrates"] and row["device"] == device]
        assert row["ratio"] == pytest.approx(1, abs=0.005), "the calibration is that of its row"
    assert {one.model for one in scale.PUBLISHED if one.engine == "zero 3"} >= {"Llama-2-7B", "GPT-175B", "GPT-1T"}


def test_a_row_of_the_results_is_what_is_predicted_now():
    one = scale.PUBLISHED[0]
    now = scale.row(one)
    for key in ("predicted_tokens", "sent_bytes", "model_state_bytes", "one_by_one"):
        assert now[key] == pytest.approx(RESULTS["rows"][0][key]), key
