"""Exports the student, reloads its files in a fresh process, and compares them with the trained model."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from strategies.common.running_statistics import batch_norms
from strategies.export.executorch.executorch_folder import TRIED as TRIED_BY_EXECUTORCH
from strategies.export.executorch.executorch_folder import try_executorch
from strategies.export.executorch.executorch_rounding import executorch_reference, nudged
from strategies.export.gguf.gguf_file import dequantized_reference
from strategies.export.onnx.onnx_folder import TRIED, try_onnx
from strategies.export.quantized_layers import quantized_layers
from strategies.export.receipt import CACHED, Receipt, is_weight_file, make_receipt
from strategies.quantization.folding import fold_batch_norms
from strategies.quantization.freeze import freeze_quantized
from trainer.data.batches import model_inputs
from trainer.data.dataset import PreparedData, prepare_text
from trainer.data.encoding import answer_end
from trainer.errors import RunFailed, UserError, error_context
from trainer.experiment.data_nodes import Data
from trainer.experiment.experiment import Experiment, StudentForm
from trainer.experiment.load import read_experiment
from trainer.experiment.nodes import Export
from trainer.experiment.quantization_nodes import Quantization
from trainer.model_files import first_line
from trainer.models.build import DTYPES, from_config, quiet_libraries
from trainer.run.folder import RunFolder
from trainer.run.foreign_folder import only_if_trusted, show_links, show_paths
from trainer.run.metrics import console
from trainer.run.report import write_report
from trainer.run.working import working
from trainer.student.compare_student import (
    ask_about,
    differs,
    first_difference,
    logits_of,
    rebuilt,
    some_text,
    tell_receipt,
)
from trainer.student.other_readers import Written, check_readers, read_by_others, readers_of


@dataclass(frozen=True)
class Runtime:
    """A runtime, besides transformers, that a student can be exported for.

    Attributes:
        module: the exporting module under `strategies.export`, with `write_NAME(path, model, tokenizer, dtype)` and
            `check_NAME(model)`.
        client: the script that loads the exported student in a fresh process.
        file: the file to write in the run's folder for the runtime; empty if the exporter writes into the folder.
        tolerance: largest allowed logit difference, relative to the largest logit.
        libraries: the libraries that load the student.
        tokenizes: whether the runtime has a tokenizer of its own; then the module has
            `read_by_NAME(tokenizer, size, texts)`.
    """

    module: str
    client: str
    file: str
    tolerance: float
    libraries: tuple[str, ...]
    tokenizes: bool = False


# The tolerance with quantized activations, in any runtime: if a token's value lies between two integers, the last bit
# of a sum decides which it is rounded to, and one step is 1/127 of the token's largest value.
ROUNDED = 2e-2
SPREAD = 2.0  # times what a student of rounded activations moves by itself, when its embeddings hardly do
WORDS = "writing for {}, reloading in a fresh process and comparing"
TRIAL = 3e8  # most weights of the small model that is built to test whether torch can export its graph
RUNTIMES = {
    "onnx": Runtime("onnx.onnx_folder", "onnx_client.py", "", 1e-4, ("onnxruntime",)),
    "gguf": Runtime("gguf.gguf_file", "gguf_client.py", "student.gguf", 1e-4, ("gguf",), tokenizes=True),
    "ctranslate2": Runtime("hf.ctranslate2_folder", "ctranslate2_client.py", "", 1e-4, ("ctranslate2",)),
    "executorch": Runtime("executorch.executorch_folder", "executorch_client.py", "", 1e-4, ("executorch",)),
}


def check_runtimes(settings: Export, form: StudentForm, model: nn.Module) -> None:
    """Raise `UserError` if one of the runtimes in `export.to` cannot hold the student.

    Args:
        model: the student; shapes are enough.
    """
    check_readers(settings)
    # Model types whose graphs torch is known to export for a runtime, and what tries another one.
    trials = {"onnx": (TRIED, try_onnx), "executorch": (TRIED_BY_EXECUTORCH, try_executorch)}
    for name in settings.to:
        _check(name, model)
        if name in trials and model.config.model_type not in trials[name][0]:
            _try(name, trials[name][1], form, model.config)


def _try(name: str, attempt: Callable[[nn.Module], None], form: StudentForm, config: PretrainedConfig) -> None:
    """Try an export with a student of at most two layers and random weights, unless that is still large."""
    small = copy.deepcopy(config)
    if (layers := getattr(small, "num_hidden_layers", None)) is not None:
        small.num_hidden_layers = min(2, layers)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in from_config(small, form.trust).parameters())
    if weights <= TRIAL:
        with (error_context("export.to", value=name, way_out="leave it out"), torch.random.fork_rng(devices=[]),
              torch.device("cpu")):
            attempt(from_config(small, form.trust))


def check_tokenizer(settings: Export, text: PreparedData, size: int) -> list[str]:
    """Compare the tokenizers of the runtimes in `export.to` with transformers' on the data.

    Args:
        size: size of the student's vocabulary, padding of the head included.

    Returns:
        Notes on minor differences in how a runtime tokenizes text.

    Raises:
        UserError: a runtime cannot hold the tokenizer, or would tokenize the data differently.
    """
    return [note for name in settings.to for note in _reads(name, text, size)]


def end_answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
    """Have the model's settings for generation end where it has learned to end an answer, if the data are chats.

    A model of texts alone often names the end of a text there, and not the token that its chat template ends a turn
    with; a student that says the second would never be stopped.
    """
    end, settings = answer_end(tokenizer, data), copy.deepcopy(model.generation_config)
    known = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if end is not None and end not in known:
        settings.eos_token_id = [end, *(token for token in known if token is not None)]
        model.generation_config = settings


def write_others(experiment: Experiment, folder: RunFolder, model: nn.Module, text: PreparedData,
                 without: Collection[str] = ()) -> list[str]:
    """Write the student for each runtime in `export.to`; returns a message for each one that failed.

    Args:
        without: runtimes for which it is there already.
    """
    failed = []
    for name in (one for one in experiment.export.to if one not in without):
        try:
            with working(experiment.name, WORDS.format(name), at_once=True):
                write_for(name, experiment, folder, model, text)
        except Exception as error:  # converters can raise anything, and the student for transformers exists already
            said = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {first_line(error)}"
            failed.append(f"for {name}: {said}")
    return failed


def drop_stale(folder: RunFolder, name: str, asked: Quantization | None, settings: Export) -> None:
    """Remove exports and plots of an earlier version of the student, and print how to write the exports again."""
    if asked is None or asked.budget is None:
        for file in (folder.allocation, folder.allocation.with_suffix(".png")):
            file.unlink(missing_ok=True)
    for runtime in set(RUNTIMES) - set(settings.to):
        if folder.student_for(runtime).exists():
            shutil.rmtree(folder.student_for(runtime))
            console.print(f"{name}: {folder.student_for(runtime)} was of the student before, and is removed: "
                          f"`limbeck export {folder.path} --to {runtime}` writes it again")


def check_written(folder: RunFolder, failed: list[str]) -> None:
    """Raise `RunFailed` if the export for a runtime failed, even though the one for transformers succeeded."""
    if failed:
        raise RunFailed("the student was not written " + "\nnor ".join(failed) + f"\n  -> for transformers it is in "
                        f"{folder.student}, with its receipt; leave the rest out of export.to and start the same "
                        "command again to have the report")


def write_for(name: str, experiment: Experiment, folder: RunFolder, model: nn.Module, text: PreparedData) -> Receipt:
    """Export the student for a runtime, reload it in a fresh process, and return the receipt of the comparison.

    Raises:
        UserError: the runtime cannot hold the student.
        RunFailed: the reloaded student differs from the trained one; no folder is left that looks finished.
    """
    runtime, final = RUNTIMES[name], folder.student_for(name)
    _check(name, model)
    notes = [] if text.classes else _reads(name, text, model.config.vocab_size)
    client = runtime.client if not text.classes else f"{name}_classifier_client.py"
    partial = final.with_name(f".{final.name}.unverified")
    shutil.rmtree(partial, ignore_errors=True)
    path = partial / runtime.file if runtime.file else partial
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[experiment.export.dtype]
    notes += _of(name, "write")(path, _folded(name, model, text, dtype), text.tokenizer, dtype) or []
    reference = _reference(name, model, dtype)
    trained, exported = logits_of(model, text), logits_of(reference, text)
    found, logits = ask_about({"student": {"path": str(path), "compare": True}}, experiment.training.micro_batch,
                              experiment.report, text, exported, "cpu", client=client, task=experiment.data.task,
                              tokenizer=str(folder.student if folder.student.exists() else folder.unverified))
    tolerance = _tolerance(name, model, reference, text, exported)
    files = [file for file in sorted(partial.rglob("*")) if is_weight_file(file)]
    receipt = make_receipt(found["student"], trained, exported, logits["student"], files,
                           tolerance, runtime.libraries, notes,
                           logits.get("student" + CACHED))
    receipt.write(partial / "receipt.json")
    if not receipt.holds:
        where = first_difference(str(path), reference, text, receipt.tolerance, client)
        raise RunFailed(differs(receipt, partial, f"the tolerance of {name},", where))
    if not text.classes:
        read_by_others(experiment.name, experiment.export, Written(name, path, files, partial), model, reference, text,
                   tolerance if name == "executorch" else 0.0)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    tell_receipt(experiment.name, receipt, final)
    return receipt


def export(run: Path, name: str, trust_remote_code: bool = False, readers: Sequence[str] = ()) -> Path:
    """Export the student of a finished run for another runtime; see `write_for`.

    Args:
        run: the run's folder. It may come from somebody else, so the outside paths that it makes us read are printed
            first.
        name: name of the runtime.
        trust_remote_code: allow code that comes with a model to run, if the folder's experiment asks for it.
        readers: further runtimes that must read it, besides those of the experiment.

    Raises:
        UserError: there is no such run or runtime, or the run needs code that is not trusted.
    """
    quiet_libraries()
    folder = RunFolder(run)
    if name not in RUNTIMES:
        raise UserError("--to", "no such runtime", value=name, way_out=f"one of {', '.join(RUNTIMES)}")
    if not folder.finished:
        raise UserError("", f"{run} is not the folder of a finished run",
                        way_out="finish it: start its command again")
    show_links(folder)
    experiment = read_experiment(folder.experiment, [f"run.folder={json.dumps(str(run))}"]).experiment
    experiment = only_if_trusted(experiment, folder, trust_remote_code)
    show_paths(folder, experiment)
    settings = experiment.export.model_copy(update={"to": (name,), "readers": tuple(dict.fromkeys(
        [*readers, *readers_of(name, experiment.export)]))})
    check_readers(settings)
    experiment = experiment.model_copy(update={"export": settings})
    text = prepare_text(experiment)  # with the tokenizer of the run, which the cut has taken over
    experiment = experiment.from_cut(folder.cut)
    with working(experiment.name, WORDS.format(name), at_once=True):
        write_for(name, experiment, folder, rebuilt(experiment, folder, folder.student, text), text)
    write_report(folder.path)
    return folder.student_for(name)


def _reference(name: str, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The student that a runtime's files have to reproduce."""
    if name == "gguf" or (name == "ctranslate2" and any(True for _ in quantized_layers(model))):
        return dequantized_reference(model, dtype)
    if name == "executorch":
        return executorch_reference(model, dtype)
    return model if dtype is torch.float32 else freeze_quantized(copy.deepcopy(model), dtype).float()


def _folded(name: str, model: nn.Module, text: PreparedData, dtype: torch.dtype) -> nn.Module:
    """What is written of a student: for ONNX a copy without the batch norms that fold into the layers before them.

    Not in half precision, since folded weights would be rounded to others than those of the student.
    """
    if name != "onnx" or dtype is not torch.float32 or not batch_norms(model):
        return model
    folded = copy.deepcopy(model).eval()
    device = next(folded.parameters()).device
    rows = {key: tensor[:2].to(device) for key, tensor in text.held_out.items()}
    fold_batch_norms(folded, model_inputs(rows), strict=False)
    return folded


def _tolerance(name: str, model: nn.Module, reference: nn.Module, text: PreparedData, exported: torch.Tensor) -> float:
    """The tolerance of a runtime, which a student of rounded activations may not be able to keep itself."""
    if all(layer.activations is None for _, layer in quantized_layers(model)):
        return RUNTIMES[name].tolerance
    with nudged(reference):
        moved = (logits_of(reference, text) - exported).abs().max() / exported.abs().max().clamp(min=1e-30)
    return max(ROUNDED, SPREAD * float(moved))


def _check(name: str, model: nn.Module) -> None:
    otherwise = ", or quantize otherwise" if any(True for _ in quantized_layers(model)) else ""
    with error_context("export.to", value=name, way_out=f"leave it out{otherwise}"):
        _of(name, "check")(model)


def _reads(name: str, text: PreparedData, size: int) -> list[str]:
    if not RUNTIMES[name].tokenizes:
        return []
    with error_context(
        "export.to", value=name, way_out="leave it out, or name another tokenizer in `data.tokenizer.path`"
    ):
        return _of(name, "read_by")(text.tokenizer, size, some_text(text))


def _of(name: str, what: str) -> Callable:
    return getattr(import_module(f"strategies.export.{RUNTIMES[name].module}"), f"{what}_{name}")
