"""Caches what a teacher says of classified rows: its scores of all classes, written once, and read by all processes."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from strategies.common.weight_file import save_weights
from strategies.distillation.losses.teacher_targets import LogitTargets
from trainer.data.batches import Batch, model_inputs
from trainer.data.dataset import PreparedData
from trainer.errors import RunFailed
from trainer.experiment.data_nodes import Data
from trainer.experiment.model_nodes import Targets
from trainer.experiment.nodes import Run
from trainer.files import fingerprint
from trainer.run.working import working
from trainer.teacher.target_cache import weights_digest

FILE = "logits.safetensors"


class CachedLogits:
    """A teacher's scores of every training row.

    Args:
        logits: (rows, classes), or (rows, sequence, classes) where each token has a class.
        device: where they are needed.
    """

    head = None  # as of a cache of hidden states, of which the teacher's head is needed

    def __init__(self, logits: torch.Tensor, device: torch.device) -> None:
        self.logits, self.device = logits, device

    def __call__(self, batch: Batch) -> LogitTargets:
        """The scores of the rows of a batch; those of row 0 for a row of padding, which has no target."""
        return LogitTargets(self.logits[batch["row"].cpu().clamp(min=0)].to(self.device, non_blocking=True))


def cached_logits(asked: Targets, data: Data, run: Run, micro_batch: int, accelerator: Accelerator,
                  text: PreparedData, teacher: nn.Module) -> CachedLogits:
    """Open the cached scores of a teacher, and write them first if necessary.

    Args:
        asked: where the cache is.
        data: settings of the rows, those of `text`.
        run: names the folder that runs share, where caches are if `asked` says nothing.
        micro_batch: rows of a forward pass.

    Raises:
        RunFailed: the file is damaged.
    """
    identity = fingerprint([weights_digest(teacher), text.identity, text.classes, data.images.model_dump()])
    file = Path(asked.path or Path(run.cache) / "targets" / identity) / FILE
    if accelerator.is_main_process and _read(file, identity) is None:
        with working("teacher", f"writing what it says of {len(text.train):,} rows", at_once=True):
            _write(file, identity, micro_batch, text, teacher.to(accelerator.device).eval())
    accelerator.wait_for_everyone()
    logits = _read(file, identity)
    if logits is None:
        raise RunFailed(f"the teacher's cache in {file.parent} is not there any more\n  -> start the command again")
    return CachedLogits(logits, accelerator.device)


def _read(file: Path, identity: str) -> torch.Tensor | None:
    """The cached scores; None if they are not there, or those of another teacher or other rows."""
    try:
        return load_file(file).get(identity)
    except (OSError, SafetensorError):
        return None


@torch.no_grad()
def _write(file: Path, identity: str, micro_batch: int, text: PreparedData, teacher: nn.Module) -> None:
    found, device = [], next(teacher.parameters()).device
    for begin in range(0, len(text.train), micro_batch):
        rows = [text.train[number] for number in range(begin, min(begin + micro_batch, len(text.train)))]
        batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        found.append(teacher(**model_inputs(batch)).logits.float().cpu())
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{FILE}.partial")
    save_weights({identity: torch.cat(found)}, partial)
    partial.replace(file)
