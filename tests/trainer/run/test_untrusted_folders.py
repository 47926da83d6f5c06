"""Caches and runs that somebody else had their hands in: nothing is executed, none takes the memory, each is named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import struct
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from strategies.distillation.teacher_cache.cache_reader import CacheDamaged, Identity, TargetCache, TargetWriter
from strategies.export.hf.transformers_folder import write_folder
from tests.conftest import TINY, train_py
from tests.trainer.untrusted import SAFETENSORS, alone, assert_refused, whole_model
from trainer import checkpoints
from trainer.checkpoints.manifest import sealed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A whole model with its tokenizer."""
    return whole_model(tmp_path_factory.mktemp("model"))


# ---- caches

SAMPLES = Identity("samples", rows=4, sequence_length=5, teacher="t", tokenizer="k", data="d", vocabulary=70_000,
                   draws=3, temperature=1.0)


@pytest.fixture
def target_cache(tmp_path) -> Path:
    """A finished cache of two shards."""
    ones = torch.ones(5, dtype=torch.long)
    content = {"tokens": torch.tensor([5]), "distinct": ones, "ids": ones, "log_p": -torch.ones(5), "counts": 3 * ones}
    with TargetWriter(tmp_path / "targets", SAMPLES, rows_per_shard=2) as writer:
        for row in range(4):
            writer.add([row], content)
    return tmp_path / "targets"


def forge(cache: Path, content: bytes | None = None, **changes: Any) -> None:
    """Put other content into the second shard, or other values into its record, as who knows the format can."""
    shard, manifest = cache / "shard-00001.safetensors", cache / "manifest.json"
    data = json.loads(manifest.read_text())
    if content is not None:
        shard.write_bytes(content)
        changes |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    data["shards"]["1"] |= changes
    manifest.write_text(json.dumps(data))


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_shards_of_targets_are_named(target_cache, name):
    assert len(TargetCache(target_cache, SAMPLES).read([2])["ids"]) == 5
    forge(target_cache, SAFETENSORS[name])
    with pytest.raises(CacheDamaged, match="shard-00001.safetensors does not hold its rows|shard 1 cannot have"):
        TargetCache(target_cache, SAMPLES).read([2])


@pytest.mark.parametrize(("changes", "what"), [
    ({"offsets": torch.tensor([0, 5, 9])}, "distinct is"), ({"offsets": torch.tensor([0, 12, 10])}, "offsets"),
    ({"offsets": torch.tensor([-5, 5, 10])}, "offsets"), ({"offsets": torch.tensor([0, 10])}, "offsets is"),
    ({"offsets": torch.tensor(3)}, "does not hold"), ({"offsets": torch.tensor([0.0, 5.0, 10.0])}, "offsets is"),
    ({"drawn_offsets": torch.tensor([0, 2**60, 10])}, "offsets"), ({"ids": None}, "does not contain tensor ids"),
    ({"ids": torch.zeros(10, 4, dtype=torch.uint8)}, "ids is"),
    ({"log_p": torch.zeros(10, dtype=torch.int64)}, "log_p is"),
    ({"ids": torch.full((10, 3), 255, dtype=torch.uint8)}, "ids has values over 69999"),
    ({"distinct": torch.full((10, 1), 2, dtype=torch.uint8)}, "distinct does not count"),
])
def test_targets_that_would_lead_out_of_their_tensors_are_found(target_cache, changes, what):
    tensors = load_file(target_cache / "shard-00001.safetensors") | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, target_cache / "forged")
    content = (target_cache / "forged").read_bytes()
    (target_cache / "forged").unlink()
    forge(target_cache, content)
    with pytest.raises(CacheDamaged, match=what):
        TargetCache(target_cache, SAMPLES).read([2, 3])


@pytest.mark.parametrize(("changes", "what"), [
    ({"bytes": 2**50}, "shard 1 cannot have 1125899906842624 bytes"), ({"bytes": 0}, "cannot have 0 bytes"),
    ({"bytes": "8"}, "cannot have 8 bytes"), ({"tokens": 11}, "cannot have 11 tokens"),
    ({"tokens": None}, "cannot have None tokens"),
    ({"sha256": 5}, "has no checksum"), ({"name": "../../x"}, "unexpected keyword argument 'name'"),
])
def test_absurd_records_of_shards_are_refused(target_cache, changes, what):
    forge(target_cache, **changes)
    with pytest.raises(CacheDamaged, match=f"manifest.json is not the manifest of a cache .*{what}"):
        TargetCache(target_cache, SAMPLES)


def test_hostile_manifests_of_targets_are_refused(target_cache):
    manifest = target_cache / "manifest.json"
    whole = manifest.read_text()
    for text in (whole.replace('"rows_per_shard": 2', '"rows_per_shard": Infinity'), "[" * 1_000_000,
                 whole.replace('"tokens": 10', '"tokens": ' + "9" * 5000)):
        manifest.write_text(text)
        with pytest.raises(CacheDamaged, match="is not the manifest of a cache"):
            TargetCache(target_cache, SAMPLES)
    os.truncate(manifest, 2**40)
    with pytest.raises(CacheDamaged, match="no file of at most 16,777,216 bytes"):
        TargetCache(target_cache, SAMPLES)
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(CacheDamaged, match="no file of at most 16,777,216 bytes"):
        TargetCache(target_cache, SAMPLES)


def test_a_folder_of_something_else_is_no_place_for_a_cache(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "notes").write_text("more")
    with pytest.raises(ValueError, match="holds other things than a cache, for example thesis.tex"):
        TargetWriter(tmp_path, SAMPLES)
    assert (tmp_path / ".partial" / "notes").read_text() == "more"


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "tokens.bin").write_bytes(b"\0" * 40),
    lambda folder: (folder / "ends.bin").write_bytes(struct.pack("<q", 2**60) * (
        (folder / "ends.bin").stat().st_size // 8)),
    lambda folder: (folder / "learnt.bin").unlink(),
    lambda folder: (folder / "manifest.json").write_text("[" * 900),
    lambda folder: (folder / "manifest.json").write_text('{"documents": "x", "tokens": []}'),
])
def test_damaged_tokens_are_named(tmp_path, damage):
    import numpy as np

    from trainer.data.rows import FILES, PackedRows, file_of
    from trainer.errors import UserError

    folder = tmp_path / "tokens"
    folder.mkdir()
    for name, dtype in FILES.items():
        np.ones(20, dtype).tofile(file_of(folder, name))
    np.array([10, 20]).tofile(folder / "ends.bin")
    (folder / "manifest.json").write_text('{"documents": 2, "tokens": 20}')
    shape = {"capacity": 8, "packing": True, "plain": True, "padding": 0, "key": "data"}
    assert PackedRows(folder, **shape).tokens
    damage(folder)
    with pytest.raises(UserError, match=f"{folder} holds no tokenized data") as caught:
        PackedRows(folder, **shape)
    assert caught.value.key == "run.cache" and "it will be made again" in caught.value.way_out


# ---- a run's own files

@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of a linear layer."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, folder / "model.safetensors")
    seal(folder)
    return folder


def seal(folder: Path, **changes: Any) -> None:
    """Write a manifest over what is in a checkpoint, as somebody would who knows the format."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
             for file in folder.glob("*.safetensors")}
    values = {"step": 1, "shapes": {"weight": [3, 2], "bias": [3]}, "files": files}
    (folder / "state.json").write_text(sealed({**values, **changes}))


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_checkpoints_are_unreadable(checkpoint, name):
    checkpoints.load_whole(checkpoint, torch.nn.Linear(2, 3))
    (checkpoint / "model.safetensors").write_bytes(SAFETENSORS[name])
    seal(checkpoint)
    with pytest.raises(checkpoints.Unreadable):
        checkpoints.load_whole(checkpoint, torch.nn.Linear(2, 3))


@pytest.mark.parametrize("changes", [
    {"files": {"../../secret.safetensors": {"bytes": 3, "sha256": "0"}}}, {"files": {"/etc/passwd": 3}},
    {"files": {"model.safetensors": {"bytes": 2**60, "sha256": "0"}}}, {"files": {"optimizer.bin": 3}}, {"files": 3},
    {"files": {"model.safetensors": [1]}}, {"shapes": {"weight": [2**62, 2**62]}}, {"shapes": {"weight": "x"}},
    {"shapes": [1]}, {"step": "1"}, {"step": 10**30},
])
def test_hostile_manifests_of_checkpoints_are_unreadable(checkpoint, changes):
    (checkpoint.parent.parent / "secret.safetensors").write_text("abc")
    seal(checkpoint, **changes)
    with pytest.raises(checkpoints.Unreadable):
        checkpoints.load_whole(checkpoint, torch.nn.Linear(2, 3))


@pytest.mark.parametrize("text", [b"", b"[" * 500_000, b"[1]", b"\xff", b'{"step": ' + b"9" * 5000 + b"}"])
def test_manifests_that_are_none_are_unreadable(checkpoint, text):
    (checkpoint / "state.json").write_bytes(text)
    with pytest.raises(checkpoints.Unreadable):
        checkpoints.load_whole(checkpoint, torch.nn.Linear(2, 3))


# ---- links that lead out of a folder of ours

def test_links_are_removed_and_not_what_they_lead_to(model, tmp_path):
    from transformers import AutoTokenizer

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for name in ("student", ".student.partial"):
        (tmp_path / name).symlink_to(mine)
    own = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    write_folder(tmp_path / "student", *own)
    assert not (tmp_path / "student").is_symlink() and (tmp_path / "student" / "model.safetensors").exists()
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / ".lock").symlink_to(mine / "thesis.tex")
    (tmp_path / "targets" / ".partial").symlink_to(mine)
    with pytest.raises(OSError), TargetWriter(tmp_path / "targets", SAMPLES):
        pass
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".step-00000001-1.partial").symlink_to(mine)
    (folder / "step-00000002").symlink_to(mine)
    with pytest.raises(Exception, match="step-00000002"):
        checkpoints.newest_good(folder)
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    assert (mine / "thesis.tex").read_text() == "years of work"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus, cache) -> Path:
    """The folder of a finished run whose prompt is hostile to Markdown."""
    import yaml

    folder = tmp_path_factory.mktemp("finished")
    values = {"name": "read-back", "student": {"architecture": TINY}, "optimizer": {"lr": 3e-3},
              "data": {"path": str(corpus), "sequence_length": 32, "tokenizer": {"train_vocabulary": 300},
                       "validation": {"fraction": 0.1, "rows": 6}},
              "training": {"steps": 2, "batch_size": 8, "micro_batch": 8},
              "report": {"sample_tokens": 4, "prompt": "The ``` <script>alert(1)</script> `\n\n# head\n```\n[a](b)"},
              "run": {"folder": str(folder / "run"), "cache": str(cache), "threads": 1}}
    (folder / "e.yaml").write_text(yaml.safe_dump(values))
    done = train_py("--config", str(folder / "e.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def test_prompts_and_samples_stay_text_in_the_report(finished, tmp_path):
    from trainer.run.report import write_report

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    found = json.loads((run / "comparison.json").read_text())
    found["student"]["samples"][0]["text"] = "x\n````\n<img src=x onerror=alert(1)>\n```\n# heading"
    (run / "comparison.json").write_text(json.dumps(found))
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps({**plan, "text": ["a <b>note</b> [x](javascript:y)\n# two"]}))
    for text in ((finished / "report.md").read_text(), write_report(run).read_text()):
        outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", text)
        outside = re.sub(r"(?s)(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
        assert "<script" not in outside and "<img" not in outside and "<b>" not in outside.replace("\\<b\\>", "")
        assert "javascript" not in outside or "\\[x\\](javascript" in outside
        assert [line for line in outside.splitlines() if line.startswith("# ")] == ["# read-back"]


READ_BACK = [
    ("experiment.yaml", b"", "the file is empty"), ("experiment.yaml", b"a: [\n", ":2: not valid YAML"),
    ("experiment.yaml", b"name: x\n", "'teacher' is missing"), ("experiment.yaml", b"\xff", "not UTF-8 text"),
    *((name, content, f"{name} is not as a run writes it")
      for name in ("comparison.json", "plan.json", "student/receipt.json")
      for content in (b"", b"{", b"[1]", b"[" * 300_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}")),
    ("comparison.json", b"{}", "'student' is missing"), ("comparison.json", b'{"student": 3}', "is not as a run"),
    ("student/receipt.json", b"{}", "'bytes_on_disk' is missing"), ("plan.json", b"{}", "'ledger' is missing"),
    ("metrics.jsonl", b'{"step": 1}\n[\n{"step": 2}\n', "metrics.jsonl is not as a run writes it: line 2"),
    ("metrics.jsonl", b'5\n{"step": 2}\n', "metrics.jsonl is not as a run writes it: line 1"),
    ("metrics.jsonl", b"[" * 300_000 + b"\n\n", "metrics.jsonl is not as a run writes it: line 1"),
    ("metrics.jsonl", b'{"step": 1, "loss": "low"}\n', "is not as a run writes it"),
]


def reported(*runs: str) -> list[tuple[int, str]]:
    """Exit code and standard error of `limbeck report` for each run folder."""
    from trainer.cli import limbeck

    found = []
    for run in runs:
        errors = io.StringIO()
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            code = limbeck(["report", run])
        found.append((code, errors.getvalue()))
    return found


def test_files_of_a_run_that_were_edited_are_named(finished, tmp_path):
    runs, wanted = [], {}
    for number, (name, content, part) in enumerate(READ_BACK):
        run = tmp_path / f"{number}"
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints", "*.png", "model.safetensors"))
        (run / name).write_bytes(content)
        runs.append(str(run))
        wanted[f"{number} {name}"] = part
    assert_refused(alone(reported, *runs), wanted)


def test_a_run_is_gone_on_with_or_named_when_its_files_were_edited(finished, tmp_path):
    run = tmp_path / "run"
    for name, content, code, part in (
            ("experiment.yaml", b"name: [", 2, f"{run / 'experiment.yaml'}:1: not valid YAML"),
            ("metrics.jsonl", b'x\n{"step": 1}\n', 2, "metrics.jsonl is not as a run writes it: line 1"),
            ("plan.json", b"[", 0, "")):  # it is made anew
        shutil.copytree(finished, run)
        (run / "report.md").unlink()
        (run / name).write_bytes(content)
        done = train_py("--config", str(finished.parent / "e.yaml"), f"run.folder={run}")
        assert done.returncode == code and part in done.stderr and "Traceback" not in done.stderr, done.stderr
        shutil.rmtree(run)


OWN_CODE = """
import pathlib
from transformers import LlamaConfig

pathlib.Path({mark!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"

    def __init__(self, **values):
        raise ValueError("it ran")
"""


def test_code_of_a_run_folder_runs_only_if_the_command_line_says_so(finished, tmp_path, capsys):
    from trainer.cli import limbeck

    run, mark = tmp_path / "run", tmp_path / "it-ran"
    shutil.copytree(finished, run)
    experiment = (run / "experiment.yaml").read_text()
    assert experiment.count("trust_remote_code: false") == 1
    (run / "experiment.yaml").write_text(experiment.replace("trust_remote_code: false", "trust_remote_code: true"))
    config = json.loads((run / "student" / "config.json").read_text())
    (run / "student" / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": {
        "AutoConfig": "configuration_own.OwnConfig"}}))
    (run / "student" / "configuration_own.py").write_text(OWN_CODE.format(mark=str(mark)))
    assert limbeck(["export", str(run), "--to", "gguf"]) == 2
    said = capsys.readouterr()
    assert "--trust-remote-code: " in said.err and "configuration_own.py" in said.err and not mark.exists()
    assert "corpus" not in said.out  # nothing was read
    assert limbeck(["export", str(run), "--to", "gguf", "--trust-remote-code"]) == 2
    assert mark.exists() and "it ran" in capsys.readouterr().err
    assert limbeck(["report", str(run), "--trust-remote-code"]) == 2
    assert "--trust-remote-code goes with export" in capsys.readouterr().err


def test_what_a_run_folder_has_read_from_elsewhere_is_shown_before(finished, corpus, cache, tmp_path, capsys):
    from trainer.cli import limbeck

    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(finished, run)
    shutil.move(run / "checkpoints", elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    (run / "again.md").symlink_to(run / "report.md")
    shutil.rmtree(elsewhere)  # so that it ends there
    assert limbeck(["export", str(run), "--to", "gguf"]) == 1
    said = capsys.readouterr().out
    assert f"'checkpoints' leads to {str(elsewhere)!r}" in said and "again.md" not in said
    assert f"text is read from {str(corpus)!r} (data.path)" in said and f"{str(cache)!r} (run.cache)" in said
    assert limbeck(["report", str(run)]) == 0 and f"leads to {str(elsewhere)!r}" in capsys.readouterr().out


def test_what_a_link_leads_to_keeps_its_content(tmp_path):
    from trainer.files import write_atomically
    from trainer.run.folder import RunFolder

    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "run").mkdir()
    for name in (".lock", ".plan.json.partial"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "thesis.tex")
    RunFolder(tmp_path / "run").lock(wait=False)
    write_atomically(tmp_path / "run" / "plan.json", "{}")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "run" / "plan.json").read_text() == "{}"
