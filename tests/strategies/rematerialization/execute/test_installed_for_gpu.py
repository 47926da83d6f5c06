"""Planned models in other people's loops: Accelerate, a Trainer, two ranks, Inductor."""

import shutil
import warnings

import pytest
import torch

from strategies.memory.meter import measure
from strategies.rematerialization.execute import segments
from strategies.rematerialization.price import block_options as ways
from strategies.rematerialization.rematerialize import rematerialize, study
from tests.conftest import forked, two_ranks
from tests.strategies.rematerialization.planning_cases import (
    assert_equal,
    by_hand,
    language_model,
    results,
    schedules,
    text_batch,
    tokens,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, and few options for each block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(ways, "LEVELS", (0.2, 0.0))
    yield
    torch.set_num_threads(threads)


def _rank() -> None:
    """What each of two processes does, as in a script that somebody launches with Accelerate."""
    from accelerate import Accelerator

    torch.set_num_threads(1)
    ways.LEVELS, segments.SMALL = (0.0,), 0
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    model = accelerator.prepare(language_model("gpt2"))
    own = tokens().roll(accelerator.process_index)
    batch = {"input_ids": own, "labels": own}
    planner = study(model, batch)

    def with_hooks():
        return results(model, batch, backward=accelerator.backward)

    first = by_hand(planner, planner.keep_all().schedule)
    expected = with_hooks()
    first.remove()
    mine = expected["gradient of module.transformer.wte.weight"]
    assert torch.equal(accelerator.gather(mine[None])[0], accelerator.gather(mine[None])[1]), "gradients not averaged"
    for schedule in [planner.least.schedule, *schedules(planner)]:
        planned = by_hand(planner, schedule)
        assert_equal(with_hooks(), expected, schedule)
        planned.remove()
    plain = with_hooks()
    for name, value in plain.items():
        torch.testing.assert_close(expected[name], value, rtol=1e-5, atol=1e-6)
    print(f"same on rank {accelerator.process_index}", flush=True)
    accelerator.end_training()


def test_two_ranks():
    done = forked(_rank, (), two_ranks(), timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "same on rank 0" in done.stdout and "same on rank 1" in done.stdout


def steps_with_accelerate(planned: bool, before: bool) -> list[float]:
    """Losses of three steps in bf16 with two micro-batches each; `before`: planned before the model is prepared."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = language_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def plan():
        planner = study(model, text_batch(), optimizer=optimizer, autocast=torch.bfloat16, accumulate=True)
        planner.install(planner.least)

    if planned and before:
        plan()
    model, optimizer = accelerator.prepare(model, optimizer)
    if planned and not before:
        plan()
    losses = []
    for step in range(6):
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens().roll(step), labels=tokens().roll(step)).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return losses


@pytest.mark.parametrize("before", [True, False])
def test_a_loop_with_accelerate(before):
    assert steps_with_accelerate(True, before) == steps_with_accelerate(False, before)


def test_a_trainer_of_transformers(tmp_path):
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]

    def losses(planned: bool) -> list[float]:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        model = language_model("llama")
        if planned:
            planner = study(model, text_batch())
            planner.install(planner.least)
        arguments = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1,
                                      use_cpu=True, report_to=[], save_strategy="steps", save_steps=3, seed=1)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(True) == losses(False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_with_inductor():
    model = language_model("llama", layers=2)
    batch = {name: value.repeat(4, 5) for name, value in text_batch().items()}
    expected = results(model, batch)
    planner = study(model, batch)
    budget = (planner.least.peak + planner.keep_all().peak) // 2
    plan = rematerialize(model, batch, budget, compile=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*plan does not hold.*")
        found = results(model, batch)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)

    def step():
        model(**batch).loss.backward()
        model.zero_grad()

    step()
    assert measure(step, "cpu", [model, batch]).peak <= budget
    plan.remove()
