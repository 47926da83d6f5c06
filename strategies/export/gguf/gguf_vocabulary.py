"""Convert a tokenizer to GGUF: tokens, merges, and the pre-tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from strategies.export.clients.gguf_pretokenizers import PRETOKENIZERS

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's `llama_token_type`


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer.

    Attributes:
        tokens: strings by id, one for each of the model's logits.
        types: llama.cpp's type of each token.
        merges: pairs separated by a space, in order of priority.
        pretokenizer: llama.cpp's name of the pre-tokenizer.
        special: ids of `bos`, `eos`, `pad` and `unk`, as far as they exist.
        add_bos, add_eos: whether they are added to text.
        chat_template: a Jinja template, or None.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pretokenizer: str
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """Convert a fast tokenizer to its GGUF form.

    Args:
        tokenizer: a transformers tokenizer.
        size: number of the model's logits; ids without a token are marked unused.

    Raises:
        ValueError: llama.cpp has no equivalent tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json, which tokens and merges are taken from")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    pretokenizer = _pretokenizer(spec)
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    for token, number in [*model["vocab"].items(), *((entry["content"], number) for number, entry in added.items())]:
        if number >= size:
            raise ValueError(f"token {number}, {token!r}, is beyond the model's vocabulary of {size}")
        tokens[number] = token
        types[number] = NORMAL if number not in added else CONTROL if added[number]["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = {name: number for name in ("bos", "eos", "pad", "unk")
               if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None}
    ids, template = tokenizer("a")["input_ids"], getattr(tokenizer, "chat_template", None)
    return Vocabulary(tokens, types, merges, pretokenizer, special, ids[0] == special.get("bos"),
                      ids[-1] == special.get("eos"), template if isinstance(template, str) else None)


def _pretokenizer(spec: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json, found by comparing its definition.

    llama.cpp's own converter goes by the tokens of a test string, and so confuses two that differ only on other text.
    """
    model, normalizer = spec["model"], spec["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix") or model.get(
            "end_of_word_suffix"):
        raise ValueError(f"the tokenizer is a {model['type']} that does not work on bytes alone: GGUF is written with "
                         "byte-level BPE, which `train_vocabulary` trains")
    # NFC is accepted: GGUF files of models that have it do not record it, as llama.cpp expects composed text.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ValueError(f"the tokenizer changes text first ({normalizer['type']}), and llama.cpp does not")
    steps = spec["pre_tokenizer"] or {}
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"}  # affects offsets, not tokens
             for step in steps.get("pretokenizers", [steps])]
    for name, known in PRETOKENIZERS.items():
        if known == {"steps": steps, "ignore_merges": bool(model.get("ignore_merges"))}:
            return name
    raise ValueError(f"llama.cpp does not cut text as this tokenizer does, {json.dumps(steps)}; it is known for "
                     f"{', '.join(PRETOKENIZERS)}")
