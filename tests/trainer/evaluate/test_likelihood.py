"""Likelihoods of choices and texts, against sums over plain forward passes of one text at a time."""

import math

import pytest
import torch

from tests.trainer.evaluate.asked_models import (
    CHAT,
    judged,
    objects,
    reader_of,
    small_model,
    small_tokenizer,
    write_records,
)
from trainer.errors import UserError
from trainer.evaluate.asking import batches_by_length
from trainer.evaluate.likelihood import passage_of, windows
from trainer.evaluate.task_files import read_task
from trainer.experiment.evaluate_nodes import Task


@torch.no_grad()
def log_likelihood(model, ids, counted):
    """Of the last tokens, in float64."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[at - 1, ids[at]]) for at in range(len(ids) - counted, len(ids)))


def test_the_likeliest_choice_is_that_of_single_forward_passes(tmp_path):
    model, tokenizer = small_model(), small_tokenizer()
    path = objects(tmp_path / "records.jsonl")
    found = judged(reader_of(model, tokenizer, 60), kind="multiple_choice", path=path, prompt="Say: {prompt}",
                   shots=2)
    records = read_task(Task(name="own", kind="multiple_choice", path=path, prompt="Say: {prompt}", shots=2), "")
    begin = "".join(f"{shot.prompt} {shot.answer}\n\n" for shot in records.shots)
    assert len(records.questions) == 10 and begin.startswith("Say: The ")
    for number, question in enumerate(records.questions):
        context = tokenizer(begin + question.prompt)["input_ids"]
        values = []
        for choice in question.choices:
            whole = tokenizer(f"{begin}{question.prompt} {choice}")["input_ids"]
            values.append(log_likelihood(model, whole, len(whole) - len(context)))
        each = [value / len(choice) for value, choice in zip(values, question.choices, strict=True)]
        assert found.outcomes["accuracy"][number][0] == (values.index(max(values)) == question.right)
        assert found.outcomes["accuracy_per_character"][number][0] == (each.index(max(each)) == question.right)
    assert found.outcomes["accuracy"] != found.outcomes["accuracy_per_character"]


def test_bits_per_byte_count_each_token_once_also_of_texts_longer_than_the_model_reads(tmp_path):
    model, tokenizer = small_model(max_position_embeddings=8), small_tokenizer()
    path = objects(tmp_path / "records.jsonl", 5)
    found = judged(reader_of(model, tokenizer), kind="perplexity", path=path)
    questions = read_task(Task(name="own", kind="perplexity", path=path), "").questions
    for question, (bits, size) in zip(questions, found.outcomes["bits_per_byte"], strict=True):
        ids, nats = tokenizer(question.answer)["input_ids"], 0.0
        for begin in range(0, len(ids), 8):
            before = ids[begin - 1] if begin else tokenizer.eos_token_id
            part = ids[begin:begin + 8]
            nats -= log_likelihood(model, [before, *part], len(part))
        assert bits == pytest.approx(nats / math.log(2), rel=1e-5) and size == len(question.answer.encode())
    assert max(len(tokenizer(question.answer)["input_ids"]) for question in questions) > 16
    sizes = [list(windows(list(range(length)), 0, 16)) for length in (1, 16, 17)]
    assert [[window.counted for window in one] for one in sizes] == [[1], [16], [16, 1]]


def test_white_space_before_an_answer_is_tokenized_with_it_and_long_prompts_lose_their_beginning():
    reader = reader_of(small_model(max_position_embeddings=16), small_tokenizer())
    plain, trailing = passage_of(reader, "The cat sees", " the bread."), passage_of(reader, "The cat sees ",
                                                                                   "the bread.")
    assert plain == trailing and plain.ids == reader.encode("The cat sees the bread.")
    long = passage_of(reader, "The cat sees. " * 20, "the milk.")
    assert len(long.ids) == 17 and long.ids[-long.counted:] == reader.encode(" the milk.")
    assert passage_of(reader, "", "The").ids[0] == reader.tokenizer.eos_token_id


def test_chats_are_asked_by_the_template_and_need_one(tmp_path):
    path = objects(tmp_path / "records.jsonl")
    model, tokenizer = small_model(), small_tokenizer()
    with pytest.raises(UserError, match="has no chat template") as raised:
        judged(reader_of(model, tokenizer), kind="multiple_choice", path=path, chat=True)
    assert raised.value.key == "evaluate.tasks.0.chat"
    tokenizer.chat_template = CHAT
    chat = judged(reader_of(model, tokenizer), kind="multiple_choice", path=path, chat=True, shots=1)
    records = [{"prompt": f"<|user|>The fish<|end|><|assistant|>bread.<|end|><|user|>{question.prompt}<|end|>"
                          "<|assistant|>", "choices": list(question.choices), "answer": question.answer}
               for question in read_task(Task(name="own", kind="multiple_choice", path=path, shots=1), "").questions]
    first = read_task(Task(name="own", kind="multiple_choice", path=path), "").questions[0]
    for record in records:
        record["prompt"] = record["prompt"].replace("The fish", first.prompt, 1).replace("bread.", first.answer, 1)
    plain = judged(reader_of(model, tokenizer), kind="multiple_choice", separator="",
                   path=write_records(tmp_path / "plain.jsonl", records))
    assert chat.outcomes == plain.outcomes


def test_batches_hold_texts_of_similar_lengths_within_their_tokens():
    lengths = [3, 9, 1, 9, 50, 2]
    batches = batches_by_length(lengths, 20)
    assert batches == [[4], [1, 3], [0, 5, 2]]
    assert batches_by_length(lengths, 20, apart=True) == [[4], [1], [3], [0], [5], [2]]
