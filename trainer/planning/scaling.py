"""Predicts step time and bytes per rank for many numbers of ranks, without any of them: `limbeck scale`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from strategies.memory.ledger import Ledger
from strategies.rematerialization.price.costs import DEVICES
from strategies.rematerialization.price.unit_seconds import ATTAINED, sustained
from strategies.sharding.network import Network
from strategies.sharding.step_time import UnitSeconds, step_time
from strategies.sharding.traffic import Traffic, traffic_of, whole_units
from trainer.data.batches import positions_of
from trainer.distributed.launch import check_engine
from trainer.distributed.rank_memory import RankSetup
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.nodes import Sharding
from trainer.planning.show_plan import print_columns
from trainer.planning.step_memory import StepStudy
from trainer.planning.step_plan import plan_or_least
from trainer.run.metrics import readable
from trainer.teacher.resident_teacher import rank_residency

ENGINES: dict[str, tuple[str, int | None]] = {
    "ddp": ("ddp", None), "zero1": ("zero", 1), "zero2": ("zero", 2), "zero3": ("zero", 3), "fsdp2": ("fsdp2", None),
    "fsdp2-stage2": ("fsdp2", 2)}
Seconds = dict[tuple[str, ...], UnitSeconds]


@dataclass(frozen=True)
class ScaleRow:
    """A prediction for one engine and number of ranks.

    Attributes:
        engine: in words.
        ranks: number of ranks.
        batch_size: sequences per step; each rank has the same share for any number of ranks.
        step: seconds of a step.
        compute, update: seconds of its forwards and backwards, and of the optimizer.
        network: seconds of all collectives; `exposed` is how much of them nothing else runs beside.
        tokens: positions per second on all ranks, padding included.
        sent: bytes that each rank sends in a step.
        state: bytes of weights, gradients and optimizer state on a rank.
        peak: bytes on a rank at the peak of a step.
        fits: whether the peak is within the budget.
    """

    engine: str
    ranks: int
    batch_size: int
    step: float
    compute: float
    update: float
    network: float
    exposed: float
    tokens: float
    sent: float
    state: int
    peak: int
    fits: bool


def scale(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig, ranks: Sequence[int],
          network: Network, engines: Sequence[str] = ()) -> list[ScaleRow]:
    """Predict steps for numbers of ranks; the micro-batch and its number per rank are those of the experiment.

    Args:
        teacher, student: configurations of its models.
        network: of the cluster.
        engines: names from `ENGINES`; the experiment's own if there are none.

    Raises:
        UserError: `memory.device` names no GPU, or an engine does not go with the experiment.
    """
    device = experiment.memory.device
    if device in (None, "cpu"):
        raise UserError("memory.device", "a step's time is predicted for a GPU, from its data sheet", value=device,
                        way_out=f"name one: memory.device=h100, or {', '.join(sorted(set(DEVICES) - {'cpu', 'h100'}))}")
    rows = []
    for sharding in [_sharded(experiment, name) for name in engines] or [experiment.sharding]:
        known: dict[bool, dict[str, Seconds]] = {}  # by whether the engine casts, or autocast
        rows += [_row(_on(experiment, sharding, count), teacher, student,
                      Topology(data_parallel=count, device=device), network, known) for count in ranks]
    return rows


def _sharded(experiment: Experiment, name: str) -> Sharding:
    engine, stage = ENGINES[name]
    return Sharding.model_validate({"engine": engine, "stage": stage, "bucket": experiment.sharding.bucket})


def _on(experiment: Experiment, sharding: Sharding, ranks: int) -> Experiment:
    """The experiment with as many sequences on each rank as it has now."""
    training = experiment.training
    own = max(training.micro_batch, training.batch_size // (experiment.memory.processes or 1))
    own -= own % training.micro_batch
    return experiment.model_copy(update={
        "sharding": Sharding(engine="ddp", bucket=sharding.bucket) if sharding.named(ranks) == "none" and ranks > 1
        else sharding, "training": training.model_copy(update={"batch_size": own * ranks})})


def _row(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig, topology: Topology,
         network: Network, known: dict[bool, dict[str, Seconds]]) -> ScaleRow:
    check_engine(experiment.sharding, experiment.optimizer, topology)
    assert experiment.memory.device is not None
    device, setup = DEVICES[experiment.memory.device], RankSetup.of(experiment, topology)
    study = StepStudy(experiment, teacher, student, topology)
    plan, fits = plan_or_least(experiment, study)
    with FakeTensorMode(allow_non_fake_inputs=True):
        traffic = _traffic(setup, study)
        ledger = Ledger.of(rank_residency(setup, study.student, study.teacher, on_gpu=True), None, 0)
    if setup.is_sharded not in known:
        known[setup.is_sharded] = _unit_seconds(study, traffic, experiment)
    seconds = known[setup.is_sharded]
    moved = 2 * (ledger.weights + ledger.fp32_weights + ledger.optimizer_state) + ledger.gradients
    accumulation = experiment.training.batch_size // (experiment.training.micro_batch * topology.data_parallel)
    step = step_time(traffic, _recomputed(seconds["student"], plan.blocks(), device.name), network, topology.ranks,
                     accumulation, moved / device.bandwidth, seconds.get("teacher"))
    return ScaleRow(experiment.sharding.words(topology.ranks), topology.ranks, experiment.training.batch_size,
                    step.seconds, step.compute, step.update, step.network, step.exposed,
                    positions_of(experiment.data, experiment.training.batch_size) / step.seconds, step.sent,
                    ledger.model_state, plan.peak, fits)


def _traffic(setup: RankSetup, study: StepStudy) -> Traffic:
    model, sharding, teacher = study.student, setup.sharding_setup(study.student, on_gpu=True), study.teacher
    groups = [list(group["params"]) for group in setup.optimizer.build(model).param_groups]
    compute = None if teacher is None else setup.gathered_dtype(teacher)
    own = next(teacher.parameters()).dtype if teacher is not None else sharding.compute
    return traffic_of(model, groups, sharding, ddp_bucket=setup.sharding.bucket_bytes, teacher=teacher,
                      teacher_setup=replace(sharding, compute=compute or own))


def _unit_seconds(study: StepStudy, traffic: Traffic, experiment: Experiment) -> dict[str, Seconds]:
    """Seconds of the units that the traffic has; of a teacher that is not sharded, those that it would have."""
    def units(name: str, model: nn.Module) -> list[tuple[str, ...]]:
        found = [unit.modules for unit in (traffic.units if name == "student" else traffic.teacher)]
        return found or whole_units(model)

    assert experiment.memory.device is not None
    found = study.unit_seconds(DEVICES[experiment.memory.device], units)
    share = sustained(experiment.memory.device)
    return {name: {unit: UnitSeconds(forward / share, backward / share) for unit, (forward, backward) in own.items()}
            for name, own in found.items()}


def _recomputed(seconds: Seconds, blocks: Sequence[dict], device: str) -> Seconds:
    """Seconds with the recomputation of a plan's blocks in their units' backward; it is priced by the data sheet."""
    share = sustained(device) * ATTAINED.get(device, 1.0)
    more = {block["name"]: block["seconds"] / share for block in blocks}
    return {unit: replace(own, backward=own.backward + sum(more.get(name, 0.0) for name in unit))
            for unit, own in seconds.items()}


def show_scale(rows: Sequence[ScaleRow], network: Network, device: str) -> None:
    """Print predictions as columns."""
    links = f"{network.within / 1e9:.0f} GB/s per GPU within it, {network.between / 1e9:.1f} GB/s between nodes"
    print_columns(f"Predicted steps on {device}, {network.node} to a node of {network.name}: {links}", [
                      ("engine", "ranks", "sequences", "step, s", "network, s", "exposed, s", "tokens/s per rank",
                       "efficiency", "sent per rank", "state per rank", "peak per rank"),
                      *(_shown(row, next(one for one in rows if one.engine == row.engine)) for row in rows)])


def _shown(row: ScaleRow, first: ScaleRow) -> tuple[str, ...]:
    efficiency = row.tokens / row.ranks / (first.tokens / first.ranks)
    return (row.engine, str(row.ranks), f"{row.batch_size:,}", f"{row.step:.3f}", f"{row.network:.3f}",
            f"{row.exposed:.3f}", f"{row.tokens / row.ranks:,.0f}", f"{efficiency:.1%}", readable(int(row.sent)),
            readable(row.state), readable(row.peak) + ("" if row.fits else ", does not fit"))


def scale_json(rows: Sequence[ScaleRow], network: Network) -> str:
    """Predictions as JSON."""
    return json.dumps({"network": asdict(network), "rows": [asdict(row) for row in rows]}, indent=2)
