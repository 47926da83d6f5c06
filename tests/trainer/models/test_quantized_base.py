"""Adapters on a base that is held in the numbers it is exported in, and how what is exported is loaded."""

import contextlib
import hashlib
import io
import json
import shutil

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from strategies.adapters.low_rank import LowRank, attach, write_adapter
from strategies.common.packed_codes import pack
from tests.conftest import ROOT, TINY
from tests.trainer.models.test_adapters import adapted, base, peaks  # noqa: F401 - a fixture among them
from trainer.early_checks import check_early
from trainer.errors import UserError
from trainer.experiment.load import read_experiment
from trainer.run.folder import read_json
from trainer.run.load_snippets import snippet
from trainer.run.metrics import read_lines
from trainer.run.model_card import model_card
from trainer.student.push_student import _files, _verified

FOUR = {"quantization": {"method": "rtn", "bits": 4, "group_size": 16, "symmetric": False}}
LAYER = "model.layers.1.mlp.down_proj"
IDS = torch.arange(24).view(2, 12)


def run_of(code):
    """What a card's Python leaves, and what it prints."""
    heard, found = io.StringIO(), {}
    with contextlib.redirect_stdout(heard):
        exec(compile(code, "card", "exec"), found)
    return found, heard.getvalue()


def digest(tensor):
    """As a run records the digest of a tensor that it trained."""
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
                          + tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_the_base_that_was_trained_on_is_exported_beside_its_adapter(
        run_experiment, base, tmp_path, monkeypatch):  # noqa: F811
    asked = adapted(base, student=FOUR.items(), base="quantized", kind="dora")
    _, folder = run_experiment("run", **asked, export={"adapter": "separate", "dtype": "bfloat16"})
    receipt, trained = read_json(folder.receipt), read_json(folder.digests)["sha256"]
    assert receipt["holds"] and receipt["largest_difference"] <= 1e-6 and receipt["notes"] == [
        "the adapter, and in base/ its base with the numbers that it was trained on"]
    measured, planned = peaks(folder.path)
    assert measured <= planned < 1.03 * measured
    file = load_file(folder.student / "base" / "model.safetensors")
    assert receipt["bytes_on_disk"] == sum(one.stat().st_size for one in folder.student.rglob("*.safetensors"))
    sizes = {"weight_packed": 1, "weight_scale": 1.5, "embed_tokens.weight": 1}  # zeros take half of bf16 scales
    assert read_json(folder.plan)["ledger"]["weights"] == sum(
        sizes.get(next((end for end in sizes if name.endswith(end)), ""), 2) * tensor.nbytes  # the rest held in fp32
        for name, tensor in file.items() if not name.endswith(("weight_shape", "weight_zero_point"))) + sum(
        tensor.nbytes for tensor in load_file(folder.student / "adapter_model.safetensors").values())
    codes, zeros = (unpack_from_int32(file[f"{LAYER}.weight_{part}"], 4, shape, packed_dim=dim)
                    for part, shape, dim in (("packed", file[f"{LAYER}.weight_shape"].tolist(), 1),
                                             ("zero_point", [*file[f"{LAYER}.weight_scale"].shape], 0)))
    held = {"numbers": pack((codes + 8).to(torch.uint8), 4), "scales": file[f"{LAYER}.weight_scale"],
            "zeros": (zeros + 8).to(torch.uint8)}
    assert held["scales"].dtype is torch.bfloat16
    for part, tensor in held.items():  # what training hashed, to the bit
        assert digest(tensor) == trained[f"{LAYER}.base_layer.{part}"], part
    assert digest(file["model.embed_tokens.weight"]) == trained["model.embed_tokens.weight"]
    assert digest(file["model.norm.weight"].float()) == trained["model.norm.weight"]

    assert folder.student / "base" / "model.safetensors" in _files(_verified(folder, "transformers"))  # of an upload
    beneath, card = folder.student / "base" / "model.safetensors", (folder.student / "README.md").read_text()
    assert f"| bytes of its base on disk | {beneath.stat().st_size:,} |" in card and "library_name: peft" in card
    assert 'path = snapshot_download(\'me/it\')' in model_card(folder, folder.student, "me/it")
    moved = tmp_path / "elsewhere"
    shutil.move(folder.student, moved)
    monkeypatch.chdir(moved)
    code = (moved / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found, said = run_of(code)
    assert said.startswith(read_json(folder.comparison)["student"]["samples"][0]["text"])
    named = AutoPeftModelForCausalLM.from_pretrained(".")  # the folder that the adapter names, from where it is
    page = (ROOT / "docs/how-to/adapters.md").read_text().split("```python\n")[1].split("```")[0]
    shown, _ = run_of(page.replace("runs/my-quantized-base/student", str(moved)))
    with torch.no_grad():
        for one in (named, shown["model"]):
            assert torch.equal(found["model"](input_ids=IDS).logits, one(input_ids=IDS).logits)
    shutil.move(moved, folder.student)

    run_experiment("run", **asked, export={"adapter": "merged", "dtype": "bfloat16"})  # made from the same checkpoint
    note = read_json(folder.receipt)["notes"][0]
    assert note.startswith("quantized after the adapter was merged, the base's numbers made anew: ")
    assert not (folder.student / "base").exists() and len([
        line for line in read_lines(folder.metrics) if "loss" in line]) == 4
    with pytest.raises(UserError, match="belongs to another experiment: export.dtype was 'bfloat16'"):
        run_experiment("run", **asked, export={"adapter": "merged"})


@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8", "nf4"])
@torch.no_grad()
def test_an_adapter_is_loaded_on_the_numbers_that_it_was_trained_on(base, held, tmp_path, monkeypatch):  # noqa: F811
    one = attach(AutoModelForCausalLM.from_pretrained(base), LowRank("dora", 4, 8, base=held, targets=(
        "q_proj", "down_proj"))).eval()
    for parameter in one.parameters():
        if parameter.requires_grad:
            parameter += torch.randn_like(parameter) / 20
    write_adapter(tmp_path, one, str(base))
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    found, _ = run_of(snippet("transformers", ".", "a b", hub=False, base=held)[1])
    torch.testing.assert_close(found["model"](input_ids=IDS).logits, one(input_ids=IDS).logits, rtol=0, atol=1e-6)
    if held != "float32":
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
        assert (plain(input_ids=IDS).logits - one(input_ids=IDS).logits).abs().max() > 1e-5


@pytest.mark.parametrize("changes, key, said", [
    ({"student.quantization": None}, "student.adapter.base", "there are no numbers to hold the base in"),
    ({"student.quantization.method": "qat"}, "student.quantization.method", "changes weights that the adapter"),
    ({"student.quantization.method": "gptq"}, "student.quantization.method", "gptq needs text to calibrate on"),
    ({"student.quantization.budget": "1 MiB"}, "student.quantization.budget", "chooses bits by a measure on text"),
    ({"student.quantization.smooth": 0.5}, "student.quantization.smooth", "measures activations on text"),
    ({"student.quantization.activations": {}}, "student.quantization.activations", "are not quantized while"),
    ({"student.quantization.embeddings": True}, "student.quantization.embeddings", "are held in 16 bits"),
    ({"student.quantization.group_size": 7}, "student.quantization.group_size", "groups of 7 do not divide"),
    ({"student.quantization.layers": [{"match": "*down_proj", "bits": 8}], "export.adapter": "separate"},
     "student.quantization.layers", "takes all its layers for the same"),
    ({"export.adapter": "separate", "student.adapter.base": "nf4"}, "student.quantization",
     "an adapter alone is not quantized"),
    ({"sharding.engine": "fsdp2"}, "student.adapter.base", "casts numbers of one kind"),
    ({"sharding.engine": "zero", "sharding.stage": 2}, "student.adapter.base", "casts numbers of one kind"),
])
def test_what_a_quantized_base_cannot_be_is_said_at_once(write_experiment, base, changes, key, said):  # noqa: F811
    overrides = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    with pytest.raises(ValueError, match=said) as caught:
        check_early(read_experiment(write_experiment(**adapted(base, student=FOUR.items(), base="quantized")),
                                    overrides).experiment)
    errors = getattr(caught.value, "errors", [caught.value])
    assert errors[0].key == key and isinstance(errors[0], UserError) and errors[0].way_out


@pytest.mark.parametrize("kind, shape, said", [
    ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "c_attn is a QATConv1D|c_attn is a Conv1D"),
    (TINY["model_type"], {**TINY, "tie_word_embeddings": False}, "lm_head is the output head"),
])
def test_layers_that_are_not_packed_are_named(kind, shape, said, write_experiment, base, tmp_path):  # noqa: F811
    from transformers import AutoConfig

    shutil.copytree(base, tmp_path / "other")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "other" / name).unlink()
    shape = {key: value for key, value in shape.items() if key != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, vocab_size=300, bos_token_id=0, eos_token_id=0
                                                          )).save_pretrained(tmp_path / "other")
    few = {"quantization": {"method": "rtn", "ignore": []}}
    with pytest.raises(UserError, match=said) as caught:
        check_early(read_experiment(write_experiment(**adapted(
            tmp_path / "other", student=few.items(), base="quantized"))).experiment)
    assert caught.value.key == "student.adapter.base" and "student.quantization.ignore" in caught.value.way_out
