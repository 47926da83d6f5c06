"""Code that loads an exported classifier, for model cards: what is shown runs as it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.run.load_snippets import FETCH, INSTALL, TRUST, place

AUTO = {"sequence_classification": "AutoModelForSequenceClassification",
        "token_classification": "AutoModelForTokenClassification",
        "image_classification": "AutoModelForImageClassification"}
TAGS = {"sequence_classification": "text-classification", "token_classification": "token-classification",
        "image_classification": "image-classification"}
KINDS = {"sequence_classification": "A classifier of texts",
         "token_classification": "A classifier of the words of texts", "image_classification": "A classifier of images"}
RUNTIMES = ("transformers", "onnx")
PIXELS = 'inputs = {"pixel_values": torch.from_numpy(pixels)}\n'


@dataclass(frozen=True)
class Classified:
    """What a classifier is given.

    Attributes:
        task: as in `data.task`.
        length: most tokens of a text.
        pair: whether it is two texts.
        size: height and width of an image in pixels.
    """

    task: str
    length: int = 512
    pair: bool = False
    size: int = 224

    @classmethod
    def of(cls, data: dict[str, Any]) -> Classified:
        """From the values of the node `data`."""
        return cls(data["task"], data["sequence_length"], data["text_pair"] is not None, data["images"]["size"])

    @property
    def is_image(self) -> bool:
        """Whether it is an image."""
        return self.task == "image_classification"


def install(runtime: str, given: Classified) -> str:
    """The command that installs what the code needs."""
    return INSTALL[runtime] + " pillow" * given.is_image


def classifier_snippet(runtime: str, path: str, given: Classified, *, hub: bool = False, trust: bool = False
                       ) -> tuple[str, str] | None:
    """(language, code) that prints the class of an example in a runtime; None for a runtime without classifiers.

    Args:
        path: the student's folder, or with `hub` the id of its repository.
        given: an example.
        trust: whether the student needs Python code that ships with it.
    """
    if runtime not in RUNTIMES:
        return None
    code = _transformers if runtime == "transformers" else _onnx
    return "python", code(path, given, hub, trust)


def _transformers(path: str, given: Classified, hub: bool, trust: bool) -> str:
    auto = AUTO[given.task]
    where = place(path, hub and given.is_image)  # whose preprocessor_config.json is read as a file
    return f"""\
{_IMPORTS * given.is_image}import torch
{(FETCH * hub + _PILLOW) * given.is_image}from transformers import {auto}{", AutoTokenizer" * (not given.is_image)}

path = {where}
model = {auto}.from_pretrained(path{TRUST * trust})
names = model.config.id2label
{example_inputs_code(given, "pt")}{PIXELS * given.is_image}\
with torch.no_grad():
    scores = model(**inputs).logits[0]
{_answer(given)}"""


def _onnx(path: str, given: Classified, hub: bool, _: bool) -> str:
    return f"""\
{_IMPORTS if given.is_image else _IMPORTS.replace(_NUMPY, "")}import onnxruntime
{FETCH * hub}{_PILLOW if given.is_image else "from transformers import AutoTokenizer" + chr(10)}
path = {place(path, hub)}
session = onnxruntime.InferenceSession(f"{{path}}/model.onnx")
with open(f"{{path}}/config.json") as file:
    names = {{int(number): name for number, name in json.load(file)["id2label"].items()}}
{example_inputs_code(given, "np")}{'inputs = {"pixel_values": pixels}' + chr(10) if given.is_image else ""}\
scores = session.run(["logits"], dict(inputs))[0][0]
{_answer(given)}"""


_NUMPY, _PILLOW = "import numpy as np\n", "from PIL import Image\n"
_IMPORTS = f"import json\n\n{_NUMPY}"


def example_inputs_code(given: Classified, tensors: str) -> str:
    """Code for `inputs` from an example text, or for `pixels` from an image."""
    if given.is_image:
        return f"""\
with open(f"{{path}}/preprocessor_config.json") as file:
    how = json.load(file)
image = Image.new("RGB", ({given.size}, {given.size}))  # or Image.open("FILE")
color = len(how["image_mean"]) == 3
image = image.convert("RGB" if color else "L").resize((how["size"]["width"], how["size"]["height"]), 2)
pixels = np.asarray(image, np.float32).reshape(*image.size[::-1], -1) / 255
pixels = ((pixels - how["image_mean"]) / how["image_std"]).transpose(2, 0, 1)[None].astype(np.float32)
"""
    example, more = '"An example."', ""
    if given.pair:
        example = '"One text.", "Another text."'
    if given.task == "token_classification":
        example, more = "words", ", is_split_into_words=True"
    return ('words = ["An", "example", "."]\n' if more else "") + f"""\
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer({example}{more}, truncation=True, max_length={given.length}, return_tensors="{tensors}")
"""


def _answer(given: Classified) -> str:
    if given.task != "token_classification":
        return "print(names[int(scores.argmax())])\n"
    return """\
of = inputs.word_ids()
for place, word in enumerate(of):
    if word is not None and word not in of[:place]:  # the first token of a word has its class
        print(words[word], names[int(scores[place].argmax())])
"""
