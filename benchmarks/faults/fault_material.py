"""The small model, text and experiment that all runs share, and the same rows as tokens for the peers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks.sharding.engines import documents
from trainer.data.dataset import prepare_text
from trainer.experiment.load import read_experiment
from trainer.models.build import quiet_libraries

# With dropout, so that a random state that is not restored shows; some 2 MB of weights, so that a save takes a while.
MODEL = {"model_type": "gpt_neox", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_dropout": 0.1, "attention_dropout": 0.1,
         "vocab_size": 300}
STEPS, DOCUMENTS, POISONED = 40, 90, 37  # steps of 8 rows, two epochs; a row that is poisoned where one is


@dataclass(frozen=True)
class Material:
    """Files that runs are started from.

    Attributes:
        experiment: of ours.
        rows: (rows, sequence) `input_ids` and (rows,) `weight`, all 1, for the peers.
        poisoned: the same with one weight NaN.
        model: the model's configuration, for the peers.
    """

    experiment: Path
    rows: Path
    poisoned: Path
    model: Path


def make(room: Path) -> Material:
    """Write them into a folder."""
    quiet_libraries()
    room.mkdir(parents=True, exist_ok=True)
    material = Material(room / "faults.yaml", room / "rows.safetensors", room / "poisoned.safetensors",
                        room / "model.json")
    material.experiment.write_text(yaml.safe_dump(_experiment(room), sort_keys=False))
    text = prepare_text(read_experiment(material.experiment, []).experiment)
    ids = torch.stack([text.train[row]["input_ids"] for row in range(len(text.train))]).long()
    weight = torch.ones(len(ids))
    save_file({"input_ids": ids, "weight": weight}, material.rows)
    weight[POISONED] = torch.nan
    save_file({"input_ids": ids, "weight": weight}, material.poisoned)
    material.model.write_text(json.dumps(MODEL))
    return material


def _experiment(room: Path) -> dict[str, Any]:
    return {
        "name": "faults", "student": {"architecture": {key: value for key, value in MODEL.items()
                                                       if key != "vocab_size"}},
        "data": {"path": str(documents(room)), "max_documents": DOCUMENTS, "packing": False, "sequence_length": 48,
                 "tokenizer": {"train_vocabulary": MODEL["vocab_size"]}, "validation": {"fraction": 0.3, "rows": 16}},
        "optimizer": {"lr": 1e-3}, "schedule": {"warmup": 5},
        "training": {"steps": STEPS, "batch_size": 8, "micro_batch": 4, "evaluate_every": STEPS, "checkpoint_every": 1},
        "report": {"sample_tokens": 2, "prompt": "import"},
        "run": {"cache": str(room / "cache"), "threads": 1, "log_every": 1}}
