"""GGUF files: read by gguf's own functions, by transformers, and by llama.cpp where it is installed."""

import copy
import json
from importlib.util import find_spec

import gguf
import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.quantization.llama_cpp import LlamaCpp, rounded_inputs
from strategies.export.clients.gguf_pretokenizers import PRETOKENIZERS
from strategies.export.gguf.gguf_file import check_gguf, dequantized_reference, write_gguf
from strategies.export.receipt import ask_client
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.freeze import freeze_quantized
from strategies.quantization.outliers import keep_whole
from strategies.quantization.qat import prepare, quantized_layers
from strategies.quantization.quantizer import Grid, WeightQuantizer
from tests.conftest import ROOT, sentences

EXPORT = str(ROOT / "strategies" / "export" / "clients")
END, SIZE = "<|endoftext|>", 320
MORE = 5  # tokens of the model that the tokenizer does not have
TEXTS = ("The cat sees the milk.", "don't  I'LL\n\n 12345 x=3;\t", "naïve 日本語 🙂 Ünïcode", f"a{END}b <tool>c", "")
SHAPES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": SIZE + MORE}
SCHEMES = {  # by GGUF's type: what is trained, bits of a number, and where the scale is in a block
    "Q4_0": ({"bits": 4, "group_size": 32}, 4, 0), "Q8_0": ({"bits": 8, "group_size": 32}, 8, 0),
    "Q5_0": ({"bits": 5, "group_size": 32, "rule": "mse"}, 5, 0),
    "Q5_0, affine": ({"bits": 4, "group_size": 32, "symmetric": False}, 5, 0),
    "Q4_0, affine": ({"bits": 3, "group_size": 64, "symmetric": False}, 4, 0),
    "Q8_0, affine": ({"bits": 7, "group_size": 32, "symmetric": False}, 8, 0),
    "Q4_0, outputs": ({"bits": 4, "rule": "learned"}, 4, 0), "Q4_0, tensor": ({"bits": 4, "per_tensor": True}, 4, 0),
    "TQ2_0": ({"kind": "ternary", "group_size": 256}, 2, 64),
    "TQ2_0, tensor": ({"kind": "ternary", "per_tensor": True}, 2, 64),
    "Q2_K": ({"bits": 2, "group_size": 256}, 2, 80),
    "Q2_K, affine": ({"bits": 2, "group_size": 256, "symmetric": False}, 2, 80),
    "Q3_K": ({"bits": 3, "group_size": 256}, 3, 108),
    "Q4_K": ({"bits": 4, "group_size": 256, "symmetric": False}, 4, 0),
    "Q5_K": ({"bits": 5, "group_size": 256, "symmetric": False}, 5, 0),
    "Q6_K": ({"bits": 6, "group_size": 256}, 6, 208)}
KINDS = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "rms_norm_eps": 1e-5}),
    "long": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}), "qwen3": ("qwen3", {"head_dim": 128})}


def trained(cut: str = "gpt-2", start: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts text as one of llama.cpp's kinds does."""
    bare = Tokenizer(models.BPE(ignore_merges=PRETOKENIZERS[cut]["ignore_merges"]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spec = json.loads(bare.to_str())
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step
        for step in PRETOKENIZERS[cut]["steps"]]}
    made = Tokenizer.from_str(json.dumps(spec))
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([sentences(1, 300), *TEXTS[1:3] * 3], trainers.BpeTrainer(
        vocab_size=SIZE - 1, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    made.add_tokens(["<tool>"])
    if start:
        made.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=END, eos_token=END, pad_token=END,
                                   chat_template="{{ messages }}")


@pytest.fixture(scope="module")
def tokenizer():
    return trained()


def build(kind: str = "llama", **more):
    torch.manual_seed(3)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{
        "tie_word_embeddings": True, **SHAPES, **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that say something, logits that differ
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def quantized(how: dict, kind: str = "llama", shapes: dict | None = None, **more):
    model = build(kind, **(shapes or {}))
    prepare(model, WeightQuantizer(scale_dtype=torch.float16, **how), **more)
    return model


def exactly(model):
    """Training with products in fp32 of the same numbers and scales; the quantizer rounds them to the scale's dtype."""
    for _, layer in quantized_layers(model):
        grid = layer.grid()
        layer.fix(Grid(grid.scale.float(), grid.zero_point))
    return model


def rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, SIZE, (3, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(3, 24)
    return {"input_ids": ids, "position_ids": positions.contiguous(), "targets": ids.roll(-1, 1),
            "bytes": torch.full((3,), 30)}


def logits(model) -> torch.Tensor:
    held_out = rows()
    with torch.no_grad():
        return model(input_ids=held_out["input_ids"], position_ids=held_out["position_ids"], use_cache=False).logits


def read(files: dict) -> tuple[dict, dict]:
    return ask_client({name: {"path": str(file), "compare": True} for name, file in files.items()}, rows(),
                      "gguf_client.py", device="cpu", threads=1, micro_batch=2, logit_rows=3, logit_length=24,
                      prompt="The cat", sample_tokens=4)


@pytest.fixture
def opened(monkeypatch):
    """Reads a file as the client does, in this process."""
    monkeypatch.syspath_prepend(EXPORT)
    from gguf_client import model_of

    def model(folder, name: str):
        reader = gguf.GGUFReader(folder / f"{name}.gguf")
        return model_of({name: field.contents() for name, field in reader.fields.items()}, reader.tensors)
    return model


# ---- weights

def unrotated(values: numpy.ndarray, heads: int) -> numpy.ndarray:
    """llama.cpp's order of a query's rows to transformers': even rows of a head, then odd ones."""
    parts = values.reshape(heads, -1, *values.shape[1:])
    return numpy.concatenate([parts[:, 0::2], parts[:, 1::2]], axis=1).reshape(values.shape)


@pytest.mark.parametrize("name", SCHEMES)
def test_numbers_and_scales_are_those_of_training(tmp_path, tokenizer, name):
    how, _, place = SCHEMES[name]
    model = quantized(how)
    write_gguf(tmp_path / "s.gguf", model, tokenizer)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "s.gguf").tensors}
    attention, block = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for written, layer, heads in (("attn_q", attention.q_proj, 4), ("attn_k", attention.k_proj, 2),
                                  ("attn_v", attention.v_proj, None), ("ffn_down", block.down_proj, None)):
        tensor = tensors[f"blk.1.{written}.weight"]
        assert tensor.tensor_type.name == name.split(",")[0]
        grid, numbers = layer.grid(), layer.numbers().double()
        if grid.zero_point is not None:
            numbers = (numbers.view(*grid.scale.shape, -1) - grid.zero_point.double().unsqueeze(-1)).view_as(numbers)
        size, width = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        outputs, inputs = numbers.shape
        scales = grid.scale.expand(outputs, -1).repeat_interleave(inputs // size // grid.scale.shape[1], 1).numpy()
        found = tensor.data.reshape(outputs, -1, width)[..., place:place + 2].copy().view(numpy.float16)[..., 0]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float64)
        if heads:
            found, values = unrotated(found, heads), unrotated(values, heads)
        assert numpy.array_equal(found, scales)
        assert numpy.array_equal(values / scales.astype(numpy.float64).repeat(size, 1), numbers.numpy())


def test_logits_are_those_of_the_fake_quantized_model(tmp_path, tokenizer):
    """Silent error 11, in the forward: not a bit is another one where the rest is in float32."""
    ours, models = {}, {"none": build(), "tied": quantized(SCHEMES["Q4_0"][0], embeddings=True)}
    models |= {name: quantized(SCHEMES[name][0]) for name in ("Q4_0", "Q8_0", "Q5_0, affine", "TQ2_0", "Q3_K", "Q4_K")}
    models["mixed"] = quantized(SCHEMES["Q3_K"][0], shapes={"tie_word_embeddings": False}, embeddings=True, ignore=(),
                                rules=[("*.down_proj", WeightQuantizer(8, 32, torch.float16)), ("*.q_proj", None)])
    for name, model in models.items():
        write_gguf(tmp_path / f"{name}.gguf", model, tokenizer, torch.float32)
        ours[name] = logits(model)
    found, theirs = read({name: tmp_path / f"{name}.gguf" for name in models})
    for name, model in models.items():
        assert torch.equal(logits(exactly(model)), theirs[name]), name
        assert torch.equal(logits(dequantized_reference(model, torch.float32)), theirs[name]), name
        assert (ours[name] - theirs[name]).abs().max() < 2e-3 * ours[name].abs().max(), name
    assert found["tied"]["sample"].startswith("The cat") and found["tied"]["parameters"] == sum(
        parameter.numel() for name, parameter in models["tied"].named_parameters() if name.endswith("weight"))
    nats = torch.nn.functional.cross_entropy(theirs["Q4_0"].flatten(0, 1), rows()["targets"].flatten(), reduction="sum")
    assert found["Q4_0"]["bits_per_byte"] == pytest.approx(float(nats) / numpy.log(2) / 90, rel=1e-5)


def test_what_is_not_quantized_has_the_dtype_of_the_export(tmp_path, tokenizer, opened):
    whole, model = build(), quantized(SCHEMES["Q4_0"][0])
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16}
    for name, dtype in dtypes.items():
        write_gguf(tmp_path / f"whole {name}.gguf", whole, tokenizer, dtype)
        write_gguf(tmp_path / f"four {name}.gguf", model, tokenizer, dtype)
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(
            tmp_path / f"four {name}.gguf").tensors}
        assert types["token_embd.weight"] == name and types["output_norm.weight"] == "F32"
        assert types["blk.0.attn_q.weight"] == "Q4_0" and "output.weight" not in types, "tied"
        assert torch.equal(
            logits(freeze_quantized(copy.deepcopy(whole), dtype).float()), logits(opened(tmp_path, f"whole {name}"))
        )
        assert torch.equal(logits(dequantized_reference(model, dtype)), logits(opened(tmp_path, f"four {name}")))


def test_architectures(tmp_path, tokenizer):
    """Permuted and plain queries, biases, norms of heads, stretched positions; by two readers."""
    models = {name: quantized(SCHEMES["Q4_0"][0], kind, shapes) for name, (kind, shapes) in KINDS.items()}
    for name, model in models.items():
        write_gguf(tmp_path / f"{name}.gguf", model, tokenizer, torch.float32)
    _, theirs = read({name: tmp_path / f"{name}.gguf" for name in models})
    for name, model in models.items():
        ours = logits(exactly(model))
        if name == "long":  # frequencies are stored as what the plain ones are divided by
            assert torch.allclose(ours, theirs[name], atol=1e-5 * float(ours.abs().max()))
            continue
        assert torch.equal(ours, theirs[name]), name
        if name not in ("linear", "biases"):  # transformers' own reader knows neither
            own = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=f"{name}.gguf", dtype=torch.float32).eval()
            assert torch.allclose(logits(own), ours, atol=1e-5 * float(ours.abs().max())), name


@pytest.mark.parametrize(("name", "least"), [("Q4_0", 4.5), ("Q8_0", 8.5), ("TQ2_0", 2.0625), ("Q3_K", 3.0625),
                                             ("Q4_0, outputs", 4 + 16 / 256)])
def test_bytes_on_disk(tmp_path, tokenizer, name, least):
    """Silent error 11: at most what numbers and scales take, and 3%, or what is said of the type."""
    model = quantized(SCHEMES[name][0], shapes={"num_hidden_layers": 6})
    write_gguf(tmp_path / "s.gguf", model, tokenizer)
    reader = gguf.GGUFReader(tmp_path / "s.gguf")
    weights = sum(layer.weight.numel() for _, layer in quantized_layers(model))
    vectors = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 1 and not n.endswith("_ratio"))
    rest = 2 * model.model.embed_tokens.weight.numel() + 4 * vectors
    known = {"Q3_K": 3.4375 / 3.0625, "Q4_0, outputs": 4.5 / (4 + 16 / 256)}.get(name, 1.0)
    assert sum(int(tensor.n_bytes) for tensor in reader.tensors) == pytest.approx(known * least * weights / 8 + rest)
    assert (tmp_path / "s.gguf").stat().st_size < 1.03 * (known * least * weights / 8 + rest)


# ---- what cannot be written

@pytest.mark.parametrize(("how", "more", "said"), [
    ({"bits": 3, "group_size": 32}, {}, "q_proj: GGUF has no type for 3 bits, symmetric, in groups of 32 over 256 "
     r"inputs; it has symmetric numbers of 4, 5 and 8 bits .* \(`group_size: 32`\)"),
    ({"bits": 4, "group_size": 16}, {}, "q_proj: GGUF has no type for 4 bits, symmetric, in groups of 16"),
    ({"bits": 8, "symmetric": False}, {}, "q_proj: GGUF has no type for 8 bits, affine, in a scale for each output"),
    ({"kind": "ternary", "group_size": 64}, {}, "no type for ternary numbers, symmetric, in groups of 64"),
    ({"kind": "binary", "per_tensor": True}, {}, "no type for binary numbers, symmetric, in one scale"),
    ({"kind": "fp8"}, {}, "no type for fp8 numbers"),
    ({"bits": 4, "scale_dtype": torch.float32}, {}, "q_proj has scales in float32, and GGUF has them in float16: train "
     "with these, as `export.dtype: float16` does"),
    ({"bits": 4, "group_size": 32}, {"activations": ActivationQuantizer()}, "q_proj quantizes its activations"),
])
def test_schemes_without_a_type_name_those_that_have_one(tmp_path, tokenizer, how, more, said):
    with torch.device("meta"):
        model = build()
    prepare(model, WeightQuantizer(**{"scale_dtype": torch.float16, **how}), **more)
    with pytest.raises(ValueError, match=said):
        check_gguf(model)
    with pytest.raises(ValueError, match=said):
        write_gguf(tmp_path / "s.gguf", model, tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "shapes", "said"), [
    ("gpt_neox", {}, "gpt_neox models are not written for llama.cpp; llama, mistral, qwen2, qwen3 are"),
    ("llama", {"hidden_act": "gelu"}, "with `hidden_act: silu`, not gelu"),
    ("mistral", {"sliding_window": 16}, "set `sliding_window: null`"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "set `sliding_window: null`"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
    ("qwen3", {"attention_bias": True}, "set `attention_bias: false`"),
])
def test_models_that_llama_cpp_computes_otherwise(kind, shapes, said):
    with torch.device("meta"):
        model = build(kind, **shapes)
    with pytest.raises(ValueError, match=said):
        check_gguf(model)


def lower(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def prefixed(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def by_words(tokenizer):
    tokenizer.backend_tokenizer.model = models.WordLevel({"a": 0}, "a")


def larger(tokenizer):
    tokenizer.add_tokens([f"<{number}>" for number in range(10)])


@pytest.mark.parametrize(("change", "said"), [
    (lower, r"the tokenizer changes text first \(Lowercase\)"), (prefixed, "does not cut text as this tokenizer does"),
    (by_words, "a WordLevel that does not work on bytes"), (larger, "token 325, '<5>', is beyond the model's"),
])
def test_tokenizers_that_llama_cpp_would_take_for_others(tmp_path, change, said):
    tokenizer = trained()
    change(tokenizer)
    with pytest.raises(ValueError, match=said):
        write_gguf(tmp_path / "s.gguf", build(), tokenizer)
    assert not list(tmp_path.iterdir())


def test_columns_in_full_precision_are_refused():
    model = quantized(SCHEMES["Q4_0"][0])
    keep_whole(model.model.layers[0].mlp.up_proj, torch.tensor([3]))
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.whole is no tensor that llama.cpp has in llama"):
        check_gguf(model)


def test_interrupted_export_leaves_what_was_there(tmp_path, tokenizer):
    model = quantized(SCHEMES["Q4_0"][0])
    write_gguf(tmp_path / "s.gguf", model, tokenizer)
    before = (tmp_path / "s.gguf").read_bytes()
    last = model.model.layers[-1].mlp.down_proj
    last.fix(Grid(last.grid().scale.float() * 1.0001, None))
    with pytest.raises(ValueError, match="blk.1.ffn_down.weight: a scale that it was given is .* from the nearest"):
        write_gguf(tmp_path / "s.gguf", model, tokenizer)
    assert (tmp_path / "s.gguf").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# ---- the tokenizer

@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("cut", PRETOKENIZERS)
def test_tokenizer_is_read_back_from_the_file_alone(tmp_path, monkeypatch, cut, start):
    monkeypatch.syspath_prepend(EXPORT)
    from gguf_client import tokenizer_of

    tokenizer = trained(cut, start)
    write_gguf(tmp_path / "s.gguf", build(num_hidden_layers=1), tokenizer)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "s.gguf").fields.items()}
    found = tokenizer_of(fields)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found(text)["input_ids"] == ids and found.decode(ids) == tokenizer.decode(ids), text
    assert fields["tokenizer.ggml.pre"] == cut and fields["tokenizer.ggml.add_bos_token"] is start
    assert (found.bos_token, found.eos_token, found.pad_token) == (END, END, END)
    assert found.chat_template == tokenizer.chat_template
    types = fields["tokenizer.ggml.token_type"]
    assert len(types) == SIZE + MORE and types.count(5) == MORE + SIZE - len(tokenizer)
    assert types[tokenizer.convert_tokens_to_ids(END)] == 3 and types[tokenizer.convert_tokens_to_ids("<tool>")] == 4


# ---- llama.cpp itself

needs_llama_cpp = pytest.mark.skipif(not find_spec("xllamacpp"), reason="pip install xllamacpp: llama.cpp in wheels")


@needs_llama_cpp
def test_llama_cpp_computes_the_same(tmp_path, tokenizer):
    """The real runtime, which rounds what enters a quantized layer to 8 bits: so does the reference here."""
    models = {name: build(kind, **shapes) for name, (kind, shapes) in KINDS.items()} | {"llama": build()}
    models |= {name: quantized(how, embeddings=True) for name, (how, _, _) in SCHEMES.items() if "," not in name}
    models["Q5_0"] = quantized(SCHEMES["Q5_0, affine"][0], embeddings=True)
    ids = rows()["input_ids"][0]
    for name, model in models.items():
        write_gguf(tmp_path / "s.gguf", model, tokenizer, torch.float32)
        theirs = LlamaCpp(tmp_path / "s.gguf", 64).log_probabilities(
            ids.tolist(), SIZE + MORE, tokenizer.convert_tokens_to_ids("a"))
        reference = dequantized_reference(model, torch.float32)
        if name in SCHEMES:
            rounded_inputs(reference, 256 if "K" in name or name == "TQ2_0" else 32)
        with torch.no_grad():
            errors = (reference(ids[None]).logits[0].log_softmax(-1) - theirs).abs().amax(-1)
        if name in SCHEMES:  # a number that lies between two may fall on the other one, and changes all later positions
            assert (errors < 1e-4).float().mean() > 0.25 and errors.max() < 0.25, name
        else:
            assert errors.max() < 1e-4, name


@needs_llama_cpp
@pytest.mark.parametrize("start", [False, True])
def test_llama_cpp_reads_text_alike(tmp_path, start):
    for cut in PRETOKENIZERS:
        tokenizer = trained(cut, start)
        write_gguf(tmp_path / "s.gguf", build(num_hidden_layers=1), tokenizer)
        runtime = LlamaCpp(tmp_path / "s.gguf", 64)
        for text in TEXTS:
            assert runtime.tokens(text) == tokenizer(text)["input_ids"], (cut, text)
