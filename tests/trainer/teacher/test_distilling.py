"""Where a teacher's word comes from and how it is understood, in whole trainings of tiny models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import TINY, sentences
from tests.trainer.distributed.test_sharding import ENGINES, LOSS, WEIGHTS, on_ranks, relative, weights_apart
from tests.trainer.test_bad_input import refused
from trainer.errors import RunFailed, UserError
from trainer.run.metrics import read_lines

END = "<|endoftext|>"


def bpe(vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([sentences(number, 20) for number in range(20)], trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return tokenizer


def save(folder, tokenizer: Tokenizer, size: int | None = None, seed: int = 0, rows: list[int] | None = None, **changes
         ) -> str:
    """A tiny model with its tokenizer; `rows` puts token i of a first model at row rows[i] of this one."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    torch.manual_seed(seed)
    shape = {**TINY, **changes, "vocab_size": size or len(fast)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
    model.model.embed_tokens.weight.data.mul_(10)
    if rows is not None:
        weight = model.model.embed_tokens.weight
        moved = weight.data.clone()
        moved[torch.tensor(rows)] = weight.data[:len(rows)]
        weight.data = moved
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def first(trainer) -> dict:
    return next(line for line in read_lines(trainer.folder.metrics) if "loss" in line)


def losses(trainer) -> list[float]:
    return [line["loss"] for line in read_lines(trainer.folder.metrics) if "loss" in line]


@pytest.fixture
def family(tmp_path):
    """A teacher and a smaller student with one tokenizer."""
    tokenizer = bpe(300)
    return {"teacher": {"path": save(tmp_path / "large", tokenizer, seed=1, hidden_size=48)},
            "student": {"path": save(tmp_path / "small", tokenizer)}, "data": {"tokenizer": {"train_vocabulary": None}},
            "objective": {"cross_entropy": 0.5, "divergence": {"temperature": 1.0}}}


def with_(family: dict, **changes) -> dict:
    from tests.conftest import merge

    return merge(family, changes)


# ---- caches

def test_cached_hidden_states_teach_as_the_teacher_does(train_here, family, capsys):
    live = losses(train_here("live", **family))
    cached = train_here("hidden", **with_(family, teacher={"targets": {"source": "hidden"}}))
    assert relative(live, losses(cached)) < 1e-6
    head = cached.cached.head
    assert cached.teacher is None and sum(p.numel() for p in head.parameters()) == 300 * 48, "its head alone"
    assert "192.0 bytes each" in capsys.readouterr().out, "stated before it starts"


@pytest.mark.parametrize(("source", "apart"), [("samples", 0.3), ("top_k", 0.02)])
def test_sampled_and_most_probable_tokens_teach_nearly_the_same(train_here, family, source, apart):
    live = losses(train_here("live", **family))
    kept = {"source": source, "draws": 200, "k": 100}
    found = losses(train_here(source, **with_(family, teacher={"targets": kept})))
    assert relative(live, found) < apart


def test_one_cache_serves_several_runs_and_none_of_another_teacher(train_here, family, tmp_path, capsys):
    kept = {"source": "top_k", "path": str(tmp_path / "kept")}
    train_here("one", **with_(family, teacher={"targets": kept}))
    assert "writing what the teacher says" in capsys.readouterr().out
    train_here("two", **with_(family, teacher={"targets": kept}, seed=3))
    assert "writing what the teacher says" not in capsys.readouterr().out
    other = save(tmp_path / "other", bpe(300), seed=7, hidden_size=48)
    for name, changes, said in (
            ("teacher", {"teacher": {"path": other, "targets": kept}}, "teacher"),
            ("length", {"teacher": {"targets": kept}, "data": {"sequence_length": 16}}, "sequence_length"),
            ("temperature", {"teacher": {"targets": kept}, "objective": {"divergence": {"temperature": 3.0}}},
             "temperature"), ("k", {"teacher": {"targets": {**kept, "k": 5}}}, "k")):
        with pytest.raises(UserError, match=said) as error:
            train_here(name, **with_(family, **changes))
        assert error.value.key == "teacher.targets.path" and "name another folder" in error.value.way_out


def test_a_truncated_shard_is_said_and_nothing_is_trained(train_here, family, tmp_path):
    kept = {"source": "hidden", "path": str(tmp_path / "kept")}
    train_here("one", **with_(family, teacher={"targets": kept}))
    shard = sorted((tmp_path / "kept").glob("shard-*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunFailed, match=f"{shard.name}.*checksum"):
        train_here("two", **with_(family, teacher={"targets": kept}))


# ---- what is inside

def test_what_is_inside_is_compared_and_leaves_nothing_in_the_student(train_here, family):
    inside = {"features": {"weight": 0.5, "layers": [[0, 0], [2, 2]]}, "relations": {"distance": 1.0, "angle": 2.0},
              "values": {"weight": 0.1, "heads": 1}, "attention_maps": {"weight": 3.0}}
    trainer = train_here("inside", **with_(family, objective=inside))
    line = first(trainer)
    assert line["loss"] == pytest.approx(
        0.5 * line["cross_entropy"] + line["forward_kl"] + 0.5 * line["features"] + line["distances"]
        + 2 * line["angles"] + 0.1 * line["values"] + 3 * line["attention_maps"], rel=1e-5)
    assert line["attention_maps"] > 0
    weights = dict(trainer.unwrapped.named_parameters())
    loss_mask = [name for name in weights if "projections" in name]
    assert len(loss_mask) == 2
    assert not any("projections" in name for name in dict(trainer.whole().named_parameters()))


def test_losses_inside_are_those_of_one_process_on_two_ranks(train_here, write_experiment, family, tmp_path):
    settings = with_(family, objective={"features": {"weight": 0.5}}, training={"micro_batch": 2}, data={
        "packing": False})
    one = losses(train_here("alone", **settings))
    runs = [{"name": name, "file": str(write_experiment(name, **settings)), "overrides": ENGINES[name]}
            for name in ("ddp", "fsdp2", "zero3")]
    for name, found in on_ranks(runs, tmp_path / "ranks").items():
        assert relative(one, found["loss"]) < LOSS, name


def test_a_micro_batch_without_targets_on_one_rank_is_that_of_one_process(write_experiment, family, tmp_path):
    """Rank 1's first micro-batch is the second of one process; its rank still takes part in every gradient."""
    settings = with_(family, objective={"features": {"weight": 0.5}}, training={"micro_batch": 2}, data={
        "packing": False})
    runs = [{"name": name, "file": str(write_experiment(name, **settings)), "overrides": how, "masked": [1, 0]}
            for name, how in ENGINES.items() if name in ("ddp", "fsdp2", "zero3")]
    lonely = [{"name": "alone", "file": str(write_experiment("alone", **settings)), "overrides": [], "masked": [0, 1]}]
    alone = on_ranks(lonely, tmp_path / "alone-ranks", processes=1)["alone"]
    for name, found in on_ranks(runs, tmp_path / "ranks").items():
        assert relative(alone["loss"], found["loss"]) < LOSS, name
        assert weights_apart(alone["weights"], found["weights"]) < WEIGHTS, name


# ---- vocabularies

def test_a_padded_vocabulary_of_an_identical_teacher_scores_nothing(train_here, family, tmp_path):
    """Silent error 2, in a whole training: the teacher's head has 28 more rows, with no token."""
    tokenizer = bpe(300)
    teacher = save(tmp_path / "padded", tokenizer, size=328)
    student = AutoModelForCausalLM.from_pretrained(teacher)
    student.resize_token_embeddings(300)
    student.save_pretrained(tmp_path / "small")
    found = first(train_here("one", **with_(family, teacher={"path": teacher})))
    assert abs(found["forward_kl"]) < 1e-5


def test_other_numbers_for_the_same_tokens_are_translated(train_here, family, tmp_path):
    tokenizer = bpe(300)
    described = json.loads(tokenizer.to_str())
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).tolist()
    vocabulary = described["model"]["vocab"]
    described["model"]["vocab"] = {token: order[number] for token, number in vocabulary.items()}
    described["added_tokens"][0]["id"] = order[described["added_tokens"][0]["id"]]
    teacher = save(tmp_path / "renumbered", Tokenizer.from_str(json.dumps(described)), rows=order)
    found = first(train_here("one", **with_(family, teacher={"path": teacher})))
    assert abs(found["forward_kl"]) < 1e-5, "the same model under other numbers"


def test_another_tokenizer_is_compared_by_spans(train_here, family, tmp_path):
    teacher = save(tmp_path / "other", bpe(280), seed=1, hidden_size=48)
    changes = {"teacher": {"path": teacher}, "objective": {"divergence": {"name": "uld"}}}
    trainer = train_here("uld", **with_(family, **changes))
    assert 0 < first(trainer)["uld"] < 2
    with pytest.raises(UserError, match="another tokenizer than the student") as error:
        train_here("kl", **with_(family, teacher={"path": teacher}))
    assert error.value.key == "objective.divergence.name" and "use uld" in error.value.way_out


# ---- on-policy

def test_steps_on_what_the_student_writes_learn_no_target_of_the_text(train_here, family):
    asked = {"on_policy": {"fraction": 0.5, "prompt_tokens": 4, "new_tokens": 8}}
    trainer = train_here("writes", **with_(family, objective=asked, training={"steps": 8}))
    lines = [line for line in read_lines(trainer.folder.metrics) if "loss" in line]
    written = [line for line in lines if "cross_entropy" not in line]
    assert 0 < len(written) < 8
    assert all(line["loss"] == pytest.approx(line["forward_kl"]) and line["tokens"] <= 8 * 8 for line in written)
    again = train_here("again", **with_(family, objective=asked, training={"steps": 8}))
    assert losses(again) == losses(trainer), "what is written follows from the seed"


# ---- bad input

@pytest.mark.parametrize(("changes", "parts"), [
    ({"objective": {"divergence": {"name": "jsd", "share": 1.5}}}, ["objective.divergence.share = 1.5", "less than 1"]),
    ({"objective": {"divergence": {"share": 0.5}}}, ["objective.divergence.share", "forward_kl mixes nothing"]),
    ({"objective": {"features": {"layers": [[0, 9]]}}}, ["objective.features.layers", "teacher's layers are 0 to 2"]),
    ({"objective": {"label_smoothing": 1.0}}, ["objective.label_smoothing", "less than 1"]),
    ({"objective": {"features": {}}, "teacher": {"targets": {"source": "hidden"}}}, ["objective.features", "a cache"]),
    ({"teacher": {"targets": {"path": "x"}}}, ["teacher.targets.path", "a live teacher has no cache"]),
    ({"teacher": {"targets": {"source": "samples"}}, "objective": {"divergence": {"name": "jsd"}}},
     ["objective.divergence.name", "forward_kl only"]),
    ({"teacher": {"targets": {"source": "top_k"}}, "data": {"streaming": True}}, ["teacher.targets.source", "stream"]),
    ({"objective": {"on_policy": {"fraction": 1.5}}}, ["objective.on_policy.fraction", "less than or equal to 1"]),
    ({"objective": {"on_policy": {}}, "sharding": {"engine": "fsdp2"}}, ["sharding.engine", "whole weights only"]),
    ({"objective": {"on_policy": {}}, "teacher": {"targets": {"source": "hidden"}}},
     ["teacher.targets.source", "in no cache"]),
    ({"objective": {"values": {}}, "memory": {"budget": "1GiB"}}, ["objective.values", "do not show their attention"]),
])
def test_what_cannot_be_is_said_before_anything_starts(write_experiment, family, tmp_path, changes, parts):
    refused(write_experiment(**with_(family, **changes)), tmp_path, parts=parts)


def test_everything_masked_is_no_loss(train_here, family):
    """Silent error 5: a batch without a target counts as such."""
    trainer = train_here("masked", **family)
    batch = {name: value[:2] for name, value in trainer.text.held_out.items()}
    batch["targets"] = torch.full_like(batch["targets"], -100)
    loss, terms = trainer._loss({**batch, "row": torch.zeros(2).long()})
    loss.backward()
    assert float(loss) == 0 and all(float(value) == 0 for value in terms.values())


def test_heads_with_a_bias_are_found_too(train_here, family):
    tokenizer = AutoTokenizer.from_pretrained(family["student"]["path"])
    shutil.rmtree(family["student"]["path"])
    torch.manual_seed(0)
    config = AutoConfig.for_model("gptj", n_embd=32, n_layer=2, n_head=2, rotary_dim=8, vocab_size=300, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(family["student"]["path"])
    tokenizer.save_pretrained(family["student"]["path"])
    trainer = train_here("gptj", **with_(family, data={"packing": False}, student={"architecture": None}))
    assert trainer.distillation.shapes[0] is not None and trainer.unwrapped.lm_head.bias is not None
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_a_student_of_weights_alone_has_its_teachers_tokenizer(train_here, family):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (Path(family["student"]["path"]) / file).unlink()
    assert first(train_here("bare", **family))["forward_kl"] > 0
