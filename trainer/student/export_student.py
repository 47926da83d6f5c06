"""Exports the student, reloads its files in a fresh process, and compares them with the trained model."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from strategies.export.clients.transformers_client import layer_outputs
from strategies.export.gguf.gguf_file import dequantized_reference
from strategies.export.hf.transformers_folder import weight_files
from strategies.export.onnx.onnx_folder import TRIED, try_onnx
from strategies.export.quantized_layers import quantized_layers
from strategies.export.receipt import Receipt, ask_client, comparison_shape, make_receipt
from strategies.quantization.freeze import freeze_quantized
from trainer import checkpoints
from trainer.data.batches import model_inputs
from trainer.data.dataset import PreparedData, prepare_text
from trainer.data.rows import StreamedRows
from trainer.errors import RunFailed, UserError, error_context
from trainer.experiment.experiment import Experiment, StudentForm
from trainer.experiment.load import read_experiment
from trainer.experiment.nodes import Export, Report
from trainer.files import write_atomically
from trainer.model_files import first_line
from trainer.models.build import DTYPES, check_files, empty_student, from_config, quiet_libraries
from trainer.run.folder import RunFolder, read_json
from trainer.run.foreign_folder import only_if_trusted, show_links, show_paths
from trainer.run.metrics import console, readable
from trainer.run.quantization_loss import say_rise
from trainer.run.report import write_report
from trainer.student.quantize_student import finalize_student
from trainer.student.weight_digests import check_digests, check_names, read_digests
from trainer.teacher.vocabularies import reads_alike


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
TRIAL = 3e8  # most weights of the small model that is built to test whether torch can export its graph
SHOWN = 256  # rows of training text and of held-out text on which a runtime's tokenizer is compared
RUNTIMES = {
    "onnx": Runtime("onnx.onnx_folder", "onnx_client.py", "", 1e-4, ("onnxruntime",)),
    "gguf": Runtime("gguf.gguf_file", "gguf_client.py", "student.gguf", 1e-4, ("gguf",), tokenizes=True),
}


def check_runtimes(settings: Export, form: StudentForm, model: nn.Module) -> None:
    """Raise `UserError` if one of the runtimes in `export.to` cannot hold the student.

    Args:
        model: the student; shapes are enough.
    """
    for name in settings.to:
        _check(name, model)
        if name == "onnx" and model.config.model_type not in TRIED:
            _try_onnx(form, model.config)


def _try_onnx(form: StudentForm, config: PretrainedConfig) -> None:
    """Try the ONNX export with a student of at most two layers and random weights, unless that is still large."""
    small = copy.deepcopy(config)
    if (layers := getattr(small, "num_hidden_layers", None)) is not None:
        small.num_hidden_layers = min(2, layers)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in from_config(small, form.trust).parameters())
    if weights <= TRIAL:
        with (error_context("export.to", value="onnx", way_out="leave it out"), torch.random.fork_rng(devices=[]),
              torch.device("cpu")):
            try_onnx(from_config(small, form.trust))


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


def write_others(experiment: Experiment, folder: RunFolder, model: nn.Module, text: PreparedData) -> list[str]:
    """Write the student for each runtime in `export.to`; returns a message for each one that failed."""
    failed = []
    for name in experiment.export.to:
        try:
            write_for(name, experiment, folder, model, text)
        except Exception as error:  # converters can raise anything, and the student for transformers exists already
            said = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {first_line(error)}"
            failed.append(f"for {name}: {said}")
    return failed


def drop_stale(folder: RunFolder, experiment: Experiment) -> None:
    """Remove exports and plots of an earlier version of the student, and print how to write the exports again."""
    asked = experiment.student.quantization
    if asked is None or asked.budget is None:
        for file in (folder.allocation, folder.allocation.with_suffix(".png")):
            file.unlink(missing_ok=True)
    for name in set(RUNTIMES) - set(experiment.export.to):
        if folder.student_for(name).exists():
            shutil.rmtree(folder.student_for(name))
            console.print(f"{experiment.name}: {folder.student_for(name)} was of the student before, and is removed: "
                          f"`limbeck export {folder.path} --to {name}` writes it again")


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
    notes = _reads(name, text, model.config.vocab_size)
    partial = final.with_name(f".{final.name}.unverified")
    shutil.rmtree(partial, ignore_errors=True)
    path = partial / runtime.file if runtime.file else partial
    path.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"{experiment.name}: writing for {name}, reloading in a fresh process and comparing")
    dtype = DTYPES[experiment.export.dtype]
    _of(name, "write")(path, model, text.tokenizer, dtype)
    reference = (
        dequantized_reference(model, dtype)
        if name == "gguf"
        else model
        if dtype is torch.float32
        else freeze_quantized(copy.deepcopy(model), dtype).float()
    )
    trained, exported = logits_of(model, text), logits_of(reference, text)
    found, logits = _asked({"student": {"path": str(path), "compare": True}}, experiment.training.micro_batch,
                           experiment.report, text, exported, "cpu",
                           tokenizer=str(folder.student if folder.student.exists() else folder.unverified),
                           client=runtime.client)
    files = [file for file in sorted(partial.rglob("*")) if file.suffix in (".onnx", ".data", ".gguf")]
    rounds = any(layer.activations is not None for _, layer in quantized_layers(model))
    receipt = make_receipt(found["student"], trained, exported, logits["student"], files,
                           ROUNDED if rounds else runtime.tolerance, runtime.libraries, notes)
    receipt.write(partial / "receipt.json")
    if not receipt.holds:
        where = first_difference(str(path), reference, text, receipt.tolerance, runtime.client)
        raise RunFailed(_differs(receipt, partial, f"the tolerance of {name},", where))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    _tell(experiment.name, receipt, final)
    return receipt


def export(run: Path, name: str, trust_remote_code: bool = False) -> Path:
    """Export the student of a finished run for another runtime; see `write_for`.

    Args:
        run: the run's folder. It may come from somebody else, so the outside paths that it makes us read are printed
            first.
        name: name of the runtime.
        trust_remote_code: allow code that comes with a model to run, if the folder's experiment asks for it.

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
    text = prepare_text(experiment)
    write_for(name, experiment, folder, rebuilt(experiment, folder, folder.student, text), text)
    write_report(folder.path)
    return folder.student_for(name)


def rebuilt(experiment: Experiment, folder: RunFolder, like: Path, text: PreparedData) -> nn.Module:
    """Rebuild the trained student from a run's last checkpoint and the configuration in its exported folder.

    Args:
        like: the exported folder.

    Raises:
        RunFailed: the last checkpoint is missing or damaged, or the rebuilt student is not the one that was trained.
    """
    check_files(str(like), "student")
    with error_context("student", value=str(like), way_out="put the folder back from a copy"):
        config = AutoConfig.from_pretrained(like, trust_remote_code=experiment.form.trust)
    if hasattr(config, "quantization_config"):  # the weights come from the checkpoint, which is not packed
        del config.quantization_config
    model = empty_student(experiment.form, config)
    model.generation_config = GenerationConfig.from_pretrained(like)
    newest = checkpoints.latest(folder.checkpoints)
    if newest is None:
        raise RunFailed(f"{folder.checkpoints} has no checkpoint to take the student from")
    steps, wrong = read_json(folder.plan).get("steps"), checkpoints.wrong_with(newest)
    if newest.name != checkpoints.NAME.format(steps if isinstance(steps, int) else 0):
        wrong = f"the run went on to step {steps}, whose checkpoint is not there"
    if wrong is not None:
        raise RunFailed(f"the student cannot be taken from {newest}: {wrong}.\n  -> put that folder back from a copy; "
                        "or run the experiment again, in another run.folder")
    checkpoints.load_whole(newest, model)
    what = f"the student, made again from {newest} and {like / 'config.json'},"
    check_names(checkpoints.names(newest), model, what)
    if (trained := read_digests(folder.digests)) is not None:
        check_digests(trained, model, what)
    return finalize_student(experiment, model.eval(), text, folder)


def compare(
    experiment: Experiment,
    folder: RunFolder,
    trained: torch.Tensor,
    exported: torch.Tensor,
    text: PreparedData,
    device: torch.device,
) -> None:
    """Load the exported student, teacher and control in a fresh process, compare them, and write the receipt.

    Args:
        trained: (rows, length, vocabulary) logits of the fake-quantized student in training, on held-out rows.
        exported: the same in the dtype of the export, which the files have to reproduce.

    Raises:
        RunFailed: the reloaded student differs from the trained one; it stays in `.student.unverified`.
    """
    trust = experiment.form.trust
    models: dict[str, dict[str, Any]] = {
        "student": {"path": str(folder.unverified), "compare": True, "trust_remote_code": trust}}
    if experiment.teacher is not None and reads_alike(experiment.teacher, experiment.student, text):
        models["teacher"] = {"path": experiment.teacher.path, "revision": experiment.teacher.revision,
                             "dtype": experiment.teacher.dtype,
                             "trust_remote_code": experiment.teacher.trust_remote_code}
    if RunFolder(folder.control).student.exists():
        models["control"] = {"path": str(RunFolder(folder.control).student), "trust_remote_code": trust}
    console.print(f"{experiment.name}: reloading in a fresh process and comparing")
    found, logits = _asked(models, experiment.training.micro_batch, experiment.report, text, exported, device.type,
                           tokenizer=str(folder.unverified))
    for name, entry in found.items():
        path = Path(models[name]["path"])
        files = weight_files(path)
        # The plan knows the size of the teacher's files even if they are not local.
        kept = read_json(folder.plan).get("teacher_bytes") if name == "teacher" else None
        entry["bytes_on_disk"] = sum(file.stat().st_size for file in files) or kept or entry["parameter_bytes"]
    receipt = make_receipt(found["student"], trained, exported, logits["student"], weight_files(folder.unverified),
                           experiment.export.tolerance)
    receipt.write(folder.unverified / "receipt.json")
    if not receipt.holds:
        reference = freeze_quantized(
            rebuilt(experiment, folder, folder.unverified, text), DTYPES[experiment.export.dtype]
        )
        where = first_difference(str(folder.unverified), reference, text, receipt.tolerance)
        raise RunFailed(_differs(receipt, folder.unverified, "export.tolerance", where))
    write_atomically(folder.comparison, json.dumps(found, indent=2) + "\n")
    if folder.student.exists():
        shutil.rmtree(folder.student)
    os.rename(folder.unverified, folder.student)
    _tell(experiment.name, receipt, folder.student)
    if experiment.student.quantization is not None and experiment.student.quantization.budget is not None:
        say_rise(experiment.name, folder)


def some_text(text: PreparedData) -> list[str]:
    """Text decoded from the first held-out rows and, unless the data is streamed, the first training rows."""
    rows = list(text.held_out["input_ids"][:SHOWN])
    if not isinstance(text.train, StreamedRows):
        rows += [text.train[number]["input_ids"] for number in range(min(SHOWN, len(text.train)))]
    return [text.tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows]


@torch.no_grad()
def logits_of(model: nn.Module, text: PreparedData) -> torch.Tensor:
    """(rows, length, vocabulary) fp32 logits on the first held-out rows, without autocast, on the CPU."""
    rows, length = comparison_shape(*text.held_out["input_ids"].shape, model.config.vocab_size)
    model.eval()
    device = next(model.parameters()).device
    part = {name: text.held_out[name][:rows, :length].to(device) for name in ("input_ids", "position_ids")}
    return model(**model_inputs(part)).logits.float().cpu()


def first_difference(path: str, model: nn.Module, text: PreparedData, tolerance: float,
                     client: str = "transformers_client.py") -> tuple[str, float] | None:
    """The first layer whose outputs on a held-out row differ from the reloaded file's, and the relative difference.

    Differences are relative to the layer's largest output. Returns None if none is above the tolerance, or if the
    outputs could not be obtained. For an ONNX graph only quantized layers are compared.
    """
    file = Path(path).parent / ".layers.safetensors"
    try:
        _asked({"student": {"path": path, "layers": str(file)}}, 1, Report(), text, None, "cpu", client=client,
               tokenizer=path)
        theirs = load_file(file)
    except (RunFailed, OSError):
        return None
    finally:
        file.unlink(missing_ok=True)
    part = {name: text.held_out[name][:1] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        ours = layer_outputs(model.eval(), lambda: model(**model_inputs(part)))
    for name, output in ours.items():
        if name in theirs and theirs[name].shape == output.shape:
            share = float((theirs[name] - output).abs().max() / output.abs().max().clamp(min=1e-30))
            if not share <= tolerance:
                return name, share
    return None


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


def _asked(models: dict[str, dict[str, Any]], micro_batch: int, sample: Report, text: PreparedData,
           exported: torch.Tensor | None, device: str, **more: Any
           ) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    rows, length = (1, 1) if exported is None else exported.shape[:2]
    try:
        return ask_client(
            models, text.held_out, device=device, threads=torch.get_num_threads(),
            micro_batch=micro_batch, logit_rows=rows, logit_length=length,
            prompt=sample.prompt, sample_tokens=sample.sample_tokens, **more)
    except RuntimeError as error:
        raise RunFailed(str(error)) from error


def _differs(receipt: Receipt, kept: Path, tolerance: str, where: tuple[str, float] | None) -> str:
    hint = "; raise export.tolerance only if you know why they may differ" if tolerance == "export.tolerance" else ""
    first = "" if where is None else f"; the first layer that differs is {where[0]}, by {where[1]:.3g} of its output"
    return (f"the reloaded student differs from the trained one by {receipt.largest_difference:.3g} (largest logit "
            f"{receipt.largest_logit:.3g}), over {tolerance} {receipt.tolerance:g}{first}; it is kept in {kept}\n"
            f"  -> the training checkpoint is safe{hint}")


def _tell(name: str, receipt: Receipt, folder: Path) -> None:
    console.print(f"{name}: receipt of {folder.name}: {readable(receipt.bytes_on_disk)} on disk, "
                  f"{receipt.bits_per_byte:.4f} bits per byte, largest logit difference {receipt.largest_difference:g}")
