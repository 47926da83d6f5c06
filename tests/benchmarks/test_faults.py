"""The fault matrix in short: a few of each fault on real runs, and none of ours is lost."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest

from benchmarks.faults import __main__ as faults
from benchmarks.faults import damage, disk, kills, nans, rank_faults
from benchmarks.faults.contenders import AccelerateScript, HFTrainer, Limbeck
from benchmarks.faults.fault_material import make
from benchmarks.faults.judging import Row, table
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def limbeck(material):
    return Limbeck(material, script=ROOT / "benchmarks" / "faults" / "training_alone.py")


def nothing_lost(row: Row) -> None:
    assert row.tries and row.resumed == row.tries and not row.unrecoverable, row.failures
    assert row.bitwise in (None, row.tries), row.failures


def test_kills_around_saves_lose_nothing_of_ours(limbeck, tmp_path):
    row = kills.kill_row(replace(limbeck, options=("training.steps=16", "training.evaluate_every=16")), 6, tmp_path)
    nothing_lost(row)
    assert row.tries == row.bitwise == 6 and row.lost <= 4


@pytest.mark.parametrize("peer", [AccelerateScript, HFTrainer])
def test_peers_are_killed_alike(material, tmp_path, peer):
    """What becomes of them is theirs; that they train, go on and are judged is ours."""
    row = kills.kill_row(peer(material, ("--steps", "16")), 3, tmp_path)
    assert row.tries == 3 == row.resumed + row.unrecoverable
    assert len(row.failures) >= (row.unrecoverable > 0)


def test_a_changed_bit_is_noticed(limbeck, tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "DAMAGES", {"bit flipped": damage.flip})
    (row,) = damage.damage_rows(replace(limbeck, options=damage.OURS), tmp_path, "", ("optimizer",))
    nothing_lost(row)
    assert row.lost >= damage.EVERY, "the checkpoint before it is gone on from"


def test_a_full_disk(limbeck, tmp_path, monkeypatch):
    with disk.small_disk(tmp_path / "try", 2**20) as mounted:
        if mounted is None:
            pytest.skip("this user may not mount a tmpfs")
    monkeypatch.setattr(disk, "CASES", (disk.full_for_a_while,))
    row = disk.disk_row(limbeck, tmp_path)
    nothing_lost(row)
    assert row.remarks == ["lives through a full disk"]


def test_a_nan_sample(material, tmp_path):
    row = nans.sample_row(Limbeck(material, nans.SHORT), tmp_path)
    nothing_lost(row)
    assert row.remarks == ["each step with it is skipped, and names it"]


def test_a_stalled_rank(limbeck, tmp_path):
    row = rank_faults.lost_rank_row(limbeck, tmp_path, signal.SIGSTOP, "forked", (1,))
    nothing_lost(row)
    assert "1 of 1 named it" in row.remarks[0]


def test_the_command_writes_its_table(tmp_path, capsys):
    file = tmp_path / "faults.json"
    assert faults.main(["--short", "--only", "workers", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [row["fault"] for row in found["rows"]] == ["0, 2, then 1 data workers"]
    assert table(found) in capsys.readouterr().out and found["rows"][0]["bitwise"] == 1
    with pytest.raises(SystemExit):
        faults.main(["--only", "nonsense"])
    assert "no such row: nonsense; there are kill, damage" in capsys.readouterr().err
