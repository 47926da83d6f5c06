"""Answers of a teacher as a data set: whole works of tiny teachers, killed, shared by processes, and learned from."""

import json
import os
import signal
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tests.conftest import TINY, fork, forked, sentences
from tests.trainer.teacher.test_distilling import END, bpe
from trainer import cli
from trainer.data.provenance import notes_on_provenance

TURN = "<turn>"
TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<turn>{% endfor %}"
            "{% if add_generation_prompt %}<assistant> {% endif %}")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher of chats whose settings sample and punish repetitions; a few of its tokens end an answer."""
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(300), eos_token=END, pad_token=END,
                                        additional_special_tokens=[TURN])
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(5)
    shape = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 128, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
    for weight in (one for one in model.parameters() if one.ndim == 2):
        weight.data.mul_(6)  # so that what it says depends on what it reads
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.5, repetition_penalty=1.3,
                                               eos_token_id=[0, *range(150, 165)])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Conversations, of which some have an answer already."""
    file = tmp_path_factory.mktemp("prompts") / "chats.jsonl"
    lines = sentences(3, 24).splitlines()
    records = [[{"role": "user", "content": " ".join(line.split()[:1 + at % 4])}] for at, line in enumerate(lines)]
    records[4] += [{"role": "assistant", "content": "Of somebody else."}]
    records[7] = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, *records[7]]
    file.write_text("".join(json.dumps({"messages": one, "id": at}) + "\n" for at, one in enumerate(records)))
    return file


def generate(*arguments):
    return cli.limbeck(["generate", *map(str, arguments)])


def of(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


SAMPLING = ("--temperature", "1.2", "--top-p", "0.95", "--answers", "2", "--batch-size", "4", "--unfinished", "keep",
            "--new-tokens", "16")


@pytest.fixture(scope="module")
def whole(teacher, questions, tmp_path_factory):
    """The samples of a work that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "answers"
    assert generate(teacher, "--prompts", questions, "--to", folder, *SAMPLING) == 0
    return folder


def test_greedy_answers_of_chats_are_what_the_teacher_says_alone(teacher, questions, tmp_path, capsys):
    folder = tmp_path / "answers"
    assert generate(teacher, "--prompts", questions, "--to", folder, "--new-tokens", 12) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    ends = {*model.generation_config.eos_token_id, tokenizer.convert_tokens_to_ids(TURN)}
    expected, cut, empty = [], 0, 0
    model.generation_config = GenerationConfig()
    for line in questions.read_text().splitlines():
        messages = json.loads(line)["messages"]
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0, attention_mask=torch.ones_like(
            ids), eos_token_id=sorted(ends))[0, ids.shape[1]:].tolist()
        text = tokenizer.decode(out[:-1], skip_special_tokens=True)
        cut, empty = cut + (out[-1] not in ends), empty + (out[-1] in ends and not text.strip())
        if out[-1] in ends and text.strip():
            expected.append({"messages": [*messages, {"role": "assistant", "content": text}]})
    assert of(folder) == expected and cut and expected, (cut, empty)
    said = capsys.readouterr().out
    assert f"  {24 - len(expected)} more are left out: {cut} were cut off at 12 tokens" in said
    assert "--unfinished keep takes them as they are" in said and (f", {empty} are empty" in said) == (empty > 0)
    found = json.loads((folder / "provenance.json").read_text())
    assert found["counts"]["cut_off"] == cut and found["counts"]["empty"] == empty
    assert found["counts"]["written"] == len(expected) == 24 - found["counts"]["prompts_without_answer"]
    assert len(found["teacher"]["weights"]) == 64 and found["decoding"]["temperature"] == 0
    assert {entry.name for entry in folder.iterdir()} == {"train.jsonl", "provenance.json", "README.md", ".lock"}


def test_a_killed_work_ends_as_one_that_was_not(teacher, questions, whole, tmp_path):
    folder, said = tmp_path / "answers", [tmp_path / "out", tmp_path / "err"]
    command = (teacher, "--prompts", questions, "--to", folder, *SAMPLING)
    process = fork({}, said, generate, command)
    while not list(folder.glob(".parts/*.jsonl")):
        assert process.is_alive(), said[1].read_text()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = {file: file.stat().st_mtime_ns for file in folder.glob(".parts/*.jsonl")}
    assert kept and not (folder / "train.jsonl").exists()
    finished = forked(generate, command, environments=[{"RANK": "0"}, {"RANK": "1"}])  # and on two processes then
    assert finished.returncode == 0, finished.stderr
    assert (folder / "train.jsonl").read_bytes() == (whole / "train.jsonl").read_bytes()
    assert not list(folder.glob(".parts"))


def test_a_finished_work_is_not_done_again_nor_mixed_with_another(teacher, questions, whole, capsys):
    command = (teacher, "--prompts", questions, "--to", whole, *SAMPLING)
    before = (whole / "train.jsonl").stat()
    assert generate(*command) == 0
    assert "is finished: " in capsys.readouterr().out and (whole / "train.jsonl").stat() == before
    assert generate(*command, "--seed", "1") == 2
    assert "--to = " in (said := capsys.readouterr().err) and "holds answers with --seed 0, and now it is 1" in said
    assert generate(*command, "--limit", "3") == 2
    assert "prompts.count 24, and now it is 3" in capsys.readouterr().err


def test_a_student_with_another_tokenizer_learns_from_them(teacher, whole, train_here, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(280), eos_token=END, pad_token=END)
    tokenizer.chat_template = TEMPLATE.replace(TURN, END)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    trainer = train_here(data={"path": str(whole), "messages": "messages", "sequence_length": 64, "tokenizer": {
        "path": str(tmp_path / "tokenizer"), "train_vocabulary": None}, "validation": {"fraction": 0.2}})
    notes = json.loads(trainer.folder.plan.read_text())["text"]
    assert any(note.startswith(f"{len(of(whole))} answers of {os.path.basename(teacher)} (weights ") and
               "to 24 prompts of chats.jsonl: sampled at temperature 1.2 and top_p 0.95, 2 to each" in note
               for note in notes), notes
    assert trainer.state.step == 4


def test_what_a_person_has_changed_is_said(whole, tmp_path):
    for name in ("train.jsonl", "provenance.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    [note] = notes_on_provenance(str(tmp_path / "train.jsonl"))
    assert "changed" not in note
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert "the data has been changed since" in notes_on_provenance(str(tmp_path))[0]
    (tmp_path / "provenance.json").write_text(json.dumps({"kind": "answers of a teacher", "teacher": 3}))
    assert not notes_on_provenance(str(tmp_path))


@pytest.mark.parametrize(("kind", "option"), [("text", ()), ("text", ("--first-tokens", "3")), ("prompt", ())])
def test_texts_are_continued_and_prompts_are_answered(teacher, kind, option, tmp_path):
    texts = sentences(8, 5).splitlines()
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({kind: text}) + "\n" for text in texts))
    folder = tmp_path / "answers"
    assert generate(teacher, "--prompts", tmp_path / "p.jsonl", "--to", folder, *option, *SAMPLING) == 0
    tokenizer, found = AutoTokenizer.from_pretrained(teacher), of(folder)
    asked = [tokenizer.decode(tokenizer(text)["input_ids"][:3]) if option else text for text in texts]
    assert len(found) >= 8, "of 10, of which few are empty"
    for record in found:
        own = next(text for text in asked if record[kind].startswith(text))
        assert len(record[kind] + record.get("response", "")) > len(own)
    assert set(found[0]) == ({"text"} if kind == "text" else {"prompt", "response"})


def test_its_card_names_the_data_for_an_experiment(whole):
    _, front, text = (whole / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["configs"][0]["data_files"] == [{"split": "train", "path": "train.jsonl"}]
    assert "data: {path: THIS_FOLDER, messages: messages}" in text and "/" not in text.split("# Answers of ")[1][:20]


LONG = " ".join(["The cat"] * 200)


@pytest.mark.parametrize(("records", "options", "parts"), [
    ([], (), ["the data set is empty"]),
    ([{"text": "a"}, {"text": " "}], (), ["--prompts = ", "record 2 has an empty prompt", "mend or remove it"]),
    ([{"question": "a"}], (), ["none of the fields messages, prompt and text", "--messages, --prompt or --text"]),
    ([{"question": "a"}], ("--prompt", "questoin"), ["--prompt = 'questoin': the records have no such field",
                                                    "their fields are question"]),
    ([{"messages": [{"role": "system", "content": "a"}]}], (), ["record 1 has no message to answer"]),
    ([{"messages": [{"from": "human", "value": "a"}]}], (), ["--messages", "rename them in the records (keys: {role"]),
    ([{"text": "a"}, {"text": LONG}], (), ["record 2 has ", "the teacher knows 128 positions", "--first-tokens"]),
    ([{"text": "a"}], ("--new-tokens", "200"), ["--new-tokens = 200: the teacher knows 128 positions", "127"]),
    ([{"text": "a"}], ("--system", "b"), ["--system = 'b': only conversations have a system prompt"]),
    ([{"text": "a"}], ("--to", __file__), ["is a file"]), ([{"text": "a"}], ("--to", os.path.dirname(__file__)), [
        "the folder exists, and holds something else", "name a new folder"])])
def test_mistakes_are_said_before_anything_is_generated(teacher, records, options, parts, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert generate(teacher, "--prompts", tmp_path / "p.jsonl", "--to", tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    for part in parts:
        assert part in said
    assert not (tmp_path / "out").exists()


def test_messages_need_a_chat_template(teacher, questions, tmp_path, capsys):
    from shutil import copytree, ignore_patterns

    copytree(teacher, tmp_path / "plain", ignore=ignore_patterns("chat_template.jinja"))
    assert generate(tmp_path / "plain", "--prompts", questions, "--to", tmp_path / "out") == 2
    assert "--messages = 'messages': the teacher's tokenizer has no chat template" in capsys.readouterr().err


def test_where_no_answer_ends_nothing_is_written_until_they_are_kept(teacher, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "The cat sees"}) + "\n")
    command = (teacher, "--prompts", tmp_path / "p.jsonl", "--to", tmp_path / "out", "--new-tokens", 3)
    assert generate(*command) == 1
    assert "no answer is left: 1 of 1 were cut off at 3 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert generate(*command, "--unfinished", "keep") == 0 and len(of(tmp_path / "out")) == 1
