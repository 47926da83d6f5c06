"""The receipt of an export: a fresh process reloads the student, and its logits are compared with training's."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TRANSFORMERS = ("torch", "transformers", "compressed-tensors", "safetensors")
CACHED = " from its cache"
FIGURES = ("accuracy", "macro_f1", "calibration_error", "cross_entropy", "rows", "rows_per_second")  # of classifiers
LOGIT_BYTES = 64 * 2**20  # most bytes of fp32 logits to compare; the larger the vocabulary, the fewer tokens


@dataclass(frozen=True)
class Receipt:
    """What was exported, and how it compares with the student after a reload in a separate process.

    Attributes:
        sha256: of the concatenated weight files.
        bytes_on_disk: of the weight files.
        parameters: number of weights, tied ones counted once.
        bits_per_byte: of the reloaded file on held-out text; None for a classifier.
        tokens_per_second: of forward passes of the reloaded file; None for a classifier.
        largest_difference: between logits of the reloaded file and of the student in the dtype of the export.
        mean_difference: mean of the same differences.
        difference_from_training: largest difference from the fake-quantized model in training, in fp32. It equals
            `largest_difference` in a float32 export; in half precision it includes the rounding of all weights that
            are not quantized.
        largest_logit: the scale of the differences.
        argmax_agreement: share of positions where file and model in training predict the same token.
        tokens_compared: number of positions compared.
        tolerance: largest difference allowed, as a share of `largest_logit`.
        versions: of the libraries that loaded it.
        notes: what the file cannot represent of the student, and where that matters.
        cache_difference: as `largest_difference`, where the file computes tokens one after the other and goes on from
            its cache; None if it was not asked to.
        figures: of a classifier's reloaded file on held-out rows: accuracy, macro_f1, calibration_error, cross_entropy,
            rows, rows_per_second. In JSON they stand beside the rest.
    """

    sha256: str
    bytes_on_disk: int
    parameters: int
    bits_per_byte: float | None
    tokens_per_second: float | None
    largest_difference: float
    mean_difference: float
    difference_from_training: float
    largest_logit: float
    argmax_agreement: float
    tokens_compared: int
    tolerance: float
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)
    cache_difference: float | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the file reproduces the student within `tolerance`."""
        differences = [self.largest_difference, self.cache_difference or 0.0]
        return all(difference <= self.tolerance * max(self.largest_logit, 1e-30) for difference in differences)

    def write(self, file: Path) -> None:
        """Write as JSON."""
        own = asdict(self)
        figures = own.pop("figures")
        file.write_text(json.dumps({**own, **figures, "holds": self.holds}, indent=2) + "\n")


def compared_rows(rows: int, numbers: int) -> int:
    """How many held-out rows of a classifier are compared, of `numbers` logits each: at most `LOGIT_BYTES` of them."""
    return max(1, min(rows, LOGIT_BYTES // (4 * numbers)))


def comparison_shape(rows: int, sequence: int, vocabulary: int) -> tuple[int, int]:
    """(rows, tokens) of held-out text whose logits are compared, at most `LOGIT_BYTES` of them."""
    tokens = max(2, LOGIT_BYTES // (4 * vocabulary))
    length = min(sequence, tokens)
    return max(1, min(rows, tokens // length)), length


def ask_client(
    models: dict[str, dict[str, Any]],
    held_out: dict[str, torch.Tensor],
    client: str = "transformers_client.py",
    **request: Any,
) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Load and measure models in a fresh process.

    Args:
        models: by name, with `path`, and optionally `revision`, `dtype`, and `compare: True` to get its logits.
        client: the script in `clients` for the runtime.
        held_out: held-out rows as the data set gives them.
        request: `device`, `threads`, `micro_batch`, `logit_rows`, `logit_length`, `sample_tokens`, and `prompt`, a text
            to continue; for transformers also `prompts`, each of which is a text or a chat.

    Returns:
        For each model the result of the client's `measure`, and the logits of those with `compare`, by name; those
        that a client has from a cache besides, by the name with `CACHED` appended.

    Raises:
        RuntimeError: the client could not load or run a model; the message ends with the end of its stderr.
    """
    with tempfile.TemporaryDirectory(prefix="limbeck-client-") as room:
        folder = Path(room)
        save_file({name: tensor.contiguous() for name, tensor in held_out.items()}, folder / "held_out.safetensors")
        for name, model in models.items():
            if model.get("compare"):
                model["logits"] = str(folder / f"{name}.safetensors")
        (folder / "request.json").write_text(json.dumps(
            {**request, "models": models, "held_out": str(folder / "held_out.safetensors")}))
        command = [sys.executable, str(Path(__file__).with_name("clients") / client),
                   str(folder / "request.json"), str(folder / "answer.json")]
        done = subprocess.run(command, capture_output=True, text=True, env=_plain_environment())
        if done.returncode:
            raise RuntimeError("a fresh process could not use the exported model:\n" + done.stderr[-2000:])
        logits: dict[str, torch.Tensor] = {}
        for name, model in models.items():
            if "logits" in model:
                found = load_file(model["logits"])
                logits |= {name: found["logits"], **({name + CACHED: found["cached"]} if "cached" in found else {})}
        return json.loads((folder / "answer.json").read_text()), logits


def _plain_environment() -> dict[str, str]:
    """The environment without a launcher's variables: the client is a single process, not a rank."""
    prefixes = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_")
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"}
    return {name: value for name, value in os.environ.items() if name not in names and not name.startswith(prefixes)}


def make_receipt(found: dict[str, Any], trained: torch.Tensor, exported: torch.Tensor, theirs: torch.Tensor,
                 files: list[Path], tolerance: float, libraries: Sequence[str] = TRANSFORMERS,
                 notes: Sequence[str] = (), cached: torch.Tensor | None = None) -> Receipt:
    """Compare logits of the reloaded file with those of the student.

    Args:
        found: measurements of the client.
        trained: (rows, length, vocabulary) logits of the fake-quantized model in training; (..., classes) of a
            classifier.
        exported: logits of the student in the dtype of the export; equal to `trained` in float32.
        theirs: logits of the reloaded file.
        files: the weight files.
        tolerance: largest difference from `exported` allowed, as a share of the largest logit.
        libraries: packages that loaded it.
        notes: see `Receipt`.
        cached: logits of the reloaded file from its cache, if it has one.
    """
    difference = (exported - theirs).abs()
    return Receipt(
        sha256=digest_of(files),
        bytes_on_disk=sum(file.stat().st_size for file in files),
        parameters=found["parameters"],
        bits_per_byte=found.get("bits_per_byte"),
        tokens_per_second=found.get("tokens_per_second"),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        difference_from_training=float((trained - theirs).abs().max()),
        largest_logit=float(exported.abs().max()),
        argmax_agreement=float((trained.argmax(-1) == theirs.argmax(-1)).float().mean()),
        tokens_compared=trained.shape[:-1].numel(),
        tolerance=tolerance,
        versions={name: version(name) for name in libraries},
        notes=list(notes),
        cache_difference=None if cached is None else float((exported - cached).abs().max()),
        figures={name: found[name] for name in FIGURES if name in found},
    )


def is_weight_file(path: Path) -> bool:
    """Whether a file of an exported folder holds weights, whose bytes and digest a receipt has."""
    return path.suffix in (".safetensors", ".onnx", ".data", ".gguf", ".bin", ".pte")


def digest_of(files: Sequence[Path]) -> str:
    """SHA-256 of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            for block in iter(lambda: handle.read(2**20), b""):
                digest.update(block)
    return digest.hexdigest()
