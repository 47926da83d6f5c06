"""Exports the student with its exits, reloads it in a fresh process, and compares where inputs leave."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strategies.distillation.losses.fused_head import LogitShape
from strategies.export.hf.transformers_folder import weight_files
from strategies.export.receipt import make_receipt
from strategies.pruning.early_exit.exit_curve import THRESHOLDS, Costs, Point, classifier_curve, point
from strategies.pruning.early_exit.exit_decisions import TokenDepths, classifier_logits, confidence, first_confident
from strategies.pruning.early_exit.exit_folder import write_exits
from strategies.pruning.early_exit.exit_heads import attach_exits, parts_of
from strategies.quantization.freeze import freeze_quantized
from trainer import checkpoints
from trainer.data.batches import model_inputs
from trainer.data.dataset import PreparedData
from trainer.errors import RunFailed
from trainer.experiment.exit_nodes import EarlyExits
from trainer.experiment.nodes import Export
from trainer.experiment.objective_nodes import Objective
from trainer.experiment.report_node import Report
from trainer.models.build import DTYPES, shape_of
from trainer.run.exit_snippets import RUNTIME
from trainer.run.folder import RunFolder
from trainer.run.working import working
from trainer.student.compare_student import ask_about, differs, exported_checkpoint, tell_receipt
from trainer.teacher.exit_losses import logits_from, settle_exits, take_exits

CLIENT = "early_exit_client.py"
LIBRARIES = ("torch", "transformers", "safetensors")
NOTHING_LEAVES = 2.0  # a threshold above all probabilities
CURVE_ROWS = 64  # of a language model, which is run once for each threshold
FOLLOWED, LENGTH = 2, 48  # rows and their tokens that the exported code follows token by token
BY_TOKEN = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # tolerance of logits that are computed
# token by token from a cache, whose sums are of another order
NEAR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # confidences so close to the threshold may
# fall on either side of it


@dataclass(frozen=True)
class ExitModel:
    """A student as its file has it, with its exits.

    Attributes:
        model: in evaluation mode, in the dtype of the export.
        exits: of the same dtype and device.
        shape: scale and soft cap of its logits.
        text: the data, whose held-out rows are measured.
        micro_batch: rows of a forward.
    """

    model: nn.Module
    exits: nn.ModuleDict
    shape: LogitShape
    text: PreparedData
    micro_batch: int

    @classmethod
    def of(cls, model: nn.Module, exits: nn.ModuleDict, dtype: torch.dtype, text: PreparedData, micro_batch: int
           ) -> ExitModel:
        """From a finished student, which is not changed."""
        written = model if dtype is torch.float32 else freeze_quantized(copy.deepcopy(model), dtype)
        device = next(written.parameters()).device
        return cls(written.eval(), copy.deepcopy(exits).to(device, dtype).eval(), shape_of(model) or LogitShape(), text,
                   micro_batch)

    @property
    def classifies(self) -> bool:
        """Whether it is a classifier."""
        return bool(self.text.classes)

    @property
    def depths(self) -> TokenDepths:
        """What lets the tokens of a language model leave."""
        parts = parts_of(self.model)
        assert parts.norm is not None
        return TokenDepths(self.model, self.exits, self.model.get_submodule(parts.norm),
                           lambda normed: logits_from(self.model, self.shape, normed))

    def batches(self, rows: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Held-out rows in micro-batches, on the model's device."""
        every, device = self.text.held_out, next(self.model.parameters()).device
        count = len(every["targets"]) if rows is None else min(rows, len(every["targets"]))
        for begin in range(0, count, self.micro_batch):
            yield {name: tensor[begin:min(begin + self.micro_batch, count)].to(device)
                   for name, tensor in every.items()}

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Arguments of the model for a batch, images in its dtype."""
        dtype = next(self.model.parameters()).dtype
        return {name: value.to(dtype) if name == "pixel_values" else value
                for name, value in model_inputs(batch).items()}


def write_early_exits(name: str, asked: EarlyExits, export: Export, folder: RunFolder, student: Path,
                      found: ExitModel) -> None:
    """Write the student with its exits and the code that runs it, after a fresh process has found the same.

    Args:
        name: of the experiment.
        student: the exported folder that transformers loads the student from.

    Raises:
        RunFailed: the reloaded folder computes something else, or lets inputs leave elsewhere.
    """
    final = folder.student_for(RUNTIME)
    partial = final.with_name(f".{final.name}.unverified")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(student, partial, ignore=shutil.ignore_patterns("receipt*.json", "README.md"))
    with working(name, "measuring what its exits save", at_once=True):
        curve, logits = (_of_classifier if found.classifies else _of_language)(found, asked.threshold)
        write_exits(partial, found.model, found.exits, asked.threshold, curve, found.shape.scale, found.shape.cap)
    with working(name, "reloading the early exits in a fresh process and comparing", at_once=True):
        answer, notes, theirs = _compared(found, asked, partial, logits)
    own = logits[-1] if found.classifies else logits
    tolerance = export.tolerance if found.classifies else max(export.tolerance, BY_TOKEN[DTYPES[export.dtype]])
    receipt = make_receipt(answer, own, own, theirs, weight_files(partial), tolerance, LIBRARIES, notes)
    receipt.write(partial / "receipt.json")
    if not receipt.holds:
        raise RunFailed(differs(receipt, partial, "export.tolerance", None))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    tell_receipt(name, receipt, final)


def exits_of_checkpoint(objective: Objective, folder: RunFolder, student: nn.Module, seed: int) -> nn.ModuleDict | None:
    """The trained exits of a finished run, from the checkpoint that its student is taken from; None without exits.

    Args:
        student: as training left it, rebuilt from that checkpoint.
    """
    if objective.early_exits is None:
        return None
    attach_exits(student, objective.early_exits.layers, seed=seed)
    checkpoints.load_whole(exported_checkpoint(folder), student)
    settle_exits(student, shape_of(student))
    return take_exits(student)


# ---- helpers

def _thresholds(own: float) -> Sequence[float]:
    return sorted({*THRESHOLDS, own, NOTHING_LEAVES})


@torch.no_grad()
def _of_classifier(found: ExitModel, threshold: float) -> tuple[list[Point], torch.Tensor]:
    """The curve over all held-out rows, and the logits of each exit and of the model's own head, as they are there."""
    every, tokens = [], 0.0
    for batch in found.batches():
        inputs = found.inputs(batch)
        every.append(classifier_logits(found.model, found.exits, inputs).cpu())
        tokens += _tokens(found.model, inputs)
    logits, held = torch.cat(every, 1), found.text.held_out
    costs = Costs.of(found.model, found.exits, round(tokens / len(held["targets"])))
    curve = classifier_curve(logits, held["targets"], costs, held.get("attention_mask"), _thresholds(threshold))
    return curve, logits


def _tokens(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Tokens of a batch that go through its blocks, without padding; patches of images."""
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    seen: list[int] = []
    block = model.get_submodule(parts_of(model).blocks)[0]
    hook = block.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0] * args[0].shape[1]))
    try:
        model(**{name: tensor[:1] for name, tensor in inputs.items()})
    finally:
        hook.remove()
    return seen[0] * len(next(iter(inputs.values())))


def _of_language(found: ExitModel, threshold: float) -> tuple[list[Point], torch.Tensor]:
    """The curve over the first held-out rows, and the logits of rows that the exported code follows."""
    costs, curve = Costs.of(found.model, found.exits, 1), []
    for limit in _thresholds(threshold):
        nats, bytes_, left = 0.0, 0, []
        for batch in found.batches(CURVE_ROWS):
            one = found.depths(found.inputs(batch), batch["targets"], limit)
            nats += float(one.nats.double().sum())
            bytes_ += int(batch["bytes"].sum())
            left.append(one.exit[batch["targets"] >= 0].cpu())
        curve.append(point(costs, limit, torch.cat(left), bits_per_byte=nats / math.log(2) / max(1, bytes_)))
    with torch.no_grad():
        logits = found.model(**_followed(found)).logits.float().cpu()
    return curve, logits


def _followed(found: ExitModel) -> dict[str, Any]:
    """The rows that the exported code follows, each as one text."""
    device = next(found.model.parameters()).device
    ids = found.text.held_out["input_ids"][:FOLLOWED, :LENGTH].to(device)
    return {"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=device).expand_as(ids),
            "use_cache": False}


def _compared(found: ExitModel, asked: EarlyExits, partial: Path, logits: torch.Tensor
              ) -> tuple[dict[str, Any], list[str], torch.Tensor]:
    """What a fresh process measures, notes for the receipt, and its logits where nothing leaves."""
    own = logits[-1] if found.classifies else logits
    prompt = max(1, logits.shape[1] // 4)
    inputs = [name for name in model_inputs(next(found.batches(1))) if name in found.text.held_out]
    answers, theirs = ask_about({"student": {"path": str(partial), "compare": True}}, found.micro_batch, Report(),
                                found.text, own, next(found.model.parameters()).device.type, client=CLIENT,
                                inputs=inputs, prompt_tokens=prompt)
    answer = answers["student"]
    blocks = torch.tensor(answer["blocks"]).flatten()
    exit, nearest, words = _rows_leave(found, asked, logits) if found.classifies else _tokens_leave(
        found, asked, prompt, answer)
    depths = torch.tensor([*(layer + 1 for layer in asked.layers), len(found.model.get_submodule(
        parts_of(found.model).blocks))])
    near = NEAR[next(found.model.parameters()).dtype]
    apart = depths[exit] != blocks
    if bool((apart & (nearest > near)).any()):
        raise RunFailed(f"the exported code lets {int(apart.sum())} of {len(blocks)} {words} leave at other blocks "
                        f"than training's own computation does; it is kept in {partial}\n  -> the training checkpoint "
                        "is safe; please report this with the model's architecture")
    share = float(blocks.double().mean()) / int(depths[-1])
    notes = [f"at threshold {asked.threshold:g} {len(blocks) - int(apart.sum()):,} of {len(blocks):,} {words} leave "
             f"after the same block as in training's own computation, with {share:.1%} of the blocks computed"]
    if apart.any():
        notes.append(f"the rest are within {near:g} of the threshold")
    notes.append("figures are those at the threshold; logits are compared where nothing leaves" if found.classifies
                 else "bits per byte and logits are those where nothing leaves; exits.json has them by threshold")
    return answer, notes, theirs["student"]


def _rows_leave(found: ExitModel, asked: EarlyExits, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Where the held-out rows leave, and how close to the threshold a confidence was."""
    mask = found.text.held_out.get("attention_mask")
    sure = torch.stack([confidence(one, mask) for one in logits[:-1]], 1)
    return first_confident(sure, asked.threshold), (sure - asked.threshold).abs().amin(1), "held-out rows"


def _tokens_leave(found: ExitModel, asked: EarlyExits, prompt: int, answer: dict[str, Any]
                  ) -> tuple[torch.Tensor, torch.Tensor, str]:
    """The same of the followed tokens behind their prompt, whose predictions have to agree as well."""
    given = _followed(found)
    ids = given["input_ids"]
    leaves = (torch.arange(ids.shape[1], device=ids.device) >= prompt).expand_as(ids)
    one = found.depths(given, torch.roll(ids, -1, 1), asked.threshold, leaves)
    part = slice(prompt - 1, ids.shape[1] - 1)
    nearest = one.nearest.cpu().cummin(1).values[:, part].flatten()  # later tokens attend to those that have left
    return one.exit.cpu()[:, part].flatten(), nearest, "tokens"
