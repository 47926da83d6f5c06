"""The table, the sentence and the picture of a sweep, against statistics computed here."""

import json
import re
from pathlib import Path
from statistics import mean

import numpy

from trainer.experiment.explain import resolved_yaml
from trainer.sweep.sweep_file import read_sweep
from trainer.sweep.sweep_metrics import figures
from trainer.sweep.sweep_plan import SweepPlan
from trainer.sweep.sweep_plot import draw_sweep
from trainer.sweep.sweep_record import RunRecord, SweepRecord
from trainer.sweep.sweep_table import failures, markdown, rows_of, table, verdict

KEYS = {"optimizer.lr": "lr", "student.quantization.method": "method"}
FOUND = {(1e-3, "rtn"): (2.5, 2.75, 2.625), (1e-2, "rtn"): (1.5, 2.0, 1.75), (1e-3, "gptq"): (2.0, 2.125, 2.0625),
         (1e-2, "gptq"): (1.25, 1.375, 1.0)}


def record(found=FOUND, *, metric="bits_per_byte", keys=KEYS, searched=False, left=0):
    runs = []
    for number, (values, results) in enumerate(found.items()):
        for seed, result in enumerate(results):
            state = {None: "waiting", "failed": "failed"}.get(result, "finished")
            figures = {metric: result, "bytes_on_disk": 1000 + number} if state == "finished" else {}
            runs.append(RunRecord(label=f"setting-{number}", values=dict(zip(keys, values, strict=True)), seed=seed,
                                  state=state, figures=figures, said="error: a|b\n-> c" if state == "failed" else ""))
    return SweepRecord(name="a-sweep", experiment="e.yaml", metric=metric, keys=keys, searched=searched,
                       total=len(runs) + left, runs=runs)


def cells(text):
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]


def test_rows_are_means_and_ranges_in_order():
    head, rule, *rows = cells(table(record()))
    assert head == ["lr", "method", "bits_per_byte", "least to greatest", "behind the best", "bytes on disk", "runs"]
    assert rule[0].startswith("---") and rule[2].endswith(":")
    order = sorted(FOUND, key=lambda values: mean(FOUND[values]))
    assert [(float(row[0]), row[1]) for row in rows] == order
    for row, values in zip(rows, order, strict=True):
        least, greatest = row[3].split(" to ")
        assert float(row[2]) == round(mean(FOUND[values]), 4)
        assert (float(least), float(greatest)) == (min(FOUND[values]), max(FOUND[values]))
        behind = [ours - best for ours, best in zip(FOUND[values], FOUND[order[0]], strict=True)]
        assert row[4] == ("" if values == order[0] else f"{min(behind):+.3g} to {max(behind):+.3g}")
        assert row[5:] == [f"{1000 + list(FOUND).index(values):,}", "3 of 3"]
    best = rows_of(record())[0].to_dict()
    assert (best["least"], best["greatest"], best["finished"], best["of"]) == (1.0, 1.375, 3, 3)
    assert abs(best["sd"] - numpy.std(FOUND[1e-2, "gptq"], ddof=1)) < 1e-12


def test_highest_first_where_more_is_better():
    rows = rows_of(record(metric="tokens_per_second"))
    assert [row.mean for row in rows] == sorted((mean(found) for found in FOUND.values()), reverse=True)
    assert "higher is better" in verdict(record(metric="tokens_per_second"))


def test_the_sentence_says_whether_seeds_could_explain_it():
    """Seed by seed: ranges that overlap tell nothing where every setting has the same good and bad seeds."""
    apart = {(1e-3, "rtn"): (1.0, 2.0, 3.0), (1e-2, "rtn"): (1.25, 2.125, 3.0625)}
    assert "It is better on each of the 3 seeds that both ran on, by 0.0625 to 0.25" in verdict(record(apart))
    assert "one of them would still win on every seed with probability 0.25" in verdict(record(apart))
    near = {(1e-3, "rtn"): (1.0, 2.0), (1e-2, "rtn"): (2.0, 1.5)}
    assert "On 1 of the 2 seeds that both ran on it is not the better one, so chance may" in verdict(record(near))
    more = {(1e-3, "rtn"): (1.0, 2.0), (1e-2, "rtn"): (2.0, 2.5)}
    assert "better on each of the 2 seeds" in verdict(record(more, metric="tokens_per_second"))
    other = {(1e-3, "rtn"): (None, 2.0, 2.0), (1e-2, "rtn"): (1.5, None, 2.5)}
    single = {(1e-3, "rtn"): (1.0,), (1e-2, "rtn"): (1.5,)}
    for one in (other, single):
        assert "no more than one seed, so how much of the difference is chance is not known" in verdict(record(one))
    assert "least to greatest" not in table(record(single))


def test_what_is_missing_is_never_left_out():
    part = record({**FOUND, (1e-1, "rtn"): ("failed", None, "failed"), (1e-4, "rtn"): (3.0, "failed", None)}, left=3)
    assert not part.finished and part.progress == "13 of 21 runs finished, 3 failed"
    assert verdict(part).startswith("Not finished: 13 of 21 runs finished, 3 failed. Best so far: setting-3")
    *_, fourth, last = cells(table(part))
    assert fourth[2:] == ["3.0000", "3.0000 to 3.0000", "+1.75 to +1.75", "1,005", "1 of 3, 1 failed, 1 waiting"]
    assert last[2:] == ["none", "", "", "", "0 of 3, 2 failed, 1 waiting"]
    assert failures(part).count("failed: error: a\\|b") == 3 and "logs/setting-4.seed-2.log" in failures(part)
    page = markdown(part)
    assert "13 of 21 runs finished" in page.splitlines()[2] and "![results](sweep.png)" in page
    assert json.loads(part.model_dump_json())["finished"] is False
    assert record().finished and "Not finished" not in markdown(record())
    assert "nothing to compare" in verdict(record({(1e-3, "rtn"): (None,)}))


def test_pictures_of_all_kinds(tmp_path, recwarn):
    """Lines along a number, a dot for each run where there is none, and panels for a search; titles tell what lacks."""
    from matplotlib import pyplot

    drawn = []
    saved = pyplot.Figure.savefig

    def save(figure, *words, **options):
        drawn.append(figure)
        return saved(figure, *words, **options)

    pyplot.Figure.savefig = save
    try:
        names = {"teacher.path": "path"}
        for one in (record(), record({("a/b",): (1.0, 2.0), ("c",): (3.0,)}, keys=names, left=1),
                    record(searched=True), record({(1e-3, "rtn"): (None,)})):
            draw_sweep(one, tmp_path / "sweep.png")
            assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    finally:
        pyplot.Figure.savefig = saved
    lines, dots, panels, empty = drawn
    assert [text.get_text() for text in lines.axes[0].get_legend().get_texts()] == ["method gptq", "method rtn"]
    assert lines.axes[0].get_xscale() == "log" and lines._suptitle.get_text() == "a-sweep"
    assert re.fullmatch(r"a-sweep: 3 of 4 runs finished", dots._suptitle.get_text())
    assert [label.get_text() for label in dots.axes[0].get_yticklabels()] == ["setting-0", "setting-1"]
    assert len(panels.axes) == 2 and "no run has finished" in empty.axes[0].get_title()
    assert not [warning for warning in recwarn if "singular" in str(warning.message)]


def test_finished_runs_that_are_to_train_for_longer_wait_again(tmp_path, monkeypatch):
    """What an earlier start of the sweep said of them counts no more; seconds are those of training steps alone."""
    monkeypatch.chdir(tmp_path)
    Path("e.yaml").write_text("student: {architecture: {model_type: llama}}\ntraining: {steps: 5}\n")

    def planned(steps):
        Path("s.yaml").write_text(f"experiment: e.yaml\nfolder: swept\noverrides: {{training.steps: {steps}}}\n"
                                  "grid: {optimizer.lr: [0.001, 0.002]}\n")
        return SweepPlan(read_sweep("s.yaml"))

    plan = planned(5)
    for run in plan.record.runs:
        folder = plan.folder.run(run)
        folder.student.mkdir(parents=True)
        folder.experiment.write_text(resolved_yaml(plan.runs[run.label, run.seed].source.experiment))
        folder.report.write_text("x")
        folder.receipt.write_text('{"bytes_on_disk": 1}')
        folder.comparison.write_text('{"student": {"bits_per_byte": 2.0}}')
        folder.metrics.write_text('{"step": 5, "loss": 1.0, "seconds": 1.5}\n'
                                  '{"step": 5, "held_out": {"bits_per_byte": 2.0}, "seconds": 10}\n')
        run.state, run.figures = "finished", {"bits_per_byte": 2.0, "bytes_on_disk": 1}
    plan.folder.write(plan.record)
    assert [run.state for run in planned(5).record.runs] == ["finished"] * 2
    assert [run.state for run in planned(10).record.runs] == ["waiting"] * 2
    assert figures(plan.folder.run(plan.record.runs[0]), "seconds")["seconds"] == 1.5
