"""Rotary frequencies that depend on length: every document is read as it is alone, by transformers itself."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import TINY
from trainer.models.rope_by_document import by_document, long_documents

SIZES = {**TINY, "vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 8.0, 16.0],
        "original_max_position_embeddings": 16}
KINDS = {
    "phi3": {"original_max_position_embeddings": 16, "rope_parameters": LONG},
    "llama": {"rope_parameters": LONG},
    "phimoe": {"rope_parameters": {**LONG, "short_mscale": 1.0, "long_mscale": 1.3}, "num_local_experts": 2},
    "qwen2": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
}


def build(kind, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SIZES, **KINDS[kind], "model_type": kind, **more})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.ndim > 1 else 1)  # so that positions matter
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_batch_are_read_as_each_is_alone(kind):
    lengths = [[20, 9, 3], [16, 16], [32], [17, 15], [5, 27]]  # 16 is the last of short frequencies
    ids = torch.randint(1, 40, (5, 32), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    plain = build(kind)
    alone = torch.stack([torch.cat([plain(input_ids=part[None]).logits[0] for part in row.split(sizes)])
                         for row, sizes in zip(ids, lengths, strict=True)])
    ours = by_document(build(kind))(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert torch.allclose(ours, alone, atol=1e-4 * float(alone.abs().max()))
    together = build(kind)(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert kind == "qwen2" or not torch.allclose(together, alone, atol=1e-2 * float(alone.abs().max()))


def test_which_positions_belong_to_long_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 1, 2], [7, 8, 9, 0, 1, 2]])
    expected = [[True] * 3 + [False] * 3, [True] * 6, [False] * 3 + [True] * 3, [True] * 6]
    assert long_documents(positions, 2).tolist() == expected
    assert long_documents(torch.tensor([[5]]), 5).tolist() == [[True]]  # from a cache
    assert long_documents(torch.tensor([[4]]), 5).tolist() == [[False]]


def test_generation_switches_where_transformers_does():
    plain, ours = build("phi3"), by_document(build("phi3"))
    for length in (10, 20):
        prompt = torch.arange(1, length + 1)[None]
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        assert torch.equal(ours.generate(prompt, **options), plain.generate(prompt, **options))
