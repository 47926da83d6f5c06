"""What all contestants are given: weights, rows, and our experiment file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH = 256, 8  # tokens of a row, rows of a step
STUDENT = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
TEACHER = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}
BETAS, RATE = (0.9, 0.95), 3e-4
SEED = 0


@dataclass(frozen=True)
class Setting:
    """What is trained: how, over how many tokens of vocabulary, in which dtype, for how many steps, and where."""

    task: str
    vocabulary: int
    dtype: str
    steps: int
    device: str = "cpu"

    def write(self, room: Path) -> None:
        """Weights, rows and experiment, into a folder."""
        torch.manual_seed(SEED)
        for name, shape in (("student", STUDENT), ("teacher", TEACHER)):
            model = LlamaForCausalLM(LlamaConfig(
                **shape, vocab_size=self.vocabulary, max_position_embeddings=LENGTH, tie_word_embeddings=True,
                num_key_value_heads=shape["num_attention_heads"] // 2, bos_token_id=0, eos_token_id=1, pad_token_id=2))
            model.save_pretrained(room / name)
            _save_tokenizer(self.vocabulary, room / name)
        _write_rows(self, room)
        (room / "setting.json").write_text(json.dumps(asdict(self)))
        (room / "experiment.yaml").write_text(yaml.safe_dump(_experiment(self, room), sort_keys=False))

    @classmethod
    def read(cls, room: Path) -> Setting:
        """The setting that was written to a folder."""
        return cls(**json.loads((room / "setting.json").read_text()))


def rows_in_order(room: Path) -> list[dict[str, torch.Tensor]]:
    """The rows of our run in its order: `input_ids` and `labels`, not shifted."""
    import limbeck
    from trainer.data.batches import training_batches
    from trainer.data.dataset import prepare_text

    setting = Setting.read(room)
    text = prepare_text(limbeck.read_experiment(room / "experiment.yaml").experiment)
    batches = training_batches(text.train, seed=SEED, micro_batch=BATCH, replica=0, replicas=1, skip=0, workers=0,
                               pin=False)
    rows = []
    for batch, _ in zip(batches, range(setting.steps), strict=False):
        assert (batch["position_ids"] == torch.arange(LENGTH)).all(), "a row is one document"
        assert (batch["targets"][:, :-1] == batch["input_ids"][:, 1:]).all() and (batch["targets"][:, -1] < 0).all()
        rows += [{"input_ids": row.clone(), "labels": row.clone()} for row in batch["input_ids"]]
    return rows


def _save_tokenizer(vocabulary: int, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{number}": number for number in range(3, vocabulary)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
                            ).save_pretrained(folder)


def _write_rows(setting: Setting, room: Path) -> None:
    """Tokens by Zipf's law, each document one row; as many rows as all steps take, and some that are held out."""
    random = np.random.default_rng(SEED)
    weights = 1 / np.arange(1, setting.vocabulary - 2)
    for name, count in (("train", setting.steps * BATCH), ("held-out", BATCH)):
        tokens = random.choice(np.arange(3, setting.vocabulary), size=(count, LENGTH), p=weights / weights.sum())
        (room / f"{name}.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in tokens.tolist()))


def _experiment(setting: Setting, room: Path) -> dict[str, Any]:
    teacher: dict[str, Any] = {}
    if setting.task == "distill":
        jsd = {"name": "jsd", "weight": 1.0, "temperature": 1.0, "normalized": False}
        teacher = {"teacher": {"path": str(room / "teacher")}, "objective": {"cross_entropy": 0.0, "divergence": jsd}}
    return {
        "name": "end-to-end", "seed": SEED, "student": {"path": str(room / "student")}, **teacher,
        "data": {"path": str(room / "train.jsonl"), "input_ids": "ids", "sequence_length": LENGTH,
                 "validation": {"path": str(room / "held-out.jsonl"), "rows": BATCH}},
        "optimizer": {"lr": RATE, "betas": list(BETAS), "weight_decay": 0.0},
        "schedule": {"shape": "constant", "warmup": 0},
        "training": {"steps": setting.steps, "batch_size": BATCH, "micro_batch": BATCH, "clip": 1.0,
                     "evaluate_every": setting.steps, "checkpoint_every": setting.steps},
        "precision": {"dtype": setting.dtype},
        "report": {"control": False},
        "run": {"folder": str(room / "run"), "cache": str(room / "cache")}}
