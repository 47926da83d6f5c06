"""Answers are greedy whatever the model's settings say, the same in any batch, end where they end, and are compared."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from tests.trainer.evaluate.asked_models import (
    CHAT,
    judged,
    reader_of,
    small_model,
    small_tokenizer,
    write_records,
)
from trainer.evaluate import exact_match
from trainer.evaluate.exact_match import end_tokens, pads_alike, write_answers
from trainer.evaluate.extraction import extracted, right_of
from trainer.experiment.evaluate_nodes import Task

PROMPTS = ["The", "The cat sees", "The dog likes the milk. The bird finds the", "corn", "The fox takes the bread. The"]


@torch.no_grad()
def greedy(model, ids, count, ends=()):
    """The most probable next token, again and again, by whole forward passes."""
    ids, new = list(ids), []
    while len(new) < count:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
        ids.append(token)
    return new


def unruly(model):
    """Settings for generation that each change what is written."""
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_p = True, 3.0, 0.5
    settings.repetition_penalty, settings.no_repeat_ngram_size = 2.0, 1
    settings.suppress_tokens, settings.forced_eos_token_id = [260], 5
    return model


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_answers_are_greedy_and_no_batch_changes_them(tokens):
    plain, model, tokenizer = small_model(), unruly(small_model()), small_tokenizer()
    own = model.generation_config
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    written = write_answers(reader_of(model, tokenizer, tokens), ids, 12, ())
    wanted = [tokenizer.decode(greedy(plain, one, 12, [0]), skip_special_tokens=True) for one in ids]
    assert written == wanted and len(set(wanted)) == len(wanted)
    assert model.generation_config is own and own.do_sample, "its own settings are back"


def test_answers_end_at_texts_and_at_every_end_token():
    model = small_model()
    tokenizer = small_tokenizer(additional_special_tokens=["<|end|>", "<|user|>", "<|assistant|>"])
    ids = tokenizer("The cat sees")["input_ids"]
    new = greedy(model, ids, 12)
    said = [tokenizer.decode(new[:count]) for count in range(13)]
    reader = reader_of(model, tokenizer)
    assert write_answers(reader, [ids], 12, ()) == [said[12]]
    stop = said[6][len(said[4]):]
    assert write_answers(reader, [ids, ids], 12, ["no such text", stop]) == [said[12][:said[12].index(stop)]] * 2
    model.generation_config.eos_token_id = [1, new[7]]
    assert write_answers(reader, [ids], 12, ()) == [said[new.index(new[7])]]
    tokenizer.chat_template = CHAT
    assert end_tokens(model, tokenizer, "<|end|>") == sorted({0, 1, new[7], tokenizer.convert_tokens_to_ids("<|end|>")})


def test_a_model_that_padding_changes_gets_none(monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64,
                                                        initializer_range=0.4)).eval()
    tokenizer = small_tokenizer()
    reader = reader_of(model, tokenizer)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    wanted = [tokenizer.decode(greedy(model, one, 6, [0]), skip_special_tokens=True) for one in ids]
    assert write_answers(reader, ids, 6, ()) == wanted
    plain = model.forward
    sizes = []

    def no_positions(*inputs, position_ids=None, **more):  # as where positions are counted from the padding on
        sizes.append(more.get("input_ids", inputs[0] if inputs else None).shape)
        return plain(*inputs, **more)

    monkeypatch.setattr(model, "forward", no_positions)
    with exact_match.greedy(model, tokenizer, [0], 6):
        assert not pads_alike(reader, ids)
    assert write_answers(reader, [*ids, ids[0]], 6, ()) == [*wanted, wanted[0]]
    assert max(rows for rows, _ in sizes[2:]) == 2, "prompts of one length still share a batch"


@pytest.mark.parametrize(("settings", "text", "found"), [
    ({"extract": "none"}, "  It is so. \n", "It is so."),
    ({"extract": "last_number"}, "He has 1,234.50 of $2,000.", "2000"),
    ({"extract": "last_number"}, "#### 72.0", "72"),
    ({"extract": "last_number"}, "16-3", "3"),
    ({"extract": "last_number"}, "16 - 3 = -13.", "-13"),
    ({"extract": "last_number"}, "1,2,3", "3"),
    ({"extract": "last_number"}, "none", None),
    ({"extract": "regex", "pattern": r"answer is (\w)"}, "The answer is B. No, the answer is C.", "C"),
    ({"extract": "regex", "pattern": r"[A-D]"}, "B or D", "D"),
])
def test_what_is_compared(settings, text, found):
    assert extracted(Task(name="own", kind="exact_match", path="x", **settings), text) == found


def test_a_right_answer_without_the_pattern_counts_whole():
    task = Task(name="own", kind="exact_match", path="x", extract="regex", pattern=r"is (\w+)")
    assert right_of(task, " Paris ") == "Paris" == right_of(task, "It is Paris.")


def test_a_task_counts_the_answers_that_are_right(tmp_path):
    model, tokenizer = small_model(), small_tokenizer()
    ids = tokenizer("The cat sees")["input_ids"]
    says = tokenizer.decode(greedy(model, ids, 5, [0]))
    records = [{"prompt": "The cat sees", "answer": answer} for answer in (says, says + "!", f" {says}\n")]
    path = write_records(tmp_path / "own.jsonl", records)
    found = judged(reader_of(model, tokenizer), kind="exact_match", path=path, max_new_tokens=5, stop=[])
    assert found.outcomes["exact_match"] == [(1.0, 1.0), (0.0, 1.0), (1.0, 1.0)]
    assert found.written[1] == {"line": 2, "prompt": "The cat sees", "written": says, "found": says.strip(),
                                "right": says + "!" if not says.startswith(" ") else (says + "!").strip()}
