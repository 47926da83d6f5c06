"""Caches the teacher's targets on disk: written once by the main process, read by all, one micro-batch at a time.

A cache holds hidden states, samples, or the top-k probabilities, at every position that has a target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from strategies.distillation.losses.fused_head import LogitShape, hidden_states, output_head
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.response import IGNORED
from strategies.distillation.losses.teacher_targets import (
    HiddenTargets,
    SampledTargets,
    SharedVocabulary,
    Targets,
    TopTargets,
)
from strategies.distillation.teacher_cache.cache_reader import (
    CacheDamaged,
    CacheInUse,
    CacheUnfinished,
    Identity,
    TargetCache,
    TargetWriter,
    bytes_per_token,
    total_bytes,
)
from strategies.distillation.teacher_cache.sampling import draw_samples, sampled_targets, top_k
from trainer.data.batches import Batch, model_inputs
from trainer.data.dataset import PreparedData
from trainer.errors import RunFailed, UserError, error_context
from trainer.experiment.data_nodes import Data
from trainer.experiment.experiment import Experiment
from trainer.experiment.model_nodes import Targets as TargetSettings
from trainer.experiment.model_nodes import Teacher
from trainer.files import fingerprint
from trainer.models.build import shape_of
from trainer.run.metrics import readable
from trainer.run.working import working
from trainer.teacher.resident_teacher import TeacherHead

SAMPLED = 4096  # about how many elements of each weight are hashed to identify a teacher


@dataclass
class CachedTargets:
    """Reads the teacher's cached targets for a micro-batch.

    Attributes:
        cache: the finished cache.
        identity: what the cache was made from.
        head: the teacher's output head if hidden states are cached, else None.
        shape: how the teacher scales and caps its logits.
        device: the device to put targets on.
    """

    cache: TargetCache
    identity: Identity
    head: TeacherHead | None
    shape: LogitShape
    device: torch.device

    def __call__(self, batch: Batch) -> Targets:
        """The targets at all positions of a batch; zeros at positions outside the loss mask.

        Raises:
            RunFailed: the cache is damaged.
        """
        loss_mask, there = (batch["targets"] != IGNORED).cpu(), (batch["row"] >= 0).cpu()
        try:
            # A batch without rows reads row 0 for its dtypes and shapes, and uses none of it.
            content = self.cache.read(batch["row"].cpu()[there].tolist() or [0])
        except CacheDamaged as error:
            raise RunFailed(f"the teacher's cache is damaged: {error}") from error
        tokens = loss_mask[there].sum(-1).tolist()
        assert not tokens or content["tokens"].tolist() == tokens, "the identity covers data and sequence length"

        def spread(values: torch.Tensor) -> torch.Tensor:
            whole = values.new_zeros(*loss_mask.shape, *values.shape[1:])
            whole[loss_mask] = values[:int(loss_mask.sum())]
            return whole.to(self.device, non_blocking=True)

        if self.identity.kind == "hidden":
            return HiddenTargets(spread(content["hidden"]), self.shape.head(self.head.weight, self.head.bias))
        temperature = self.identity.temperature
        if self.identity.kind == "top_k":
            return TopTargets(spread(content["ids"]), spread(content["log_p"].float()), spread(content["log_tail"]),
                              temperature)
        drawn = sampled_targets(content, self.identity.draws, temperature)
        return SampledTargets(spread(drawn.ids), spread(drawn.shares), spread(drawn.log_p), temperature)


def cached_targets(experiment: Experiment, accelerator: Accelerator, text: PreparedData, teacher: nn.Module,
                   common: SharedVocabulary | None = None) -> CachedTargets:
    """Open the target cache of an experiment, and write it first if necessary.

    The teacher is not needed afterwards.

    Args:
        common: the columns of both heads that belong to tokens; samples and top-k are taken from these only. None
            where all columns do.

    Raises:
        UserError: the named cache was made from another teacher, tokenizer, data or length; or the disk is too small;
            or it is not known how the teacher scales and caps its logits.
        RunFailed: the cache is damaged or in use.
    """
    asked, shape = experiment.teacher.targets, shape_of(teacher)
    if shape is None:
        raise UserError("teacher.targets.source", f"what {type(teacher).__name__} does to its logits is not known, so "
                        "they cannot be made from a cache", value=asked.source, way_out="use `live`")
    identity = identity_of(experiment.teacher, experiment.objective.divergence.temperature, experiment.data, text,
                           teacher, common)
    folder = Path(asked.path or Path(experiment.run.cache) / "targets" / fingerprint(identity.__dict__))
    with _told(asked, folder):
        if accelerator.is_main_process and not _is_finished(folder, identity):
            _write(folder, identity, experiment.name, experiment.training.micro_batch, text,
                   teacher.to(accelerator.device), shape)
        accelerator.wait_for_everyone()
        cache = TargetCache(folder, identity)
    head = None
    if identity.kind == "hidden":
        own = output_head(teacher)
        head = TeacherHead(own.weight.detach().clone(), None if own.bias is None else own.bias.detach().clone()).to(
            accelerator.device)
    return CachedTargets(cache, identity, head, shape, accelerator.device)


def identity_of(
    settings: Teacher, temperature: float, data: Data, text: PreparedData, teacher: nn.Module,
    common: SharedVocabulary | None = None,
) -> Identity:
    """The identity of this experiment's cache: everything that its content depends on."""
    asked = settings.targets
    vocabulary, width = output_head(teacher).weight.shape
    vocabulary = vocabulary if common is None else common.size
    of_kind = {"hidden": {"width": width, "dtype": settings.dtype},
               "samples": {"vocabulary": vocabulary, "draws": asked.draws, "temperature": temperature},
               "top_k": {"vocabulary": vocabulary, "k": asked.k, "temperature": temperature}}[asked.source]
    return Identity(asked.source, rows=len(text.train), sequence_length=data.sequence_length,
                    teacher=weights_digest(teacher),
                    tokenizer=fingerprint(text.tokenizer.backend_tokenizer.to_str()),
                    data=fingerprint([text.identity, data.packing]), **of_kind)


def weights_digest(teacher: nn.Module) -> str:
    """A hash of a teacher's weights: of their names, shapes and dtypes, and a sample of the elements of each."""
    known = hashlib.sha256()
    for name, weight in teacher.state_dict().items():
        some = weight.flatten()[::max(1, weight.numel() // SAMPLED)].float().cpu().contiguous()
        known.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.numpy().tobytes())
    return known.hexdigest()[:16]


@contextmanager
def _told(targets: TargetSettings, folder: Path) -> Iterator[None]:
    """Convert errors of the cache into errors for the user that name the experiment's key."""
    key = "teacher.targets.path" if targets.path else "run.cache"
    try:
        with error_context(key, value=str(folder),
                   way_out="name another folder, which is then written, or what this one was made from"):
            yield
    except (CacheInUse, CacheDamaged) as error:
        raise RunFailed(f"the teacher's cache in {folder}: {error}") from error


def _is_finished(folder: Path, identity: Identity) -> bool:
    """Whether the cache holds every row. If not, the rest is written; incomplete shards are written again."""
    try:
        TargetCache(folder, identity)
    except (CacheUnfinished, CacheDamaged):
        return False
    return True


@torch.no_grad()
def _write(
    folder: Path, identity: Identity, name: str, micro_batch: int, text: PreparedData, teacher: nn.Module,
    shape: LogitShape,
) -> None:
    """Run the teacher on every row that the cache does not hold yet."""
    tokens = sum(int((row["targets"] != IGNORED).sum()) for row in (text.train[at] for at in range(len(text.train))))
    stated = total_bytes(identity, tokens)
    size, device = micro_batch, next(teacher.parameters()).device
    with TargetWriter(folder, identity, stated=stated) as writer:
        left = list(writer.rows_left())
        words = (f"writing what the teacher says, about {tokens:,} tokens, at most {bytes_per_token(identity):,.1f} "
                 f"bytes each, {readable(stated)} in all: {len(left):,} of {len(text.train):,} rows")
        with working(name, words, at_once=True) as work:
            for begin in range(0, len(left), size):
                work.report("rows", begin, len(left))
                rows = left[begin:begin + size]
                batch = {name: torch.stack([text.train[row][name] for row in rows]).to(device)
                         for name in ("input_ids", "position_ids", "targets")}
                writer.add(rows, _said(identity, teacher, shape, rows, batch))


def _said(identity: Identity, teacher: nn.Module, shape: LogitShape, rows: list[int], batch: Batch
          ) -> dict[str, torch.Tensor]:
    """The teacher's targets for some rows, at the positions of the loss mask."""
    loss_mask = batch["targets"] != IGNORED
    hidden = hidden_states(teacher, model_inputs(batch))[0][loss_mask]
    content = {"tokens": loss_mask.sum(-1)}
    if identity.kind == "hidden":
        return {**content, "hidden": hidden}
    own = output_head(teacher)
    head: Head = shape.head(own.weight, own.bias)
    numbers = (torch.tensor(rows, device=loss_mask.device)[:, None] * loss_mask.shape[-1]
               + torch.arange(loss_mask.shape[-1], device=loss_mask.device))[loss_mask]
    make: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]] = (
        (lambda logits, at: top_k(logits, identity.k, identity.temperature)) if identity.kind == "top_k" else
        (lambda logits, at: draw_samples(logits, identity.draws, identity.temperature, 0, at)))
    found = []
    for part in torch.arange(len(hidden), device=hidden.device).split(256):  # tiles of 256 positions of logits
        logits = torch.empty(len(part), head.vocabulary, device=hidden.device)
        found.append(make(head.shape(head.fill(logits, hidden[part]))[:, :identity.vocabulary], numbers[part]))
    if not found:
        found = [make(torch.zeros(0, head.vocabulary, device=hidden.device), numbers)]
    return {**content, **{name: torch.cat([part[name] for part in found]) for name in found[0]}}


# ---- for planning, from shapes alone
