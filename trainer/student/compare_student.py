"""Compares an exported student, reloaded in a fresh process, with the model in training, and writes its receipt."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from strategies.common.generation_settings import load_generation_settings
from strategies.common.model_tasks import task_of
from strategies.export.clients.transformers_client import layer_outputs
from strategies.export.hf.transformers_folder import weight_files
from strategies.export.receipt import Receipt, ask_client, compared_rows, comparison_shape, make_receipt
from strategies.quantization.freeze import freeze_quantized
from trainer import checkpoints
from trainer.data.batches import model_inputs
from trainer.data.dataset import PreparedData
from trainer.data.encoding import sample_prompts
from trainer.data.rows import StreamedRows
from trainer.errors import RunFailed, UserError, error_context
from trainer.experiment.data_nodes import Data
from trainer.experiment.experiment import Experiment, StudentForm
from trainer.experiment.report_node import Report
from trainer.files import write_atomically
from trainer.model_files import check_files
from trainer.models.build import DTYPES, build_student, empty_student, layers_above
from trainer.models.configs import student_config, teacher_config
from trainer.run.folder import RunFolder, read_json
from trainer.run.held_out import in_words
from trainer.run.metrics import console, readable
from trainer.run.quantization_loss import say_rise
from trainer.run.working import working
from trainer.student.merge_adapter import BASE, client_of, export_notes, libraries_of, student_entry
from trainer.student.quantize_student import finalize_student
from trainer.student.weight_digests import check_digests, check_names, read_digests
from trainer.teacher.vocabularies import reads_alike

ROWS = 64  # of a forward pass of a classifier
SHOWN = 256  # rows of training text and of held-out text on which a runtime's tokenizer is compared


def rebuilt(experiment: Experiment, folder: RunFolder, like: Path, text: PreparedData, final: bool = True) -> nn.Module:
    """Rebuild the student from the checkpoint that it is exported from and the configuration in its exported folder.

    Args:
        like: the exported folder.
        final: whether it is merged with its adapters and quantized; if not, it is as training left it.

    Raises:
        RunFailed: that checkpoint is missing or damaged, or the rebuilt student is not the one that was trained.
    """
    asked, vocabulary = experiment.student, text.vocabulary
    if asked.adapter is None:
        model = _like(like, experiment.form)
    else:
        if asked.from_teacher is not None and experiment.teacher.path is None:
            raise UserError("export.to", "the adapter's base is layers of a teacher that the run trained, which only "
                            "the run itself finds", way_out="add the runtime to export.to, and start the run's command "
                            "again")
        above = teacher_config(experiment.teacher, vocabulary)
        model = build_student(experiment, student_config(asked, above, vocabulary),
                              layers_above(asked, experiment.teacher, above), text.tokenizer)
        for known in (like, like / BASE):
            if (known / "generation_config.json").exists():  # it knows what ends an answer
                load_generation_settings(known, model)
    checkpoint = exported_checkpoint(folder)
    checkpoints.load_whole(checkpoint, model)
    what = f"the student, made again from {checkpoint} and {like / 'config.json'},"
    check_names(checkpoints.names(checkpoint), model, what)
    if (trained := read_digests(folder.digests)) is not None:
        check_digests(trained, model, what)
    return finalize_student(experiment, model.eval(), text, folder) if final else model.eval()


def _like(folder: Path, form: StudentForm) -> nn.Module:
    """A student of the shape of an exported folder, with weights still to be loaded."""
    check_files(str(folder), "student")
    with error_context("student", value=str(folder), way_out="put the folder back from a copy"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=form.trust)
    if hasattr(config, "quantization_config"):  # the weights come from the checkpoint, which is not packed
        del config.quantization_config
    model = empty_student(form, config)
    load_generation_settings(folder, model)
    return model


def exported_checkpoint(folder: RunFolder) -> Path:
    """The checkpoint that a finished run's student is taken from: the last one, or that of the best evaluation.

    Raises:
        RunFailed: it is missing or damaged.
    """
    newest = checkpoints.latest(folder.checkpoints)
    if newest is None:
        raise RunFailed(f"{folder.checkpoints} has no checkpoint to take the student from")
    best = folder.best.exists()
    steps = read_json(folder.best if best else folder.plan).get("step" if best else "steps")
    found = folder.checkpoints / checkpoints.NAME.format(steps if isinstance(steps, int) else 0)
    if not found.is_dir():
        found, wrong = newest, (f"step {steps} had the best evaluation" if best else f"the run went on to step {steps}"
                                ) + ", whose checkpoint is not there"
    else:
        wrong = checkpoints.wrong_with(found)
    if wrong is not None:
        raise RunFailed(f"the student cannot be taken from {found}: {wrong}.\n  -> put that folder back from a copy; "
                        "or run the experiment again, in another run.folder")
    return found


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
        "student": {**student_entry(experiment.student, experiment.export, folder.unverified), "compare": True,
                    "trust_remote_code": trust}}
    if experiment.teacher is not None and (text.classes or reads_alike(experiment.teacher, experiment.student, text)):
        models["teacher"] = {"path": experiment.teacher.path, "revision": experiment.teacher.revision,
                             "dtype": experiment.teacher.dtype,
                             "trust_remote_code": experiment.teacher.trust_remote_code,
                             "pad_token_id": getattr(text.tokenizer, "pad_token_id", None)}
    if RunFolder(folder.control).student.exists():
        models["control"] = {**student_entry(experiment.student, experiment.export, RunFolder(folder.control).student),
                             "trust_remote_code": trust}
    client = client_of(experiment.export, experiment.data.task)
    with working(experiment.name, "reloading in a fresh process and comparing", at_once=True):
        found, logits = ask_about(models, experiment.training.micro_batch, experiment.report, text, exported,
                                  device.type, client=client,
                                  **_request(experiment.data, experiment.report, folder, text))
    for name, entry in found.items():
        path = Path(models[name].get("adapter", models[name]["path"]))
        files = [*weight_files(path), *weight_files(path / BASE)]
        # The plan knows the size of the teacher's files even if they are not local.
        kept = read_json(folder.plan).get("teacher_bytes") if name == "teacher" else None
        entry["bytes_on_disk"] = sum(file.stat().st_size for file in files) or kept or entry["parameter_bytes"]
    receipt = make_receipt(found["student"], trained, exported, logits["student"],
                           [*weight_files(folder.unverified), *weight_files(folder.unverified / BASE)],
                           experiment.export.tolerance, libraries=libraries_of(experiment.student, experiment.export),
                           notes=[*export_notes(experiment.student, experiment.export, trained, exported),
                                  *_unpacked(folder.unverified)])
    receipt.write(folder.unverified / "receipt.json")
    if not receipt.holds and experiment.export.adapter == "separate":
        raise RunFailed(differs(receipt, folder.unverified, "export.tolerance", None))
    if not receipt.holds:
        reference = freeze_quantized(
            rebuilt(experiment, folder, folder.unverified, text), DTYPES[experiment.export.dtype]
        )
        where = first_difference(str(folder.unverified), reference, text, receipt.tolerance, client)
        raise RunFailed(differs(receipt, folder.unverified, "export.tolerance", where))
    write_atomically(folder.comparison, json.dumps(found, indent=2) + "\n")
    if folder.student.exists():
        shutil.rmtree(folder.student)
    os.rename(folder.unverified, folder.student)
    tell_receipt(experiment.name, receipt, folder.student)
    say_rise(folder, experiment.model_dump(mode="json"))


def _unpacked(folder: Path) -> list[str]:
    """A note if a folder holds fewer bits than it stores: kernels of convolutions take a byte for each number."""
    file = folder / "config.json"  # an adapter alone has none
    config = (read_json(file).get("quantization_config") or {}) if file.exists() else {}
    if config.get("format") != "naive-quantized":
        return []
    bits = {group["weights"]["num_bits"] for group in config["config_groups"].values()} - {8}
    return [f"its numbers of {min(bits)} bits take a byte each: transformers reads no packed format of convolutions"
            ] if bits else []


def _request(data: Data, report: Report, folder: RunFolder, text: PreparedData) -> dict[str, Any]:
    """What the fresh process is told besides: the task of classifiers, or the prompts of language models."""
    if not data.is_language:
        return {"task": data.task}
    return {"tokenizer": str(folder.unverified), "prompts": sample_prompts(report.texts, text.tokenizer, data)}


def some_text(text: PreparedData) -> list[str]:
    """Text decoded from the first held-out rows and, unless the data is streamed, the first training rows."""
    rows = list(text.held_out["input_ids"][:SHOWN])
    if not isinstance(text.train, StreamedRows):
        rows += [text.train[number]["input_ids"] for number in range(min(SHOWN, len(text.train)))]
    return [text.tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows]


@torch.no_grad()
def logits_of(model: nn.Module, text: PreparedData) -> torch.Tensor:
    """(rows, length, vocabulary) fp32 logits on the first held-out rows, without autocast, on the CPU.

    Of a classifier (rows, classes), or (rows, length, classes) if each token has one.
    """
    model.eval()
    device = next(model.parameters()).device
    if text.classes:
        rows = compared_rows(len(text.held_out["targets"]), text.held_out["targets"][0].numel() * len(text.classes))
        parts = [model_inputs({name: tensor[begin:min(begin + ROWS, rows)].to(device)
                               for name, tensor in text.held_out.items()}) for begin in range(0, rows, ROWS)]
        return torch.cat([model(**part).logits.float().cpu() for part in parts])
    rows, length = comparison_shape(*text.held_out["input_ids"].shape, model.config.vocab_size)
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
        ask_about({"student": {"path": path, "layers": str(file)}}, 1, Report(), text, None, "cpu", client=client,
                  tokenizer=path, task=task_of(model.config))
        theirs = load_file(file)
    except (RunFailed, OSError):
        return None
    finally:
        file.unlink(missing_ok=True)
    part = {name: tensor[:1] for name, tensor in text.held_out.items()}
    with torch.no_grad():
        ours = layer_outputs(model.eval(), lambda: model(**model_inputs(part)))
    for name, output in ours.items():
        if name in theirs and theirs[name].shape == output.shape:
            share = float((theirs[name] - output).abs().max() / output.abs().max().clamp(min=1e-30))
            if not share <= tolerance:
                return name, share
    return None


def ask_about(models: dict[str, dict[str, Any]], micro_batch: int, sample: Report, text: PreparedData,
           exported: torch.Tensor | None, device: str, **more: Any
           ) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    rows, length = (1, 1) if exported is None else (*exported.shape[:2], 1)[:2]
    try:
        return ask_client(
            models, text.held_out, device=device, threads=torch.get_num_threads(),
            micro_batch=micro_batch, logit_rows=rows, logit_length=length,
            prompt=sample.texts[0], sample_tokens=sample.sample_tokens, **more)
    except RuntimeError as error:
        raise RunFailed(str(error)) from error


def differs(receipt: Receipt, kept: Path, tolerance: str, where: tuple[str, float] | None) -> str:
    hint = "; raise export.tolerance only if you know why they may differ" if tolerance == "export.tolerance" else ""
    first = "" if where is None else f"; the first layer that differs is {where[0]}, by {where[1]:.3g} of its output"
    difference, how = receipt.largest_difference, ""
    if receipt.cache_difference is not None and not receipt.cache_difference <= difference:
        difference, how = receipt.cache_difference, ", when it goes on from its cache,"
    return (f"the reloaded student differs from the trained one{how} by {difference:.3g} (largest logit "
            f"{receipt.largest_logit:.3g}), over {tolerance} {receipt.tolerance:g}{first}; it is kept in {kept}\n"
            f"  -> the training checkpoint is safe{hint}")


def tell_receipt(name: str, receipt: Receipt, folder: Path) -> None:
    console.print(f"{name}: receipt of {folder.name}: {readable(receipt.bytes_on_disk)} on disk, "
                  f"{in_words(receipt.figures or {'bits_per_byte': receipt.bits_per_byte})}, largest logit difference "
                  f"{receipt.largest_difference:g}")
