"""What batch norms in a model that trains need of the settings: rows to take statistics of, and whole models."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from strategies.common.running_statistics import batch_norms
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.models.build import from_config


def check_batch_norms(experiment: Experiment, student: PretrainedConfig, topology: Topology) -> None:
    """Raise `UserError` if the student has batch norms and cannot be trained as the experiment says.

    A single row has no statistics: where a map is one pixel it would be divided by a variance of zero. The sharding
    engines keep running statistics apart on each rank, and ZeRO rounds them to the dtype in which it computes.
    """
    with torch.device("meta"):
        model = from_config(student, experiment.form.trust)
    if not batch_norms(model):
        return
    name, engine = type(model).__name__, experiment.sharding.named(topology.ranks)
    if experiment.training.micro_batch == 1:
        raise UserError("training.micro_batch", f"{name} has batch norms, which normalize by the statistics of a "
                        "micro-batch, and one row has none", value=1, way_out="use 2 or more, 16 say")
    if engine in ("fsdp2", "zero"):
        raise UserError("sharding.engine", f"{name} has batch norms, whose running statistics {engine} does not bring "
                        "together", value=engine, way_out="use ddp, which does; the memory of such a model is in its "
                        "activations, which memory.budget is for")
