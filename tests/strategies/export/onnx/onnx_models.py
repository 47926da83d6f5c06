"""Small language models for ONNX, a tokenizer and rows for them, and how their files are asked."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from strategies.export.clients import onnx_client
from strategies.export.receipt import ask_client
from tests.conftest import TINY

CLOSE = 2e-6  # of the largest number: fp32 sums in another order, which are 1.3e-6 for 1,024 inputs of 4 bits
WORDS = ["</s>", "<unk>", *(f"w{number}" for number in range(88))]


def tokenizer() -> PreTrainedTokenizerFast:
    found = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="</s>", unk_token="<unk>")


def build(kind: str, tied: bool = True, **dimensions):
    torch.manual_seed(3)
    torch.set_num_threads(1)
    dimensions = {**TINY, "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 90, "tie_word_embeddings": tied,
                  "model_type": kind, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **dimensions}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**dimensions)).eval()


def held_out() -> dict[str, torch.Tensor]:
    """Rows in which documents begin again, at other places in each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (5, 24), generator=generator)
    begins = torch.rand(5, 24, generator=generator) < 0.15
    positions = torch.stack([torch.arange(24) - torch.cummax(torch.arange(24) * row, 0).values for row in begins])
    targets = torch.where(positions.roll(-1, 1) == 0, -100, ids.roll(-1, 1))
    return {"input_ids": ids, "position_ids": positions, "targets": targets, "bytes": torch.full((5,), 70)}


def ask(folder, names, client):
    return ask_client({name: {"path": str(folder / name), "compare": True} for name in names}, held_out(), client,
                      device="cpu", threads=1, micro_batch=2, logit_rows=4, logit_length=20, prompt="w1 w2 w3",
                      sample_tokens=8, tokenizer=str(folder / names[0]))


def logits(model, ids, positions):
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def says_what_transformers_says(folder, model):
    """64 tokens of two prompts: each alone, and both at once with padding on the left of the shorter one."""
    session = onnx_client.open_session(folder, threads=1)
    prompts, found = [[3, 14, 15, 9, 26, 5], [35, 8, 79]], []
    for prompt in prompts:
        with torch.no_grad():
            wanted = model.generate(torch.tensor([prompt]), generation_config=GenerationConfig(
                max_new_tokens=64, do_sample=False, pad_token_id=0))[0, len(prompt):]
        found.append(list(onnx_client.greedy(session, prompt, 64)))
        assert found[-1] == wanted.tolist()
    row, mask = np.array([prompts[0], [0, 0, 0, *prompts[1]]]), np.array([[1] * 6, [0] * 3 + [1] * 3])
    ids, cache, together = row, onnx_client.empty_cache(session, 2), []
    for _ in range(64):
        places = (mask.cumsum(1) - 1).clip(min=0)[:, -ids.shape[1]:]
        logits_now, cache = onnx_client.step(session, ids, mask, places, cache)
        ids = logits_now[:, -1:].argmax(-1)
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        together.append(ids[:, 0])
    assert np.array(together).T.tolist() == found
