"""Task files and their settings: what is read of them, and what is refused before work starts, with a way out."""

import json

import pytest

from tests.conftest import merge
from tests.trainer.evaluate.asked_models import objects, write_records
from trainer import cli
from trainer.errors import ExperimentErrors, UserError
from trainer.evaluate.task_files import read_task
from trainer.experiment.evaluate_nodes import Task
from trainer.experiment.load import read_experiment

PLAIN = {"prompt": "2 + 2 =", "answer": "4", "choices": ["3", "4"], "text": "Four."}


def task(path, **settings):
    return Task(**{"name": "own", "kind": "multiple_choice", "path": str(path), **settings})


def test_prompts_are_fields_or_texts_with_fields_and_answers_texts_or_numbers(tmp_path):
    path = write_records(tmp_path / "own.jsonl", [{**PLAIN, "answer": 1, "n": 2}, {**PLAIN, "n": "two"}])
    first, second = read_task(task(path, prompt="{n}. {prompt}"), "").questions
    assert (first.prompt, first.answer, first.right) == ("2. 2 + 2 =", "4", 1)
    assert (second.prompt, second.line) == ("two. 2 + 2 =", 2)
    same = read_task(task(path, choices=["4", "5", "6"], limit=1), "")
    assert [one.choices for one in same.questions] == [("4", "5", "6")] and same.questions[0].right == 1


def test_examples_are_of_another_file_or_not_judged(tmp_path):
    path, other = objects(tmp_path / "own.jsonl", 6), objects(tmp_path / "other.jsonl", 9)
    own = read_task(task(path, shots=2, limit=3), "")
    assert [one.line for one in own.shots] == [1, 2] and [one.line for one in own.questions] == [3, 4, 5]
    apart = read_task(task(path, shots=2, examples=other), "")
    assert len(apart.questions) == 6 and len(apart.shots) == 2


@pytest.mark.parametrize(("lines", "settings", "key", "said", "way_out"), [
    ([], {}, "path", "there is no record to judge", "one JSON object on each line"),
    (["{}"], {}, "prompt", "own.jsonl:1 has no field 'prompt'", "its fields are"),
    ([json.dumps(PLAIN), '{"prompt": "x"}'], {}, "choices", "own.jsonl:2 has no field 'choices'", "fields are prompt"),
    ([json.dumps({**PLAIN, "answer": "5"})], {}, "answer", 'the answer "5", which is none of its choices ["3", "4"]',
     "its number from 0 to 1"),
    ([json.dumps({**PLAIN, "answer": 2})], {}, "answer", "which is none of its choices", "its number from 0 to 1"),
    ([json.dumps({**PLAIN, "choices": ["4"]})], {}, "choices", "no list of two texts or more", 'as in ["yes", "no"]'),
    ([json.dumps({**PLAIN, "choices": ["4", "4"]})], {}, "choices", "has the choice '4' twice", "mend or remove"),
    (["{"], {}, "path", "own.jsonl:1 is no JSON object", "one JSON object on each line"),
    (["[1]"], {}, "path", "it is no object {...}", "one JSON object on each line"),
    ([json.dumps({**PLAIN, "prompt": 3})], {}, "prompt", "has no text in this field, but 3", "mend or remove"),
    ([json.dumps(PLAIN)], {"shots": 1}, "path", "no record is left to judge", "name a file"),
    ([json.dumps(PLAIN)], {"shots": 3}, "shots", "has 1 records for the examples", "ask for 1 at most"),
    ([json.dumps({**PLAIN, "text": " "})], {"kind": "perplexity"}, "text", "only white space", "remove this line"),
    ([json.dumps({**PLAIN, "answer": "four"})], {"kind": "exact_match", "extract": "last_number"}, "extract",
     "nothing is found: 'four'", "extract otherwise"),
])
def test_records_that_cannot_be_judged_are_named(tmp_path, lines, settings, key, said, way_out):
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        read_task(task(file, **settings), "evaluate.tasks.0")
    error = raised.value
    assert error.key == f"evaluate.tasks.0.{key}" and said in str(error) and way_out in error.way_out


OWN = {"name": "own", "kind": "multiple_choice", "path": "own.jsonl"}
WRITES = {"name": "words", "kind": "exact_match", "path": "own.jsonl"}


@pytest.mark.parametrize(("changes", "said"), [
    ({"evaluate": {"tasks": [{**OWN, "kind": "multiple_choise"}]}}, "did you mean `multiple_choice`?"),
    ({"evaluate": {"tasks": [{"name": "own", "kind": "perplexity"}]}}, "this key is required"),
    ({"evaluate": {"tasks": [{**OWN, "extract": "last_number"}]}}, "kind multiple_choice has no such key"),
    ({"evaluate": {"tasks": [{**WRITES, "extract": "regex"}]}}, "`pattern` and `extract: regex` go together"),
    ({"evaluate": {"tasks": [{**WRITES, "extract": "regex", "pattern": "("}]}}, "this is no regular expression"),
    ({"evaluate": {"tasks": [OWN, OWN]}}, "call it own-2, say"),
    ({"evaluate": {"tasks": [{**OWN, "examples": "x"}]}}, "add `shots: 3`"),
    ({"evaluate": {"tasks": [{**OWN, "system": "Be brief."}]}}, "add `chat: true`"),
    ({"evaluate": {"every": 2}}, "there is no task to evaluate in training"),
    ({"evaluate": {"every": 2, "tasks": [{"name": "mmlu", "kind": "harness"}]}}, "are judged when the run ends"),
    ({"evaluate": {"every": 2, "tasks": [WRITES]}, "sharding": {"engine": "fsdp2"}}, "fsdp2 shards them"),
    ({"evaluate": {"every": 2, "tasks": [OWN]}, "training": {"keep_best": "own.acuracy"}},
     "did you mean `own.accuracy`?"),
    ({"evaluate": {"tasks": [OWN]}, "training": {"keep_best": "own.accuracy"}}, "add evaluate.every"),
    ({"training": {"keep_best": "gsm8k.exact_match"}}, "add the task to evaluate.tasks"),
    ({"evaluate": {"tasks": [OWN]}}, "there is no such file"),
    ({"evaluate": {"tasks": [{"name": "own", "kind": "harness", "path": "nowhere"}]}}, "-> "),
])
def test_an_experiment_with_such_tasks_is_refused(write_experiment, changes, said, capsys):
    changes = merge({"training": {"steps": 4}}, changes)
    file = write_experiment(**changes)
    assert cli.train(["--config", str(file), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error and f"{file}:" in error
    if "there is no such file" not in said and said != "-> ":
        with pytest.raises(ExperimentErrors):
            read_experiment(file)
