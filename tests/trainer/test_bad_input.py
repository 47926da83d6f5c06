"""Each mistake: exit code 2, one clear message that names the key and the way out, and no half-written run."""

import json
import os
import socket
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import TINY, launch, on_two_ranks, train_py
from trainer.data.tokenizers import train_tokenizer
from trainer.early_checks import check_early
from trainer.errors import OtherRun, UserError
from trainer.experiment.data_nodes import Data, Tokenizer
from trainer.experiment.load import read_experiment
from trainer.run.folder import RunFolder
from trainer.run.run_status import STATUS, check_free


def refused(file, tmp_path, *overrides, parts, folder="tiny"):
    done = train_py("--config", str(file), *overrides)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1, "one message"
    assert not (tmp_path / folder).exists(), "a half-written run is left behind"
    return done


def line_of(file, text):
    return next(number for number, line in enumerate(file.read_text().splitlines(), 1) if text in line)


def test_missing_data_file(write_experiment, tmp_path):
    file = write_experiment(data={"path": "./no/such/file.txt"})
    refused(file, tmp_path, parts=[f"{file}:{line_of(file, 'path: ./no')}: data.path = './no/such/file.txt'",
                                   "there is no such file or folder", "-> name an existing path"])


def test_empty_data_set(write_experiment, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    refused(write_experiment(data={"path": str(tmp_path / "empty.jsonl")}), tmp_path,
            parts=["data.path", "the data set is empty", "at least one record"])


def test_record_without_the_named_field(write_experiment, tmp_path):
    records = [{"body": "x y z"}] * 30
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    file = write_experiment(data={"path": str(tmp_path / "records.jsonl")})
    refused(file, tmp_path, parts=["data.text", "the records have no such field", "their fields are body"])
    records[17] = {"other": "no body"}
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    refused(file, tmp_path, f"data.path={tmp_path / 'some.jsonl'}", "data.text=body",
            parts=["override `data.text=body`: data.text = 'body'", "has nothing in this field",
                   '{"body": null, "other": "no body"}', "mend or remove the record"])


def test_sequence_longer_than_the_models_positions(write_experiment, tmp_path):
    file = write_experiment(data={"sequence_length": 65})
    refused(file, tmp_path, parts=["data.sequence_length = 65", "the student knows 64 positions", "use at most 64"])


def test_different_vocabularies(write_experiment, tmp_path):
    file = write_experiment(teacher={"architecture": {**TINY, "vocab_size": 400}, "train": {"steps": 1}},
                            student={"architecture": {**TINY, "vocab_size": 500}})
    refused(file, tmp_path, parts=["student", "vocabulary of 500 tokens and the teacher of 400",
                                   "leave `vocab_size` out"])


def test_vocabulary_smaller_than_the_tokenizers(write_experiment, tmp_path):
    file = write_experiment(student={"architecture": {**TINY, "vocab_size": 100}})
    refused(file, tmp_path, parts=["student.architecture.vocab_size = 100", "100 tokens and the tokenizer 300"])


def test_unknown_dimension_and_architecture(write_experiment, tmp_path):
    file = write_experiment(student={"architecture": {**TINY, "hiden_size": 3}})
    refused(file, tmp_path, parts=[f"{file}:{line_of(file, 'hiden_size')}", "did you mean `hidden_size`?"])
    refused(file, tmp_path, "student.architecture={model_type: lama}", parts=["'lama'", "did you mean 'llama'?"])
    refused(file, tmp_path, "student.architecture={model_type: llama, hidden_size: 30, num_attention_heads: 4}",
            parts=["student.architecture", "not a valid llama architecture"])


def test_model_that_is_not_there_or_not_safe(write_experiment, tmp_path, monkeypatch):
    file = write_experiment(student={"architecture": None, "path": "./nowhere"},
                            data={"tokenizer": {"train_vocabulary": None}})
    refused(file, tmp_path, parts=["student.path = './nowhere'", "there is no such folder"])
    refused(file, tmp_path, "student.path=models/of/mine", parts=["'models/of/mine'", "there is no such folder"])
    monkeypatch.chdir(tmp_path)
    for folder in ("SmolLM2-135M", "me/SmolLM2-135M"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    for path, said in (("SmolLM-135M", "mean SmolLM2-135M? A model of the hub is OWNER/NAME"),
                       ("me/SmolLM-135M", "did you mean the folder me/SmolLM2-135M?"),
                       (f"{tmp_path}/SmolLM-135M", f"did you mean {tmp_path}/SmolLM2-135M?")):
        with pytest.raises(UserError) as caught:
            check_early(read_experiment(file, [f"student.path={path}"]).experiment)
        assert said in caught.value.way_out and caught.value.value == path
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps({**TINY, "vocab_size": 300, "architectures": ["LlamaForCausalLM"]}))
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    train_tokenizer([(Data(tokenizer=Tokenizer(train_vocabulary=300)), [{"text": "some text"}])], pickled)
    refused(file, tmp_path, f"student.path={pickled}", parts=["student.path", "pickled weights only", "safetensors"])
    refused(file, tmp_path, "student.path=no/such-model", "run.threads=2",
            parts=["student.path = 'no/such-model'", "cannot load this model", "check the name and the network"])


def saved_model(folder, vocabulary_text="some text", **changes):
    """A whole model with its tokenizer, as a hub folder is."""
    config = AutoConfig.for_model(**{**TINY, **changes}, vocab_size=300)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer([(Data(tokenizer=Tokenizer(train_vocabulary=300)), [{"text": vocabulary_text}] * 5)], folder)
    return folder


def test_weights_that_are_incomplete_or_no_safetensors(write_experiment, tmp_path):
    folder = saved_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "layers.1." not in name},
              folder / "model.safetensors", metadata={"format": "pt"})
    file = write_experiment(student={"architecture": None, "path": str(folder)},
                            data={"tokenizer": {"train_vocabulary": None}})
    refused(file, tmp_path, parts=["student.path", "the weights lack 9 tensors, for example model.layers.1."])
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(file, tmp_path, parts=["student.path", "cannot load this model", "git lfs pull"])


def test_weights_that_no_part_of_the_model_reads_are_named(train_here, tmp_path, caplog):
    folder = saved_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    changes = {"student": {"architecture": None, "path": str(folder)}, "training": {"steps": 1},
               "data": {"tokenizer": {"train_vocabulary": None}}}
    assert len(train_here(**changes).student.model.layers) == 2
    assert "student: 9 tensors of its files belong to no part of the model" in caplog.text
    assert "for example model.layers.2.input_layernorm.weight" in caplog.text
    caplog.clear()
    (folder / "config.json").write_text(json.dumps(config))
    train_here("whole", **changes)
    assert "tensors of its files" not in caplog.text


def test_a_model_for_any_number_of_positions_has_no_longest_row(write_experiment, tmp_path):
    xlnet = {"model_type": "xlnet", "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    file = write_experiment()
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "student": {"architecture": xlnet}}))
    refused(file, tmp_path, parts=["is not causal as it is configured"])


def test_models_of_different_families_are_told_apart_at_equal_size(write_experiment, tmp_path):
    one = saved_model(tmp_path / "one", "the cat sat on the mat and the cat was fat")
    other = saved_model(tmp_path / "other", "un chien mange une pomme verte sous un arbre vert")
    file = write_experiment(teacher={"path": str(one)}, student={"architecture": None, "path": str(other)},
                            data={"tokenizer": {"train_vocabulary": None}})
    refused(file, tmp_path, parts=["objective.divergence.name = 'forward_kl'", "another tokenizer than the student",
                                   "use uld", "the student's family"])
    refused(file, tmp_path, "data.tokenizer.train_vocabulary=300",
            parts=["data.tokenizer.train_vocabulary = 300", f"{other} was trained with its own tokenizer"])
    refused(file, tmp_path, f"data.tokenizer.path={one}",
            parts=[f"student.path = '{other}'", "another vocabulary than the tokenizer in use", "for example token"])


def test_two_runs_at_once_on_one_folder(write_experiment, tmp_path):
    import fcntl

    file = write_experiment()
    (tmp_path / "tiny").mkdir()
    with (tmp_path / "tiny" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = train_py("--config", str(file))
    assert done.returncode == 2 and "another run is using this folder now" in done.stderr
    assert "process(es)" not in done.stdout, "before anything is planned or read"
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == [".lock"]


def test_a_run_that_has_not_locked_its_folder_yet_is_seen_by_its_signs_of_life(write_experiment, tmp_path):
    folder = RunFolder(tmp_path / "tiny")
    folder.path.mkdir()
    status = {"host": socket.gethostname(), "pid": os.getppid(), "doing": "loading models"}
    (folder.path / STATUS).write_text(json.dumps(status))
    with pytest.raises(OtherRun, match="another run is using this folder now"):
        check_free(folder)
    for other in ({"pid": os.getpid()}, {"host": "another"}):  # itself, and one of which nothing is known
        (folder.path / STATUS).write_text(json.dumps(status | other))
        check_free(folder)


def test_folder_and_cache_that_cannot_be_written(write_experiment, tmp_path):
    (tmp_path / "file").write_text("")
    done = train_py("--config", str(write_experiment()), f"run.folder={tmp_path / 'file'}")
    assert done.returncode == 2 and "run.folder" in done.stderr and "is a file" in done.stderr
    done = train_py("--config", str(write_experiment()), f"run.cache={tmp_path / 'file' / 'cache'}")
    assert done.returncode == 2 and "run.cache" in done.stderr and "cannot make this folder" in done.stderr
    done = train_py("--config", str(write_experiment()), f"run.folder={tmp_path / 'file' / 'run'}")
    assert done.returncode == 2 and "run.folder" in done.stderr and f"{tmp_path / 'file'} is a file" in done.stderr


def test_json_without_dry_run():
    done = train_py("--config", "configs/quickstart.yaml", "--json")
    assert done.returncode == 2 and "--json goes with --dry-run" in done.stderr


def test_launched_by_accelerate_the_message_is_there_too(write_experiment, tmp_path):
    done = launch("--config", str(write_experiment(data={"sequence_length": 65})))
    assert done.returncode != 0 and "error: " in done.stderr
    assert "data.sequence_length = 65: the student knows 64 positions" in done.stderr
    assert not (tmp_path / "tiny").exists()


def test_layers_the_teacher_does_not_have(write_experiment, tmp_path):
    file = write_experiment(teacher={"architecture": TINY, "train": {"steps": 1}},
                            student={"architecture": None, "from_teacher": [0, 3]})
    refused(file, tmp_path, parts=["student.from_teacher = [0, 3]", "layers 0 to 2"])


def test_group_that_does_not_divide_a_layer(write_experiment, tmp_path):
    file = write_experiment(student={"quantization": {"bits": 4, "group_size": 24}})
    refused(file, tmp_path, parts=["student.quantization.group_size = 24", "q_proj: groups of 24 do not divide its 32",
                                   "group sizes that fit every layer: 8, 16, 32"])
    refused(file, tmp_path, "student.quantization={bits: 8, ignore: ['atention*']}",
            parts=["override `student.quantization={bits: 8, ignore: ['atention*']}`: student.quantization.ignore",
                   "matches no layer"])


def test_heads_that_cannot_be_shared(write_experiment, tmp_path):
    file = write_experiment(teacher={"architecture": {**TINY, "num_attention_heads": 4, "num_key_value_heads": 3},
                                     "train": {"steps": 1}})
    refused(file, tmp_path, parts=["teacher.architecture.num_key_value_heads = 3", "use a divisor of 4"])


def test_warm_up_that_never_ends(write_experiment, tmp_path):
    file = write_experiment(schedule={"warmup": 4})
    refused(file, tmp_path, parts=["schedule.warmup = 4", "never ends in a run of 4 steps", "0.05"])


def test_white_space_is_no_text(write_experiment, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\t\n" * 200)
    refused(write_experiment(data={"path": str(tmp_path / "blank.txt"), "tokenizer": {"train_vocabulary": 257}}),
            tmp_path, parts=["data", "no document has a token to learn"])


def test_batch_that_processes_cannot_share(write_experiment, tmp_path):
    file = write_experiment(training={"batch_size": 9, "micro_batch": 9})
    done = on_two_ranks("--config", str(file))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, "rank 0 only"
    assert "training.micro_batch = 9: 2 processes with this micro_batch cannot share a batch_size of 9" in done.stderr
    assert "make batch_size a multiple of 2" in done.stderr
    assert not (tmp_path / "tiny").exists()


def test_epochs_of_a_stream(write_experiment, tmp_path):
    file = write_experiment(data={"streaming": True}, training={"steps": None, "epochs": 1})
    refused(file, tmp_path, parts=["training.epochs", "no known length", "training.steps"])


def test_folder_that_is_no_run(write_experiment, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    done = train_py("--config", str(write_experiment()), f"run.folder={tmp_path / 'taken'}")
    assert done.returncode == 2 and "exists and is not a run folder" in done.stderr
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "years of work"


def test_tracker_that_is_not_installed(write_experiment, tmp_path):
    file = write_experiment(run={"trackers": ["trackio"]})
    refused(file, tmp_path, parts=["run.trackers", "trackio is not installed", "pip install 'trackio'"])


def test_model_that_cannot_keep_documents_apart(write_experiment, tmp_path):
    architecture = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}
    file = write_experiment()
    values = yaml.safe_load(file.read_text())
    values["student"] = {"architecture": architecture}
    file.write_text(yaml.safe_dump(values))
    refused(file, tmp_path, parts=["data.packing = True", "would see each other in the student", "data.packing: false"])


@pytest.mark.parametrize("precision", ["fp32"])
def test_nan_in_the_loss_stops_with_exit_code_1(write_experiment, tmp_path, precision):
    """Driven to NaN for real, by a learning rate that no model survives."""
    file = write_experiment(optimizer={"lr": 1e30, "weight_decay": 0}, schedule={"warmup": 0},
                            training={"steps": 50, "nonfinite_limit": 2, "clip": None})
    done = train_py("--config", str(file))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "not finite for 2 steps in a row" in done.stderr and "lower optimizer.lr" in done.stderr
    assert not (tmp_path / "tiny" / "student").exists() and not (tmp_path / "tiny" / "report.md").exists()
    assert list(Path(tmp_path / "tiny" / "checkpoints").glob("step-*"))
