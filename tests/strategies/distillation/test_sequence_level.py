"""A teacher's answers, against what transformers generates prompt by prompt."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import TopPLogitsWarper

from strategies.distillation.sequence_level import Decoding, RowSampler, decode_answers, uniforms

PROMPTS = [[5, 6, 7, 8, 9], [3], [11, 4, 2], [12, 13]]
ENDS, PADDING = {20, 41}, 0


@pytest.fixture(scope="module")
def model():
    """A teacher whose own settings sample, punish repetitions and end nowhere."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2)).eval()
    model.model.embed_tokens.weight.data.mul_(20)
    model.generation_config = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=1.7, top_k=3,
                                               no_repeat_ngram_size=2)
    return model


def alone(model, prompt, **settings):
    """What transformers writes after one prompt, with no settings but these."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        found = model.generate(torch.tensor([prompt]), do_sample=False, eos_token_id=sorted(ENDS), pad_token_id=PADDING,
                               attention_mask=torch.ones(1, len(prompt)), **settings)
    finally:
        model.generation_config = own
    answers = [row[len(prompt):].tolist() for row in found]
    return [row[:next((at + 1 for at, one in enumerate(row) if one in ENDS), len(row))] for row in answers]


def decoded(model, prompts=PROMPTS, seeds="abcd", **settings):
    return decode_answers(model, prompts, Decoding(**settings), ends=ENDS, padding=PADDING, seeds=list(seeds))


def test_greedy_answers_are_those_of_each_prompt_alone(model):
    own = model.generation_config
    found = decoded(model, new_tokens=24)
    assert found == [alone(model, prompt, max_new_tokens=24) for prompt in PROMPTS]
    assert {len(answers[0]) == 24 for answers in found} == {True, False}, "some end, some are cut off"
    assert model.generation_config is own


def test_a_beam_search_gives_the_best_of_each_prompt(model):
    found = decoded(model, new_tokens=6, beams=4, answers=2)
    assert found == [alone(model, prompt, max_new_tokens=6, num_beams=4, num_return_sequences=2) for prompt in PROMPTS]


def test_a_sample_depends_on_its_own_seed_alone(model):
    sampling = {"new_tokens": 12, "temperature": 1.3, "top_p": 0.9, "answers": 3}
    found = decoded(model, **sampling)
    turned = decoded(model, PROMPTS[::-1], "dcba", **sampling)
    assert found == turned[::-1]
    assert found[1:2] == decoded(model, PROMPTS[1:2], "b", **sampling)
    assert len({tuple(answer) for answer in found[0]}) == 3
    assert found[0] != decoded(model, PROMPTS[:1], "e", **sampling)[0]


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_tokens_are_drawn_as_often_as_they_are_probable(top_p):
    """Against the softmax, cut off as transformers cuts it off."""
    scores, many = torch.tensor([[2.0, -1.0, 0.5, 1.5, -4.0, 0.0]]), 20_000
    kept = scores / 0.7 if top_p == 1 else TopPLogitsWarper(top_p)(None, scores / 0.7)
    expected = torch.softmax(kept[0].double(), -1)
    sampler = RowSampler(uniforms("any", many)[:, None], 4, 0.7, top_p)
    chosen = sampler(torch.zeros(many, 4), scores.expand(many, -1))
    assert (chosen.exp().sum(-1) == 1).all(), "one token is left to each row"
    found = chosen.exp().mean(0).double()
    assert torch.equal(found > 0, expected > 1e-6)
    assert (found - expected).abs().max() < 4 * (0.25 / many) ** 0.5


@pytest.mark.parametrize(("settings", "said"), [
    ({"new_tokens": 0}, "new_tokens is a number from 1 on"), ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0.0}, "top_p is a probability"), ({"beams": 2, "temperature": 1.0}, "draws nothing"),
    ({"answers": 2}, "the same"), ({"top_p": 0.5}, "for sampling")])
def test_settings_that_do_not_go_together(settings, said):
    with pytest.raises(ValueError, match=said):
        Decoding(**settings)
