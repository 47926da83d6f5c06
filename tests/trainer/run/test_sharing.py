"""What is done with a finished student: its model card, and an upload to a hub, here a server of this file."""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import re
import shutil
import threading

import onnxruntime  # noqa: F401 - so that its import is not measured with a test
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.conftest import ROOT, TINY, train_py
from tests.trainer.student.test_samples import PROMPTS, chats  # noqa: F401 - a fixture
from trainer import cli
from trainer.run.folder import RunFolder
from trainer.run.load_snippets import snippet
from trainer.run.model_card import MARK
from trainer.run.report import write_report


@pytest.fixture(scope="module")
def finished(chats, cache, tmp_path_factory):  # noqa: F811
    """A finished run on chats, begun from a model on this disk with a license, and exported for three runtimes."""
    folder = tmp_path_factory.mktemp("finished")
    tokenizer = AutoTokenizer.from_pretrained(chats)
    torch.manual_seed(0)
    shape = {name: value for name, value in TINY.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
                     ).save_pretrained(folder / "base-model")
    tokenizer.save_pretrained(folder / "base-model")
    (folder / "base-model" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A base\n")
    values = {"name": "shared", "student": {"path": str(folder / "base-model")},
              "data": {"path": str(chats / "chats.jsonl"), "messages": "messages", "sequence_length": 32},
              "training": {"steps": 6, "batch_size": 8, "micro_batch": 8, "keep_best": "cross_entropy"},
              "optimizer": {"lr": 1e-2}, "export": {"to": ["onnx", "gguf"]},
              "report": {"control": False, "prompts": PROMPTS, "sample_tokens": 4},
              "run": {"folder": str(folder / "run"), "cache": str(cache), "threads": 1}}
    (folder / "e.yaml").write_text(yaml.safe_dump(values))
    done = train_py("--config", str(folder / "e.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    return RunFolder(folder / "run")


def code_of(card, language="python"):
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)


def said(code):
    """What a piece of Python prints."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        exec(compile(code, "card", "exec"), {})
    return heard.getvalue()


def test_each_folder_has_a_card_that_says_what_it_is(finished):
    for name, library in {"student": "transformers", "student-onnx": "onnx", "student-gguf": "gguf"}.items():
        text = (finished.path / name / "README.md").read_text()
        card, receipt = ModelCard(text), json.loads((finished.path / name / "receipt.json").read_text())
        assert card.data.license == "mit" and card.data.library_name == library
        assert card.data.pipeline_tag == "text-generation" and "limbeck" in card.data.tags
        assert card.data.base_model is None and card.data.datasets is None, "of this disk, and on no hub"
        assert f"| bytes on disk | {receipt['bytes_on_disk']:,} |" in text
        assert "`base-model`" in text and "`chats.jsonl`" in text and "the student is that of step" in text
        assert str(finished.path.parent) not in text and str(ROOT) not in text, "a card is public"


def test_what_a_card_shows_runs_and_writes_what_the_report_shows(finished, monkeypatch):
    monkeypatch.chdir(finished.student)
    mine, other = code_of((finished.student / "README.md").read_text())
    found = json.loads(finished.comparison.read_text())["student"]["samples"][0]["text"]
    answer = said(mine)
    assert answer.startswith(found) and len(answer) > len(found)
    assert answer.strip() and said(other) == answer, "the answer alone, which ends where the student ends it"
    assert "llama-cli -m ../student-gguf/student.gguf" in code_of((finished.student / "README.md").read_text(), "sh")[0]
    text = snippet("transformers", ".", "The cat's `x`", hub=False)[1]
    assert said(text).startswith("The cat's `x`")


def test_a_card_that_somebody_changed_is_left_to_him(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    mine, other = run / "student" / "README.md", run / "student-onnx" / "README.md"
    mine.write_text(mine.read_text().replace(MARK, "My own words."))
    other.unlink()
    write_report(run)
    assert "My own words." in mine.read_text() and MARK in other.read_text()


def test_a_card_follows_the_runs_that_weights_come_from(finished, run_experiment, chats, tmp_path):  # noqa: F811
    shutil.copytree(finished.path, tmp_path / "runs" / "first")
    _, second = run_experiment(
        "second", student={"architecture": None, "from_run": str(tmp_path / "runs" / "first")}, training={"steps": 0},
        data={"path": str(chats / "chats.jsonl"), "messages": "messages", "tokenizer": {"train_vocabulary": None}},
        report={"control": False})
    text = (second.student / "README.md").read_text()
    row = "| `first` | `chats.jsonl` | 6 | 0.01 (cosine) | 1 cross-entropy |"
    assert "begun as `base-model`, by way of 1 earlier run. License: mit." in text and row in text
    assert "This run trained nothing. It compared the model on `chats.jsonl`" in text
    assert str(tmp_path) not in text and str(finished.path.parent) not in text, "a card is public"

    third = tmp_path / "runs" / "third"  # from the exported student of the second, as one of the first's checkpoints
    shutil.copytree(second.path, third)

    def changed(folder, **student):
        values = yaml.safe_load((folder / "experiment.yaml").read_text())
        values["student"].update(student)
        (folder / "experiment.yaml").write_text(yaml.safe_dump(values))

    changed(third, from_run=None, path="tiny-second/student")
    shutil.copytree(second.path, tmp_path / "tiny-second")
    changed(tmp_path / "tiny-second", from_run="runs/first/checkpoints/step-00000003")  # from where it was started
    changed(tmp_path / "runs" / "first", path="some/base")
    write_report(third)
    text = (third / "student" / "README.md").read_text()
    assert ModelCard(text).data.base_model == "some/base" and "by way of 2 earlier runs" in text
    assert text.index(row.replace("| 6 |", "| 3 |")) < text.index("| `tiny-second` |  | 0 |")
    changed(tmp_path / "runs" / "first", from_run="runs/third", path=None)  # a circle, which no run can make
    write_report(third)
    shutil.rmtree(tmp_path / "runs" / "first")
    write_report(third)
    text = (third / "student" / "README.md").read_text()
    assert "begun as `checkpoints/student`" not in text and "begun as `first/student`, by way of 1 earlier run" in text


def test_ids_of_a_hub_and_a_license_of_ones_own_are_in_the_front_matter(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    values = yaml.safe_load((run / "experiment.yaml").read_text())
    values["student"].update(path="some/base", quantization={
        "method": "rtn", "bits": 4, "group_size": 32, "kind": "int", "embeddings": True})
    values["data"]["path"], values["export"]["license"] = "some/chats", "apache-2.0"
    values["name"] = "<b>x</b>"
    (run / "experiment.yaml").write_text(yaml.safe_dump(values))
    write_report(run)
    text = (run / "student" / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.base_model, card.data.datasets, card.data.license) == ("some/base", ["some/chats"], "apache-2.0")
    assert "quantized" in card.data.tags and "rtn, 4 bits, groups of 32, embeddings too" in text
    assert "`some/base`" in text and "<b>" not in text.replace("\\<b\\>", "")


# ---- the hub

class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as `huggingface_hub` asks for to make a repository and one commit in it.

    Attributes:
        repositories: by id, whether it is private, and its files.
        stored: contents of large files by their SHA-256, committed or not.
        fails: a path for whose requests it has the status beside it.
    """

    repositories: dict = {}
    stored: dict = {}
    fails: dict = {}

    def log_message(self, *_):
        pass

    def do_GET(self):
        private = self.repositories.get(self.path.removeprefix("/api/models/"), (None, {}))[0]
        self._answer({"id": self.path, "private": private, "tags": [], "siblings": [], "_id": "1"},
                     404 if private is None else 200)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._fail():
            return
        assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/large/")
        self.stored[self.path.removeprefix("/large/")] = body
        self._answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._fail():
            return
        assert self.headers["Authorization"] == "Bearer hf_secret"
        path, _, rest = self.path.removeprefix("/api/models/").partition("/preupload/")
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name, private = f"{asked['organization']}/{asked['name']}", asked.get("visibility") == "private"
            there = name in self.repositories
            self.repositories.setdefault(name, (private, {}))
            self._answer({"url": f"{here}/{name}"}, 409 if there else 200)
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self._answer({"errors": [], "warnings": []})
        elif rest:
            large = re.compile(r"\.(safetensors|gguf|onnx|data)$")
            self._answer({"files": [{"path": file["path"], "shouldIgnore": False, "uploadMode":
                                     "lfs" if large.search(file["path"]) else "regular"}
                                    for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{here}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]]})
        else:
            self._commit(path.removesuffix("/commit/main"), [json.loads(line) for line in body.splitlines()], here)

    def _commit(self, name, lines, here):
        files = self.repositories[name][1]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        files["commits"] = files.get("commits", 0) + 1
        self._answer({"commitUrl": f"{here}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    def _fail(self):
        status = next((status for part, status in self.fails.items() if part in self.path), None)
        if status is not None:
            self._answer({"error": "no"}, status)
        return status is not None

    def _answer(self, values, status=200):
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    """A server that is the hub for this process; large files go over HTTP, since xet is a service of its own."""
    monkeypatch.setattr(Hub, "repositories", {})
    monkeypatch.setattr(Hub, "stored", {})
    monkeypatch.setattr(Hub, "fails", {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield Hub
        server.shutdown()


def test_a_student_is_uploaded_in_one_commit_and_loads_from_there(finished, hub, tmp_path, capsys):
    assert cli.limbeck(["push", str(finished.path), "--to", "me/mine", "--private"]) == 0
    assert capsys.readouterr().out.strip().endswith("/me/mine")
    private, files = hub.repositories["me/mine"]
    assert private and files.pop("commits") == 1
    assert set(files) == {path.name for path in finished.student.iterdir()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert name == "README.md" or content == (finished.student / name).read_bytes()
    card = files["README.md"].decode()
    assert "path = 'me/mine'\n" in card and "student-onnx" not in card and MARK not in card
    assert ModelCard(card).data.license == "mit"
    for one, other in zip(*(AutoModelForCausalLM.from_pretrained(folder).parameters()
                            for folder in (tmp_path, finished.student)), strict=True):
        assert torch.equal(one, other)
    assert cli.limbeck(["push", str(finished.path), "--to", "me/graph", "--runtime", "onnx"]) == 0
    assert {"model.onnx", "receipt.json", "README.md"} <= set(hub.repositories["me/graph"][1])
    assert not hub.repositories["me/graph"][0]


@pytest.mark.parametrize(("fails", "code", "said"), [
    ({"/large/": 400}, 1, "has not got the student"), ({"/commit/": 422}, 1, "has not got the student"),
    ({"/preupload/": 403}, 2, "the hub refuses the token (HTTP 403)"),
    ({"/repos/create": 401}, 2, "the hub refuses the token (HTTP 401)")])
def test_an_upload_that_ends_early_leaves_nothing_that_looks_finished(finished, hub, capsys, fails, code, said):
    hub.fails.update(fails)
    assert cli.limbeck(["push", str(finished.path), "--to", "me/mine"]) == code
    assert said in capsys.readouterr().err
    assert hub.repositories.get("me/mine", (False, {}))[1] == {}
    hub.fails.clear()
    assert cli.limbeck(["push", str(finished.path), "--to", "me/mine"]) == 0
    assert "model.safetensors" in hub.repositories["me/mine"][1]


def test_what_must_not_be_uploaded_is_not(finished, hub, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    push = ["push", str(run), "--to", "me/mine"]

    def refused(said, *arguments):
        assert cli.limbeck(list(arguments or push)) == 2
        assert said in capsys.readouterr().err and not any(files for _, files in hub.repositories.values())

    hub.repositories["me/open"] = (False, {})
    refused("everybody can read it", "push", str(run), "--to", "me/open", "--private")
    refused("no name of a repository", "push", str(run), "--to", "mine")
    refused("no name of a repository", "push", str(run), "--to", "me/mi ne")
    refused("is not the folder of a finished run", "push", str(tmp_path), "--to", "me/mine")
    refused("no such runtime: onyx", "push", str(run), "--to", "me/mine", "--runtime", "onyx")
    shutil.rmtree(run / "student-gguf")
    refused("limbeck export", "push", str(run), "--to", "me/mine", "--runtime", "gguf")
    (run / "student" / "notes.txt").symlink_to(tmp_path / "secret")
    refused("is a link or no file")
    (run / "student" / "notes.txt").unlink()
    weights, receipt = run / "student" / "model.safetensors", run / "student" / "receipt.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("are not those that its receipt is of")
    weights.write_bytes(content)
    receipt.write_text(receipt.read_text().replace('"holds": true', '"holds": false'))
    refused("does not hold")
    receipt.write_text(receipt.read_text().replace('"holds": false', '"holds": true'))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused("there is no token of the Hugging Face hub here\n  -> hf auth login, or set HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set")
