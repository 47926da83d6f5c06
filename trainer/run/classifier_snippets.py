"""Code that loads an exported classifier, for model cards; a test runs it."""

from __future__ import annotations

AUTO = {"sequence_classification": "AutoModelForSequenceClassification",
        "token_classification": "AutoModelForTokenClassification",
        "image_classification": "AutoModelForImageClassification"}
TAGS = {"sequence_classification": "text-classification", "token_classification": "token-classification",
        "image_classification": "image-classification"}
KINDS = {"sequence_classification": "A classifier of texts", "token_classification": "A classifier of the words of texts",
         "image_classification": "A classifier of images"}
HERE = "  # the folder of this file"


def classifier_snippet(runtime: str, path: str, task: str, hub: bool, trust: bool, size: int) -> tuple[str, str] | None:
    """(language, code) that prints the class of an example in a runtime; None for a runtime without classifiers.

    Args:
        path: the folder, or the id on the hub.
        size: height and width of images in pixels.
    """
    if runtime not in ("transformers", "onnx"):
        return None
    place = f"snapshot_download({path!r})" if hub else repr(path) + HERE * (path == ".")
    fetch = "from huggingface_hub import snapshot_download\n" if hub else ""
    given = _images(size) if task == "image_classification" else _texts(task)
    if runtime == "transformers":
        imports = "" if task == "image_classification" else ", AutoTokenizer"
        more = ", trust_remote_code=True" if trust else ""
        return "python", (
            f"{'import json' + chr(10) + 'from pathlib import Path' + chr(10) if not imports else ''}"
            f"{'import numpy as np' + chr(10) if not imports else ''}import torch\n{fetch}"
            f"{'from PIL import Image' + chr(10) if not imports else ''}"
            f"from transformers import {AUTO[task]}{imports}\n\npath = {place}\n"
            f"model = {AUTO[task]}.from_pretrained(path{more})\n{given.format(tensors='pt')}"
            + ("" if imports else "inputs = {\"pixel_values\": torch.from_numpy(pixels)}\n")
            + f"with torch.no_grad():\n    scores = model(**inputs).logits[0]\n{_answer(task, 'model.config.id2label')}")
    imports = "" if task == "image_classification" else "from transformers import AutoTokenizer\n"
    return "python", (
        f"import json\nfrom pathlib import Path\n\nimport numpy as np\nimport onnxruntime\n{fetch}"
        f"{'from PIL import Image' + chr(10) if not imports else ''}{imports}\npath = {place}\n"
        f"session = onnxruntime.InferenceSession(f\"{{path}}/model.onnx\")\n"
        "names = {int(number): name for number, name in json.loads(\n"
        "    Path(path, \"config.json\").read_text())[\"id2label\"].items()}\n"
        f"{given.format(tensors='np')}" + ("" if imports else "inputs = {\"pixel_values\": pixels}\n")
        + f"scores = session.run([\"logits\"], dict(inputs))[0][0]\n{_answer(task, 'names')}")


def _texts(task: str) -> str:
    return ("tokenizer = AutoTokenizer.from_pretrained(path)\n"
            "inputs = tokenizer(\"An example.\", return_tensors={tensors!r}, return_token_type_ids=False)\n")


def _images(size: int) -> str:
    return ("how = json.loads(Path(path, \"preprocessor_config.json\").read_text())\n"
            "image = Image.new(\"RGB\", (" f"{size}, {size}" "))  # or Image.open(\"FILE\")\n"
            "image = image.convert(\"RGB\" if len(how[\"image_mean\"]) == 3 else \"L\").resize("
            "(how[\"size\"][\"width\"], how[\"size\"][\"height\"]), 2)\n"
            "pixels = np.asarray(image, np.float32).reshape(*image.size[::-1], -1) / 255\n"
            "pixels = ((pixels - how[\"image_mean\"]) / how[\"image_std\"]).transpose(2, 0, 1)[None].astype(np.float32)\n")


def _answer(task: str, names: str) -> str:
    if task == "token_classification":
        return (f"for token, number in zip(tokenizer.convert_ids_to_tokens(inputs[\"input_ids\"][0]), scores.argmax(-1)):"
                f"\n    print(token, {names}[int(number)])\n")
    return f"print({names}[int(scores.argmax())])\n"
