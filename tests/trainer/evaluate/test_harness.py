"""Own tasks reach the figures of lm-evaluation-harness where both have the task; it judges through `kind: harness`."""

import json
import re
from pathlib import Path

import pytest

from tests.trainer.evaluate.asked_models import (
    judged,
    objects,
    reader_of,
    small_model,
    small_tokenizer,
    write_records,
)
from trainer.errors import UserError
from trainer.evaluate.exact_match import write_answers
from trainer.evaluate.harness import check_harness, judge_by_harness
from trainer.experiment.evaluate_nodes import Task

TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "Say: {{prompt}}"
doc_to_target: answer
doc_to_choice: choices
fewshot_split: train
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
""",
    "numbers": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{number}}"
generation_kwargs: {until: ["t"], max_gen_toks: 8}
metric_list:
  - metric: exact_match
filter_list:
  - name: first-word
    filter:
      - function: regex
        regex_pattern: "(\\\\S+)"
        group_select: -1
      - function: take_first
""",
}


@pytest.fixture
def folder(tmp_path):
    """Task files as the harness reads them, of local data."""
    records = objects(tmp_path / "records.jsonl")
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{train: {records}}}}}\n"
            f"test_split: train\ntraining_split: train\n{text}")
    return tmp_path


def right_on_every_other(reader, path):
    """Give every other record the answer that the model writes."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for record in records[::2]:
        [text] = write_answers(reader, [reader.encode(record["prompt"])], 8, ["t"])
        record["number"] = re.findall(r"\S+", text)[-1]
    write_records(Path(path), records)


def test_own_figures_are_those_of_the_harness(folder, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    model, tokenizer = small_model(), small_tokenizer()
    reader, path = reader_of(model, tokenizer), str(folder / "records.jsonl")
    right_on_every_other(reader, path)
    model.generation_config.repetition_penalty = 3.0  # counts for neither
    choices, texts, numbers = (judge_by_harness(reader, Task(
        name=name, kind="harness", path=str(folder), trust_remote_code=True)) for name in TASKS)
    own = judged(reader, kind="multiple_choice", path=path, prompt="Say: {prompt}")
    assert own.values == {"accuracy": choices.values["acc"], "accuracy_per_character": choices.values["acc_norm"]}
    assert own.outcomes["accuracy"] == choices.outcomes["acc"] and 0 < own.values["accuracy"] < 1
    own = judged(reader, kind="perplexity", path=path)
    assert own.values["bits_per_byte"] == pytest.approx(texts.values["bits_per_byte"], rel=1e-6)
    for ours, theirs in zip(own.outcomes["bits_per_byte"], texts.outcomes["bits_per_byte"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    own = judged(reader, kind="exact_match", path=path, answer="number", extract="regex", pattern=r"(\S+)", stop=["t"],
                 max_new_tokens=8)
    assert own.values["exact_match"] == 0.5
    assert own.outcomes["exact_match"] == numbers.outcomes["exact_match.first-word"]


def test_what_the_harness_lacks_is_said_before_work_starts(folder, monkeypatch):
    task = Task(name="choises", kind="harness", path=str(folder), trust_remote_code=True)
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    with pytest.raises(UserError, match="has no such task") as raised:
        check_harness(task, "evaluate.tasks.0")
    assert raised.value.key == "evaluate.tasks.0.name" and raised.value.way_out == "did you mean `choices`?"
    check_harness(task.model_copy(update={"name": "choices"}), "evaluate.tasks.0")
    with pytest.raises(UserError, match="are programs, which are run only if you say so"):
        check_harness(task.model_copy(update={"trust_remote_code": False}), "evaluate.tasks.0")
    (folder / "records.jsonl").unlink()
    with pytest.raises(UserError, match="cannot load this task"):
        check_harness(task.model_copy(update={"name": "texts"}), "evaluate.tasks.0")


def test_without_the_harness_a_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.evaluate.harness.find_spec", lambda _: None)
    with pytest.raises(UserError, match="is not installed") as raised:
        check_harness(Task(name="hellaswag", kind="harness"), "evaluate.tasks.1")
    assert raised.value.key == "evaluate.tasks.1.kind" and "limbeck[eval]" in raised.value.way_out
