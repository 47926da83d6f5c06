"""The end-to-end benchmark: both sides train on the same rows from the same weights, with the same losses."""

import json

from benchmarks.end_to_end.__main__ import main
from benchmarks.end_to_end.contestant import OURS, TRAINER
from benchmarks.end_to_end.end_to_end_table import best, table


def test_ours_and_the_trainer_lose_the_same_at_every_step(tmp_path, capsys):
    assert main(["--tasks", "fine-tune", "--vocabulary", "600", "--dtypes", "fp32", "--rounds", "1", "--turn", "2",
                 "--warm-up", "2", "--threads", "1", "--json", str(tmp_path / "found.json")]) == 0
    rows = {row["contestant"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert {OURS, TRAINER} <= set(rows)
    assert rows[TRAINER]["largest_loss_difference"] < 1e-5 and not rows[TRAINER]["void"]
    assert rows[OURS]["largest_loss_difference"] == 0 and rows[OURS]["ratio"] == 1
    assert all(0 < row["peak_above_imports"] < row["peak_bytes"] and row["tokens_per_second"] > 0
               for row in rows.values())
    assert "| fine-tune | 600 | fp32 | limbeck |" in capsys.readouterr().out


def test_void_rows_count_for_nothing():
    shared = {"task": "fine-tune", "vocabulary": 1, "tokens_per_second": 1.0, "peak_bytes": 9,
              "largest_loss_difference": 0.0}
    rows = [shared | {"dtype": dtype, "contestant": name, "ratio": ratio, "peak_above_imports": peak, "void": void}
            for dtype, void in (("fp32", False), ("bf16", True))
            for name, ratio, peak in ((OURS, 1.0, 2), (TRAINER, 9.0 if void else 1.5, 4))]
    assert best(rows, "fine-tune", TRAINER) == ((1.5, 1.5), (0.5, 0.5))
    assert "(void)" in table(rows)
