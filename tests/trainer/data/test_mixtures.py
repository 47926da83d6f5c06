"""Mixtures of sources: shares by tokens, one order for everybody, and runs that go on to the bit."""

import json
import signal
import time

import numpy as np
import pytest
import torch

from strategies.distillation.losses.response import IGNORED
from tests.conftest import FORKED, TINY, sentences
from tests.trainer.checkpoints.test_checkpoints import losses, quietly, same
from tests.trainer.data.test_order import stream
from tests.trainer.teacher.test_distilling import bpe, save
from trainer import checkpoints
from trainer.data import row_order
from trainer.data.dataset import prepare_text
from trainer.data.row_order import MixedOrder
from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.load import read_experiment
from trainer.run.metrics import read_lines

SHARES = (0.5, 0.2, 0.3)


@pytest.fixture
def uneven():
    """Tokens of the rows of three sources: one is larger than its share, one is repeated, one has long rows."""
    draw = np.random.default_rng(0)
    return [draw.integers(2, 65, 5000), draw.integers(2, 9, 300), draw.integers(40, 65, 700)]


def source_of(rows, lengths):
    return np.searchsorted(np.cumsum([len(own) for own in lengths]), rows, side="right")


def test_shares_are_the_weights_in_every_epoch_and_every_beginning(uneven):
    order, rows = MixedOrder(uneven, SHARES, seed=3), sum(map(len, uneven))
    seen = np.array([order[position] for position in range(2 * rows)])
    tokens = np.concatenate(uneven)[seen]
    for source, share in enumerate(SHARES):
        own = tokens * (source_of(seen, uneven) == source)
        for epoch in (slice(0, rows), slice(rows, 2 * rows)):
            assert abs(own[epoch].sum() / tokens[epoch].sum() - share) < 1e-3
        assert np.abs(np.cumsum(own) - share * np.cumsum(tokens)).max() <= 64, "a row, from the first on"
    counted = [int(tokens[:777][source_of(seen[:777], uneven) == source].sum()) for source in range(3)]
    assert order.tokens_before(777) == counted


def test_rows_of_a_source_are_seen_equally_often_and_in_another_order_each_time(uneven):
    order = MixedOrder(uneven, SHARES, seed=3)
    seen = np.array([order[position] for position in range(12000)])
    counts = np.bincount(seen, minlength=6000)
    for source in range(3):
        own = counts[source_of(np.arange(6000), uneven) == source]
        assert own.max() - own.min() <= 1
    small = seen[source_of(seen, uneven) == 1]
    assert len(small) > 600 and set(small[:300]) == set(small[300:600]) and (small[:300] != small[300:600]).any()


def test_a_position_is_found_without_those_before_it_and_depends_on_the_seed(uneven, monkeypatch):
    order = MixedOrder(uneven, SHARES, seed=3)
    places = [0, 4095, 4096, 11999, 250_000]
    whole = [order[position] for position in range(12000)]
    assert [MixedOrder(uneven, SHARES, seed=3)[place] for place in places[:4]] == [whole[place] for place in places[:4]]
    assert [MixedOrder(uneven, SHARES, seed=4)[place] for place in range(50)] != whole[:50]
    far = [order[position] for position in range(249_990, 250_010)]
    monkeypatch.setattr(row_order, "WINDOW", 100)
    assert [MixedOrder(uneven, SHARES, seed=3)[position] for position in range(249_990, 250_010)] == far
    one = MixedOrder([np.full(1, 7), np.full(1, 7)], (0.75, 0.25), seed=0)
    assert [one[position] for position in range(8)].count(1) == 2, "sources of a single row"


@pytest.fixture
def sources(tmp_path):
    """Text as JSONL, and questions with answers as CSV."""
    (tmp_path / "text.jsonl").write_text("".join(
        json.dumps({"body": sentences(number, 1 + number % 5)}) + "\n" for number in range(60)))
    (tmp_path / "asked.csv").write_text("q,a\n" + "".join(
        f'"What does it see,\nnumber {number}?",It sees {number}.\n' for number in range(25)))
    return [{"path": str(tmp_path / "text.jsonl"), "text": "body", "weight": 3},
            {"path": str(tmp_path / "asked.csv"), "prompt": "q", "response": "a"}]


@pytest.fixture
def mixed(sources, write_experiment):
    def write(name="mixed", data=None, **changes):
        file = write_experiment(name, data={"sources": sources, "packing": False, **(data or {})}, **changes)
        text = file.read_text().splitlines()
        file.write_text("\n".join(line for line in text if not line.startswith("  path: ")) + "\n")
        return file
    return write


@pytest.mark.parametrize("streaming", [False, True])
def test_order_is_the_same_on_one_and_two_processes_and_from_any_step_on(mixed, streaming):
    text = prepare_text(read_experiment(mixed(data={"streaming": streaming})).experiment)
    one = stream(text.train, 120)
    for start, micro_batch in ((0, 2), (40, 4)):
        other = stream(text.train, 120 - start, processes=2, micro_batch=micro_batch, skip=start)
        assert [row for row, *_ in one[start:]] == [row for row, *_ in other]
        for (_, ids, targets), (_, ids_, targets_) in zip(one[start:], other, strict=True):
            assert torch.equal(ids, ids_) and torch.equal(targets, targets_)
    end = text.tokenizer.eos_token_id
    lengths = [int((ids != end).sum()) + 1 for _, ids, _ in one]
    asked = sum(size for size, (_, _, targets) in zip(lengths, one, strict=True) if targets[1] == IGNORED)
    assert abs(asked / sum(lengths) - 0.25) <= 32 / sum(lengths), "known by prompts, which are not learned"


def test_a_killed_run_of_a_mixture_ends_where_an_undisturbed_one_does(mixed, train_here, sources, tmp_path):
    """kill -9; weights, moments, random states and losses to the bit; and what is said of the mixture."""
    changes = {"student": {"architecture": {**TINY, "attention_dropout": 0.2}},
               "data": {"sources": sources, "packing": False, "path": "python-library"},
               "training": {"steps": 24, "micro_batch": 4, "evaluate_every": 12, "checkpoint_every": 2}}
    whole = train_here("whole", **changes)
    mixed("cut", **changes)
    process = FORKED.Process(target=quietly, args=(["--config", str(tmp_path / "cut.yaml")], tmp_path / "said"))
    process.start()
    folder = tmp_path / "cut" / "checkpoints"
    while not list(folder.glob("step-*")) and process.is_alive():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and 0 < int(checkpoints.latest(folder).name[5:]) < 24
    train_here("cut", **changes)
    same(tmp_path / "whole" / "checkpoints" / "step-00000024", folder / "step-00000024")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    plan = json.loads((tmp_path / "cut" / "plan.json").read_text())
    assert [one["weight"] for one in plan["mixture"]] == [0.75, 0.25] and plan["text"][0].startswith(
        f"mixture by tokens: {sources[0]['path']} 7")
    assert sum(one["trained"] for one in plan["mixture"]) == sum(
        int(whole.text.train[whole.text.train.order(0)[position]]["length"]) for position in range(24 * 8))
    held = [line["held_out"] for line in read_lines(tmp_path / "cut" / "metrics.jsonl") if "held_out" in line][-1]
    sizes = [int(whole.text.held_out["bytes"][part].sum()) for part in whole.text.held_out_of.values()]
    bits = sum(size * held["sources"][source["path"]] for size, source in zip(sizes, sources, strict=True))
    assert held["bits_per_byte"] == pytest.approx(bits / sum(sizes), rel=1e-6)


def test_cached_targets_are_those_of_the_rows_of_each_source(train_here, sources, tmp_path):
    """Hidden states from the cache teach what the teacher itself does; other weights find the same cache."""
    tokenizer = bpe(300)
    family = {"teacher": {"path": save(tmp_path / "large", tokenizer, seed=1, hidden_size=48)},
              "student": {"path": save(tmp_path / "small", tokenizer), "architecture": None},
              "objective": {"cross_entropy": 0.5, "divergence": {"weight": 0.5}},
              "run": {"cache": str(tmp_path / "cache")}, "training": {"steps": 3}}
    data = {"sources": sources, "path": "python-library", "tokenizer": {"train_vocabulary": None}}
    live = train_here("live", **family, data=data)
    cached = {**family, "teacher": {**family["teacher"], "targets": {"source": "hidden"}}}
    for name, weight in (("cached", 3), ("reweighted", 1)):
        sources[0]["weight"] = weight
        train_here(name, **cached, data=data)
    assert [loss for _, loss in losses(live.folder.path)] == pytest.approx(
        [loss for _, loss in losses(tmp_path / "cached")], rel=1e-5)
    assert len(list((tmp_path / "cache" / "targets").iterdir())) == 1


def test_a_held_out_set_that_all_sources_share_is_evaluated_on_once(mixed, sources, tmp_path):
    del sources[0]["text"], sources[1]["prompt"], sources[1]["response"]
    for source, name in zip(sources, ("one", "other"), strict=True):
        source["path"] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": sentences(len(name), 9)}) + "\n")
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": sentences(number, 3)}) + "\n" for number in range(5)))
    text = prepare_text(read_experiment(mixed(data={"validation": {"path": str(held), "rows": 4}})).experiment)
    assert text.held_out_of == {str(held): slice(0, 4)} and len(text.held_out["input_ids"]) == 4


@pytest.mark.parametrize(("change", "key", "said"), [
    ("[{path: a, weight: 0}]", "data.sources.0.weight", "greater than 0 remove the source, or give it a weight"),
    ("[{path: a}, {path: b, weight: -2}]", "data.sources.1.weight", "greater than 0"),
    ("[{path: a, weight: .inf}]", "data.sources.0.weight", "finite"),
    ("[]", "data.sources", "there is no source in this list"),
    ("[a.jsonl]", "data.sources.0", "write {path: a.jsonl}"),
    ("[{path: a, wieght: 1}]", "data.sources.0.wieght", "did you mean `data.sources.0.weight`?"),
    ("[{path: a}, {path: b, prompt: q}]", "data.sources.1.prompt", "belong together"),
    ("[{path: a, labels: x}]", "data.sources.0.labels", "`input_ids` is not given"),
])
def test_mistakes_in_sources_are_named(write_experiment, change, key, said):
    file = write_experiment(data={"path": "python-library"})
    with pytest.raises(ExperimentErrors) as caught:
        read_experiment(file, [f"data.sources={change}"])
    (error,) = caught.value.errors
    assert error.key == key and said in f"{error.problem} {error.way_out}"


def test_one_path_or_several(write_experiment):
    with pytest.raises(ExperimentErrors) as caught:
        read_experiment(write_experiment(), ["data.sources=[{path: a}]"])
    assert caught.value.errors[0].key == "data.path" and "keep one of the two" in caught.value.errors[0].way_out


@pytest.mark.parametrize(("change", "key"), [
    ({"path": "gone.jsonl"}, "data.sources.1.path"), ({"response": "x"}, "data.sources.1.response"),
    ({"path": "empty.csv"}, "data.sources.1.path"), ({"validation": {"split": "test"}},
                                                     "data.sources.1.validation.split")])
def test_mistakes_in_the_data_name_their_source(mixed, sources, tmp_path, monkeypatch, change, key):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("q,a\n")
    sources[1].update(change)
    with pytest.raises(UserError) as caught:
        prepare_text(read_experiment(mixed()).experiment)
    assert caught.value.key == key


@pytest.mark.parametrize("rows", [4, 20])
def test_held_out_rows_are_counted_and_few_decide_nothing(mixed, sources, rows):
    text = prepare_text(read_experiment(mixed(
        data={"validation": {"fraction": 0.5, "rows": rows}}, training={"keep_best": "bits_per_byte"})).experiment)
    one, other = (part.stop - part.start for part in text.held_out_of.values())
    assert one + other == len(text.held_out["input_ids"])
    said = f"{one + other} held-out rows: {one} of {sources[0]['path']}, {other} of {sources[1]['path']}"
    warning = ("training.keep_best decides by fewer than 16 held-out rows: which evaluation is the best may be chance; "
               "raise data.validation.rows, and hold out more text where there is too little")
    assert said in text.notes and (warning in text.notes) == (rows < 16)
    early = read_experiment(mixed(data={"validation": {"fraction": 0.5, "rows": 4}}, training={
        "keep_best": "bits_per_byte", "early_stopping": 2})).experiment
    assert any("keep_best and training.early_stopping decide by" in note for note in prepare_text(early).notes)
