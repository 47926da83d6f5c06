"""Planned models in the hands of people: blocks that cannot be captured, odd calls, copies, wrappers, other plans."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from strategies.memory.meter import measure
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer
from strategies.rematerialization.execute import installed as execution
from strategies.rematerialization.rematerialize import rematerialize, study
from strategies.rematerialization.solve.chain_program import Block, Segment
from tests.strategies.rematerialization.planning_cases import (
    assert_equal,
    by_hand,
    language_model,
    quick,
    results,
    schedules,
    text_batch,
)

SIZE = 16


@pytest.fixture(autouse=True)
def few_options(monkeypatch):
    with quick(monkeypatch, levels=(0.0,)):
        yield


class Plain(nn.Module):
    """A residual block; others below misbehave on top of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(SIZE), nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        """What all of them do."""
        return self.down(torch.nn.functional.gelu(self.up(self.norm(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, length, size) -> the same"""
        return x + self.inside(x)


class Reads(Plain):
    def forward(self, x):
        self.largest = self.inside(x).abs().max().item()
        return x + self.inside(x)


class Prints(Plain):
    def forward(self, x):
        warnings.warn_explicit("a block says something", UserWarning, "elsewhere", 1) if x.numel() < 0 else None
        torch._dynamo.graph_break()
        return x + self.inside(x)


class Decides(Plain):
    def forward(self, x):
        return x + self.inside(x) if x.sum() > 0 else x - 0.5 * self.inside(x)


class Writes(Plain):
    def forward(self, x):
        x += self.inside(x * 1.0)
        return x


class Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] * gradient  # not the derivative, so that one sees that it was used


class Custom(Plain):
    def forward(self, x):
        return x + Squares.apply(self.inside(x))


class Averages(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(SIZE))

    def forward(self, x):
        with torch.no_grad():
            self.average.mul_(0.5).add_(x.mean((0, 1)), alpha=0.5)
        return x + self.inside(x) * (1 + self.average)


class Assigns(Averages):
    def forward(self, x):
        self.average = 0.5 * self.average + 0.5 * x.detach().mean((0, 1))
        return x + self.inside(x) * (1 + self.average)


class Normalizes(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(SIZE)

    def inside(self, x):
        return self.down(torch.relu(self.up(self.norm(x.transpose(1, 2)).transpose(1, 2))))


class Drops(Plain):
    def forward(self, x):
        return x + nn.functional.dropout(self.inside(x), 0.3, self.training)


class ReadsAndAverages(Averages):
    def forward(self, x):
        self.largest = x.max().item()
        return super().forward(x)


class Stack(nn.Module):
    """Four blocks between a first and a last layer; `order` says which runs when."""

    def __init__(self, block=Plain, count: int = 4, order=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.order = order or list(range(count))

    def forward(self, x, raising: bool = False):
        x = self.first(x)
        for position, index in enumerate(self.order):
            if raising and position == 2:
                raise KeyError("in the middle")
            x = self.blocks[index](x)
        return self.last(x).square().mean()


def inputs(length: int = 6) -> torch.Tensor:
    """(3, length, SIZE)"""
    return torch.randn(3, length, SIZE, generator=torch.Generator().manual_seed(2))


def ways_of(model, batch, **options):
    """Install the least plan and forced schedules, one after the other."""
    planner = study(model, batch, **options)
    forced = schedules(planner) if len(planner.calls) >= 3 else []
    for schedule in [planner.least.schedule, planner.keep_all().schedule, *forced]:
        planned = by_hand(planner, schedule)
        yield planner, planned, schedule
        planned.remove()


BLOCKS = [(Plain, 0), (Reads, None), (Prints, 1), (Decides, 1), (Writes, 1), (Custom, 0), (Averages, 0),
          (Assigns, None), (Normalizes, 0), (Drops, 0), (ReadsAndAverages, None)]


@pytest.mark.parametrize("block, warned", BLOCKS, ids=[block.__name__ for block, _ in BLOCKS])
def test_blocks_of_all_kinds(block, warned):
    model, batch = Stack(block), inputs()
    expected = results(model, batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, _, schedule in ways_of(model, batch):
            assert_equal(results(model, batch), expected, schedule)
    told = [str(one.message) for one in caught if "plan" in str(one.message)]
    if warned is not None:
        assert len(told) == warned, told
        assert all("blocks.0" in text and block.__name__ in text and ": " in text for text in told)
    assert_equal(results(model, batch), expected)


def test_many_lengths():
    model, batch = Stack(), inputs()
    expected = {length: results(model, inputs(length)) for length in range(2, 14)}
    for planner, planned, schedule in ways_of(model, batch):
        counted = len(planner._options)
        for length, wanted in expected.items():
            assert_equal(results(model, inputs(length)), wanted, (length, schedule))
        assert len(planner._options) == counted, "a solver ran in training"
        assert not planned._warned
        break


def test_too_many_lengths_are_said_once(monkeypatch):
    monkeypatch.setattr(execution, "SHAPES", 2)
    model = Stack()
    expected = {length: results(model, inputs(length)) for length in range(2, 8)}
    rematerialize(model, inputs(), study(model, inputs()).least.peak)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length, wanted in expected.items():
            assert_equal(results(model, inputs(length)), wanted)
    assert [str(one.message) for one in caught if "different shapes" in str(one.message)][1:] == []
    assert len(caught) == 1


@pytest.mark.parametrize("frozen", ["first", "first two blocks", "all but the last", "middle"])
def test_frozen_layers(frozen):
    model, batch = Stack(), inputs()
    parts = {"first": [model.first], "first two blocks": [model.first, *model.blocks[:2]],
             "all but the last": [model.first, *model.blocks], "middle": [model.blocks[1], model.blocks[2]]}[frozen]
    for part in parts:
        part.requires_grad_(False)
    expected = results(model, batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*planned.*")
        for _, _, schedule in ways_of(model, batch):
            assert_equal(results(model, batch), expected, schedule)


def test_evaluation_in_between_and_inputs_with_gradient():
    model, batch = Stack(Drops), inputs().requires_grad_()
    expected = results(model, batch)
    gradient, batch.grad = batch.grad, None
    model.eval()
    evaluated = results(model, batch)
    for _, _, schedule in ways_of(model.train(), batch):
        batch.grad = None
        assert_equal(results(model, batch), expected, schedule)
        assert torch.equal(batch.grad, gradient)
        with torch.no_grad():
            model(batch)
        with torch.inference_mode():
            model.eval()(batch)
        assert_equal(results(model, batch), evaluated, schedule)
        model.train()


@pytest.mark.parametrize("order", [[0, 1, 0, 1, 0], [0, 0, 1, 1], [2, 1, 0, 3]])
def test_shared_and_shuffled_blocks(order):
    model, batch = Stack(Drops, 4, order), inputs()
    expected = results(model, batch)
    for _, _, schedule in ways_of(model, batch):
        for _ in range(2):
            assert_equal(results(model, batch), expected, schedule)


def test_blocks_skipped_and_in_another_order_than_planned():
    model, batch = Stack(Drops), inputs()
    orders = [[0, 2, 3], [3, 2, 1, 0], [1], [0, 1, 2, 3], [1, 1, 2, 2, 3]]
    expected = []
    for order in orders:
        model.order = order
        expected.append(results(model, batch))
    model.order = [0, 1, 2, 3]
    for _, _, schedule in ways_of(model, batch):
        for order, wanted in zip(orders, expected, strict=True):
            model.order = order
            assert_equal(results(model, batch), wanted, (order, schedule))
        model.order = [0, 1, 2, 3]


def test_hooks_and_hidden_states():
    model, batch = language_model("llama"), text_batch(output_hidden_states=True)
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, given, out: seen.append(float(out.mean())) or out * 2)
    model.model.layers[2].register_forward_hook(lambda module, given, out: out.mul_(0.5))
    model.model.layers[3].register_full_backward_hook(lambda module, into, out: seen.append(into[0].shape))

    def loss(model, batch):
        out = model(**batch)
        return out.loss + sum(state.square().mean() for state in out.hidden_states)

    plain, expected = results(model, batch, loss=loss), None
    for planner, _, schedule in ways_of(model, batch, loss=loss):
        assert all(call.captured is not None for call in planner.calls), "hooks inside of blocks are idle"
        seen.clear()
        found = results(model, batch, loss=loss)
        assert len(seen) == 2
        expected = expected or found
        assert_equal(found, expected, schedule)
    for name, value in plain.items():  # a state's three gradients are summed in another order
        torch.testing.assert_close(expected[name], value, rtol=1e-5, atol=1e-6)


def test_attention_maps_are_still_collected():
    model, batch = language_model("llama"), text_batch(output_attentions=True)
    model.set_attn_implementation("eager")

    def loss(model, batch):
        out = model(**batch)
        return out.loss + sum(attention.square().sum() for attention in out.attentions)

    plain = results(model, batch, loss=loss)
    for _, _, schedule in ways_of(model, batch, loss=loss):
        found = results(model, batch, loss=loss)
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{name}, {schedule}")


def test_randomness_between_blocks():
    """A model that draws between its blocks, as for leaving some out, and an evaluation before the backward."""
    class Random(Stack):
        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = block(x) if torch.rand([]) < 0.7 else x
            return self.last(x).square().mean()

    model, batch = Random(Drops), inputs()
    torch.manual_seed(0)
    planner = study(model, batch)
    expected = {}
    for seed in range(6):
        def loss(model, batch, seed=seed):
            torch.manual_seed(seed)
            return model(batch)
        expected[seed] = results(model, batch, loss=loss), loss
    count = len(planner.calls)
    whole = Segment(0, count, tuple(Block(position, 0) for position in range(count)))
    for schedule in [planner.least.schedule, (whole,)]:
        planned = by_hand(planner, schedule)
        for wanted, loss in expected.values():
            assert_equal(results(model, batch, loss=loss), wanted, schedule)
        planned.remove()


def test_after_an_exception():
    model, batch = Stack(Drops), inputs()
    expected = results(model, batch)
    for _, planned, schedule in ways_of(model, batch):
        assert not planned._warned
        with pytest.raises(KeyError, match="in the middle"):
            model(batch, raising=True)
        assert_equal(results(model, batch), expected, schedule)
        with pytest.raises(RuntimeError):  # of a block itself: its own words
            model(torch.ones(3, 4, SIZE + 1))
        assert_equal(results(model, batch), expected, schedule)
        assert not planned._warned


def test_copies_and_pickles_are_plain_models(tmp_path):
    model, batch = Stack(Drops), inputs()
    names, expected = list(model.state_dict()), results(model, batch)
    plan = rematerialize(model, batch, study(model, batch).least.peak)
    assert list(model.state_dict()) == names
    torch.save(model, tmp_path / "model.pt")
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "model.pt",
                                                                                 weights_only=False)]
    for other in others:
        assert_equal(results(other, batch), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert results(other, batch)["loss"] == 0, "a copy uses the original's weights"
        assert_equal(results(model, batch), expected)
    rematerialize(others[0].train(), batch, plan.peak)
    assert results(others[0], batch)["loss"] == 0
    plan.remove()
    assert "forward" not in model.blocks[0].__dict__
    assert_equal(results(model, batch), expected)


def test_planning_again_and_removing():
    model, batch = Stack(Drops), inputs()
    expected = results(model, batch)
    first = rematerialize(model, batch, study(model, batch).least.peak)
    second = rematerialize(model, batch, first.budget)
    first.remove()  # has been taken out already: changes nothing
    assert execution.installed(model.blocks[0]).planned is second.planned
    assert_equal(results(model, batch), expected)
    study(model, batch)
    assert execution.installed(model.blocks[0]).planned is second.planned
    second.remove()
    second.remove()
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert_equal(results(model, batch), expected)
    rematerialize(model, batch, first.peak)
    assert rematerialize(model, batch, "1GiB").recomputed == 0.0  # it fits as it is
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_batches_of_other_kinds_and_losses():
    model, batch = Stack(), inputs()
    expected = results(model, batch)
    rematerialize(model, (batch,), study(model, (batch,)).least.peak)
    assert_equal(results(model, (batch,)), expected)
    linear = nn.Sequential(*[nn.Linear(SIZE, SIZE) for _ in range(3)])
    with pytest.raises(ValueError, match="one number"):
        rematerialize(linear, batch, "1GiB")
    rematerialize(linear, batch, "1GiB", loss=lambda model, batch: model(batch).sum())


def test_loss_that_looks_at_numbers():
    model, batch = Stack(), inputs()

    def loss(model, batch):
        value = model(batch)
        return value * 2 if value.item() > 1e9 else value

    expected = results(model, batch, loss=loss)
    for _, _, schedule in ways_of(model, batch, loss=loss):
        assert_equal(results(model, batch, loss=loss), expected, schedule)


def test_cache_is_dropped_where_a_gradient_comes_back():
    model = language_model("llama")
    batch = text_batch(use_cache=True)
    expected = results(model, batch)
    for _, _, schedule in ways_of(model, batch):
        assert_equal(results(model, batch), expected, schedule)
        assert model.eval()(**batch).past_key_values.get_seq_length() > 0
        with torch.no_grad():
            assert model.train()(**batch).past_key_values.get_seq_length() > 0
        model.train()


def test_tied_weights_and_quantized_layers():
    model, batch = language_model("qwen2"), text_batch(use_cache=False)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    prepare(model, WeightQuantizer(bits=4, group_size=16))
    expected = results(model, batch)
    for _, _, schedule in ways_of(model, batch):
        assert_equal(results(model, batch), expected, schedule)


def test_nothing_is_left_behind():
    """Memory of one step is free when it has ended, segments in segments included."""
    model, batch = Stack(Drops), inputs()
    for _, _, schedule in ways_of(model, batch):
        def step():
            model(batch).backward()
        step()
        step()
        measured = measure(step, "cpu", [model, batch])
        assert int(measured.timeline[-1, 1]) - measured.base < 16_384, schedule


def test_a_tensor_written_to_after_its_segment_is_refused():
    model, batch = Stack(), inputs()
    planner = study(model, batch)
    planned = by_hand(planner, (Segment(0, 4, tuple(Block(position, 0) for position in range(4))),))
    x = model.first(batch)
    out = x
    for block in model.blocks:
        out = block(out)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="written to since"):
        out.sum().backward()
    planned.remove()


def test_compiled_by_the_user_around_the_plan():
    """torch.compile of a planned model leaves the plan in place: regions run as planned between compiled pieces."""
    model, batch = Stack(), inputs()
    expected = results(model, batch)
    for _, planned, schedule in ways_of(model, batch):
        torch._dynamo.reset()
        around = torch.compile(model, backend="eager")
        calls = []
        original = planned.call
        planned.call = lambda *args, original=original, calls=calls: calls.append(1) or original(*args)
        assert_equal(results(model, batch, loss=lambda model, batch, around=around: around(batch)), expected, schedule)
        assert len(calls) == 4
    before = torch.compile(model, backend="eager")
    rematerialize(before, batch, study(before, batch).least.peak)
    assert_equal(results(model, batch), expected)
