"""Ours and the peers: how each is started, where its checkpoints are, and what it ended with."""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.faults.fault_material import Material
from benchmarks.faults.processes import ROOT, Forked, Launched, Started

PEERS = Path(__file__).with_name("peers")
MAKERS = {"forked": Forked, "launched": Launched}


@dataclass
class Contender(ABC):
    """A program that trains the same model and can be started again.

    Attributes:
        material: files it is started from.
        options: further arguments of each start.
    """

    material: Material
    options: tuple[str, ...] = ()
    script = Path()
    checkpoint = re.compile("")  # its group is the number

    @property
    @abstractmethod
    def name(self) -> str:
        """For tables."""

    @abstractmethod
    def arguments(self, folder: Path) -> list[str]:
        """Of a start in a folder."""

    @abstractmethod
    def kept(self, folder: Path) -> Path:
        """Where checkpoints are."""

    @abstractmethod
    def tensors(self, folder: Path) -> dict[str, torch.Tensor]:
        """Weights, optimizer state and random state of the newest checkpoint."""

    @abstractmethod
    def losses(self, folder: Path) -> dict[int, Any]:
        """The loss logged for each step."""

    def start(self, folder: Path, *options: str, how: str = "forked", processes: int = 1, script: Path | None = None,
              first: tuple[str, ...] = ()) -> Started:
        """Start it in a folder, or start it there again; each start has a log beside the folder.

        `first` are arguments of another `script` that wraps ours.
        """
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.parent.glob(f"{folder.name}.*.log")))
        log = folder.with_name(f"{folder.name}.{number:03}.log")
        return MAKERS[how](script or self.script, [*first, *self.arguments(folder), *self.options, *options], log,
                           processes)

    def numbered(self, folder: Path) -> dict[int, Path]:
        """Checkpoints by their numbers, begun ones as well."""
        found, place = {}, self.kept(folder)
        for path in place.iterdir() if place.exists() else ():
            match = self.checkpoint.fullmatch(path.name)
            if match:
                found[int(match[1])] = path
        return found

    def whole(self, path: Path, files: set[str]) -> bool:
        """Whether a checkpoint has all files of a finished one."""
        return not path.name.startswith(".") and files <= names(path)

    def has_one(self, folder: Path, started: Started) -> bool:
        """Whether a start that saves every step has finished a checkpoint, now or before."""
        return bool(started.began) or started.reached > 1

    def newest(self, folder: Path) -> Path:
        """The newest checkpoint, finished or not."""
        return max(self.numbered(folder).items())[1]

    def forget_newest(self, folder: Path) -> bool:
        """Remove it, as a person would by hand; whether there was one."""
        found = self.numbered(folder)
        if found:
            shutil.rmtree(found[max(found)])
        return bool(found)


@dataclass
class Limbeck(Contender):
    """train.py, or another script that takes its arguments."""

    script: Path = ROOT / "train.py"
    checkpoint = re.compile(r"\.?step-(\d+)(?:-\d+\.partial)?")

    @property
    def name(self) -> str:
        return "Limbeck"

    def arguments(self, folder: Path) -> list[str]:
        return ["--config", str(self.material.experiment), f"run.folder={folder}"]

    def kept(self, folder: Path) -> Path:
        return folder / "checkpoints"

    def has_one(self, folder: Path, started: Started) -> bool:
        return any(not path.name.startswith(".") for path in self.numbered(folder).values())

    def tensors(self, folder: Path) -> dict[str, torch.Tensor]:
        return {f"{file.name}/{name}": tensor for file in sorted(self.newest(folder).glob("*.safetensors"))
                for name, tensor in load_file(file).items()}

    def losses(self, folder: Path) -> dict[int, Any]:
        file = folder / "metrics.jsonl"
        return {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines_of(file) if "loss" in line}


@dataclass
class AccelerateScript(Contender):
    """Plain Accelerate, as its guide has it, or with the sampler that it has for going on in the same order."""

    limit: int = 2
    seedable: bool = False
    script = PEERS / "accelerate_script.py"
    checkpoint = re.compile(r"checkpoint_(\d+)")

    @property
    def name(self) -> str:
        return f"Accelerate, total_limit={self.limit}" + (", seedable sampler" if self.seedable else "")

    def arguments(self, folder: Path) -> list[str]:
        seedable = ["--seedable"] if self.seedable else []
        return [*_of_peer(self.material, folder), "--total-limit", str(self.limit), *seedable]

    def kept(self, folder: Path) -> Path:
        return folder / "checkpoints"

    def tensors(self, folder: Path) -> dict[str, torch.Tensor]:
        newest = self.newest(folder)
        state = torch.load(newest / "optimizer.bin", weights_only=True)
        return {**load_file(newest / "model.safetensors"), **dict(_leaves(state, "optimizer"))}

    def losses(self, folder: Path) -> dict[int, Any]:
        return {line["step"]: line["loss"] for line in lines_of(folder / "losses.jsonl")}


@dataclass
class HFTrainer(Contender):
    """The Trainer of transformers."""

    limit: int = 2
    script = PEERS / "hf_trainer_script.py"
    checkpoint = re.compile(r"checkpoint-(\d+)")

    @property
    def name(self) -> str:
        return f"HF Trainer, save_total_limit={self.limit}"

    def arguments(self, folder: Path) -> list[str]:
        return [*_of_peer(self.material, folder), "--total-limit", str(self.limit)]

    def kept(self, folder: Path) -> Path:
        return folder

    def tensors(self, folder: Path) -> dict[str, torch.Tensor]:
        newest = self.newest(folder)
        state = torch.load(newest / "optimizer.pt", weights_only=True)
        return {**load_file(newest / "model.safetensors"), **dict(_leaves(state, "optimizer"))}

    def losses(self, folder: Path) -> dict[int, Any]:
        state = json.loads((self.newest(folder) / "trainer_state.json").read_text())
        return {line["step"]: line["loss"] for line in state["log_history"] if "loss" in line}


def names(checkpoint: Path) -> set[str]:
    """Files of a checkpoint."""
    return {path.name for path in checkpoint.iterdir()} if checkpoint.exists() else set()


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Records of a file of JSON lines; one that was cut off is left out."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _of_peer(material: Material, folder: Path) -> list[str]:
    return ["--rows", str(material.rows), "--model", str(material.model), "--folder", str(folder)]


def _leaves(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors and numbers of nested dictionaries and lists, by their path."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _leaves(one, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            yield from _leaves(one, f"{name}/{number}")
    elif isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (int, float)):
        yield name, torch.tensor(float(value), dtype=torch.float64)
