"""Exits on models of transformers: where they sit, what they read, and what is refused."""

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, T5Config, T5ForConditionalGeneration

from strategies.pruning.early_exit.exit_heads import (
    ClassifierExit,
    attach_exits,
    check_layers,
    detach_exits,
    parts_of,
    pooled,
    pooling_of,
)
from tests.strategies.pruning.early_exit.exit_models import CLASSIFIERS, LANGUAGE, inputs_of, made

POOLING = {"bert": "first", "distilbert": "first", "modernbert": "mean", "llama": "last", "tokens": "none",
           "vit": "first"}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_an_exit_reads_the_tokens_that_the_models_own_head_reads(name):
    model = made(CLASSIFIERS[name])
    inputs = {key: tensor[:1] for key, tensor in inputs_of(model).items()}
    assert pooling_of(model, inputs) == POOLING[name] and not model.training


@pytest.mark.parametrize("name", LANGUAGE)
def test_an_exit_of_a_language_model_begins_as_its_last_norm(name):
    model = made(LANGUAGE[name])
    norm = model.get_submodule(parts_of(model).norm)
    exits = attach_exits(model, [1])
    hidden = torch.randn(2, 3, 32)
    torch.testing.assert_close(exits["1"](hidden), norm(hidden), rtol=0, atol=0)
    assert exits["1"].norm.weight is not norm.weight and exits["1"].norm.weight.requires_grad


def test_attached_exits_are_saved_with_the_model_and_taken_off_again():
    model = made(CLASSIFIERS["bert"])
    names, before = set(model.state_dict()), torch.get_rng_state()
    attach_exits(model, [0, 2], seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert set(model.state_dict()) - names == {f"early_exits.{layer}.{name}" for layer in (0, 2) for name in (
        "norm.weight", "norm.bias", "linear.weight", "linear.bias")}
    with pytest.raises(ValueError, match="detach_exits"):
        attach_exits(model, [0])
    first = detach_exits(model)
    again = attach_exits(model, [0, 2], seed=3)
    assert torch.equal(first["2"].linear.weight, again["2"].linear.weight)
    assert set(detach_exits(model)) == {"0", "2"} and set(model.state_dict()) == names
    with pytest.raises(ValueError, match="attach_exits"):
        detach_exits(model)


def test_padding_is_pooled_away():
    hidden, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = torch.where(mask[..., None].bool(), hidden, torch.randn(2, 5, 8))
    for pooling in ("first", "last", "mean"):
        torch.testing.assert_close(pooled(hidden, pooling, mask), pooled(other, pooling, mask), rtol=0, atol=0)
    torch.testing.assert_close(pooled(hidden, "mean", mask)[0], hidden[0, :3].mean(0))
    assert torch.equal(pooled(hidden, "last", mask), torch.stack([hidden[0, 2], hidden[1, 4]]))
    assert ClassifierExit(8, 3, "none")(hidden, mask).shape == (2, 5, 3)


@pytest.mark.parametrize(("layers", "said"), [
    ([], "no exit without a layer"), ([4], "blocks are 0 to 3"), ([-1], "blocks are 0 to 3"), ([3], "is the last one"),
    ([2, 1], "from the first to the last"), ([1, 1], "once each")])
def test_layers_that_cannot_have_an_exit(layers, said):
    with pytest.raises(ValueError, match=said):
        check_layers(layers, 4)


def test_models_without_one_list_of_blocks():
    resnet = ResNetForImageClassification(ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8))
    with pytest.raises(ValueError, match="no list of blocks"):
        parts_of(resnet)
    two = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    with pytest.raises(ValueError, match="found encoder.block, decoder.block"):
        parts_of(two)
