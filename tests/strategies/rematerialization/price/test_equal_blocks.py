"""A few of a run of equal blocks stand for all: every byte at every moment is that of the step in which all run."""

from dataclasses import fields

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from strategies.optimizers.adafactor import Adafactor
from strategies.optimizers.in_backward import StepInBackward
from strategies.optimizers.lamb import Lamb
from strategies.rematerialization.price.equal_blocks import EqualRun, Uneven, equal_runs, puts
from strategies.rematerialization.price.step_trace import Shared
from strategies.rematerialization.rematerialize import study
from tests.strategies.rematerialization.planning_cases import quick

KINDS = {
    "llama": lambda blocks: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=blocks, num_attention_heads=4, vocab_size=64)),
    "gpt2": lambda blocks: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=64, n_layer=blocks, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0)),
    "gemma3": lambda blocks: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=blocks, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=64, layer_types=["sliding_attention"] * (blocks - 7) + ["full_attention"] * 7)),
}


def made(kind: str, blocks: int = 9) -> tuple[nn.Module, dict]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = KINDS[kind](blocks).train()
        ids = torch.zeros(2, 16, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def frames(model: nn.Module, batch: object, **settings) -> list[dict]:
    """What is held outside the regions when all blocks run, and when a few do; then `even` as the second found it."""
    found = []
    for alike in (False, True):
        shared = Shared()
        frame = study(model, batch, device="h100", regions=False, alike=alike, shared=shared, **settings).frame
        found.append({one.name: getattr(frame, one.name) for one in fields(frame)} | {
            "gradients": sorted(frame.gradients)})
    return [*found, shared.even]


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_blocks_give_every_byte_of_all(kind):
    model, batch = made(kind)
    everything, few, even = frames(model, batch, optimizer=torch.optim.AdamW(model.parameters()))
    assert few == everything
    assert even


@pytest.mark.parametrize("optimizer", [Lamb, Adafactor])
def test_optimizers_that_step_by_other_operations(optimizer):
    model, batch = made("llama", 7)
    everything, few, even = frames(model, batch, optimizer=optimizer(model.parameters()))
    assert few == everything
    assert even


@pytest.mark.parametrize("optimizer", [Adafactor, Lamb])
@pytest.mark.parametrize("regions", [False, True])
def test_peaks_where_only_a_few_blocks_are_stepped(optimizer, regions):
    model, batch = made("llama")
    moments, found = [], []
    for brief in (False, True):
        frame = study(model, batch, optimizer=optimizer(model.parameters()), regions=regions, alike=True, device="h100",
                      shared=Shared(brief=brief)).frame
        found.append((frame.base, frame.start, frame.before, frame.behind, frame.head, frame.end, frame.update,
                      frame.parts))
        moments.append(len(frame.timeline))
    assert found[0] == found[1]
    assert (moments[1] < moments[0]) == (optimizer is Adafactor)  # LAMB steps several tensors at once


@pytest.mark.parametrize("settings", [{"autocast": torch.bfloat16}, {"accumulate": True},
                                      {"in_backward": StepInBackward}])
def test_mixed_precision_gradients_that_stay_and_gradients_that_are_used_up(settings):
    model, batch = made("llama")
    everything, few, even = frames(model, batch, optimizer=torch.optim.AdamW(model.parameters()), **settings)
    assert few == everything
    assert even


def test_what_is_freed_after_all_blocks_is_noticed():
    """Under autocast, 16-bit copies of GPT-2's biases stay until the forward has ended, a few for each block."""
    model, batch = made("gpt2")
    everything, few, even = frames(model, batch, autocast=torch.bfloat16)
    assert few == everything
    assert even is False


def test_a_teacher_of_equal_blocks_beside_the_model():
    (model, batch), (teacher, _) = made("llama"), made("llama", 11)

    def loss(model, batch):
        with torch.no_grad():
            target = teacher(**{name: batch[name] for name in ("input_ids", "use_cache")}).logits
        return (model(**batch).logits - target).square().mean()

    everything, few, even = frames(model, batch, loss=loss, others=[teacher])
    assert few == everything
    assert even


def test_plans_are_the_same(monkeypatch):
    def planned(alike):
        model, batch = made("llama", 12)
        shared, settings = Shared(), {"optimizer": torch.optim.AdamW(model.parameters()), "device": "h100"}
        study(model, batch, regions=False, alike=alike, shared=shared, **settings)
        planner = study(model, batch, alike=alike, shared=shared, **settings)
        budget = (planner.least.peak + planner.keep_all().peak) // 2
        plan = planner.plan(budget)
        return planner.frame, plan.peak, plan.schedule, plan.recomputed, plan.bound, plan.blocks(), [
            (call.name, call.captured.signature, call.input, call.passed, call.chained, call.read)
            for call in planner.calls]

    with quick(monkeypatch, levels=(0.3, 0.0)):
        assert planned(True) == planned(False)


class Numbered(nn.Module):
    """A block that does more if its number is even."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx, self.inner = number, nn.Linear(16, 16)

    def forward(self, hidden):
        return torch.sin(self.inner(hidden)) if self.layer_idx % 2 else self.inner(hidden)


class Stack(nn.Module):
    def __init__(self, blocks) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.square().mean()


def test_a_block_that_reads_its_number_is_run():
    with FakeTensorMode():
        model, batch = Stack([Numbered(number) for number in range(8)]), torch.zeros(4, 16)
    everything, few, even = frames(model, batch, loss=lambda model, batch: model(batch))
    assert few == everything
    assert even is False
    assert [block.layer_idx for block in model.blocks] == list(range(8))


def test_runs_are_of_blocks_that_are_equal():
    with FakeTensorMode():
        blocks = [Numbered(number) for number in range(20)]
        blocks[2].inner.weight.requires_grad_(False)
        blocks[9].register_forward_hook(lambda *_: None)
        blocks[16].also = 1
    assert [[name for name, _ in run.blocks] for run in equal_runs(Stack(blocks))] == [
        [f"blocks.{number}" for number in range(3, 9)], [f"blocks.{number}" for number in range(10, 16)]]
    blocks[5].inner.weight = blocks[6].inner.weight  # tied: no block's gradient is its own
    assert [[name for name, _ in run.blocks] for run in equal_runs(Stack(blocks))] == [
        [f"blocks.{number}" for number in range(10, 16)]]


def test_other_bytes_in_one_block_are_noticed():
    timeline = [10, 20, 30, 40, 50, 60, 70]
    run = EqualRun([(str(number), nn.Identity()) for number in range(7)], forward=[1, 2, 3, 4, 5])
    assert [(put.at, put.begin, put.changes, put.times) for put in puts([run], timeline)] == [(4, 3, (10,), 2)]
    with pytest.raises(Uneven, match="from 0 on are not equal"):
        puts([run], [10, 20, 30, 41, 51, 61, 71])
