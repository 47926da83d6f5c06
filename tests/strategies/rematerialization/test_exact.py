"""The exact program as a choice, and what is found for a block kept on disk: on small blocks of a real model."""

import hashlib
import json

import pytest
import torch
from torch import nn

from strategies.rematerialization import rematerialize as entry
from strategies.rematerialization.price import block_options
from strategies.rematerialization.price.costs import Prices
from strategies.rematerialization.price.option_store import OptionStore
from strategies.rematerialization.rematerialize import rematerialize, study
from strategies.rematerialization.solve import keep_frontier
from strategies.rematerialization.solve.checkmate import MOST_OPERATIONS, NotExact
from tests.strategies.rematerialization.planning_cases import assert_equal, batch_for, language_model, results


class Block(nn.Module):
    """A gated perceptron beside its input: 13 operations with their backward, or 24."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32)
        self.gate = nn.Linear(32, 128) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, 32] -> [rows, 32]"""
        inside = self.norm(x)
        wide = nn.functional.gelu(self.up(inside))
        return x + self.down(wide if self.gate is None else wide * self.gate(inside))


class Perceptron(nn.Module):
    """Equal blocks, one after another; `parts` of one are no list, so that the model is planned as a whole."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = [Block() for _ in range(blocks)]
        self.blocks = nn.ModuleList(made) if blocks > 1 else made[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, 32] -> the loss"""
        for block in self.blocks if isinstance(self.blocks, nn.ModuleList) else [self.blocks]:
            x = block(x)
        return x.square().mean()


BATCH = torch.linspace(-1, 1, 512 * 32).view(512, 32)


@pytest.fixture
def by_roofline(monkeypatch):
    """The same prices for both solvers; what was found before is not known."""
    monkeypatch.setattr(entry, "Prices", lambda known, measure, store: Prices(known, measure=False, store=store))
    block_options._known.clear()


@pytest.mark.parametrize("blocks", [1, 3])
def test_exact_plans_cost_no_more_and_keep_their_budget(by_roofline, blocks):
    """One region that is solved for the budget itself, and several that are chosen from what was solved for each."""
    model = Perceptron(blocks).train()
    expected = results(model, BATCH)
    peaks = [study(model, BATCH).keep_all().peak, study(model, BATCH).least.peak]
    for share in (0.3, 0.7):
        budget = int(peaks[1] + share * (peaks[0] - peaks[1]))
        plans = {solver: rematerialize(model, BATCH, budget, solver=solver) for solver in ("auto", "exact")}
        exact = plans["exact"]
        assert exact.peak <= budget and 0 < exact.recomputed <= plans["auto"].recomputed * (1 + 1e-9)
        assert exact.solver == "exact" and "proven optimal by Checkmate's exact program" in str(exact)
        assert plans["auto"].solver == "auto" and "proven optimal" not in str(plans["auto"])
        assert_equal(results(model, BATCH), expected, share)
        exact.remove()


def test_blocks_of_a_language_model_are_refused_with_their_name_and_size():
    model, batch = language_model("gpt2", 2), batch_for("gpt2")
    keep_all = study(model, batch, regions=False).keep_all().peak
    assert rematerialize(model, batch, 2 * keep_all, solver="exact").recomputed == 0  # nothing is to be solved
    with pytest.raises(NotExact, match=rf"^transformer\.h\.0 with its \d+ operations .* {MOST_OPERATIONS} at most"):
        rematerialize(model, batch, int(0.7 * keep_all), solver="exact")


def test_bounds_that_ran_out_of_time_are_not_kept_for_others(tmp_path, monkeypatch):
    model = Perceptron(3).train()
    budget = int(0.8 * study(model, BATCH).keep_all().peak)
    counts = []
    for name, seconds in (("cut", 0.0), ("whole", 60.0)):
        monkeypatch.setattr(keep_frontier, "LONGEST", seconds)
        block_options._known.clear()
        folder = tmp_path / name
        folder.mkdir()
        rematerialize(model, BATCH, budget, cache=folder).remove()
        counts.append(len(list((folder / "plans").iterdir())))
    assert counts[0] < counts[1]


def test_what_was_found_for_a_block_is_found_once(tmp_path, monkeypatch):
    """By the next process, here one that has forgotten all. Files that are damaged or hold no orders are none."""
    model = Perceptron(3).train()
    budget = int(0.8 * study(model, BATCH).keep_all().peak)

    def plan(cache=tmp_path):
        block_options._known.clear()
        found = rematerialize(model, BATCH, budget, cache=cache)
        return found.schedule, found.recomputed, found.bound, found.peak

    later = tmp_path / "made later"
    rematerialize(model, BATCH, budget, cache=later)
    assert not list(tmp_path.iterdir()), "a folder that nobody made is not made"
    later.mkdir()
    OptionStore(later / "plans").keep(("another",), [])
    assert len(list((later / "plans").iterdir())) > 3, "what was found before is kept now"
    first = plan()
    files = list((tmp_path / "plans").iterdir())
    assert len(files) >= 3 and not [file for file in files if file.suffix != ".json"]
    with monkeypatch.context() as nothing:
        for search in ("_options", "keep_frontier"):
            nothing.setattr(block_options, search, None)
        nothing.setattr(Prices, "_price", None)
        assert plan() == first
    firsts = {file: json.loads(file.read_text())["found"][0] for file in files}
    prices = [file for file in files if isinstance(firsts[file][0], float) and firsts[file][0] > 0]  # bounds begin at 0
    assert len(prices) == 2, "of two graphs: the first block passes no gradient on"
    others = [file for file in files if file not in prices]
    strange = [[10**6]]
    valid = json.dumps({"found": strange, "sha256": hashlib.sha256(json.dumps(strange).encode()).hexdigest()})
    damages = ["", "{", "[" * 10_000, "x" * (2**22 + 1), json.dumps({"found": strange, "sha256": ""}), valid]
    for number, damage in enumerate(damages):
        file = others[number % len(others)]
        file.write_text(damage)
        assert plan() == first and file.read_text() != damage, damage[:20]
    prices[0].write_text(valid)
    plan()
    assert prices[0].read_text() != valid, "measured again"
