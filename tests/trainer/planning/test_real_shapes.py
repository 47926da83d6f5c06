"""Plans of models shaped as real ones are, a large tied head and half of a chat learned, held against the profiler."""

import json
from dataclasses import replace

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from strategies.memory.plot import Curve, progress, shared_phases
from tests.conftest import sentences
from tests.strategies.rematerialization.planning_cases import quick
from tests.trainer.teacher.test_distilling import END, bpe
from trainer.data.tokenizers import known_size
from trainer.distributed.topology import Topology
from trainer.early_checks import configs_of
from trainer.experiment.load import read_experiment
from trainer.planning.refusal import BudgetUnmet
from trainer.planning.step_plan import plan_step
from trainer.run.metrics import read_lines, readable

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1,
         "max_position_embeddings": 128, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A teacher whose head is most of it, and questions whose answers are half of the text."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=4, vocab_size=8192)).save_pretrained(folder / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=bpe(300), eos_token=END, pad_token=END).save_pretrained(folder / "teacher")
    with open(folder / "chat.jsonl", "w") as file:
        for number in range(60):
            asked, answered = sentences(number, 2), sentences(number + 100, 4)
            file.write(json.dumps({"asked": asked, "answered": answered}) + "\n")
    return {"teacher": {"path": str(folder / "teacher")}, "student": {"architecture": None, "from_teacher": [0, 2]},
            "data": {"path": str(folder / "chat.jsonl"), "prompt": "asked", "response": "answered",
                     "sequence_length": 128, "tokenizer": {"train_vocabulary": None}},
            "training": {"steps": 3, "batch_size": 8, "micro_batch": 8}, "report": {"control": False}}


def planned(file, *overrides):
    """What a dry run plans."""
    experiment = read_experiment(file, list(overrides)).experiment
    tokens = known_size(experiment.data.tokenizer, experiment.with_weights)
    step = plan_step(experiment, Topology(), *configs_of(experiment, tokens, offline=True))
    return step and step.memory


@pytest.mark.parametrize(("overrides", "smaller"), [
    ((), {}),
    (("precision.dtype=bf16", "training.batch_size=16"), {}),
    (("teacher.targets.source=hidden",), {}),
    (("teacher.dtype=bfloat16",), {"student": {"from_teacher": None, "architecture": {
        "model_type": "llama", **SHAPE, "hidden_size": 128, "num_hidden_layers": 2}}}),
])
def test_the_dry_run_is_the_run_and_both_are_within_3_percent_of_the_profiler(train_here, given, tmp_path, overrides,
                                                                              smaller):
    trainer = train_here(overrides=overrides, **{**given, **smaller})
    dry = planned(tmp_path / "tiny.yaml", *overrides)
    assert dry == trainer.plan.memory
    found = next(line for line in read_lines(trainer.folder.metrics) if "memory" in line)["memory"]
    assert found["peak"] <= dry.peak * 1.005 and found["peak"] >= dry.peak / 1.03
    names = ["forward", "loss", "backward", "update"]
    assert [name for name, _ in dry.marks] == [name for name, _ in found["marks"]] == names
    before = found["base"] + dry.parts["batch"] + dry.parts["gradients"]
    assert dry.marks[0][1] == 0 and dry.curve[0][1] == pytest.approx(before, rel=0.03)
    curves = [Curve(numpy.array(points), tuple(map(tuple, marks)))
              for points, marks in ((dry.curve, dry.marks), (found["curve"], found["marks"]))]
    phases = shared_phases(curves)
    for curve in curves:
        places = numpy.interp([position for _, position in curve.marks], curve.points[:, 0], progress(curve, phases))
        assert places == pytest.approx(list(phases.values()), abs=0.05)


def test_the_plan_without_a_budget_meets_its_own_peak_and_names_what_is_there(write_experiment, given, monkeypatch):
    """Its peak is where both terms of the tied matrix's gradient are there, and the blocks' gradients."""
    small = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 8192}
    file = write_experiment(student={"architecture": {"model_type": "llama", **small}},
                            data={"sequence_length": 8, "tokenizer": {"train_vocabulary": None,
                                                                      "path": given["teacher"]["path"]}},
                            training={"batch_size": 1, "micro_batch": 1})
    free = planned(file)
    assert replace(planned(file, f"memory.budget={free.peak}"), budget=None) == free
    with quick(monkeypatch, levels=(0.1,)), pytest.raises(BudgetUnmet) as refused:
        planned(file, f"memory.budget={free.peak - 1}")
    assert refused.value.way_out.endswith(f"memory.budget={free.peak}")
    said = f"needs is {readable(free.peak)} ({free.peak:,} bytes), and none can need less than {readable(free.peak)} ("
    assert said in str(refused.value) and f"({free.moment})" in str(refused.value)

    matrix, weights = 4 * 64 * 8192, free.parts["weights"] - 4 * 16  # less the buffers of rotary embeddings
    assert free.moment == "end of the backward" and free.parts["gradients"] == weights - matrix
    assert 2 * matrix < free.parts["activations, loss and temporaries"] < 2.1 * matrix
    longer = planned(file, "data.sequence_length=128", "training.batch_size=8", "training.micro_batch=8")
    assert longer.moment == "loss" and not longer.parts["gradients"]
    assert "gradients" not in {name for name, count in planned(file, "optimizer.in_backward=true",
                                                               "training.clip=null").parts.items() if count}


def ways_out(file, budget):
    """The ways out of a budget, as overrides, with what is said of each."""
    with pytest.raises(BudgetUnmet) as refused:
        planned(file, f"memory.budget={budget}")
    offered = [way.partition(" (then ") for way in refused.value.way_out.split("; or ")]
    return {tuple(text.split()): said for text, _, said in offered}


def test_one_figure_without_a_budget_and_every_way_out_fits(write_experiment, given):
    alone = {"architecture": {"model_type": "llama", **SHAPE, "num_hidden_layers": 2, "vocab_size": 8192}}
    file = write_experiment(**{**given, "teacher": None, "student": alone}, objective={"divergence": {"weight": 0.0}})
    text = file.read_text().replace("train_vocabulary: null", f"path: {given['teacher']['path']}")
    file.write_text(text.replace("batch_size: 8", "batch_size: 2").replace("micro_batch: 8", "micro_batch: 2"))
    free = planned(file)
    loose = planned(file, f"memory.budget={int(0.99 * free.peak)}")
    assert loose.keep_all == free.keep_all == free.peak > loose.peak and not loose.recomputed
    budget = free.parts["weights"] + free.parts["optimizer state"]  # of AdamW: nothing is left for anything else
    offered = ways_out(file, budget)
    assert ("optimizer.name=adafactor",) in offered
    assert_planned_as_said(file, budget, offered)


def assert_planned_as_said(file, budget, offered):
    for overrides, said in offered.items():
        kept = () if overrides[0].startswith("memory.budget=") else (f"memory.budget={budget}",)
        plan = planned(file, *kept, *overrides)
        assert plan.peak <= plan.budget and (not kept or said.startswith(f"{readable(plan.peak)}, "))


def test_ways_out_with_a_teacher_alone_and_together(write_experiment, given, capsys):
    file = write_experiment(**{**given, "training": {"steps": 3, "batch_size": 2, "micro_batch": 2}})
    parts = planned(file).parts
    state = parts["weights"] + parts["optimizer state"] + parts["teacher"]
    budget = state + parts["weights"] + 2**20  # and the gradients: next to nothing is left for anything else
    alone = ways_out(file, budget)
    assert "tiny: " in (said := capsys.readouterr().err) and "looking for what would fit" in said
    for change in ("teacher.targets.source=hidden", "teacher.dtype=bfloat16", "optimizer.name=adafactor"):
        assert (change,) in alone
    assert_planned_as_said(file, budget, alone)
    budget = state - parts["weights"]  # less than any one change needs
    several = ways_out(file, budget)
    assert [len(overrides) > 1 for overrides in several] == [True, False], several
    assert_planned_as_said(file, budget, several)
