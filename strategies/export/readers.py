"""Further runtimes that read a student's exported files, each with a receipt of its own on one long text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strategies.export.receipt import ask_client, digest_of

POSITIONS = 32  # of the text at which predictions are compared; all tokens are read
MOST = 4096  # tokens of the text: attention to all of them takes seconds for small models, and minutes for large ones
TEXT_BYTES = 2**30  # most bytes of the text's logits
OF_LENGTH = ("dynamic", "longrope")  # rotary frequencies that depend on how long a text is


@dataclass(frozen=True)
class Reader:
    """A runtime that reads files which are exported for another one.

    Attributes:
        of: the runtime in whose format the files are.
        client: the script that loads them in a fresh process.
        package: the package with the runtime.
        compares: what the client gives: logits or log-probabilities.
    """

    of: str
    client: str
    package: str
    compares: str = "logits"


READERS = {
    "llama-cpp": Reader("gguf", "llama_cpp_client.py", "xllamacpp", "log-probabilities"),
    "openvino": Reader("onnx", "openvino_client.py", "openvino"),
    "ctranslate2": Reader("ctranslate2", "ctranslate2_client.py", "ctranslate2"),  # always, of its own files
    "executorch": Reader("executorch", "executorch_client.py", "executorch"),  # likewise
}


@dataclass(frozen=True)
class ReaderReceipt:
    """How the predictions of a further runtime compare with the student's, on one text.

    Attributes:
        sha256: of the concatenated weight files.
        reader: a key of `READERS`.
        compares: what was compared: logits or log-probabilities.
        tokens: length of the text.
        tokens_compared: positions of the text at which predictions were compared, from the first to the last.
        slowest_turn: turns that the slowest rotary frequency makes in the text; None for a model without them. Below
            1 the text is as long as the model's context, or as a comparison may be.
        largest_difference: between the reader's numbers and those of the student in the dtype of the export.
        mean_difference: mean of the same differences.
        largest_value: the scale of the differences.
        argmax_agreement: share of compared positions where both predict the same token.
        tolerance: largest difference allowed, as a share of `largest_value`.
        tokens_per_second: of reading the text.
        versions: of the runtime.
    """

    sha256: str
    reader: str
    compares: str
    tokens: int
    tokens_compared: int
    slowest_turn: float | None
    largest_difference: float
    mean_difference: float
    largest_value: float
    argmax_agreement: float
    tolerance: float
    tokens_per_second: float
    versions: dict[str, str]

    @property
    def holds(self) -> bool:
        """Whether the runtime reproduces the student within `tolerance`."""
        return self.largest_difference <= self.tolerance * max(self.largest_value, 1e-30)

    def write(self, file: Path) -> None:
        """Write as JSON."""
        file.write_text(json.dumps({**asdict(self), "holds": self.holds}, indent=2) + "\n")


def check_reader(name: str, to: Sequence[str]) -> None:
    """Raise `ValueError` if a reader is not installed, or what it reads is not exported.

    Args:
        name: a key of `READERS`.
        to: runtimes that the student is exported for.
    """
    reader = READERS[name]
    if reader.of not in to:
        raise ValueError(f"{name} reads what is exported for {reader.of}, which `export.to` does not name")
    if not is_installed(reader.package):
        raise ValueError(f"{name} needs a package that is not installed: pip install 'limbeck[{name}]'")


def is_installed(package: str) -> bool:
    """Whether a distribution is installed.

    Asking for its module would not do: ExecuTorch's is a namespace, and so is any folder of that name on the path.
    """
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def receipt_name(reader: str) -> str:
    """Name of the file with the receipt of a reader."""
    return f"receipt-{reader}.json"


def long_text(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """(1, tokens) one text in which every rotary frequency turns once, if the model's context is that long.

    Wrong frequencies of the slow pairs show only far from the beginning. What the text says does not matter: it is the
    rows (rows, length) one after the other, repeated as often as it takes.
    """
    turn, config, vocabulary = slowest_turn(model, 1), model.config.get_text_config(), model.config.vocab_size
    wanted = rows.shape[1] if turn is None or _depends_on_length(config) else math.ceil(1 / turn)
    context = (getattr(config, "max_position_embeddings", None) or rows.shape[1]) - 1  # llama.cpp says one more
    length = max(2, min(wanted, context, MOST, TEXT_BYTES // (4 * vocabulary)))
    text = rows.flatten()
    return text.repeat(-(-length // len(text)))[:length][None]


def slowest_turn(model: nn.Module, tokens: int) -> float | None:
    """Turns that the slowest rotary frequency of a model makes in so many tokens; None without such frequencies."""
    found = [float(buffer.min()) for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    return tokens * min(found) / (2 * math.pi) if found else None


def _depends_on_length(config: Any) -> bool:
    return any(kind in json.dumps(getattr(config, "rope_parameters", None), default=str) for kind in OF_LENGTH)


@torch.no_grad()
def read_by(name: str, path: Path, files: Sequence[Path], reference: nn.Module, rows: torch.Tensor, tolerance: float,
            **request: Any) -> ReaderReceipt:
    """Have a further runtime read exported files in a fresh process, and compare it with the student.

    Args:
        name: a key of `READERS`.
        path: the exported file or folder.
        files: the weight files among it.
        reference: the student that the files have to reproduce.
        rows: (rows, length) held-out token ids.
        tolerance: see `ReaderReceipt`.
        request: `threads`, and for llama.cpp `letter`, a token of whole letters.

    Raises:
        RuntimeError: the runtime could not load or run the student.
    """
    reader, text = READERS[name], long_text(reference, rows)
    kept = torch.linspace(0, text.shape[1] - 1, POSITIONS).round().long().unique()
    device = next(reference.parameters()).device
    ours = reference(input_ids=text.to(device), position_ids=torch.arange(text.shape[1], device=device)[None],
                     use_cache=False).logits[0].float().cpu()[kept]
    if reader.compares == "log-probabilities":
        ours = ours.log_softmax(-1)
    found, scores = ask_client({"student": {"path": str(path), "compare": True}}, {"input_ids": text, "kept": kept},
                               reader.client, vocabulary=ours.shape[-1], **request)
    theirs = scores["student"]
    difference = (ours - theirs).abs()
    return ReaderReceipt(
        digest_of(files), name, reader.compares, text.shape[1], len(kept),
        slowest_turn(reference, text.shape[1]), float(difference.max()), float(difference.mean()),
        float(ours.abs().max()), float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()), tolerance,
        found["student"]["tokens_per_second"], {reader.package: version(reader.package)})
