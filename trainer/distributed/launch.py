"""Join the launched processes, and wrap models with the sharding engine that the experiment names."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn

from strategies.common.running_statistics import batch_norms
from strategies.sharding.engine import Engine
from strategies.sharding.zero import EVEN, bucket_numel, deepspeed_config
from trainer.distributed import rendezvous
from trainer.distributed.rank_memory import RankSetup
from trainer.distributed.topology import Topology
from trainer.errors import RunFailed, UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.nodes import LossScale, Memory, Optimizer, Run, Sharding
from trainer.experiment.precision import DTYPES
from trainer.files import flatten
from trainer.run.folder import training_identity

WAIT = timedelta(hours=1)  # process-group timeout: other ranks wait while rank 0 tokenizes
MIB = 2**20
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def start(experiment: Experiment) -> tuple[Accelerator, Topology]:
    """Join the launched processes, and check that they match the experiment.

    Raises:
        UserError: a tracker or an engine is not installed, the engine does not fit the number of processes, or
            processes were launched with different experiments.
        RunFailed: the launcher's own configuration sets something that only the experiment may set.
    """
    run, sharding, topology = experiment.run, experiment.sharding, Topology.launched()
    _check_launch(run, experiment.memory, topology)
    check_engine(sharding, experiment.optimizer, topology)
    setup = RankSetup.of(experiment, topology)
    if setup.engine == "zero" and find_spec("deepspeed") is None:  # checked here, since planning does not need it
        raise UserError("sharding.engine", "DeepSpeed, which is the engine of ZeRO, is not installed", value="zero",
                        way_out="pip install 'limbeck[zero]', or use fsdp2, which shards as ZeRO's stage 3 does")
    _refuse_launcher(sharding)
    if setup.is_sharded:
        _be_a_rank()
    settings: dict[str, Any] = {}
    group: dict[str, Any] = {"timeout": max(WAIT, timedelta(seconds=2 * run.timeout))}
    if rendezvous.launchers_store():
        group["init_method"] = rendezvous.METHOD
    if setup.engine == "zero":
        config = zero_config(setup, experiment.precision.loss_scale, EVEN, 0)
        settings["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        # With ACCELERATE_USE_CPU, Accelerate would run DeepSpeed's CUDA code; without gloo, each process would be on
        # its own.
        if os.environ.pop("ACCELERATE_USE_CPU", "") or not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
            group["backend"] = "gloo"
    accelerator = Accelerator(
        mixed_precision="no",  # `MixedPrecision` does it, in the same way on every device
        log_with=list(run.trackers) or None, project_dir=experiment.folder,
        kwargs_handlers=[InitProcessGroupKwargs(**group), DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        **settings,
    )
    if setup.engine == "zero":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else transformers would shard every model it builds, also teacher and plan
    _check_joined(accelerator, setup)
    if topology.ranks > 1:
        _check_same(experiment, accelerator)
    if accelerator.device.type == "cpu":
        # Without a GPU, `accelerate launch` sets one thread per process, which would leave the other cores idle.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", topology.ranks))
        torch.set_num_threads(run.threads or max(1, _cores() // local))
    return accelerator, Topology(topology.data_parallel, accelerator.device.type)


def _check_launch(run: Run, memory: Memory, topology: Topology) -> None:
    for tracker in run.trackers:
        if find_spec(tracker) is None:  # Accelerate would silently continue without it
            raise UserError("run.trackers", f"{tracker} is not installed", value=list(run.trackers),
                            way_out=f"pip install '{tracker}', or remove it here; metrics.jsonl is always written")
    if memory.processes not in (None, topology.ranks):
        raise UserError("memory.processes", f"{topology.ranks} processes were launched", value=memory.processes,
                        way_out="launch as many, leave it out, or add --dry-run to plan for them")


def check_engine(sharding: Sharding, optimizer: Optimizer, topology: Topology) -> None:
    """Raise `UserError` if the engine or optimizer cannot be used with a topology."""
    engine = sharding.named(topology.ranks)
    if engine == "none" and topology.ranks > 1:
        raise UserError("sharding.engine", f"{topology.ranks} processes were launched, and with `none` each would "
                        "train alone", value="none", way_out="use ddp, fsdp2 or zero, or leave it out")
    if engine == "zero" and optimizer.name == "muon":
        raise UserError("optimizer.name", "Muon looks at whole matrices, and ZeRO hands out parts of them",
                        value="muon", way_out="use sharding.engine fsdp2, or another optimizer: adamw, lamb, adafactor")
    if optimizer.in_backward and engine not in ("none", "fsdp2"):
        raise UserError("optimizer.in_backward", f"{engine} sums gradients over processes after they are made",
                        value=True, way_out="use sharding.engine fsdp2, or leave it out")
    if optimizer.name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise UserError("optimizer.name", "bitsandbytes, whose 8-bit AdamW this is, is not installed",
                        value="adamw8bit", way_out="pip install 'limbeck[adamw8bit]', or use adamw or adafactor")


def zero_config(setup: RankSetup, loss_scale: LossScale, bucket: int, gathered: int) -> dict[str, Any]:
    """The DeepSpeed configuration.

    Args:
        setup: how the model is sharded.
        loss_scale: settings of the dynamic loss scale.
        bucket: size of a communication bucket in elements.
        gathered: number of weight elements that may be prefetched, that is, all-gathered ahead of their use.
    """
    sharding, training = setup.sharding, setup.training
    return deepspeed_config(
        stage=sharding.zero_stage, precision=NAMES[setup.compute], micro_batch=training.micro_batch,
        clip=training.clip, bucket=bucket, gathered=gathered, accumulates=setup.accumulates,
        initial_scale=loss_scale.initial, growth_interval=loss_scale.growth_interval,
        offload_parameters=sharding.offload.parameters, offload_optimizer=sharding.offload.optimizer)


def engine_for(setup: RankSetup, loss_scale: LossScale, accelerator: Accelerator, student: nn.Module,
               bucket: int | None, without_gradient: Callable[[], set[str] | None] = set) -> Engine:
    """Wrap the student with the engine of the experiment.

    Args:
        setup: how the student is sharded.
        loss_scale: settings of the dynamic loss scale.
        accelerator: the Accelerate object that all processes have joined.
        student: the model to wrap.
        bucket: planned size of a communication bucket: bytes for DDP, elements for ZeRO.
        without_gradient: returns the names of parameters that the loss does not depend on, or None if unknown; called
            only if the engine needs to know.
    """
    apart: set[str] = set()
    if setup.engine == "ddp" and setup.topology.ranks > 1:
        # DDP waits for the gradient of every parameter that it is not told to ignore, and fails if a step does not
        # produce it. Its own search (`find_unused_parameters`) does not see through recomputation; it is used only
        # if the names are unknown, and then nothing is recomputed.
        found = without_gradient()
        accelerator.ddp_handler.bucket_cap_mb = max(1, bucket // MIB)
        accelerator.ddp_handler.find_unused_parameters, apart = found is None, found or set()
        # DDP would give every rank the running statistics of the first one, whose rows are a part of all.
        accelerator.ddp_handler.broadcast_buffers = not batch_norms(student)
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, apart)
    engine = _engine(setup, loss_scale, accelerator, student, bucket)
    engine.apart = [parameter for name, parameter in student.named_parameters()
                    if name in apart and parameter.requires_grad]
    engine.in_backward = None if setup.in_backward is None else setup.in_backward(engine.inner)
    return engine


def _engine(setup: RankSetup, loss_scale: LossScale, accelerator: Accelerator, student: nn.Module, bucket: int | None
            ) -> Engine:
    sharding, build = setup.sharding, setup.optimizer.build
    if setup.engine == "fsdp2":
        from strategies.sharding.fsdp2 import FSDP2

        return FSDP2(student, build, device=accelerator.device, reshard=sharding.reshards,
                     compute=None if setup.compute is torch.float32 else setup.compute,
                     offload=sharding.offload.parameters)
    if setup.engine == "zero":
        from strategies.sharding.zero import Zero

        config = zero_config(setup, loss_scale, bucket, bucket_numel(student) if torch.cuda.is_available() else 0)
        accelerator.state.deepspeed_plugin.hf_ds_config.config.update(config)
        return Zero(student, build, accelerator.prepare, config)
    wrapped, optimizer = accelerator.prepare(student.to(accelerator.device), build(student))
    if setup.engine == "ddp":
        assert setup.topology.ranks == 1 or isinstance(wrapped, nn.parallel.DistributedDataParallel)
    # `unwrap_model` would import DeepSpeed to find what it is given here.
    return Engine(wrapped, student, optimizer, accelerator.no_sync)


def place_teacher(setup: RankSetup, accelerator: Accelerator, teacher: nn.Module) -> nn.Module:
    """Move the teacher to its device; if the student is sharded, shard the teacher too, all-gathered block by block."""
    if not setup.is_sharded:
        return teacher.to(accelerator.device)
    from strategies.sharding.fsdp2 import rank_mesh, shard

    shard(teacher, rank_mesh(accelerator.device.type), frozen=True, compute=setup.gathered_dtype(teacher))
    return teacher.to(accelerator.device)


def _be_a_rank() -> None:
    """Set up the environment of a process group of one rank if no launcher did, since sharding engines need a group."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))


def _refuse_launcher(sharding: Sharding) -> None:
    """Raise `RunFailed` if the launcher's configuration enables a sharding engine: only the experiment may do so."""
    for variable, what in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP"),
                           ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(variable, "false").lower() == "true":
            raise RunFailed(f"the launcher's configuration asks for {what}, and the experiment says "
                            f"sharding.engine {sharding.engine or 'nothing'}: one of them would be lost.\n"
                            "  -> launch with a file that names processes and machines only, as those in launch/, and "
                            "set `sharding` in the experiment")


def _check_joined(accelerator: Accelerator, setup: RankSetup) -> None:
    """Raise `RunFailed` for every known way in which a launch silently differs from what the experiment requests."""
    launched = setup.topology.ranks
    if accelerator.num_processes != launched:
        raise RunFailed(f"the launcher started {launched} processes but they train as {accelerator.num_processes}: "
                        "each would train alone.\n  -> on CPU set ACCELERATE_USE_CPU=true and pass --multi_gpu to "
                        "accelerate launch, as launch/two_cpu_ranks.sh does")
    unasked = accelerator.gradient_accumulation_steps != 1 or accelerator.scaler is not None
    plain = accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if plain == (setup.engine == "zero") or unasked:
        raise RunFailed("accelerate's own configuration asks for something that the experiment file says "
                        f"({accelerator.distributed_type.value}, gradient accumulation "
                        f"{accelerator.gradient_accumulation_steps}).\n  -> launch with --config_file "
                        "launch/one_process.yaml, or a file of your own that names processes and machines only")
    if setup.is_sharded:
        assert dist.is_initialized() and dist.get_world_size() == launched


def _check_same(experiment: Experiment, accelerator: Accelerator) -> None:
    """Raise `UserError` if processes were launched with different experiments: they would hang or diverge."""
    every = flatten(experiment.model_dump(mode="json"))
    known = {**training_identity(experiment), "run.folder": experiment.folder,
             **{key: value for key, value in every.items() if key.startswith(("sharding.", "memory.", "training."))}}
    everything: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(everything, known)
    first = everything[0]
    rank = next((number for number, theirs in enumerate(everything) if theirs != first), None)
    if rank is None:
        return
    other = everything[rank]
    key = min(key for key in {*first, *other} if first.get(key) != other.get(key))
    raise UserError(key, f"process {rank} was launched with another experiment: there it is {other.get(key)!r}",
                    value=first.get(key),
                    way_out="start the same command on every machine, with the same file")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
