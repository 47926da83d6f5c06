"""A model's own settings for generation do not enter what a student writes, nor the samples of a report."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from strategies.distillation.on_policy import written_rows
from strategies.export.clients.transformers_client import sample

WORDS, ROWS = 12, 6000
NASTY = {"repetition_penalty": 4.0, "no_repeat_ngram_size": 1, "top_p": 0.3, "top_k": 2, "min_p": 0.4, "typical_p": 0.2,
         "temperature": 0.2, "suppress_tokens": [5, 6], "begin_suppress_tokens": [7], "epsilon_cutoff": 0.1,
         "eta_cutoff": 0.1, "bad_words_ids": [[8]], "sequence_bias": [[[9], 5.0]], "forced_eos_token_id": 3,
         "min_new_tokens": 2, "max_length": 3, "exponential_decay_length_penalty": [1, 5.0], "guidance_scale": 3.0,
         "renormalize_logits": True, "num_return_sequences": 2, "cache_implementation": "static"}


def model():
    torch.manual_seed(1)
    found = LlamaForCausalLM(LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=1, initializer_range=0.4)).eval()
    for name, value in NASTY.items():
        setattr(found.generation_config, name, value)
    return found


def test_tokens_are_drawn_as_often_as_the_student_gives_them_probability():
    student, prompt = model(), torch.tensor([4, 5, 8])
    batch = {"input_ids": prompt.repeat(ROWS, 2), "position_ids": torch.arange(6).repeat(ROWS, 1),
             "targets": torch.tensor([-100, -100, 4, 5, 8, -100]).repeat(ROWS, 1)}
    settings = student.generation_config
    rows = written_rows(student, batch, prompt_tokens=3, new_tokens=1, temperature=1.5, end=1, padding=1, seed=3)
    with torch.no_grad():
        exact = (student(prompt[None]).logits[0, -1].double() / 1.5).softmax(-1)
    drawn = torch.bincount(rows["input_ids"][:, 3], minlength=WORDS) / ROWS
    assert exact.min() > 1e-3  # every token is to be seen, those that are suppressed and repeated too
    assert ((drawn - exact).abs() < 5 * (exact * (1 - exact) / ROWS).sqrt()).all()
    assert student.generation_config is settings


def test_a_sample_is_of_the_most_probable_tokens(tmp_path):
    student = model()
    words = {f"w{number}": number for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w0").save_pretrained(tmp_path)
    ids = [4, 5, 8]
    with torch.no_grad():
        while len(ids) < 11 and ids[-1] != 1:
            ids.append(int(student(torch.tensor([ids])).logits[0, -1].argmax()))
    found = sample(student, str(tmp_path), {}, {"prompt": "w4 w5 w8", "sample_tokens": 8})
    assert found == AutoTokenizer.from_pretrained(tmp_path).decode(ids, skip_special_tokens=True)
