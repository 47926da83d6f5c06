"""llama.cpp's pre-tokenizers by name. This module imports nothing, since clients read it too.

Each has the equivalent `steps` of a tokenizer.json, in order, and `ignore_merges`: whether a word that is itself a
token is kept whole without applying merges.
"""

_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
          r"|\s+")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def _split(digits: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": _WORDS % digits}, "behavior": "Isolated", "invert": False}


PRETOKENIZERS = {
    "gpt-2": {"steps": [_BYTES | {"use_regex": True}], "ignore_merges": False},
    "smollm": {"steps": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
               "ignore_merges": False},
    "qwen2": {"steps": [_split(r"\p{N}"), _BYTES], "ignore_merges": False},
    "llama-bpe": {"steps": [_split(r"\p{N}{1,3}"), _BYTES], "ignore_merges": True},
}
