"""Load and measure GGUF files in a separate process, with only `gguf`, `numpy`, `torch` and `transformers`.

    python gguf_client.py request.json answer.json

Request and answer are those of `transformers_client.py`. The model is built from the file's metadata alone,
and its weights are dequantized by gguf's own functions. llama.cpp's results are rounded further, since it
also quantizes activations: `benchmarks/quantization/llama_cpp.py` measures that.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import gguf
import numpy
import torch
from gguf_pretokenizers import PRETOKENIZERS
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from transformers_client import layer_outputs, logits_of, main, read_through, sample  # beside this file

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5


@torch.no_grad()
def measure(which: dict[str, Any], held_out: dict[str, torch.Tensor], request: dict[str, Any]) -> dict[str, Any]:
    """The measurements of `transformers_client.measure`, for a GGUF file."""
    reader = gguf.GGUFReader(which["path"])
    fields = {name: field.contents() for name, field in reader.fields.items()}
    model = model_of(fields, reader.tensors)
    if which.get("logits"):
        rows, length = request["logit_rows"], request["logit_length"]
        save_file({"logits": logits_of(model, held_out, slice(0, rows), length).contiguous()}, which["logits"])
    if which.get("layers"):
        save_file(layer_outputs(model, lambda: logits_of(model, held_out, slice(0, 1), None)), which["layers"])
    return {
        **read_through(model, held_out, request),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameter_bytes": sum(int(tensor.n_bytes) for tensor in reader.tensors),
        "sample": sample_of(model, tokenizer_of(fields), request),
        "runtime": "gguf",
    }


def sample_of(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, request: dict[str, Any]) -> str:
    """The greedy continuation of the prompt, with the file's own tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sample(model, folder, {}, {**request, "tokenizer": folder})


# ---- the model

def model_of(fields: dict[str, Any], tensors: list[Any]) -> torch.nn.Module:
    """The transformers model that a file describes, in float32."""
    kind, held = fields["general.architecture"], {tensor.name: tensor for tensor in tensors}
    model = AutoModelForCausalLM.from_config(config_of(fields, set(held)), dtype=torch.float32).eval()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, fields[f"{kind}.block_count"])
    state = {}
    for name in model.state_dict():
        written = names.get_name(name, (".weight", ".bias"))
        if written in held:
            state[name] = weights_of(held.pop(written))
            if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
                state[name] = unrotated(state[name], fields[f"{kind}.rope.dimension_count"])
    if "rope_freqs.weight" in held:
        model.model.rotary_emb.inv_freq /= weights_of(held.pop("rope_freqs.weight"))
    missing = set(model.state_dict()) - set(state)
    if held or missing - {"lm_head.weight"}:
        raise ValueError(f"the file and its description differ: {sorted(held)} are too much, {sorted(missing)} missing")
    model.load_state_dict(state, strict=not missing)
    return model


def config_of(fields: dict[str, Any], names: set[str]) -> Any:
    """The configuration that follows from the metadata."""
    kind = fields["general.architecture"]
    of = {name.removeprefix(f"{kind}."): value for name, value in fields.items() if name.startswith(f"{kind}.")}
    rope = {"rope_type": of.get("rope.scaling.type", "default"), "rope_theta": of["rope.freq_base"]}
    if rope["rope_type"] != "default":
        rope["factor"] = of["rope.scaling.factor"]
    biases = {name.split(".")[2] for name in names if name.startswith("blk.") and name.endswith(".bias")}
    return AutoConfig.for_model(
        kind, vocab_size=of["vocab_size"], hidden_size=of["embedding_length"],
        intermediate_size=of["feed_forward_length"], num_hidden_layers=of["block_count"],
        num_attention_heads=of["attention.head_count"], num_key_value_heads=of["attention.head_count_kv"],
        head_dim=of["attention.key_length"], max_position_embeddings=of["context_length"],
        rms_norm_eps=of["attention.layer_norm_rms_epsilon"], rope_parameters=rope,
        tie_word_embeddings="output.weight" not in names, attention_bias="attn_q" in biases,
        mlp_bias="ffn_up" in biases, **{f"{name}_token_id": fields.get(f"tokenizer.ggml.{long}_token_id")
                                       for name, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))})


def weights_of(tensor: Any) -> torch.Tensor:
    """A tensor of the file in float32, rows first."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(numpy.array(values, dtype=numpy.float32)).reshape([int(n) for n in tensor.shape[::-1]])


def unrotated(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Reorder rows (heads * width, ...) from llama.cpp's rotary layout, adjacent pairs, to transformers', halves."""
    return rows.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


# ---- the tokenizer

def tokenizer_of(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that follows from the metadata."""
    of = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()
          if name.startswith("tokenizer.ggml.")}
    types, cut = of["token_type"], PRETOKENIZERS[of["pre"]]
    made = Tokenizer(models.BPE(
        {token: number for number, token in enumerate(of["tokens"]) if types[number] != UNUSED},
        [tuple(merge.split(" ")) for merge in of["merges"]], ignore_merges=cut["ignore_merges"]))
    spec = json.loads(made.to_str())
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step for step in cut["steps"]]}
    made = Tokenizer.from_str(json.dumps(spec))
    made.decoder = decoders.ByteLevel()
    for number, kind in enumerate(types):
        if kind in (CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(of["tokens"][number], special=kind == CONTROL, normalized=False)])
    special = {f"{name}_token": of["tokens"][of[f"{long}_token_id"]]
               for name, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")) if f"{long}_token_id" in of}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=fields.get("tokenizer.chat_template"),
                                   **special)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main(measure, sys.argv[1], sys.argv[2])
