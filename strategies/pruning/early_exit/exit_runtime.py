"""Run a model with early exits, with PyTorch and transformers alone.

    python early_exit.py FOLDER --text "a text to classify or to continue" [--threshold 0.9]
    python early_exit.py FOLDER --image picture.png

    from early_exit import load
    model = load("FOLDER")
    answer = model.classify(input_ids=..., attention_mask=...)          # or pixel_values=...
    answer.logits, answer.blocks                                        # (rows, classes), blocks computed of each row
    written = model.generate(input_ids, max_new_tokens=40)              # a language model, one row
    written.ids, written.blocks

An exit is a small head after a block. An input leaves at the first exit whose largest softmax probability reaches the
threshold, and what lies behind is not computed. Above 1 nothing leaves, and this is the plain model.

Rows of a classifier that have left are dropped from the batch: the model is called again with those that stay, from the
block at which they are, so that its masks fit them. Only its embeddings are computed again for that.

A token of a language model leaves by itself. Later tokens attend to it in the blocks that it skipped, too: its keys and
values there are computed from the state with which it left, and no more of those blocks (Schuster et al. 2022, CALM).
The prompt goes through all blocks.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache

CLASSES = {"causal_lm": "AutoModelForCausalLM", "sequence_classification": "AutoModelForSequenceClassification",
           "token_classification": "AutoModelForTokenClassification",
           "image_classification": "AutoModelForImageClassification"}


@dataclass
class Answer:
    """Of a classifier: logits (rows, classes), or (rows, tokens, classes), and the blocks computed of each row."""

    logits: torch.Tensor
    blocks: torch.Tensor


@dataclass
class Written:
    """Of a language model: the new tokens (n,), the blocks computed for each, and the logits (n, vocabulary)."""

    ids: torch.Tensor
    blocks: list[int]
    logits: torch.Tensor


class ClassifierExit(nn.Module):
    """Norm, pooling, and a linear layer."""

    def __init__(self, width: int, classes: int, pooling: str) -> None:
        super().__init__()
        self.norm, self.linear, self.pooling = nn.LayerNorm(width), nn.Linear(width, classes), pooling

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        hidden = self.norm(hidden)
        if self.pooling == "first":
            hidden = hidden[:, 0]
        elif self.pooling == "last" and mask is None:
            hidden = hidden[:, -1]
        elif self.pooling == "last":
            places = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), places]
        elif self.pooling == "mean":
            kept = torch.ones_like(hidden[..., :1]) if mask is None else mask.to(hidden.dtype)[..., None]
            hidden = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)
        return self.linear(hidden)


class Stop(Exception):
    """Ends a forward of the model where nothing of the rest is needed."""


class FilledCache(DynamicCache):
    """A cache that can end a block as soon as it has its keys and values."""

    only_fill = False

    def update(self, *args: Any, **kwargs: Any) -> Any:
        found = super().update(*args, **kwargs)
        if self.only_fill:
            raise Stop
        return found


class EarlyExitModel:
    """A model of transformers with exits.

    Attributes:
        model: the plain model.
        exits: its exits, by the number of the block before them.
        settings: exits.json.
    """

    def __init__(self, model: nn.Module, exits: dict[int, nn.Module], settings: dict[str, Any]) -> None:
        self.model, self.exits, self.settings = model.eval(), exits, settings
        self.blocks: Any = model.get_submodule(settings["blocks"])

    @torch.no_grad()
    def classify(self, threshold: float | None = None, **inputs: torch.Tensor) -> Answer:
        """Classify a batch. Each row leaves by itself.

        Args:
            threshold: null takes that of the folder.
            inputs: arguments of the model, each with one entry for a row.
        """
        limit = self.settings["threshold"] if threshold is None else threshold
        rows = torch.arange(len(next(iter(inputs.values()))))
        logits: list[Any] = [None] * len(rows)
        blocks = torch.full((len(rows),), len(self.blocks))
        done, hidden = 0, None
        while len(rows):
            part = {name: tensor[rows.to(tensor.device)] for name, tensor in inputs.items()}
            found, leaves, done, hidden = self._until_some_leave(part, limit, done, hidden)
            for number, row in enumerate(rows.tolist()):
                if leaves[number]:
                    logits[row], blocks[row] = found[number], done
            rows = rows[~leaves.cpu()]
        return Answer(torch.stack(logits), blocks)

    def _until_some_leave(self, inputs: dict[str, torch.Tensor], threshold: float, done: int,
                          start: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor | None]:
        """Run blocks from number `done` on until rows leave.

        Returns the logits of all rows, which of them leave, the number of blocks done, and the hidden states of those
        that stay.
        """
        mask, found = inputs.get("attention_mask"), None

        def run(number: int, own: Callable, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal found
            if number < done:
                return self._as_block(hidden)
            output = own(start if number == done and start is not None else hidden, *args, **kwargs)
            hidden = self._hidden(output)
            if number in self.exits and threshold <= 1:
                logits = self.exits[number](hidden, mask)
                leaves = confidence(logits, mask) >= threshold
                if leaves.any():
                    found = logits, leaves, number + 1, hidden[~leaves]
                    raise Stop
            return output

        with self._running(run):
            try:
                logits = self.model(**inputs).logits
            except Stop:
                assert found is not None
                return found
        return logits, torch.ones(len(logits), dtype=torch.bool), len(self.blocks), None

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, max_new_tokens: int = 40, threshold: float | None = None,
                 follow: torch.Tensor | None = None) -> Written:
        """Continue one row with the most probable tokens.

        Args:
            input_ids: (1, tokens).
            threshold: null takes that of the folder.
            follow: (n,) tokens to write whatever is probable, to see how sure the model is of them.
        """
        if len(input_ids) != 1:
            raise ValueError(f"{len(input_ids)} rows: each token leaves at its own block; give one row at a time")
        limit = self.settings["threshold"] if threshold is None else threshold
        cache, ends = FilledCache(config=self.model.config), self._ends()
        scores, depth = self._next(input_ids, cache, 2.0)
        ids, depths, logits = [], [depth], [scores]
        steps = max_new_tokens if follow is None else len(follow)
        for number in range(steps):
            token = scores.argmax() if follow is None else follow[number]
            ids.append(token)
            if follow is None and (int(token) in ends or number == steps - 1):
                break
            scores, depth = self._next(token.view(1, 1).to(input_ids.device), cache, limit)
            depths.append(depth)
            logits.append(scores)
        return Written(torch.stack(ids), depths, torch.stack(logits))

    def _next(self, ids: torch.Tensor, cache: FilledCache, threshold: float) -> tuple[torch.Tensor, int]:
        """(vocabulary,) logits behind the last of some tokens, and the number of blocks computed."""
        left: tuple[torch.Tensor, int] | None = None

        def run(number: int, own: Callable, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left is None:
                output = own(hidden, *args, **kwargs)
                if number in self.exits and threshold <= 1:
                    logits = self._logits(self.exits[number](self._hidden(output)[:, -1:]))[0, -1]
                    if confidence(logits[None])[0] >= threshold:
                        left = logits, number + 1
                return output
            cache.only_fill = True
            try:
                own(hidden, *args, **kwargs)
            except Stop:
                pass
            finally:
                cache.only_fill = False
            if number == len(self.blocks) - 1:
                raise Stop
            return self._as_block(hidden)

        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        with self._running(run):
            try:
                logits = self.model(input_ids=ids, use_cache=True, **{name: cache}).logits[0, -1]
            except Stop:
                assert left is not None
                return left
        return logits, len(self.blocks)

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits of the model's own head, with its scale and soft cap."""
        scores, cap = self.model.get_output_embeddings()(normed) * self.settings["scale"], self.settings["cap"]
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def _ends(self) -> list[int]:
        """The tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    @contextmanager
    def _running(self, run: Callable) -> Iterator[None]:
        """Within the context, a block with number n computes `run(n, its own forward, ...)`."""
        def replaced(number: int, own: Callable) -> Callable:
            return lambda *args, **kwargs: run(number, own, *args, **kwargs)

        before = [vars(block).get("forward") for block in self.blocks]
        for number, block in enumerate(self.blocks):
            block.forward = replaced(number, block.forward)
        try:
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                del block.forward
                if own is not None:
                    block.forward = own

    def _hidden(self, output: Any) -> torch.Tensor:
        """The hidden states in what a block returns, which some models have in a tuple."""
        self._rest = len(output) - 1 if isinstance(output, tuple) else None
        return output if self._rest is None else output[0]

    def _as_block(self, hidden: torch.Tensor) -> Any:
        """Hidden states as a block returns them."""
        return hidden if self._rest is None else (hidden, *[None] * self._rest)


def confidence(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(rows,) largest probability; of a row with logits for each token that of its least sure one, padding left out."""
    sure = logits.float().softmax(-1).amax(-1)
    if sure.ndim == 1:
        return sure
    return (sure if mask is None else sure.masked_fill(mask == 0, 1.0)).amin(1)


def load(folder: str | Path, dtype: Any = "auto", device: str = "cpu") -> EarlyExitModel:
    """Load a folder with a model of transformers, exits.json and exits.safetensors. No code of the folder is run."""
    folder = Path(folder)
    settings = json.loads((folder / "exits.json").read_text())
    model = getattr(transformers, CLASSES[settings["task"]]).from_pretrained(folder, dtype=dtype, use_safetensors=True)
    weights, exits = load_file(folder / "exits.safetensors"), {}
    for layer in settings["layers"]:
        own = {name.split(".", 1)[1]: tensor for name, tensor in weights.items() if name.startswith(f"{layer}.")}
        if settings["task"] == "causal_lm":
            exit: nn.Module = copy.deepcopy(model.get_submodule(settings["norm"]))
            own = {name.removeprefix("norm."): tensor for name, tensor in own.items()}
        else:
            exit = ClassifierExit(own["linear.weight"].shape[1], len(own["linear.weight"]), settings["pooling"])
        exit.load_state_dict(own)
        exits[layer] = exit.to(device=device, dtype=model.dtype).eval()
    return EarlyExitModel(model.to(device), exits, settings)


def pixels_of(folder: Path, image: Path) -> torch.Tensor:
    """(1, channels, height, width) of an image file, scaled as the folder's preprocessor_config.json says."""
    from PIL import Image

    how = json.loads((folder / "preprocessor_config.json").read_text())
    size = how["size"]["width"], how["size"]["height"]
    picture = Image.open(image).convert("RGB" if len(how["image_mean"]) == 3 else "L").resize(size, 2)
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size[1], size[0], -1) / 255
    return ((values - torch.tensor(how["image_mean"])) / torch.tensor(how["image_std"])).permute(2, 0, 1)[None]


def main() -> None:
    """Classify or continue what the command line gives."""
    parser = argparse.ArgumentParser(description="Run a model with early exits.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", help="to classify, or to continue")
    parser.add_argument("--image", type=Path, help="to classify")
    parser.add_argument("--threshold", type=float, help="leave from this probability on; left out: the folder's")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    asked = parser.parse_args()
    model = load(asked.folder)
    whole = len(model.blocks)
    if model.settings["task"] == "causal_lm":
        tokenizer = transformers.AutoTokenizer.from_pretrained(asked.folder)
        ids = tokenizer(asked.text, return_tensors="pt").input_ids
        written = model.generate(ids, asked.max_new_tokens, asked.threshold)
        print(tokenizer.decode(torch.cat([ids[0], written.ids]), skip_special_tokens=True))
        print(f"{sum(written.blocks)} of {whole * len(written.blocks)} blocks computed")
        return
    if asked.image is not None:
        inputs = {"pixel_values": pixels_of(asked.folder, asked.image)}
    else:
        inputs = transformers.AutoTokenizer.from_pretrained(asked.folder)(asked.text, return_tensors="pt")
    answer = model.classify(asked.threshold, **inputs)
    names, said = model.model.config.id2label, answer.logits.argmax(-1)[0]
    print(", ".join(names[int(one)] for one in said.flatten()))
    print(f"{int(answer.blocks[0])} of {whole} blocks computed")


if __name__ == "__main__":
    main()
