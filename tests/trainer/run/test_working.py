"""Words before slow work, by a clock of the test's own."""

import io
import time

import pytest
import torch
from rich.console import Console
from torch import nn

from strategies.common.progress import listening, report, tracked
from strategies.quantization.post_training import quantize
from strategies.quantization.quantizer import WeightQuantizer
from strategies.quantization.sensitivity import measure
from trainer.run import working as words
from trainer.run.bars import Bars
from trainer.run.working import Work, going, working


class Clock:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def worked(until, progress=(), **options):
    """What is said about work that is looked at each half second: its lines, each with the second it came in."""
    clock, said = Clock(), []
    work = Work("run", "searching, among 8 kinds", clock=clock,
                say=lambda line: said.append((clock.now - 1000, line)), **options)
    moves = dict(progress)
    while clock.now - 1000 < until:
        clock.now += words.TICK
        if clock.now - 1000 in moves:
            work.report("blocks", *moves[clock.now - 1000])
        work.tick()
    work.end()
    return said


def test_short_work_says_nothing_and_other_work_before_five_seconds_are_over():
    assert worked(1.5) == []
    assert worked(4) == [(2, "run: searching, among 8 kinds")]
    assert worked(41) == [(2, "run: searching, among 8 kinds"), (41, "run: searching took 41s")]
    assert worked(600, quiet=True) == []


def test_work_that_is_counted_tells_how_far_it_has_come():
    assert worked(70, {6: (2, 20), 40: (10, 20)}.items()) == [
        (2, "run: searching, among 8 kinds"), (32, "run: searching, 2 of 20 blocks, 4m48s left"),
        (62, "run: searching, 10 of 20 blocks, 1m02s left"), (70, "run: searching took 1m10s")]
    assert worked(40, {6: (1280, None)}.items())[1] == (32, "run: searching, 1,280 blocks"), "of nobody knows how many"


def test_work_named_at_once_is_not_named_again():
    assert worked(1, at_once=True) == [(0, "run: searching, among 8 kinds")]
    assert worked(8, {3: (3, 4)}.items(), at_once=True) == [
        (0, "run: searching, among 8 kinds"), (5, "run: searching, 3 of 4 blocks, 2s left"),
        (8, "run: searching took 8s")]


def test_a_terminal_shows_a_bar_that_goes_when_the_work_is_over():
    out = io.StringIO()
    bars = Bars(Console(file=out, force_terminal=True, width=100))
    outer = bars.add("run", 40, 3)
    clock, said = Clock(), []
    work = Work("run", "searching", clock=clock, say=said.append, bars=bars)
    clock.now += 6
    work.report("blocks", 3, 4)
    work.tick()
    deadline = time.monotonic() + 20
    while "3 of 4 blocks, 2s left" not in out.getvalue() and time.monotonic() < deadline:
        time.sleep(0.02)  # the terminal is drawn ten times a second
    assert "run  searching" in out.getvalue() and "━" in out.getvalue() and said == ["run: searching"]
    work.end()
    bars.remove(outer, keep=True)
    last = out.getvalue().rpartition("\x1b[2K")[2]
    assert "3/40" in last and "searching" not in last, "the run's own bar stays"
    assert said == ["run: searching", "run: searching took 6s"]


def test_work_knows_what_it_is_part_of_and_ends_when_it_fails(capsys, monkeypatch):
    with working("run", "training", quiet=True, model="control"), pytest.raises(ValueError), \
            working("run", "evaluating"):
        report("rows", 8, 30)
        assert [(work.short, work.done, work.total) for work in going()] == [("training", 0, None),
                                                                             ("evaluating", 8, 30)]
        raise ValueError
    assert going() == []
    with working("run", "writing", at_once=True):
        pass
    monkeypatch.setenv("RANK", "1")
    with working("run", "writing again", at_once=True):
        pass
    assert capsys.readouterr().out == "run: writing\n", "one process tells"


def test_progress_is_told_to_the_innermost_listener_and_to_nobody_else():
    outer, inner = [], []
    with listening(lambda *told: outer.append(told)):
        for item in tracked("ab", "letters"):
            with listening(lambda *told: inner.append(told)):
                assert list(tracked(iter([item]), "copies")) == [item]
    report("letters", 1, 2)
    assert outer == [("letters", 0, 2), ("letters", 1, 2), ("letters", 2, 2)]
    assert inner == 2 * [("copies", 0, None), ("copies", 1, None)]


def test_quantization_counts_its_layers():
    torch.manual_seed(0)
    model, told = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), []
    loss = lambda model: float(model(torch.ones(1, 8)).square().sum())  # noqa: E731
    with listening(lambda *one: told.append(one)):
        measure(model, [WeightQuantizer(bits=4), None], loss)
        quantize(model, None, WeightQuantizer(bits=4))
    assert told == [("layers", 0, 2), ("layers", 1, 2), ("layers", 2, 2), ("layers", 1, 2), ("layers", 2, 2)]
