"""Has the runtimes of `export.readers` read the exported files, and writes a receipt of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from strategies.export.gguf.gguf_rounding import rounded_reference
from strategies.export.quantized_layers import quantized_layers
from strategies.export.readers import READERS, ReaderReceipt, check_reader, read_by, receipt_name
from trainer.data.dataset import PreparedData
from trainer.errors import RunFailed, error_context
from trainer.experiment.nodes import Export
from trainer.models.build import DTYPES
from trainer.run.metrics import console
from trainer.run.working import working

SUMS = 1e-4  # tolerance of fp32 sums in another order
# llama.cpp rounds what enters a layer, as its reference here does; a number between two may fall on the other one.
# OpenVINO dequantizes weights in fp32, and does not round the product as half-precision scales are in training.
ROUNDED, HALF = 2e-2, {torch.float32: SUMS, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Written:
    """A student that was exported for a runtime.

    Attributes:
        runtime: a key of `export_student.RUNTIMES`.
        path: the file or folder that the runtime loads.
        files: the weight files.
        folder: where receipts go.
    """

    runtime: str
    path: Path
    files: Sequence[Path]
    folder: Path


def check_readers(settings: Export) -> None:
    """Raise `UserError` if a runtime in `export.readers` is not installed, or has nothing to read."""
    for name in settings.readers:
        with error_context("export.readers", value=name, way_out=f"leave it out, or add {READERS[name].of} to export.to"
                           if READERS[name].of not in settings.to else "install it, or leave it out"):
            check_reader(name, settings.to)


def missing_receipts(folder: Path, runtime: str, settings: Export) -> bool:
    """Whether an exported folder lacks the receipt of its runtime, or of a reader."""
    names = ["receipt.json", *map(receipt_name, readers_of(runtime, settings))]
    return not all((folder / name).exists() for name in names)


def read_by_others(experiment: str, settings: Export, written: Written, model: nn.Module, reference: nn.Module,
                   text: PreparedData, least: float = 0.0) -> None:
    """Have each further runtime read an exported student, and write its receipt.

    Args:
        experiment: its name, for the log.
        model: the trained student, whose quantized layers still fake-quantize.
        reference: the same in the dtype of the export.
        least: the least tolerance that the student itself can keep.

    Raises:
        RunFailed: a runtime could not load the student, or finds something else in it.
    """
    dtype = DTYPES[settings.dtype]
    for name in readers_of(written.runtime, settings):
        ours = rounded_reference(model, dtype) if name == "llama-cpp" else reference
        try:
            with working(experiment, f"reading what is for {written.runtime} with {name}", at_once=True):
                receipt = read_by(name, written.path, written.files, ours, text.held_out["input_ids"],
                                  max(least, tolerance(name, model, dtype)), threads=torch.get_num_threads(),
                                  letter=_letter(text.tokenizer))
        except RuntimeError as error:
            raise RunFailed(f"{name}: {error}") from error
        receipt.write(written.folder / receipt_name(name))
        if not receipt.holds:
            raise RunFailed(_differs(receipt, written))
        console.print(f"{experiment}: {name} reads the same: largest difference of {receipt.compares} "
                      f"{receipt.largest_difference:.3g} in {receipt.tokens} tokens{_turn(receipt)}")


def tolerance(name: str, model: nn.Module, dtype: torch.dtype) -> float:
    """The tolerance of a reader for a student: of exact sums, or of what the runtime rounds."""
    layers = [layer for _, layer in quantized_layers(model)]
    if any(layer.activations is not None for layer in layers):
        return ROUNDED
    if name in ("ctranslate2", "executorch"):
        return SUMS
    if name == "llama-cpp":
        return ROUNDED if layers or dtype is not torch.float32 else SUMS
    return HALF[dtype]


def readers_of(runtime: str, settings: Export) -> list[str]:
    """The readers of what is exported for a runtime: itself, if it is one, and those of `export.readers`."""
    return [name for name, reader in READERS.items() if reader.of == runtime and name in (runtime, *settings.readers)]


def _letter(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token of whole letters, whatever it says."""
    ids = (token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids)
    return next((token for token in ids if (said := tokenizer.decode([token])).isascii() and said.isalpha()), 0)


def _turn(receipt: ReaderReceipt) -> str:
    turn = receipt.slowest_turn
    return "" if turn is None else f", in which the slowest rotary frequency makes {turn:.2g} turns"


def _differs(receipt: ReaderReceipt, written: Written) -> str:
    return (f"{receipt.reader} predicts otherwise than the trained student: {receipt.compares} differ by "
            f"{receipt.largest_difference:.3g} (the largest is {receipt.largest_value:.3g}), over its tolerance of "
            f"{receipt.tolerance:g}; the files are kept in {written.folder}\n  -> they hold for {written.runtime}: to "
            f"have them, leave {receipt.reader} out of export.readers, and do not use them with {receipt.reader}")
