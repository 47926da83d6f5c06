"""The records of the benchmark of tasks: one right number among three wrong ones, for both judges alike."""

import argparse
import json

import yaml

from benchmarks.judged_on_tasks import tasks, write_harness, write_records, wrong_numbers
from trainer.evaluate.task_files import read_task
from trainer.experiment.evaluate_nodes import Evaluate


def test_both_judges_get_the_same_records(tmp_path):
    assert [wrong_numbers(right) for right in ("18", "10", "0", "1234567.5")] == [
        ["28", "36", "17"], ["20", "23", "9"], ["10", "3", "-1"], ["1234577.5", "2469135", "1234566.5"]]
    lines = [{"question": f"{number} and 1?", "answer": f"{number} + 1 = {number + 1}\n#### {number + 1:,}"}
             for number in (1, 17, 1299)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = argparse.Namespace(data=tmp_path, limit=3, answers=2, new_tokens=8)
    records = write_records(chosen, tmp_path)
    asked = Evaluate(tasks=tasks(chosen, records, write_harness(records, tmp_path / "harness", 8)))
    texts, numbers, answers = (read_task(task, "") for task in asked.in_training)
    assert [one.answer for one in numbers.questions] == ["2", "18", "1300"] and len(answers.questions) == 2
    assert all(len(set(one.choices)) == 4 for one in numbers.questions) and texts.questions[2].answer.endswith("1,300")
    theirs = {file.stem: yaml.safe_load(file.read_text()) for file in (tmp_path / "harness").iterdir()}
    assert {task.name for task in asked.tasks if task.kind == "harness"} == {one["task"] for one in theirs.values()}
    assert all(one["dataset_kwargs"]["data_files"]["test"] == str(records) for one in theirs.values())
