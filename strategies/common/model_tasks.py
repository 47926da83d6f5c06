"""What a transformers model is for, by the class that its configuration names."""

from __future__ import annotations

from typing import Any

ENDINGS = {"ForSequenceClassification": "sequence_classification", "ForTokenClassification": "token_classification",
           "ForImageClassification": "image_classification"}


def task_of(config: Any) -> str:
    """The task of a configuration: one of `ENDINGS`, or causal_lm where its class has none of these endings."""
    names = getattr(config, "architectures", None) or [""]
    return next((task for ending, task in ENDINGS.items() if names[0].endswith(ending)), "causal_lm")


def takes_segments(config: Any) -> bool:
    """Whether a model is told by `token_type_ids` which of two texts a token is of."""
    return (getattr(config, "type_vocab_size", None) or 0) > 1 or getattr(config, "model_type", "") == "xlnet"
