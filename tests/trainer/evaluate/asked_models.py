"""Small models with tokenizers, and task files, that the tests of evaluations use."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.conftest import TINY, sentences
from tests.trainer.teacher.test_distilling import bpe
from trainer.data.tokenizers import END
from trainer.evaluate.asking import OneProcess, Reader
from trainer.evaluate.judge import judge
from trainer.evaluate.task_files import read_task
from trainer.experiment.evaluate_nodes import Task

CHAT = ("{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def small_tokenizer(**special):
    return PreTrainedTokenizerFast(tokenizer_object=bpe(300), eos_token=END, pad_token=END, **special)


def small_model(seed=0, **changes):
    """A random model with something to say: larger weights make its predictions differ from each other."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, "vocab_size": 300, "num_hidden_layers": 2,
                                                            "initializer_range": 0.4, **changes}))
    return model.eval()


def reader_of(model, tokenizer, tokens=400):
    return Reader(model, model, tokenizer, OneProcess(torch.device("cpu")), tokens)


def write_records(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def objects(file, count=12):
    """Sentences of a small grammar without their last words, which are the choices; as texts, and with numbers."""
    records = []
    for number, line in enumerate(sentences(5, count).split("\n")):
        words = line.split()
        records.append({"prompt": " ".join(words[:number % 3 + 2]), "answer": words[4], "text": line * (number % 4 + 1),
                        "choices": ["bread.", "milk.", "corn."], "number": f"It is {number}. No, {number + 1}."})
    return write_records(file, records)


def judged(reader, **task):
    return judge(reader, read_task(Task(name="own", **task), "evaluate.tasks.0"), "evaluate.tasks.0")
