"""`limbeck scale`: predicted steps and bytes for many ranks."""

import json

import pytest

from strategies.sharding.network import NETWORKS
from tests.conftest import TINY
from trainer.cli import limbeck
from trainer.command_line import CLUSTERS
from trainer.distributed.topology import Topology
from trainer.experiment.load import read_experiment
from trainer.models.configs import student_config
from trainer.planning.plan import Plans

BATCH = {"training": {"batch_size": 8, "micro_batch": 2}}


def predicted(capsys, *arguments: str) -> list[dict]:
    assert limbeck(["scale", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_bytes_are_those_of_the_plan_and_tokens_those_of_the_batch(write_experiment, capsys):
    """Each rank goes on with 4 micro-batches of 2; the plan is that of an experiment with as large a batch."""
    file = str(write_experiment(**BATCH))
    for engine in ("fsdp2", "ddp"):
        rows = predicted(capsys, "--config", file, "memory.device=h100", f"sharding.engine={engine}", "--ranks", "1,4")
        assert [row["batch_size"] for row in rows] == [8, 32]
        experiment = read_experiment(file, ["memory.device=h100", f"sharding.engine={engine}",
                                            "training.batch_size=32"]).experiment
        plan = Plans().resolve(experiment, Topology(data_parallel=4, device="h100"), None,
                               student_config(experiment.student, None, 300))
        assert rows[1]["peak"] == plan.memory.peak and rows[1]["state"] == plan.ledger.model_state, engine
        for row in rows:
            assert row["tokens"] * row["step"] == pytest.approx(32 * row["batch_size"])
            assert row["step"] == pytest.approx(row["compute"] + row["update"] + row["exposed"])
        assert rows[0]["sent"] == rows[0]["network"] == 0 < rows[1]["exposed"] <= rows[1]["network"]


def test_engines_differ_in_what_they_send_and_hold(write_experiment, capsys):
    """FSDP2 gathers for every micro-batch, DDP reduces once; stage 3 holds the least."""
    file = str(write_experiment(**BATCH, precision={"dtype": "bf16"}, student={"architecture": {
        **TINY, "tie_word_embeddings": False}}))
    found = {row["engine"]: row for row in predicted(capsys, "--config", file, "memory.device=h100", "--ranks", "16",
                                                      "--engines", "ddp,zero1,zero3,fsdp2,fsdp2-stage2")}
    assert found["fsdp2"]["sent"] > 2 * found["ddp"]["sent"]
    assert found["fsdp2 stage 2"]["sent"] < found["fsdp2"]["sent"]
    assert found["zero stage 3"]["state"] < found["zero stage 1"]["state"] < found["ddp"]["state"]
    slower = predicted(capsys, "--config", file, "memory.device=h100", "sharding.engine=fsdp2", "--ranks", "16",
                       "--gbits", "1", "--network", "dgx-a100")
    assert slower[0]["network"] > 1.3 * found["fsdp2"]["network"], "most of it is latency"
    assert slower[0]["compute"] == found["fsdp2"]["compute"]


def test_what_does_not_fit_is_said(write_experiment, capsys):
    file = str(write_experiment(**BATCH))
    arguments = ["scale", "--config", file, "memory.device=h100", "memory.budget=100KiB", "--ranks", "1,2"]
    assert limbeck(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("does not fit") == 2 and "8 to a node of dgx-h100" in said and "100.0%" in said


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "name one: memory.device=h100"),
    (["memory.device=h100", "--ranks", "0"], "--ranks 1,8,64"), (["memory.device=h100", "--ranks", "x"], "--ranks"),
    (["memory.device=h100", "--engines", "zero4"], "zero1"), (["memory.device=h100", "--gbits", "0"], "--gbits"),
    (["memory.device=h100", "--network", "dgx"], "dgx-h100")])
def test_mistakes_are_answered_with_a_way_out(write_experiment, capsys, arguments, says):
    assert limbeck(["scale", "--config", str(write_experiment()), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_command_line_knows_the_networks():
    assert set(CLUSTERS) == set(NETWORKS)
