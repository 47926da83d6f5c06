"""Inductor or eager kernels: what decides, what a trial leaves as it was, and what is said."""

import re

import pytest
import torch
from torch.utils._pytree import tree_flatten

from limbeck import rematerialize
from strategies.rematerialization import inductor_choice
from strategies.rematerialization.capture.regions import Meta, RegionCall
from strategies.rematerialization.inductor_choice import STEPS, Ways, decided, missing_compiler
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.rematerialize import study
from strategies.rematerialization.solve.chain_program import leaves
from tests.strategies.rematerialization.planning_cases import assert_equal, language_model, quick, results, text_batch


@pytest.fixture(autouse=True)
def few_options(monkeypatch):
    with quick(monkeypatch, levels=()):
        yield


@pytest.fixture
def tight():
    """A model, a batch and a budget that a plan has to recompute for."""
    model, batch = language_model("llama", layers=2), text_batch()
    planner = study(model, batch)
    return model, batch, (planner.least.peak + planner.keep_all().peak) // 2


@pytest.mark.parametrize("gain, compiling, taken, why", [
    (0.1, 4.9, True, "has paid after 49 steps"), (0.1, 5.1, False, "would only pay after 51 steps"),
    (0.021, 44.6, False, "would only pay after 2,124 steps"), (-0.02, 1.0, False, "0.020 s slower")])
def test_it_pays_within_fifty_steps_or_is_not_chosen(gain, compiling, taken, why):
    choice = decided(gain, compiling)
    assert choice.inductor is taken and why in str(choice) and STEPS == 50
    assert str(choice).startswith("Inductor: " if taken else "eager kernels: ")


def test_a_small_model_is_not_even_tried(tight, monkeypatch):
    model, batch, budget = tight
    expected = results(model, batch)
    monkeypatch.setattr(Ways, "_tried", None)  # a call would fail
    plan = rematerialize(model, batch, budget, compile="auto")
    seconds = re.search(r"eager kernels: compiling takes ([\d.]+) s at least, and 50 steps could save ([\d.]+) s at "
                        "most", str(plan))
    assert seconds and float(seconds[1]) >= float(seconds[2])
    assert_equal(results(model, batch), expected, plan.compiled)


@pytest.mark.parametrize("slower", [True, False])
def test_a_trial_changes_nothing_and_its_winner_is_installed(tight, monkeypatch, slower):
    """Both ways run eager kernels here, so that no compiler is needed; a clock makes one of them slow."""
    model, batch, budget = tight
    expected, clock, installed = results(model, batch), [0.0], []
    install, alone = Planner.install, inductor_choice.Planned.run_alone

    def eagerly(self, plan, inductor=False, model=None):
        install(self, plan, False, model)
        installed.append((inductor, plan.planned))

    def timed(self, position, args, kwargs):
        mine = any(inductor and self is planned for inductor, planned in installed)
        clock[0] += 0.2 if mine is slower else 0.1
        return alone(self, position, args, kwargs)

    monkeypatch.setattr(inductor_choice, "COMPILING", {"cpu": 0.0})
    monkeypatch.setattr(Planner, "install", eagerly)
    monkeypatch.setattr(inductor_choice.Planned, "run_alone", timed)
    monkeypatch.setattr(inductor_choice, "_now", lambda kind: clock[0])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    plan = rematerialize(model, batch, budget, compile="auto")
    assert torch.equal(torch.get_rng_state(), state)
    assert [inductor for inductor, _ in installed] == [False, True]  # each installed once, whichever is chosen
    assert plan.planned is installed[0 if slower else 1][1]
    assert ("makes a step" if slower else "saves") in plan.compiled
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_equal(results(model, batch), expected, plan.compiled)
    plan.remove()


def test_nothing_to_compile_where_no_block_runs_by_a_graph():
    model, batch = language_model("llama", layers=2), text_batch()
    assert "nothing to compile" in rematerialize(model, batch, "1GiB", compile="auto").compiled


def test_without_a_compiler(tight, monkeypatch):
    def none() -> str:
        raise RuntimeError("no working C++ compiler")

    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert missing_compiler("cpu") == "there is no C++ compiler at hand (no working C++ compiler)"
    model, batch, budget = tight
    assert rematerialize(model, batch, budget, compile="auto").compiled.startswith("eager kernels: there is no C++")


def test_what_is_to_be_compiled_runs_by_its_graph():
    """Inductor compiles graphs; a block that runs unchanged has none."""
    model, batch = language_model("llama", layers=2), text_batch()
    planner = study(model, batch)
    budget = planner.keep_all().peak

    def by_graphs(unchanged: bool) -> int:
        planner.unchanged = unchanged
        plan = planner.plan(budget)
        assert plan.peak <= budget
        return sum(bool(plan.links[position].options[which].order) for item in plan.schedule
                   for position, which in leaves(item))

    assert by_graphs(False) == 2 > by_graphs(True)


def test_arguments_are_made_up_as_they_are_laid_out():
    def of(tensor: torch.Tensor) -> torch.Tensor:
        call = RegionCall("block", torch.nn.Identity(), arguments=([Meta.of(tensor)], tree_flatten(((0,), {}))[1]))
        return inductor_choice.made_up(call, torch.device("cpu"))[0][0]

    expanded = of(torch.randn(1, 4).expand(3, 4).requires_grad_())
    assert expanded.stride() == (0, 1) and expanded.shape == (3, 4) and expanded.requires_grad
    assert torch.equal(expanded[0], expanded[2])
    assert of(torch.zeros(1, 5, dtype=torch.bool).expand(2, 5)).all()
    assert of(torch.randn(6, 2).T).stride() == (1, 2)
