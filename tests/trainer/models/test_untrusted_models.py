"""Models and tokenizers of other people: nothing is executed or unpickled, none takes the memory, each is named."""

from __future__ import annotations

import json
import os
import pickle
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import sentences, train_py
from tests.trainer.untrusted import GIB, SAFETENSORS, alone, assert_refused, bombs, commands, copied, whole_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A whole model with its tokenizer."""
    return whole_model(tmp_path_factory.mktemp("model"))


def test_hostile_weights_are_named(model, write_experiment, tmp_path):
    file = write_experiment(student={"architecture": None}, data={"tokenizer": {"train_vocabulary": None}})
    lines, wanted = [], {}
    for number, (name, content) in enumerate(SAFETENSORS.items()):
        folder = copied(model, tmp_path / f"{number}", model__safetensors=content)
        lines.append(["--config", file, f"student.path={folder}", "--dry-run"])
        wanted[name] = f"cannot load this model: {folder / 'model.safetensors'} is not a whole safetensors file"
    answers = alone(commands, *lines, memory=GIB // 2)
    assert_refused(answers, wanted)
    assert "student.path = " in answers[0][1] and "git lfs pull" in answers[0][1]


def test_hostile_model_folders_are_named(model, write_experiment, tmp_path):
    config = json.loads((model / "config.json").read_text())

    def naming(file: Path | str) -> dict[str, str]:
        return {"model__safetensors__index__json": json.dumps({"metadata": {}, "weight_map": {"w": str(file)}})}

    whole = model / "model.safetensors"
    cases = {
        "above": (naming("../model/model.safetensors"), "names '../model/model.safetensors', which is not a"),
        "absolute": (naming(whole), f"names '{whole}', which is not a safetensors file beside it"),
        "pickled shards": (naming("w.bin"), "names 'w.bin', which is not a safetensors file beside it"),
        "missing": (naming("no.safetensors"), "names 'no.safetensors', which is not there"),
        "no map": ({"model__safetensors__index__json": "{}"}, "has no `weight_map` of file names"),
        "no index": ({"model__safetensors__index__json": "[" * 200_000}, "index.json is no JSON"),
        "adapter": ({"adapter_config__json": json.dumps({"base_model_name_or_path": "some/other"})}, "is an adapter"),
        "list": ({"config__json": "[1]"}, "config.json is no JSON object"),
        "deep": ({"config__json": "[" * 200_000}, "config.json is no JSON"),
        "layers": ({"config__json": json.dumps({**config, "num_hidden_layers": 10**9})},
                   "more than 10,000 layers by its num_hidden_layers"),
        "types": ({"config__json": json.dumps({**config, "hidden_size": "wide"})}, "cannot load this model"),
        "kernel": ({"config__json": json.dumps({**config, "attn_implementation": "somebody/kernel"})},
                   "its attention computed by code from a hub, somebody/kernel"),
        "code": ({"config__json": json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
                  "own__py": "open('owned', 'w')\n"}, "set `trust_remote_code: true` if you have read it"),
    }
    file = write_experiment(student={"architecture": None}, data={"tokenizer": {"train_vocabulary": None}})
    lines = [["--config", file, f"student.path={copied(model, tmp_path / name, **files)}", "--dry-run"]
             for name, (files, _) in cases.items()]
    wanted = {name: part for name, (_, part) in cases.items()}
    pipe = copied(model, tmp_path / "pipe", config__json=None)
    os.mkfifo(pipe / "config.json")
    huge = copied(model, tmp_path / "huge", tokenizer__json=b"{")
    os.truncate(huge / "tokenizer.json", 2**40)
    lines += [["--config", file, f"student.path={folder}", "--dry-run"] for folder in (pipe, huge)]
    wanted |= {"pipe": "config.json is not a file",
               "huge": "tokenizer.json has 1,099,511,627,776 bytes, over 134,217,728"}
    assert_refused(alone(commands, *lines, memory=GIB // 2, cwd=tmp_path), wanted)
    assert not (tmp_path / "owned").exists()


def tokenizers_said(*folders: str) -> list[str]:
    """What is said of each tokenizer, by a process that somebody would answer yes."""
    from trainer.data.tokenizers import load_tokenizer, own_tokenizer
    from trainer.errors import UserError

    said = []
    for folder in folders:
        read, write = os.pipe()
        os.write(write, b"y\ny\ny\n")
        os.dup2(read, 0)
        for load in (partial(load_tokenizer, "data.tokenizer.path"), own_tokenizer):
            try:
                said.append(f"{load(folder, None)}"[:200])
            except UserError as error:
                said.append(f"{error.key}: {error.problem}")
    return said


def test_tokenizers_run_nothing_and_are_named(model, tmp_path):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    code = {**settings, "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    cases = {"code": ({"tokenizer_config__json": json.dumps(code), "own__py": "open('owned', 'w')\n"},
                      "cannot load this tokenizer: The repository"),
             "garbage": ({"tokenizer__json": '{"model": 3}'}, "cannot load this tokenizer"),
             "deep": ({"tokenizer__json": "[" * 200_000}, "cannot load this tokenizer"),
             "types": ({"tokenizer_config__json": "[1]"}, "cannot load this tokenizer")}
    folders = [str(copied(model, tmp_path / name, **files)) for name, (files, _) in cases.items()]
    answers = alone(tokenizers_said, *folders, cwd=tmp_path)
    assert not (tmp_path / "owned").exists()
    for (name, (_, part)), *said in zip(cases.items(), answers[::2], answers[1::2], strict=True):
        assert part in said[0], f"{name}: {said}"
        assert part in said[1], f"{name}: {said}"


def test_nothing_is_unpickled_wherever_it_lies(model, write_experiment, tmp_path):
    """A run that is gone on with, from and among folders that are full of pickles."""
    marker, data, cache = tmp_path / "owned", tmp_path / "data", tmp_path / "cache"
    bombs(tmp_path / "proof", marker, "bomb.pkl")
    pickle.loads((tmp_path / "proof" / "bomb.pkl").read_bytes()).close()
    marker.unlink()  # it works
    student = copied(model, tmp_path / "student")
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"text": sentences(n, 8)}) + "\n" for n in range(40)))
    arguments = ["--config", str(write_experiment(
        student={"architecture": None, "path": str(student)}, report={"control": False},
        data={"path": str(data), "tokenizer": {"train_vocabulary": None}}, run={"cache": str(cache)},
        teacher={"path": str(student), "targets": {"source": "samples"}}, training={"checkpoint_every": 2}))]
    weights = ("pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin", "tokenizer.pkl", "vocab.pkl")
    bombs(student, marker, *weights, "consolidated.00.pth", "tf_model.h5", "generation_config.bin")
    bombs(data, marker, "data.pkl", "state.pt", "train.npy", "dataset_dict.pickle", "train.bin")
    done = train_py(*arguments, "training.steps=2", "schedule.warmup=0")
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "tiny"
    for file in (run / "report.md", run / "student" / "receipt.json"):
        file.unlink()  # it is not finished any more
    for folder in (next((run / "checkpoints").glob("step-*")), run / "checkpoints", run, run / "student"):
        bombs(folder, marker, *weights, "optimizer.bin", "scheduler.bin", "scaler.pt", "random_states_0.pkl",
              "sampler.bin", "custom_checkpoint_0.pkl", "rng_state.pth", "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for folder in [cache, *(path for path in cache.rglob("*") if path.is_dir())]:
        bombs(folder, marker, "state.pkl", "cache.pkl", "dataset.pt", "tokens.npy", "shard-00001.bin")
    done = train_py(*arguments, "training.steps=2", "schedule.warmup=0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "report.md").exists() and not marker.exists()


def test_pickles_alone_are_refused(model, write_experiment, tmp_path):
    marker = tmp_path / "owned"
    bombs(tmp_path / "data", marker, "data.pkl", "train.npy", "state.pt")
    student = copied(model, tmp_path / "student", model__safetensors=None)
    bombs(student, marker, "pytorch_model.bin")
    teacher = copied(model, tmp_path / "teacher", model__safetensors=None, model__safetensors__index__json=json.dumps(
        {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}))
    bombs(teacher, marker, "pytorch_model.bin")
    file = write_experiment(student={"architecture": None, "path": str(student)},
                            data={"tokenizer": {"train_vocabulary": None}})
    wanted = {f"data.path={tmp_path / 'data'}": "data.path", f"data.path={tmp_path / 'data' / 'data.pkl'}": "data.path",
              f"student.path={student}": "the folder has pickled weights only",
              f"student.path={teacher}": "names 'pytorch_model.bin', which is not a safetensors file"}
    for override, part in wanted.items():
        done = train_py("--config", str(file), override)
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not marker.exists() and not (tmp_path / "tiny").exists()
