"""What models write to the prompts of a report: texts are continued, chats are answered, by greedy `generate`."""

import json

import pytest
import torch
from matplotlib import pyplot
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tests.conftest import sentences
from trainer.data.encoding import answer_end, sample_prompts
from trainer.data.tokenizers import train_tokenizer
from trainer.errors import ExperimentErrors
from trainer.experiment.data_nodes import Data, Tokenizer
from trainer.experiment.load import read_experiment
from trainer.run.report import _samples, write_report
from trainer.run.report_plots import loss_figure, plot_size, sizes_figure

TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
PROMPTS = ["What does the cat see?", "Who likes milk?\nSay it."]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Chats, and a tokenizer whose end of a text is not what its template ends a turn with."""
    folder, lines = tmp_path_factory.mktemp("chats"), sentences(7, 60).split("\n")
    train_tokenizer([(Data(tokenizer=Tokenizer(train_vocabulary=300)), [{"text": line} for line in lines] * 4)], folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": [
        {"role": "user", "content": f"What does the {line.split()[1]} see?"}, {"role": "assistant", "content": line}]})
        for line in lines))
    return folder


def test_a_chat_is_answered_up_to_the_token_that_ends_an_answer(run_experiment, chats):
    _, folder = run_experiment(
        data={"path": str(chats / "chats.jsonl"), "messages": "messages", "packing": False,
              "tokenizer": {"path": str(chats), "train_vocabulary": None}},
        training={"steps": 24, "evaluate_every": 24, "checkpoint_every": 24}, optimizer={"lr": 1e-2},
        report={"control": False, "prompts": PROMPTS, "sample_tokens": 12})
    tokenizer = AutoTokenizer.from_pretrained(folder.student)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert GenerationConfig.from_pretrained(folder.student).eos_token_id[0] == end != tokenizer.eos_token_id
    model, found = AutoModelForCausalLM.from_pretrained(folder.student), []
    for prompt in PROMPTS:
        ids = tokenizer(f"<|user|>{prompt}<|end|>\n<|assistant|>").input_ids
        begin = len(ids)
        with torch.no_grad():
            while len(ids) < begin + 12 and ids[-1] != end or len(ids) == begin:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(tokenizer.decode(ids[begin:], skip_special_tokens=True))
    samples = json.loads(folder.comparison.read_text())["student"]["samples"]
    assert [one["text"] for one in samples] == found
    assert [one["prompt"] for one in samples] == [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    report = folder.report.read_text().partition("## Samples\n")[2]
    assert report.count("**user**") == 2
    assert all(f"```text\n{text}\n```" in report for text in (*PROMPTS, *found))
    assert report.count("The student answers with its most probable tokens") == 1
    whole = folder.report.read_text()
    assert "size.png" not in whole and not (folder.path / "size.png").exists(), "there is nothing to compare"
    assert "| notes |" not in whole and "| cache difference |" not in whole, "rows without a value"


def test_texts_are_continued_and_old_samples_are_shown(run_experiment):
    _, folder = run_experiment(report={"control": False, "prompts": ["The cat", "The fox `"]})
    found = json.loads(folder.comparison.read_text())
    assert [one["text"][:7] for one in found["student"]["samples"]] == ["The cat", "The fox"]
    report = folder.report.read_text()
    assert report.count("The student continues each prompt with its most probable tokens.") == 1
    assert "**prompt**: `The cat`\n" in report and "**prompt**: `` The fox ` ``\n" in report
    both = "\n".join(_samples({**found, "teacher": found["student"]}, {}))
    assert both.count("Each model continues each prompt") == 1 and both.count("**prompt**") == 2
    del found["student"]["samples"]
    folder.comparison.write_text(json.dumps({"student": {**found["student"], "sample": "The old one"}}))
    assert "```text\nThe old one\n```" in write_report(folder.path).read_text()


def test_a_picture_of_sizes_compares_and_has_no_bits_below_none(tmp_path):
    found = {"teacher": {"bytes_on_disk": 9 * 2**20, "bits_per_byte": 0.1},
             "student": {"bytes_on_disk": 2**20, "bits_per_byte": 2.0}}
    plot_size(found, tmp_path / "size.png")
    assert (tmp_path / "size.png").exists()
    assert sizes_figure(found)[1].get_ylim()[0] == 0 < 2.0 < sizes_figure(found)[1].get_ylim()[1]
    plot_size({"student": found["student"]}, tmp_path / "size.png")
    assert not (tmp_path / "size.png").exists()


def test_what_a_prompt_is_depends_on_what_is_learned(chats):
    tokenizer = AutoTokenizer.from_pretrained(chats)
    asked = [[{"role": "user", "content": "a"}]]
    for data in (Data(messages="m"), Data(prompt="p", response="r")):
        assert sample_prompts(["a"], tokenizer, data) == asked
        assert answer_end(tokenizer, data) == tokenizer.convert_tokens_to_ids("<|end|>")
    assert sample_prompts(["a"], tokenizer, Data()) == ["a"] and answer_end(tokenizer, Data()) is None


def test_one_prompt_or_several(write_experiment):
    with pytest.raises(ExperimentErrors, match="`prompt` is for one prompt"):
        read_experiment(write_experiment(report={"prompt": "A", "prompts": ["B"]}))
    assert read_experiment(write_experiment(report={"prompts": ["B", "C"]})).experiment.report.texts == ("B", "C")


def test_the_loss_of_a_classifier_is_not_one_of_tokens():
    lines = [{"step": 1, "loss": 2.0, "cross_entropy": 1.5}, {"step": 2, "loss": 1.0, "cross_entropy": 0.75}]
    for held_out, unit in (({"bits_per_byte": 1.0}, "nats per token"), ({"accuracy": 0.5}, "nats")):
        figure, axes = loss_figure({"student": [*lines, {"step": 2, "held_out": held_out}]})
        assert axes.get_ylabel() == f"cross-entropy ({unit})"
        assert axes.lines[0].get_xydata().tolist() == [[1, 1.5], [2, 0.75]]
        pyplot.close(figure)
