"""Whatever is made of a student after its training is compared with the one that was trained."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import TINY, sentences
from trainer import cli
from trainer.data.dataset import prepare_text
from trainer.early_checks import configs_of
from trainer.errors import RunFailed, UserError
from trainer.models.build import from_config
from trainer.run.folder import RunFolder
from trainer.student import export_student
from trainer.training import loop

OWN = {"tokenizer": {"train_vocabulary": None}}
STILL = {"optimizer": {"lr": 1e-30, "weight_decay": 0.0}, "report": {"control": False}}  # weights stay as they began


def published(folder, tied: bool, head: bool, kind: dict = TINY, rename=lambda name: name, shards: int = 1):
    """A model whose configuration says `tied`, and whose files hold a head of its own or not; its tensors."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        **{**kind, "tie_word_embeddings": not head}, vocab_size=300))
    model.save_pretrained(folder)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([sentences(0, 9)], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file,
                  metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


def test_a_head_of_its_own_is_exported_though_the_configuration_says_there_is_none(run_experiment, tmp_path, capsys):
    """Against the published tensors themselves, which a learning rate of nothing leaves as they are."""
    tensors = published(tmp_path / "published", tied=True, head=True)
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    experiment, folder = run_experiment(student={"architecture": None, "path": str(tmp_path / "published")},
                                   data=OWN, **STILL)
    exported = load_file(folder.student / "model.safetensors")
    assert exported.keys() == tensors.keys() and all(torch.equal(exported[name], tensors[name]) for name in tensors)
    assert json.loads((folder.student / "config.json").read_text())["tie_word_embeddings"] is False
    plan, receipt = json.loads(folder.plan.read_text()), json.loads(folder.receipt.read_text())
    assert plan["parameters"]["student"] == receipt["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    again = export_student.rebuilt(experiment, folder, folder.student, prepare_text(experiment))
    assert torch.equal(again.lm_head.weight, tensors["lm_head.weight"])
    _a_later_export_is_of_what_was_trained(folder, capsys)


def _a_later_export_is_of_what_was_trained(folder: RunFolder, capsys) -> None:
    config = json.loads((folder.student / "config.json").read_text())
    digests = json.loads(folder.digests.read_text())
    rope = {**config["rope_parameters"], "rope_theta": 20000.0}
    for changes, said in (({"rope_parameters": rope}, "model.rotary_emb.inv_freq has other values"),
                          ({"tie_word_embeddings": True}, "lm_head.weight was trained, and is not there")):
        (folder.student / "config.json").write_text(json.dumps({**config, **changes}))
        assert cli.limbeck(["export", str(folder.path), "--to", "gguf"]) == 1
        assert f"is not the model that was trained: {said}" in capsys.readouterr().err
    (folder.student / "config.json").write_text(json.dumps(config))
    folder.digests.write_text(json.dumps({"sha256": {**digests["sha256"], "lm_head.bias": "0"}}))
    assert cli.limbeck(["export", str(folder.path), "--to", "gguf"]) == 1
    assert "lm_head.bias was trained, and is not there" in capsys.readouterr().err
    folder.digests.write_text("[]")
    with pytest.raises(UserError, match="digests.json is not as a run writes it"):
        export_student.export(folder.path, "gguf")


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
NEOX = {"model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(("kind", "tied", "head", "more", "says"), [
    (TINY, True, True, {"shards": 2}, False), (TINY, True, False, {}, True), (TINY, False, True, {}, False),
    (GPT2, True, True, {"rename": lambda name: name.removeprefix("transformer.")}, False),
    (NEOX, True, True, {}, False), ({**TINY, "model_type": "phimoe"}, True, True, {}, False)],
    ids=lambda value: str(value)[:12])
def test_what_files_hold_decides_whether_head_and_embeddings_are_one(write_experiment, tmp_path, kind, tied, head, more,
                                                                   says):
    """Against transformers, which loads the folder and has one matrix or two."""
    from trainer.experiment.load import read_experiment

    published(tmp_path / "published", tied, head, kind, **more)
    experiment = read_experiment(write_experiment(student={"architecture": None, "path": str(tmp_path / "published")})
                                 ).experiment
    _, config = configs_of(experiment, 300)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    assert config.tie_word_embeddings is says
    assert says == (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight)
    assert sum(parameter.numel() for parameter in from_config(config, experiment.form.trust).parameters()) == sum(
        parameter.numel() for parameter in loaded.parameters())


def test_equal_matrices_in_a_file_are_one(write_experiment, tmp_path):
    from trainer.experiment.load import read_experiment

    folder = tmp_path / "published"
    tensors = published(folder, tied=True, head=True)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
              folder / "model.safetensors", metadata={"format": "pt"})
    experiment = read_experiment(write_experiment(student={"architecture": None, "path": str(folder)})).experiment
    assert configs_of(experiment, 300)[1].tie_word_embeddings is True


def tied_again(form, like):
    """A student put together as one whose head is its embeddings, which was not so in training."""
    config = type(like.config)(**{**like.config.to_dict(), "tie_word_embeddings": True})
    return from_config(config, form.trust)


def another_buffer(form, like):
    """A student put together with rotary frequencies that were not those of training."""
    model = from_config(like.config, form.trust)
    model.model.rotary_emb.inv_freq.mul_(1.001)
    return model


@pytest.mark.parametrize(("made", "said"), [
    (tied_again, r"trained: (lm_head|model.embed_tokens).weight has other values"),
    (another_buffer, r"model.rotary_emb.inv_freq has other values")])
def test_a_student_put_together_otherwise_ends_the_run(run_experiment, tmp_path, monkeypatch, made, said):
    whole = loop.TrainLoop.whole

    def otherwise(trainer):
        model = made(trainer.experiment.form, trainer.unwrapped)
        model.load_state_dict(whole(trainer).state_dict())
        model.generation_config = trainer.unwrapped.generation_config
        return model

    monkeypatch.setattr(loop.TrainLoop, "whole", otherwise)
    with pytest.raises(RunFailed, match=said):
        run_experiment(student={"architecture": {"tie_word_embeddings": False}}, report={"control": False})
    folder = RunFolder(tmp_path / "tiny")
    assert not folder.student.exists() and not folder.finished


def test_a_student_quantized_after_training_is_the_one_that_was_trained(run_experiment, monkeypatch):
    from trainer.student import quantize_student

    monkeypatch.setattr(quantize_student, "empty_student", lambda form, config: tied_again(
        form, AutoModelForCausalLM.from_config(config)))
    with pytest.raises(RunFailed, match=r"to be quantized, is not .*trained: (lm_head|model.embed_tokens).weight has"):
        run_experiment(student={"architecture": {"tie_word_embeddings": False},
                           "quantization": {"method": "rtn", "bits": 8}}, report={"control": False})
