"""Heads that are padded beyond their tokenizer's tokens: what only pads takes no part in a divergence."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import sentences
from tests.trainer.teacher.test_distilling import bpe, first, save

TOKENS = 300


@pytest.fixture
def padded(tmp_path):
    """Two models whose heads are padded to other sizes, and whose padding is most of what they would say."""
    tokenizer = bpe(TOKENS)
    paths = [save(tmp_path / "teacher", tokenizer, 384, model_type="gemma2", head_dim=8, sliding_window=8,
                  query_pre_attn_scalar=8, final_logit_softcapping=2.0),
             save(tmp_path / "student", tokenizer, 320, seed=1)]
    for path in paths:
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            model.get_output_embeddings().weight[TOKENS:] *= 40
        model.save_pretrained(path)
    for name, begin in (("text", 0), ("held", 4)):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": sentences(number, 2)}) + "\n" for number in range(begin, begin + 4)))
    return paths


def experiment(tmp_path, paths, source, **changes):
    return {"teacher": {"path": paths[0], "targets": {"source": source, **changes}},
            "student": {"architecture": None, "path": paths[1]}, "optimizer": {"lr": 1e-12},
            "objective": {"cross_entropy": 0.5,
                          "divergence": {"name": "forward_kl", "weight": 0.5, "temperature": 2.0}},
            "data": {"path": str(tmp_path / "text.jsonl"), "packing": False, "tokenizer": {"train_vocabulary": None},
                     "validation": {"path": str(tmp_path / "held.jsonl"), "fraction": 0.01}},
            "training": {"steps": 1, "batch_size": 4, "micro_batch": 4, "evaluate_every": 1, "checkpoint_every": 1}}


def divergence(tmp_path, paths, sequence=32) -> float:
    """KL of the softened models over the tokenizer's tokens, times T^2, in float64, each document alone."""
    teacher, student = (AutoModelForCausalLM.from_pretrained(path).eval() for path in paths)
    tokenizer, total, count = AutoTokenizer.from_pretrained(paths[1]), 0.0, 0
    for line in (tmp_path / "text.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([ids[:sequence + 1]])
        with torch.no_grad():
            p, q = ((model(ids).logits[0, :-1, :TOKENS].double() / 2).log_softmax(-1) for model in (teacher, student))
        total, count = total + 4 * float((p.exp() * (p - q)).sum()), count + ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("source, changes", [("live", {}), ("hidden", {}), ("top_k", {"k": TOKENS}),
                                             ("samples", {"draws": 4000})])
def test_a_divergence_is_over_tokens_alone(padded, tmp_path, train_here, source, changes):
    trainer = train_here(**experiment(tmp_path, padded, source, **changes))
    exact = divergence(tmp_path, padded)
    found = first(trainer)["forward_kl"]
    assert found == pytest.approx(exact, rel=0.1 if source == "samples" else 1e-4)


def test_identical_models_that_are_padded_score_zero(padded, tmp_path, train_here):
    trainer = train_here(**experiment(tmp_path, [padded[1], padded[1]], "live"))
    assert first(trainer)["forward_kl"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("own", [True, False])
def test_sorted_distributions_are_over_tokens_alone(padded, tmp_path, train_here, own):
    """Where the teacher brings a tokenizer texts are matched by spans; of the same tokenizer each token is one."""
    if not own:
        for file in (tmp_path / "teacher").glob("token*"):
            file.unlink()
    changes = experiment(tmp_path, padded, "live")
    changes["objective"]["divergence"]["name"] = "uld"
    changes["data"]["tokenizer"] = {"train_vocabulary": None, "path": padded[1]}
    teacher, student = (AutoModelForCausalLM.from_pretrained(path).eval() for path in padded)
    total, count = 0.0, 0
    tokenizer = AutoTokenizer.from_pretrained(padded[1])
    for line in (tmp_path / "text.jsonl").read_text().splitlines():
        ids = torch.tensor([[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id][:33]])
        with torch.no_grad():
            p, q = ((model(ids).logits[0, :-1, :TOKENS].double() / 2).softmax(-1).sort(-1).values
                    for model in (teacher, student))
        total, count = total + 4 * float((p - q).abs().sum()), count + ids.shape[1] - 1
    assert first(train_here(**changes))["uld"] == pytest.approx(total / count, rel=1e-4)
