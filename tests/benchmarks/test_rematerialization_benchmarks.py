"""The benchmarks of rematerialization run from end to end on small models, and write the rows they promise."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rematerialization import frontier, layered, planning, proof
from benchmarks.rematerialization.layered_graphs import budget_of
from benchmarks.rematerialization.layered_graphs import layered as layered_graph

KEYS = ["model", "method", "budget_bytes", "predicted_peak", "measured_peak", "time_ratio"]


def tiny() -> tuple:
    """Two blocks of Llama."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2))
    tokens = torch.randint(0, 64, (2, 64))
    return model, {"input_ids": tokens, "labels": tokens, "use_cache": False}, list(model.model.layers)


@pytest.fixture
def threads():
    """The benchmark sets the number of threads; give it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_frontier_of_a_small_model(tmp_path, monkeypatch, capsys, threads):
    monkeypatch.setitem(frontier.MODELS, "tiny", tiny)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"model": "gpt2", "method": "of an earlier run"}]))

    assert frontier.main(["--model", "tiny", "--budgets", "2", "--steps", "1", "--json", str(file)]) == 0

    earlier, *rows = json.loads(file.read_text())
    assert earlier["method"] == "of an earlier run"
    assert all(list(row)[:len(KEYS)] == KEYS and row["time_ratio"] > 0 for row in rows)
    plans = [row for row in rows if row["method"] == "limbeck"]
    assert sum("beside" not in plan for plan in plans) == 2
    assert "checkpoint blocks" in [plan.get("beside") for plan in plans], "a plan for what a peer needs"
    for plan in plans:
        assert plan["measured_peak"] <= plan["budget_bytes"]
        assert plan["predicted_peak"] <= plan["budget_bytes"]
        assert plan["gradient_difference"] == 0
    others = {row["method"]: row for row in rows if row["method"] != "limbeck"}
    assert set(others) == {"keep_all", "checkpoint blocks", "checkpoint every 2nd block", "selective checkpoint",
                           *(f"min-cut {fraction}" for fraction in frontier.FRACTIONS)}
    assert all(row["budget_bytes"] is None for row in others.values())
    assert others["checkpoint blocks"]["measured_peak"] < others["keep_all"]["measured_peak"]
    assert f"0 of {len(plans)} plans measured over their budget" in capsys.readouterr().out


def test_verdict_names_what_is_wrong():
    def row(method: str, measured: int, ratio: float, budget: int | None = None) -> dict:
        return {"model": "m", "method": method, "budget_bytes": budget, "predicted_peak": measured,
                "measured_peak": measured, "time_ratio": ratio, "time_ratio_error": 0.001, "gradient_difference": 0.0,
                "fits": None if budget is None else measured <= budget}

    said = frontier.verdict([row("keep_all", 100, 1.0), row("limbeck", 90, 1.3, 80), row("limbeck", 60, 1.4, 70),
                             row("peer", 50, 1.1)])
    assert "1 of 2 plans measured over" in said
    assert said.count("slower") == 2 and "not below peer" in said
    said = frontier.verdict([row("limbeck", 60, 1.12, 70), row("peer", 65, 1.1)])
    assert "0 of 1 plans" in said and "at no budget slower" in said


def test_planning_of_a_model_without_data(tmp_path, capsys):
    file = tmp_path / "planning.json"

    assert planning.main(["--blocks", "4", "--json", str(file)]) == 0

    figures = json.loads(file.read_text())
    assert figures["blocks"] == 4 and figures["fallbacks"] == []
    assert figures["least_bound"] <= figures["least_peak"] <= figures["keep_all_peak"]
    assert figures["predicted_peak"] <= figures["budget_bytes"] < figures["keep_all_peak"]
    assert figures["host_bytes"] < 4 * 2**30
    assert figures["seconds"] == pytest.approx(sum(figures["seconds_by_stage"].values()))
    assert "host memory" in capsys.readouterr().out


def test_layered_graphs_are_the_same_each_time_and_solved(tmp_path, capsys):
    first, again, other = (layered_graph(80, seed) for seed in (0, 0, 1))
    assert first.reads == again.reads and first.size.tolist() == again.size.tolist() and first.reads != other.reads
    assert all(value in set(sum(first.reads, ())) for value in range(79)), "every value but the last is read"
    file = tmp_path / "rows.json"
    assert layered.main(["--nodes", "40", "80", "--seconds", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["graphs"]
    assert [row["nodes"] for row in rows] == [40, 80]
    for row in rows:
        assert row["bound"] <= row["cost"] and row["cost"] > row["once"] and row["peak"] <= row["budget"]
        assert row["gap"] == pytest.approx((row["cost"] - row["bound"]) / row["cost"])
        assert row["budget"] == budget_of(layered_graph(row["nodes"]))
    assert "80 nodes" in capsys.readouterr().out


def test_proof_of_a_chain_of_blocks(tmp_path, capsys):
    """More is recomputed than in a long chain's limit, and the bound leaves little of it open."""
    file = tmp_path / "rows.json"
    assert proof.main(["--blocks", "3", "--hidden", "128", "--length", "256", "--batch", "1", "--vocabulary", "64",
                       "--share", "0.96", "--json", str(file)]) == 0
    row, = json.loads(file.read_text())["rows"]
    assert row["peak"] <= row["budget"] and row["recomputed"] > 0
    assert row["gap"] < 0.3 * row["recomputed"]
    assert "3 blocks" in capsys.readouterr().out
