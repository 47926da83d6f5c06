"""What the runs of all types share: text, tokenizer, and for each type a folder with a tiny model of random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.architectures.dimensions import runs, tiny
from trainer.experiment.experiment import Experiment
from trainer.experiment.load import read_experiment

VOCABULARY, ROW = 300, 32
# Tokens of each document, its end included. Two fill a row and three do not fit: eight rows padded are four packed.
DOCUMENTS = (16, 15, 14, 13, 16, 15, 14, 13)
TEXT = "a cat sees the bird and a dog finds bread near some old house while two fish swim past it in cold water"
WORDS = TEXT.split()


class Room:
    """A folder for the runs of one type, beside what all types share.

    Attributes:
        model_type: of the model.
        base: the folder of all types; text and tokenizer lie in it.
        folder: of this type.
    """

    def __init__(self, base: Path, model_type: str) -> None:
        self.model_type, self.base, self.folder = model_type, base, base / model_type

    @property
    def model(self) -> Path:
        """The folder that transformers loads."""
        return self.folder / "model"

    def make_model(self) -> nn.Module:
        """Write a tiny model with random weights, none of which is as it was begun; see `tiny` for what is raised."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.base / "tokenizer")
        config = tiny(self.model_type, len(tokenizer))
        for one in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
            one.bos_token_id, one.eos_token_id, one.pad_token_id = 0, 0, 1
        model = runs(config)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.add_(noise * (0.5 / parameter.shape[-1]**0.5 if parameter.ndim > 1 else 0.05))
        model.save_pretrained(self.model)  # without a tokenizer: one of its own class would bring tokens of its own
        try:
            self.plain()
        except Exception as error:
            raise RuntimeError("transformers cannot load what it has saved of it itself: "
                               f"{str(error).splitlines()[0][:120]}") from error
        return model

    def without_flag(self) -> Path | None:
        """The model's folder without `is_decoder`, where it has such a flag; its weights are the same."""
        config = json.loads((self.model / "config.json").read_text())
        if not config.get("is_decoder") or config.get("is_encoder_decoder"):
            return None
        folder = self.folder / "without-flag"
        shutil.copytree(self.model, folder)
        (folder / "config.json").write_text(json.dumps({**config, "is_decoder": False}))
        return folder

    def experiment(self, name: str, **changes: Any) -> Experiment:
        """An experiment on the model, as a file would give it; `changes` replace values of its nodes."""
        values: dict[str, dict[str, Any]] = {
            "student": {"path": str(self.model)},
            "data": {"path": str(self.base / "text.jsonl"), "sequence_length": ROW,
                     "tokenizer": {"path": str(self.base / "tokenizer")},
                     "validation": {"path": str(self.base / "held-out.jsonl"), "rows": 4}},
            "optimizer": {"lr": 1e-3}, "schedule": {"warmup": 0, "shape": "constant"},
            "training": {"steps": 2, "batch_size": 4, "micro_batch": 4, "evaluate_every": 100, "checkpoint_every": 100},
            "report": {"sample_tokens": 2, "prompt": "a cat"}, "export": {},
            "run": {"folder": str(self.folder / name), "cache": str(self.base / "cache"), "threads": 1}}
        for node, more in changes.items():
            values[node] = more if node in ("student", "teacher") else {**values.get(node, {}), **more}
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"name": name, **values}, sort_keys=False))
        return read_experiment(file, []).experiment

    def documents(self) -> Iterator[torch.Tensor]:
        """(tokens,) of each document of the training text, encoded here, its end included."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.base / "tokenizer")
        for line in (self.base / "text.jsonl").read_text().splitlines():
            yield torch.tensor([*tokenizer.encode(json.loads(line)["text"], add_special_tokens=False), 0])

    def plain(self) -> nn.Module:
        """The model as transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()


def share(base: Path) -> None:
    """Write what all types share: a tokenizer, a text whose documents have set lengths, and one that is held out."""
    tokenizer = _tokenizer(base / "tokenizer")
    candidates: dict[int, list[str]] = {}
    for begin in range(len(WORDS)):
        for count in range(2, 12):
            for order in (WORDS, WORDS[::-1]):
                text = " ".join((order[begin:] + order)[:count])
                candidates.setdefault(len(tokenizer.encode(text, add_special_tokens=False)) + 1, []).append(text)
    for number, file in enumerate(("text.jsonl", "held-out.jsonl")):
        lengths = DOCUMENTS[:4] if number else DOCUMENTS
        texts = [candidates[length][3 * index + number] for index, length in enumerate(lengths)]
        (base / file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE whose padding is no other token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    while made.get_vocab_size() < VOCABULARY:
        made.add_tokens([f"<more {made.get_vocab_size()}>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<end>", eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer
