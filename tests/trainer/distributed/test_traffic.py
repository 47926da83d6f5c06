"""Bytes that engines send, foretold, and counted in the collectives of two real ranks."""

import json
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from strategies.sharding.traffic import traffic_of
from tests.conftest import TINY, forked, two_ranks
from tests.trainer.distributed.test_sharding import ENGINES
from trainer.distributed.rank_memory import RankSetup
from trainer.distributed.topology import Topology
from trainer.experiment.load import read_experiment
from trainer.models.build import empty_student
from trainer.models.configs import student_config

BYTES = {"float": 4, "c10::BFloat16": 2}
FEW = 48  # bytes: norms, sums of losses, decisions
GATHER, SCATTER, REDUCE = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "gloo:all_reduce"


@pytest.mark.timeout(600)
def test_engines_send_the_bytes_foretold(write_experiment, tmp_path):
    """In the second step, of two micro-batches: by kind of collective, to the byte.

    Gloo's reduce-scatter is an all-reduce, which is not counted again. Weights that are gathered in bfloat16 and
    gradients that are reduced in fp32 are told apart by their dtypes.
    """
    kinds = [(engine, "fp32", False) for engine in ENGINES]
    kinds += [("fsdp2", "bf16", False), ("zero3", "bf16", False), ("zero2", "bf16", False), ("fsdp2", "fp32", True),
              ("zero3", "fp32", True)]
    runs = []
    for engine, precision, tied in kinds:
        name = f"{engine}-{precision}{'-tied' if tied else ''}"
        file = write_experiment(name, student={"architecture": {**TINY, "tie_word_embeddings": tied}}, training={
            "steps": 2, "batch_size": 8, "micro_batch": 2, "evaluate_every": 100, "checkpoint_every": 100})
        runs.append({"name": name, "file": str(file), "overrides": [*ENGINES[engine], f"precision.dtype={precision}"]})
    done = forked(_rank, (runs, tmp_path), two_ranks(), timeout=550)
    assert done.returncode == 0, done.stderr[-6000:]
    for run in runs:
        found = json.loads((tmp_path / f"{run['name']}-sent.json").read_text())
        assert found == {kind: count for kind, count in _foretold(run).items() if count}, run["name"]


def _foretold(run: dict) -> dict[str, int]:
    experiment = read_experiment(run["file"], run["overrides"]).experiment
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model = empty_student(experiment.form, student_config(experiment.student, None, 300))
        setup = RankSetup.of(experiment, Topology(data_parallel=2))
        groups = [list(group["params"]) for group in experiment.optimizer.build(model).param_groups]
        return traffic_of(model, groups, setup.sharding_setup(model, on_gpu=False)).totals(2)


def _rank(runs: list[dict], folder) -> None:
    from benchmarks.sharding import sharded_runs

    plain = sharded_runs.remembered

    def remembered(trainer):
        step = trainer.train_step

        def counted(inputs):
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
                record = step(inputs)
            if os.environ["RANK"] == "0":
                (folder / f"{trainer.experiment.name}-sent.json").write_text(json.dumps(_counted(profiled)))
            return record

        trainer.train_step = counted
        return plain(trainer)

    sharded_runs.remembered = remembered
    for run in runs:
        sharded_runs.one(run, folder)


def _counted(profiled) -> dict[str, int]:
    found = {GATHER: 0, SCATTER: 0, REDUCE: 0}
    for event in profiled.profiler.kineto_results.events():
        if event.name() in found:
            whole = 1 if event.name() == SCATTER else 0  # the whole is what it is given
            shape, dtype = event.shapes()[whole], event.dtypes()[whole]
            count = BYTES.get(dtype, 0) * torch.Size(shape).numel()
            found[event.name()] += count if count > FEW or event.name() != REDUCE else 0
    found[REDUCE] -= found[SCATTER]
    names = {GATHER: "all-gather", SCATTER: "reduce-scatter", REDUCE: "all-reduce"}
    return {names[name]: count for name, count in found.items() if count}
