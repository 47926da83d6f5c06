"""The tokenizer that is saved with a model: it gives its users what that model was trained on."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from strategies.common.model_tasks import takes_segments, task_of


def saved_processor(processor: Any, model: nn.Module) -> Any:
    """The processor to save with a model: of a classifier of texts, a copy of the tokenizer that names its inputs.

    A tokenizer saves the names of its inputs only if it was made with them, and otherwise takes those of its class when
    it is loaded: pairs of texts would silently lose `token_type_ids`, or a model get some that it does not know.

    Args:
        processor: a tokenizer whose `model_input_names` are those of the data, or anything else, which is returned.
        model: a transformers model.
    """
    names = getattr(processor, "model_input_names", None)
    if names is None or task_of(model.config) == "causal_lm" or not hasattr(processor, "init_kwargs"):
        return processor
    own = copy.copy(processor)
    own.model_input_names = [name for name in names if name != "token_type_ids" or takes_segments(model.config)]
    own.init_kwargs = {**processor.init_kwargs, "model_input_names": own.model_input_names}
    return own
