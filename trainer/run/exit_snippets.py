"""Code that runs an exported student with early exits, for model cards: what is shown runs as it stands."""

from __future__ import annotations

from trainer.run.classifier_snippets import PIXELS, Classified, example_inputs_code
from trainer.run.load_snippets import FETCH, TOKENS, Prompt, ids_code, place

RUNTIME = "early-exit"


def exit_snippet(path: str, example: Prompt | Classified, *, hub: bool = False) -> tuple[str, str]:
    """(language, code) that classifies or continues an example and says how many blocks that took.

    Args:
        path: the student's folder, or with `hub` the id of its repository.
        example: a text to continue, a chat to answer, or what a classifier is given.
    """
    if isinstance(example, Classified):
        return "python", _head(path, hub, example.is_image) + _classifies(example)
    return "python", _head(path, hub, False) + f"""\
tokenizer = AutoTokenizer.from_pretrained(path)
{ids_code(example, "pt")}
written = model.generate(inputs["input_ids"], max_new_tokens={TOKENS})
print(tokenizer.decode(written.ids, skip_special_tokens=True))
print(sum(written.blocks), "of", len(model.blocks) * len(written.blocks), "blocks computed")
"""


def _head(path: str, hub: bool, image: bool) -> str:
    imports = "import json\n" if image else ""
    libraries = "import numpy as np\nimport torch\nfrom PIL import Image\n" if image else \
        "from transformers import AutoTokenizer\n"
    return f"""\
{imports}import sys

{FETCH * hub}{libraries}
path = {place(path, hub)}
sys.path.insert(0, path)
from early_exit import load

model = load(path)
"""


def _classifies(given: Classified) -> str:
    return f"""\
{example_inputs_code(given, "pt")}{PIXELS * given.is_image}answer = model.classify(**inputs)
names = model.model.config.id2label
print([names[int(one)] for one in answer.logits[0].argmax(-1).flatten()])
print(int(answer.blocks[0]), "of", len(model.blocks), "blocks computed")
"""
