"""Where text is cut before byte pairs are merged, by llama.cpp's names for it. Imports nothing: clients read it too.

For each name, what a tokenizer.json has for the same (`steps`, in order), and whether a word that is a token is taken
whole, without a look at the merges (`ignore_merges`).
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
