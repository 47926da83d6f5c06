"""What is recorded in small models of transformers, against what their modules make of their own hidden states."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    Qwen3Config,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
)

from strategies.distillation.losses.attention import relation_sum, visible_pairs
from strategies.distillation.losses.features import squared_error_sum
from strategies.distillation.losses.recorder import Values

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 40, "num_key_value_heads": 2, "head_dim": 8}
IDS = torch.arange(24).reshape(2, 12)


def llama(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**TEXT | changes)).train()


def qwen(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3Config(**TEXT | changes)).train()


def gpt2():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=40)).eval()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=40)).eval()


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1)).eval()


def gpt2_third(block, hidden, kind):
    fused = block.attn.c_attn(block.ln_1(hidden))
    return fused.split(32, -1)[("query", "key", "value").index(kind)]


def of_llama(block, hidden, kind):
    return getattr(block.self_attn, f"{kind[0]}_proj")(block.input_layernorm(hidden))


MODELS = {
    "llama": (llama, IDS, lambda m: m.model.layers, lambda m: m.model.norm, of_llama),
    "qwen": (qwen, IDS, lambda m: m.model.layers, lambda m: m.model.norm, of_llama),
    "gpt2": (gpt2, IDS, lambda m: m.transformer.h, lambda m: m.transformer.ln_f, gpt2_third),
    "bert": (bert, IDS, lambda m: m.bert.encoder.layer, lambda m: nn.Identity(),
             lambda block, hidden, kind: getattr(block.attention.self, kind)(hidden)),
    "vit": (vit, torch.arange(128.0).reshape(2, 1, 8, 8) / 128, lambda m: m.vit.layers, lambda m: nn.Identity(),
            lambda block, hidden, kind: getattr(block.attention, f"{kind[0]}_proj")(block.layernorm_before(hidden))),
}
KINDS = ("value", "query", "key", "hidden")


@pytest.mark.parametrize("name", MODELS)
def test_records_are_what_the_blocks_make(name):
    """Block i's output is number i + 1 of the hidden states; the last is through the final norm, in language models."""
    make, inputs, blocks, norm, project = MODELS[name]
    model = make()
    with Values(model, range(3), KINDS) as values:
        hidden = model(inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    for layer, block in enumerate(blocks(model)):
        for kind in KINDS[:3]:
            assert torch.allclose(values.of(layer, kind), project(block, hidden[layer], kind), atol=1e-6), (layer, kind)
        if layer < 2:
            assert torch.equal(values.of(layer, "hidden"), hidden[layer + 1])
        else:
            assert torch.allclose(norm(model)(values.of(2, "hidden")), hidden[3], atol=1e-6)
            assert name in ("bert", "vit") or not torch.allclose(values.of(2, "hidden"), hidden[3], atol=0.1)


def test_grouped_query_models_have_narrower_values_that_still_relate():
    student, teacher = qwen(), llama(num_key_value_heads=4)
    with Values(student, [1]) as ours, Values(teacher, [2]) as theirs:
        student(IDS)
        with torch.no_grad():
            teacher(IDS)
    assert ours.of(1).shape == (2, 12, 16) and theirs.of(2).shape == (2, 12, 32)
    kept = torch.ones(2, 12, dtype=torch.bool)
    relation_sum(ours.of(1), theirs.of(2), kept, visible_pairs(kept, causal=True), 8).backward()
    assert student.model.layers[1].self_attn.v_proj.weight.grad.any()
    assert student.model.layers[2].self_attn.v_proj.weight.grad is None, "what comes after has no part in it"
    with pytest.raises(ValueError, match="these divide both: 1, 2, 4, 8, 16"):
        relation_sum(ours.of(1), theirs.of(2), kept, visible_pairs(kept, causal=True), 3)


def gradients(model, wanted):
    """Of a loss of recorded values and outputs together with the model's own."""
    with Values(model, [1, 2], ("value", "hidden")) as values:
        logits = model(IDS, use_cache=False).logits
        recorded = {key: values.of(*key) for key in ((1, "value"), (2, "hidden"))}
        loss = logits.square().sum() + sum(squared_error_sum(x, wanted(x), torch.ones(2, 12, dtype=torch.bool))
                                           for x in recorded.values())
        loss.backward()
        assert all(values.of(*key) is x for key, x in recorded.items()), "backward recorded what it computed again"
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_under_gradient_checkpointing_gradients_are_the_same():
    plain, saving = llama(), llama()
    saving.gradient_checkpointing_enable()
    assert saving.is_gradient_checkpointing
    first, second = gradients(plain, torch.ones_like), gradients(saving, torch.ones_like)
    assert all(torch.allclose(gradient, second[name], rtol=1e-4, atol=1e-5) for name, gradient in first.items())


def test_a_reentrant_checkpoint_which_cuts_the_gradient_is_refused():
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with Values(model, [1]), pytest.raises(ValueError, match='value of layer 1 has no gradient.*use_reentrant": False'):
        model(IDS, use_cache=False)


def test_the_base_model_alone_is_recorded_as_the_whole_and_wrappers_do_not_matter():
    model = llama()
    with Values(model, [0]) as values, Values(nn.Sequential(model), [0]) as wrapped:
        model.model(IDS)
        first = values.of(0)
        assert torch.equal(first, wrapped.of(0))
        model(IDS)
        assert values.of(0) is not first and torch.equal(values.of(0), first)


def test_hooks_go_with_the_context_and_what_they_left_with_clear():
    model = llama()
    before = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(RuntimeError, match="interrupted"), Values(model, [0]) as values:
        model(IDS)
        raise RuntimeError("interrupted")
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == before
    assert values.of(0).shape == (2, 12, 16)
    values.clear()
    with pytest.raises(ValueError, match="value of layer 0: LlamaModel has not run within the context"):
        values.of(0)


def test_a_block_that_runs_without_its_projection_is_said():
    model, hidden = llama(), torch.ones(2, 12, 32)
    model.model.layers[1].forward = lambda *_, **__: hidden
    with Values(model, [1], ["value", "hidden"]) as values:
        model(IDS)
    assert values.of(1, "hidden") is hidden
    with pytest.raises(ValueError, match="value of layer 1: LlamaModel ran its block without it, .* only hidden"):
        values.of(1)


def test_a_forward_that_failed_leaves_no_old_values():
    model = llama()
    with Values(model, [2]) as values:
        model(IDS)
        with pytest.raises(IndexError):
            model(IDS + 40)
        with pytest.raises(ValueError, match="value of layer 2: LlamaModel has not run"):
            model.model.layers[2].self_attn.v_proj(torch.zeros(1, 1, 32))  # a call from outside of a forward
            values.of(2)


def test_what_was_not_asked_for_is_said():
    with Values(bert(), [0, 2], ("value", "hidden")) as values:
        pass
    with pytest.raises(ValueError, match="query of layer 0 is not recorded; recorded are: value of 0, hidden of 0"):
        values.of(0, "query")
    with pytest.raises(ValueError, match="value of layer 1 is not recorded"):
        values.of(1)


def decoder_with_cross_attention():
    return BertLMHeadModel(BertConfig(**SMALL, vocab_size=40, is_decoder=True, add_cross_attention=True))


def big_code():
    return AutoModelForCausalLM.from_config(GPTBigCodeConfig(n_embd=32, n_layer=3, n_head=4, vocab_size=40,
                                                             multi_query=False))


def bart():
    return BartModel(BartConfig(vocab_size=40, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32,
                                decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4))


def t5():
    return AutoModel.from_config(T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4))


@pytest.mark.parametrize(("make", "layer", "message"), [
    (llama, 3, "layer 3: the layers of LlamaForCausalLM are 0 to 2"),
    (llama, -1, "layer -1: the layers of LlamaForCausalLM are 0 to 2"),
    (lambda: nn.Linear(2, 2), 0, "Linear has no configuration that says how many blocks to look for"),
    (bart, 0, r"BartModel: looked for one list of 2 blocks, and found (en|de)coder.layers, .*model.get_encoder\(\)"),
    (lambda: t5().get_encoder(), 0, "block 0 of T5Stack: looked for one module that makes the value, named v_proj or "
                                    "value or v_lin, or c_attn or Wqkv as GPT-2's and ModernBERT's, and found none"),
    (decoder_with_cross_attention, 1, "block 1 of BertLMHeadModel: .*attention.self.value, crossattention.self.value"),
    (big_code, 0, "block 0 of GPTBigCodeForCausalLM: .* found none"),
])
def test_models_that_are_not_understood_are_said(make, layer, message):
    with pytest.raises(ValueError, match=message):
        Values(make(), [layer])


def test_an_encoder_is_understood_where_its_whole_is_not():
    model = bart().get_encoder().eval()
    with Values(model, [1]) as values:
        model(IDS)
    assert values.of(1).shape == (2, 12, 32)


def test_an_unknown_kind_is_said():
    with pytest.raises(ValueError, match="kind 'values': there are hidden, query, key, value"):
        Values(llama(), [0], ["values"])
