"""What a dry run says of the data, beside what a run then makes of it."""

import json
import shutil

import datasets
import pytest

from tests.conftest import sentences, train_py
from trainer.data import data_preview
from trainer.data.data_preview import preview
from trainer.data.dataset import prepare_text
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data
from trainer.experiment.load import read_experiment


@pytest.fixture
def talks(tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"q": f"What does it see, number {number}?", "a": sentences(number, number % 9)})
                            + "\n" for number in range(300)))
    return {"path": str(file), "prompt": "q", "response": "a", "sequence_length": 48, "packing": True}


def test_a_dry_run_counts_checks_and_shows_small_data_as_the_run_will_have_it(write_experiment, talks, tmp_path):
    file = write_experiment(data=talks, run={"cache": str(tmp_path / "cache")})
    before = sorted(tmp_path.rglob("*"))
    done = train_py("--config", str(file), "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    (said,) = json.loads(done.stdout)["data"]
    text = prepare_text(read_experiment(file).experiment)
    assert said["exact"] and (said["rows"], said["tokens"]) == (len(text.train), text.train.tokens)
    assert said["learned"] == pytest.approx(text.train.learned / text.train.tokens)
    assert said["left_out"] == pytest.approx(text.train.cut / (text.train.cut + text.train.tokens))
    assert 0 < said["cut"] < 1 and said["read"] == said["records"] == 270
    assert len(said["examples"]) == 3 and "What does it see" in said["examples"][0] and "[[The" in "".join(
        said["examples"])
    done = train_py("--config", str(file), "--dry-run", "data.response=reply", cwd=tmp_path)
    assert done.returncode == 2 and "data.response = 'reply': the records have no such field" in done.stderr


def test_figures_of_larger_data_follow_from_its_beginning(write_experiment, talks, monkeypatch):
    monkeypatch.setattr(data_preview, "SMALL", 1000)
    experiment = read_experiment(write_experiment(data=talks)).experiment
    (said,) = preview(experiment.data, None)
    text = prepare_text(experiment)
    assert not said.exact and said.read == 200 and said.records == pytest.approx(270, abs=2)
    assert said.rows == pytest.approx(len(text.train), rel=0.1)
    assert said.tokens == pytest.approx(text.train.tokens, rel=0.1)


def test_each_source_of_a_mixture_is_looked_at_and_what_is_not_here_is_not(write_experiment, talks, tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "".join(f'"{sentences(number, 2)}"\n' for number in range(20)))
    sources = [{name: talks[name] for name in ("path", "prompt", "response")}, {"path": str(tmp_path / "a.csv")},
               {"path": "some/hub-dataset", "weight": 2}]
    data = Data(sources=sources, tokenizer={"train_vocabulary": 300}, sequence_length=48)
    asked, table, hub = preview(data, None)
    assert (asked.weight, hub.weight) == (0.25, 0.5) and table.learned > 0.9 > asked.learned
    assert table.records == 20 - 1 and "no local data" in hub.not_looked_at
    assert not table.exact and "more text" in table.notes[-1], "the tokenizer is trained on what is on the hub, too"
    assert preview(Data(path=talks["path"], text="q"), ("student.path", "some/model", None))[0].not_looked_at == \
        "its tokenizer is not on this machine"
    sources[1]["text"] = "body"
    with pytest.raises(UserError) as caught:
        preview(Data(sources=sources, tokenizer={"train_vocabulary": 300}), None)
    assert caught.value.key == "data.sources.1.text"


def test_hub_data_of_an_earlier_run_is_looked_at_in_the_cache(talks, tmp_path):
    cached = tmp_path / "cache" / "datasets"
    datasets.load_dataset("json", data_files=talks["path"], cache_dir=str(cached))
    (info,) = cached.rglob("dataset_info.json")  # what `datasets` leaves of a hub data set has the same files
    folder = cached / "some___talks" / "default" / "0.0.0" / "0123abcd"
    shutil.copytree(info.parent, folder)
    (folder / "json-train.arrow").rename(folder / "talks-train.arrow")
    facts = json.loads(info.read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**facts, "config_name": "default", "dataset_name": "talks"}))
    before = sorted(tmp_path.rglob("*"))
    data = Data(**{**talks, "path": "some/talks"}, tokenizer={"train_vocabulary": 300})
    (said,) = preview(data, None, tmp_path / "cache")
    assert (said.read, said.records, said.not_looked_at) == (200, 294, "") and "earlier run" in said.notes[0]
    assert "What does it see" in said.examples[0] and sorted(tmp_path.rglob("*")) == before
    (other,) = preview(Data(**{**talks, "path": "some/walks"}), None, tmp_path / "cache")
    assert "no local data, so that its fields" in other.not_looked_at
    with pytest.raises(UserError, match="the records have no such field"):
        preview(Data(**{**talks, "path": "some/talks", "response": "reply"}), None, tmp_path / "cache")
