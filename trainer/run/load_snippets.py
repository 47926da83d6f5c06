"""Code that loads an exported student in its runtime, as a model card shows it: what is shown runs as it stands."""

from __future__ import annotations

from typing import Any

Prompt = str | list[dict[str, Any]]

TITLES = {"transformers": "transformers", "onnx": "ONNX Runtime", "gguf": "llama.cpp", "ctranslate2": "CTranslate2",
          "executorch": "ExecuTorch", "early-exit": "the code in its folder"}
INSTALL = {"transformers": "pip install torch transformers compressed-tensors",
           "early-exit": "pip install torch transformers compressed-tensors",
           "onnx": "pip install onnxruntime transformers huggingface_hub",
           "ctranslate2": "pip install ctranslate2 transformers huggingface_hub",
           "executorch": "pip install executorch torch transformers huggingface_hub"}
HERE = "  # this folder"
FETCH = "from huggingface_hub import snapshot_download\n"
TOKENS = 64  # that a snippet generates
TRUST = ", trust_remote_code=True"


def snippet(runtime: str, path: str, prompt: Prompt, *, hub: bool, trust: bool = False, base: str | None = None
            ) -> tuple[str, str] | None:
    """(language, code) that loads a student and has it answer a prompt; None for a runtime without a snippet here.

    Args:
        runtime: a key of `TITLES`.
        path: the student's folder, or with `hub` the id of its repository.
        prompt: a text to continue, or the messages of a chat to answer.
        trust: whether the student needs Python code that ships with it.
        base: of an adapter that is exported alone, the numbers that its base was held in (`student.adapter.base`).
    """
    if runtime == "transformers":
        return "python", _transformers(path, prompt, trust) if base is None else (
            _peft_beside(path, prompt, hub, trust) if base == "quantized" else _peft(path, prompt, trust, base))
    if runtime == "onnx":
        return "python", _onnx(path, prompt, hub)
    if runtime == "ctranslate2":
        return "python", _ctranslate2(path, prompt, hub)
    if runtime == "executorch":
        return "python", _executorch(path, prompt, hub)
    return ("sh", _llama_cpp(path, prompt, hub)) if runtime == "gguf" else None


def place(path: str, hub: bool) -> str:
    """Code for the folder of a student, which a runtime that knows no hub needs to have here."""
    return f"snapshot_download({path!r})" if hub else repr(path) + HERE * (path == ".")


def ids_code(prompt: Prompt, tensors: str) -> str:
    """Code for `inputs` from a prompt, as tensors of a library."""
    if isinstance(prompt, str):
        return f"inputs = tokenizer({prompt!r}, return_tensors={tensors!r})"
    return (f"chat = {prompt!r}\ninputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, "
            f"return_tensors={tensors!r},\n                                       return_dict=True)")


def _transformers(path: str, prompt: Prompt, trust: bool) -> str:
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = {path!r}{HERE * (path == ".")}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path{TRUST * trust})
{_answer(prompt)}"""


# Code that rounds an adapted `weight` to the numbers that it was held in, and what that needs to import.
ROUNDED = {
    "int8": ("largest = weight.abs().amax(1, keepdim=True).clamp(min=1e-30)\n            "
             "weight.copy_((weight * (127 / largest)).round() * (largest / 127))", ""),
    "nf4": ("weight.copy_(dequantize_4bit(*quantize_4bit(weight.contiguous(), blocksize=64, quant_type=\"nf4\")))",
            "from bitsandbytes.functional import dequantize_4bit, quantize_4bit\n")}


def _peft(path: str, prompt: Prompt, trust: bool, base: str) -> str:
    """Code that loads an adapter on its base, with the base in the numbers that the adapter was trained on."""
    code, imports = ROUNDED.get(base, ("", ""))
    torch = "" if base == "float32" else "import torch\n"
    return f"""\
{torch}{imports}from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

path = {path!r}{HERE * (path == ".")}
tokenizer = AutoTokenizer.from_pretrained(path)
of = PeftConfig.from_pretrained(path)
base = AutoModelForCausalLM.from_pretrained(of.base_model_name_or_path, revision=of.revision,
                                            dtype="float32"{TRUST * trust})
model = PeftModel.from_pretrained(base, path)
{_rounding(base, code)}{_answer(prompt)}"""


def _peft_beside(path: str, prompt: Prompt, hub: bool, trust: bool) -> str:
    """Code that loads an adapter on the base that was exported with it."""
    return f"""\
{FETCH * hub}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

path = {place(path, hub)}
tokenizer = AutoTokenizer.from_pretrained(path)
base = AutoModelForCausalLM.from_pretrained(f"{{path}}/base"{TRUST * trust})
model = PeftModel.from_pretrained(base, path)
{_answer(prompt)}"""


def _rounding(base: str, code: str) -> str:
    if base == "float32":
        return ""
    rest = "weight.ndim > 1 and \"lora_\" not in name:\n            weight.copy_(weight.bfloat16())\n"
    if not code:
        return f"""\
with torch.no_grad():  # the numbers that the adapter was trained on
    for name, weight in model.named_parameters():
        if {rest}"""
    return f"""\
adapted = {{id(layer.base_layer.weight) for layer in model.modules() if hasattr(layer, "base_layer")}}
with torch.no_grad():  # the numbers that the adapter was trained on: {base}, and bfloat16 where no adapter is
    for name, weight in model.named_parameters():
        if id(weight) in adapted:
            {code}
        elif {rest}"""


def _shown(tokens: str, prompt: Prompt) -> str:
    """Code that prints generated tokens; of a chat the answer alone."""
    cut = "" if isinstance(prompt, str) else ", inputs.input_ids.shape[1]:"
    return f"print(tokenizer.decode({tokens}[0{cut}], skip_special_tokens=True))"


def _answer(prompt: Prompt) -> str:
    """Code in which `model` answers a prompt."""
    return f"""\
{ids_code(prompt, "pt")}
tokens = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False,
                        max_new_tokens={TOKENS})
{_shown("tokens", prompt)}
"""


def _onnx(path: str, prompt: Prompt, hub: bool) -> str:
    return f"""\
import numpy as np
{FETCH * hub}from onnxruntime import InferenceSession
from transformers import AutoTokenizer, GenerationConfig

path = {place(path, hub)}
tokenizer = AutoTokenizer.from_pretrained(path)
ends = np.ravel(GenerationConfig.from_pretrained(path).eos_token_id)
session = InferenceSession(f"{{path}}/model.onnx")
{ids_code(prompt, "np")}
caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
past = {{value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in caches}}
ids = new = inputs.input_ids
for _ in range({TOKENS}):
    given = {{"input_ids": new, "position_ids": np.arange(ids.shape[1])[None, -new.shape[1]:], **past}}
    if past:
        given["attention_mask"] = np.ones_like(ids)
    logits, *present = session.run(None, given)
    past = dict(zip(past, present))
    ids = np.append(ids, logits[:, -1:].argmax(-1), axis=1)
    new = ids[:, -1:] if past else ids
    if ids[0, -1] in ends:
        break
{_shown("ids", prompt)}
"""


def _ctranslate2(path: str, prompt: Prompt, hub: bool) -> str:
    alone = "" if isinstance(prompt, str) else ", include_prompt_in_result=False"
    return f"""\
{FETCH * hub}from ctranslate2 import Generator
from transformers import AutoTokenizer

path = {place(path, hub)}
tokenizer = AutoTokenizer.from_pretrained(path)
generator = Generator(path, compute_type="float32")
{ids_code(prompt, "np")}
tokens = tokenizer.convert_ids_to_tokens(inputs.input_ids[0])
[found] = generator.generate_batch([tokens], max_length={TOKENS}, sampling_topk=1{alone})
print(tokenizer.decode(found.sequences_ids[0], skip_special_tokens=True))
"""


def _executorch(path: str, prompt: Prompt, hub: bool) -> str:
    return f"""\
import torch
{FETCH * hub}from executorch.runtime import Runtime
from transformers import AutoTokenizer, GenerationConfig

path = {place(path, hub)}
tokenizer = AutoTokenizer.from_pretrained(path)
ends = GenerationConfig.from_pretrained(path).eos_token_id
ends = ends if isinstance(ends, list) else [ends]
program = Runtime.get().load_program(f"{{path}}/student.pte")
forward = program.load_method("forward")
{ids_code(prompt, "pt")}
ids = inputs.input_ids
for _ in range({TOKENS}):
    [logits] = forward.execute([ids, torch.arange(ids.shape[1])[None]])
    ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    if ids[0, -1].item() in ends:
        break
{_shown("ids", prompt)}
"""


def _llama_cpp(path: str, prompt: Prompt, hub: bool) -> str:
    asked = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
    quoted = "'" + asked.replace("'", "'\\''") + "'"
    fetch = f"hf download {path} student.gguf --local-dir .\n" if hub else ""
    file = "student.gguf" if hub or path == "." else f"{path}/student.gguf"
    answer = "" if isinstance(prompt, str) else "-st "  # a single turn of a chat, written with the file's template
    return f"{fetch}llama-cli -m {file} {answer}-p {quoted} -n {TOKENS} --temp 0\n"
