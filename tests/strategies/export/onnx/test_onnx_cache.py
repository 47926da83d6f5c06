"""Graphs with a key/value cache of models whose attention has something of its own, and of one that has no cache."""

import json
import re
import shutil

import onnx
import pytest
import torch
from transformers import GenerationConfig

from strategies.export.clients import onnx_client
from strategies.export.onnx.onnx_folder import write_onnx
from strategies.export.receipt import CACHED, make_receipt
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer
from tests.conftest import ROOT
from tests.strategies.export.onnx.onnx_models import (
    CLOSE,
    ask,
    build,
    held_out,
    logits,
    says_what_transformers_says,
    tokenizer,
)

STUDENTS = {  # windows with soft caps, windows with norms of queries, learned positions
    "gemma2": (build("gemma2", num_hidden_layers=2, head_dim=16, num_key_value_heads=2, sliding_window=4,
                     attn_logit_softcapping=2.0), {"quantizer": WeightQuantizer(4, 32)}),
    "gemma3": (build("gemma3_text", head_dim=16, sliding_window=5, layer_types=["sliding_attention"]),
               {"quantizer": WeightQuantizer(8)}),
    "gpt2": (build("gpt2", max_position_embeddings=128),
             {"quantizer": WeightQuantizer(8), "rules": [("*.c_*", None)], "embeddings": True})}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Folders of all students, and what one fresh process found in them."""
    folder = tmp_path_factory.mktemp("students")
    for name, (model, how) in STUDENTS.items():
        prepare(model, **how)
        assert write_onnx(folder / name, model.eval(), tokenizer()) == []
    return folder, *ask(folder, list(STUDENTS), "onnx_client.py")


@pytest.mark.parametrize("name", STUDENTS)
def test_rows_and_text_are_those_of_the_model(answers, name):
    folder, _, theirs = answers
    model, rows = STUDENTS[name][0], held_out()
    ours = logits(model, rows["input_ids"][:4, :20], rows["position_ids"][:4, :20])
    for found in (theirs[name], theirs[name + CACHED]):
        assert (found - ours).abs().max() <= CLOSE * ours.abs().max()
    says_what_transformers_says(folder / name, model)


def test_a_graph_that_is_wrong_only_with_a_cache_is_found_out(answers, tmp_path):
    """Two layers that take each other's keys are right for whole rows, and the receipt sees what decoding gives."""
    shutil.copytree(answers[0] / "gemma2", tmp_path / "gemma2")
    graph = onnx.load(tmp_path / "gemma2" / "model.onnx", load_external_data=False)
    other = {f"past_key_values.{layer}.key": f"past_key_values.{1 - layer}.key" for layer in (0, 1)}
    for node in graph.graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]
    onnx.save(graph, tmp_path / "gemma2" / "model.onnx")
    found, theirs = ask(tmp_path, ["gemma2"], "onnx_client.py")
    rows = held_out()
    ours = logits(STUDENTS["gemma2"][0], rows["input_ids"][:4, :20], rows["position_ids"][:4, :20])
    file = tmp_path / "gemma2" / "model.onnx.data"
    receipt = make_receipt(found["gemma2"], ours, ours, theirs["gemma2"], [file], 1e-4,
                           cached=theirs["gemma2" + CACHED])
    assert receipt.largest_difference <= 1e-5 * receipt.largest_logit and receipt.argmax_agreement == 1
    assert receipt.cache_difference > 1e-2 * receipt.largest_logit and not receipt.holds


def test_the_program_of_the_page_writes_what_transformers_writes(answers, capsys):
    page = (ROOT / "docs" / "how-to" / "export.md").read_text()
    program, chat, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model, words = STUDENTS["gemma2"][0], tokenizer()
    for theirs, ours in (("runs/my-finetune/student-onnx", str(answers[0] / "gemma2")), ('"The"', '"w1 w12 w13"')):
        assert theirs in program
        program = program.replace(theirs, ours)
    exec(program, {})
    with torch.no_grad():
        wanted = model.generate(words("w1 w12 w13", return_tensors="pt").input_ids, generation_config=GenerationConfig(
            max_new_tokens=64, do_sample=False, pad_token_id=0))
    assert capsys.readouterr().out.strip() == words.decode(wanted[0])
    words.chat_template = "{% for one in messages %}{{ one.content }}{% endfor %}"
    exec(chat, room := {"tokenizer": words})
    assert room["row"].shape == words(room["chat"][0]["content"], return_tensors="np").input_ids.shape


def test_onnxruntime_genai_and_optimum_find_the_names_that_they_read(answers):
    graph = onnx_client.open_session(answers[0] / "gemma2", threads=1)
    tokens, cached = ["batch_size", "sequence_length"], ["batch_size", 2, "past_sequence_length", 16]
    assert {value.name: value.shape for value in graph.get_inputs()} == {
        "input_ids": tokens, "attention_mask": ["batch_size", "total_sequence_length"], "position_ids": tokens,
        **{f"past_key_values.{layer}.{part}": cached for layer in (0, 1) for part in ("key", "value")}}
    assert {value.name: value.shape for value in graph.get_outputs()} == {
        "logits": [*tokens, 90], **{f"present.{layer}.{part}": ["batch_size", 2, "total_sequence_length", 16]
                                    for layer in (0, 1) for part in ("key", "value")}}
    decoder = json.loads((answers[0] / "gemma2" / "genai_config.json").read_text())["model"]["decoder"]
    assert [decoder[key] for key in ("filename", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                                     "head_size")] == ["model.onnx", 2, 2, 2, 16]
    for names, found in (("inputs", graph.get_inputs()), ("outputs", graph.get_outputs())):
        told = {name % layer if "%d" in name else name for name in decoder[names].values() for layer in (0, 1)}
        assert told == {value.name for value in found}


def test_a_model_whose_layers_cache_something_else_has_a_graph_without_a_cache(tmp_path):
    model = build("bloom", n_head=2)
    notes = write_onnx(tmp_path / "student", model, tokenizer())
    assert len(notes) == 1 and "the graph of BloomForCausalLM has no cache, so that each token is computed" in notes[0]
    session = onnx_client.open_session(tmp_path / "student", threads=1)
    assert [value.name for value in session.get_inputs()] == ["input_ids", "position_ids"]
    assert not (tmp_path / "student" / "genai_config.json").exists()
    with torch.no_grad():
        wanted = model.generate(torch.tensor([[3, 14, 15]]), generation_config=GenerationConfig(
            max_new_tokens=8, do_sample=False, pad_token_id=0))[0, 3:]
    assert list(onnx_client.greedy(session, [3, 14, 15], 8)) == wanted.tolist()
