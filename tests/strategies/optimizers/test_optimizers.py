"""Optimizers are right on whole logical parameters, whole or sharded, against float64, torch's own and peers."""

from __future__ import annotations

import math
import os
from copy import deepcopy
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from strategies.common.shards import Layout, Piece, lay_out, layout_of, local_of
from strategies.memory.meter import measure
from strategies.optimizers import adafactor, lamb, passes
from strategies.optimizers.adafactor import Adafactor
from strategies.optimizers.adamw import adamw
from strategies.optimizers.adamw8bit import AdamW8bit
from strategies.optimizers.groups import parameter_groups
from strategies.optimizers.in_backward import StepInBackward
from strategies.optimizers.lamb import Lamb
from strategies.optimizers.muon import Muon, muon_groups
from strategies.optimizers.norms import squared_norm
from strategies.optimizers.optimizer_state import PieceState, read_state, write_state
from tests.conftest import forked

SHAPES = {"vector": (11,), "matrix": (7, 5), "cube": (3, 4, 5), "big": (129, 70), "long": (700, 3), "tail": (2,)}
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())
CUTS = {2: (0, 5003, TOTAL), 3: (0, 13, 7001, TOTAL)}  # in the middle of rows; a rank has nothing of some parameters
PADDING, STEPS = 5, 20


def compiled(optimizer):
    """Steps are compiled passes, although the parameters are few."""
    optimizer.compiled = True
    return optimizer


MAKE = {
    "lamb": lambda params: Lamb(params, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda params: Adafactor(params, lr=1e-2, weight_decay=0.1),
    "lamb compiled": lambda params: compiled(Lamb(params, lr=1e-2, weight_decay=0.1)),
    "adafactor compiled": lambda params: compiled(Adafactor(params, lr=1e-2, weight_decay=0.1)),
    "adamw": lambda params: adamw([{"params": params, "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8),
    "adamw8bit": lambda params: AdamW8bit(params, lr=1e-2, weight_decay=0.1),
}


def numbers(seed: int, shapes=SHAPES, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()}


def gradients(step: int, shapes=SHAPES):
    return numbers(1000 + step, shapes, 0.1 + step % 5)


def whole_run(make, steps=STEPS, shapes=SHAPES, dtype=torch.float32):
    """Weights [by name] after steps from `numbers(0)`, and the optimizer."""
    weights = {name: nn.Parameter(value.to(dtype)) for name, value in numbers(0, shapes).items()}
    optimizer = make(list(weights.values()))
    for step in range(steps):
        whole_step(optimizer, weights, step)
    return weights, optimizer


def whole_step(optimizer, weights, step):
    for name, value in gradients(step, {name: tuple(weight.shape) for name, weight in weights.items()}).items():
        weights[name].grad = value.to(weights[name].dtype)
    optimizer.step()


def flat_part(values: dict[str, torch.Tensor], begin: int, end: int, group=None) -> torch.Tensor:
    """Elements `begin` to `end` of all parameters laid end to end, and padding."""
    together = torch.cat([value.reshape(-1) for value in values.values()])
    flat = torch.cat([together[begin:end], torch.zeros(PADDING)])
    at, pieces = 0, []
    for name, value in values.items():
        start, stop = (min(max(edge - at, 0), value.numel()) for edge in (begin, end))
        pieces.append(Piece(name, tuple(value.shape), start, stop, max(at + start - begin, 0)))
        at += value.numel()
    lay_out(flat, Layout(tuple(pieces), group))
    return flat


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found.detach() - wanted.detach()).abs().max() / wanted.detach().abs().max())


# ---- LAMB and Adafactor, whole

def reference_lamb(steps: int, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, decay=0.1):
    """Algorithm 2 of You et al. 2020 in float64; weights and the last step's trust ratios."""
    weights = {name: value.double() for name, value in numbers(0).items()}
    first, second = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    ratios = {}
    for step in range(steps):
        for name, gradient in gradients(step).items():
            gradient, weight = gradient.double(), weights[name]
            first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
            second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient**2
            mean, square = (moment[name] / (1 - beta ** (step + 1)) for moment, beta in zip((first, second), betas,
                                                                                            strict=True))
            update = mean / (square.sqrt() + eps) + decay * weight
            ratios[name] = weight.norm() / update.norm()
            weights[name] = weight - lr * ratios[name] * update
    return weights, ratios


@pytest.mark.parametrize("name", ["lamb", "lamb compiled"])
def test_lamb_is_the_papers(name):
    weights, optimizer = whole_run(MAKE[name])
    wanted, ratios = reference_lamb(STEPS)
    for name, weight in weights.items():
        assert difference(weight.double(), wanted[name]) < 1e-6
        assert abs(float(optimizer.trust_ratios[weight, 0] / ratios[name]) - 1) < 1e-6
    zero = nn.Parameter(torch.zeros(3))
    zero.grad = torch.ones(3)
    optimizer = Lamb([zero], lr=0.5, max_trust_ratio=0.1)
    optimizer.step()
    assert float(optimizer.trust_ratios[zero, 0]) == pytest.approx(0.1)
    assert float(zero.detach()[0]) == pytest.approx(-0.05, rel=1e-5)


def test_lamb_is_pytorch_optimizers_where_bias_correction_cancels():
    """Without decay and eps a trust ratio takes any scale of the update out.

    Theirs by default divides the learning rate by 1 - beta1^t, which no trust ratio takes out: a first step ten times
    as long. `adam_debias` stops that.
    """
    peer = pytest.importorskip("pytorch_optimizer")
    small = {"vector": (11,), "matrix": (7, 5)}  # whose norms stay below the 10 at which theirs are cut
    ours, _ = whole_run(lambda params: Lamb(params, lr=1e-2, eps=1e-15), shapes=small, dtype=torch.float64)
    theirs, _ = whole_run(lambda params: peer.Lamb(params, lr=1e-2, eps=1e-15, adam_debias=True), shapes=small,
                          dtype=torch.float64)
    assert all(difference(ours[name], theirs[name]) < 1e-9 for name in small)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_torchs_in_float64(decay):
    ours, _ = whole_run(lambda params: Adafactor(params, lr=1e-2, weight_decay=decay), dtype=torch.float64)
    theirs, _ = whole_run(lambda params: torch.optim.Adafactor(params, lr=1e-2, weight_decay=decay),
                          dtype=torch.float64)
    assert all(difference(ours[name], theirs[name]) < 1e-13 for name in SHAPES)


def test_norms_of_large_tensors_are_right():
    large = torch.randn(4_000_003, generator=torch.Generator().manual_seed(0))
    assert float(squared_norm(large) / large.double().square().sum()) == pytest.approx(1, rel=1e-8)
    unlike = float(torch.linalg.vector_norm(large).double() ** 2 / large.double().square().sum())
    assert abs(unlike - 1) > 1e-8, "torch's norm has become better: squared_norm may be simpler"


def test_torchs_adafactor_on_flat_halves_is_silently_another_optimizer():
    """What the tests of sharding below would notice in ours."""
    whole, _ = whole_run(lambda params: torch.optim.Adafactor(params, lr=1e-2))
    halves = [flat_part(numbers(0), begin, end) for begin, end in pairwise(CUTS[2])]
    optimizer = torch.optim.Adafactor(halves, lr=1e-2)
    for step in range(STEPS):
        for half, (begin, end) in zip(halves, pairwise(CUTS[2]), strict=True):
            half.grad = flat_part(gradients(step), begin, end)
        optimizer.step()
    joined = torch.cat([half[:-PADDING] for half in halves])
    assert difference(joined, torch.cat([weight.reshape(-1) for weight in whole.values()])) > 1e-3


@pytest.mark.parametrize("use_passes", [False, True])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(0, 400), max_size=4))
def test_partial_sums_of_any_cut_add_up_to_the_whole(use_passes, shape, cuts):
    values, slopes = numbers(0, {"any": shape}), numbers(1, {"any": shape})
    size = values["any"].numel()

    def parts(edges):
        statistics, norms, ratios = 0, 0, 0
        for begin, end in pairwise(edges):
            flat = flat_part(values, begin, end)
            flat.grad = flat_part(slopes, begin, end)
            one, two = Adafactor([flat]), Lamb([flat])
            two.compiled = use_passes
            kind = adafactor._PassedWork if use_passes else adafactor._Work
            work = kind(flat, one.fresh_state(flat), one.param_groups[0], layout_of(flat))
            statistics = statistics + work.square_sums()
            norms = norms + squared_norm(flat.grad)
            two.state[flat] = two.fresh_state(flat) | {"step": torch.ones(())}
            (own,) = two._batches([(flat, two.param_groups[0], layout_of(flat))])
            ratios = ratios + lamb._shares(own)
        return statistics, norms, ratios

    whole, cut = parts([0, size]), parts([0, *sorted(min(cut, size) for cut in cuts), size])
    for found, wanted in zip(cut, whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("span", [64, 1 << 19])
def test_adafactor_passes_over_parts_are_its_operations_on_the_whole(span, monkeypatch):
    """Parts cut within rows and matrices, whose sums are added up as ranks would, two steps."""
    monkeypatch.setattr(passes, "SPAN", span)
    shapes = {"stack": (3, 9, 11), "bias": (7,), "matrix": (30, 20)}
    whole = {name: nn.Parameter(value.clone()) for name, value in numbers(0, shapes).items()}
    plain, total = Adafactor(whole.values(), lr=1e-2), sum(value.numel() for value in whole.values())
    edges = [0, 130, 131, 300, 305, 420, total]
    parts = [flat_part(numbers(0, shapes), begin, end) for begin, end in pairwise(edges)]
    states = [plain.fresh_state(part) for part in parts]
    for step in (1, 2):
        for name, slope in numbers(step, shapes).items():
            whole[name].grad = slope
        plain.step()
        works = []
        for part, state, (begin, end) in zip(parts, states, pairwise(edges), strict=True):
            part.grad = flat_part(numbers(step, shapes), begin, end)
            state["step"] += 1
            works.append(adafactor._PassedWork(part, state, plain.param_groups[0], layout_of(part)))
        sums = sum(work.square_sums() for work in works)
        for work in works:
            work.blend(sums)
        norms = sum(work.shares() for work in works)
        for work in works:
            work.step(norms)
    joined = torch.cat([piece.of(part) for part in parts for piece in layout_of(part).pieces])
    wanted = torch.cat([value.detach().reshape(-1) for value in whole.values()])
    torch.testing.assert_close(joined, wanted, rtol=2e-6, atol=1e-7)


# ---- sharded

def one_rank(ranks: int, folder: str) -> None:
    """Everything that needs ranks; what came of it goes into a file."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    found = {"flat": {name: flat_run(make, rank, ranks) for name, make in MAKE.items()},
             "dtensor": {name: dtensor_run(make) for name, make in {**MAKE, "muon": make_muon}.items()},
             "in_backward": [backward_run(use, True) for use in (False, True)]}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def flat_run(make, rank, ranks):
    begin, end = CUTS[ranks][rank:rank + 2]
    flat = flat_part(numbers(0), begin, end, dist.group.WORLD)
    optimizer = make([flat])
    for step in range(STEPS):
        flat.grad = flat_part(gradients(step), begin, end)
        optimizer.step()
    padding = flat[-PADDING:].abs().max()
    assert float(padding) < (1e-2 if isinstance(optimizer, AdamW8bit) else 1e-30), "it creeps in bitsandbytes on CPU"
    pieces = [(piece.name, piece.start, piece.stop) for piece in layout_of(flat).pieces]
    states = [(state.elementwise, state.whole) for state in read_state(optimizer, flat)]
    return {"weights": flat[:-PADDING], "pieces": pieces, "states": states,
            "ratios": getattr(optimizer, "trust_ratios", None)}


def dtensor_run(make):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.ParameterDict({name: nn.Parameter(value) for name, value in numbers(0).items()})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    optimizer = make(list(model.values()))
    for step in range(STEPS):
        for name, value in gradients(step).items():
            model[name].grad = distribute_tensor(value, mesh, model[name].placements)
        optimizer.step()
    before = {name: local_of(weight).clone() for name, weight in model.items()}
    for weight in model.values():  # state written back as it was read
        write_state(optimizer, weight, read_state(optimizer, weight))
    assert all(torch.equal(before[name], local_of(weight)) for name, weight in model.items())
    ratios = {name: optimizer.trust_ratios[weight, 0] for name, weight in model.items()
              } if isinstance(optimizer, Lamb) else None
    return {"weights": {name: weight.full_tensor().detach() for name, weight in model.items()}, "ratios": ratios}


def make_muon(params):
    return Muon([{"params": [one for one in params if (one.ndim == 2) == kind], "weight_decay": 0.1, "muon": kind}
                 for kind in (True, False)], lr=1e-2)


def backward_run(in_backward: bool, sharded: bool):
    """Weights after 4 steps of a small net, the last gradient's squared norm, and parameters skipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 33), nn.Tanh(), nn.Linear(33, 5))
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    optimizer = Lamb(model.parameters(), lr=1e-2)
    steps = StepInBackward(optimizer) if in_backward else None
    for turn in range(4):
        data = torch.randn(4, 9, generator=torch.Generator().manual_seed(turn))
        if in_backward:
            steps.reset()
        model(data).square().mean().backward()
        if not in_backward:
            squared = sum(squared_norm(getattr(one.grad, "full_tensor", lambda one=one: one.grad)())
                          for one in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        assert all(weight.grad is None for weight in model.parameters())
    if in_backward:
        squared = steps.squared_norm
    weights = [getattr(weight, "full_tensor", lambda weight=weight: weight)().detach() for weight in model.parameters()]
    if in_backward:  # one rank's loss is infinite: no rank's weights move
        bad = torch.full((4, 9), math.inf if not sharded or dist.get_rank() == 0 else 1.0)
        kept = [local_of(weight).clone() for weight in model.parameters()]
        model(bad).square().mean().backward()
        assert all(torch.equal(a, local_of(b)) for a, b in zip(kept, model.parameters(), strict=True))
        assert int(steps.skipped) > 0 and not steps.squared_norm.isfinite()
    return weights, squared


@pytest.fixture(scope="module", params=[2, 3])
def shared(request, tmp_path_factory):
    """What each rank found, of 2 and of 3 real ones."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    done = forked(one_rank, (request.param, str(folder)), [{"RANK": str(rank)} for rank in range(request.param)])
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("name", MAKE)
def test_sharded_is_unsharded(shared, name):
    weights, _ = whole_run(MAKE[name])
    tolerance = 2e-2 if name == "adamw8bit" else 1e-6  # blocks of 256 begin elsewhere
    flat = torch.cat([found["flat"][name]["weights"] for found in shared])
    assert difference(flat, torch.cat([weight.reshape(-1) for weight in weights.values()])) < tolerance
    for key, weight in weights.items():
        assert difference(shared[0]["dtensor"][name]["weights"][key], weight) < tolerance, key


def test_sharded_trust_ratios_are_those_of_float64(shared):
    _, wanted = reference_lamb(STEPS)
    for found in shared:
        for engine, way in product(("flat", "dtensor"), ("lamb", "lamb compiled")):
            for name, ratio in found[engine][way]["ratios"].items():
                assert abs(float(ratio / wanted[name]) - 1) < 1e-6


def test_muon_sharded_by_rows_is_unsharded(shared):
    weights, _ = whole_run(make_muon)
    for name, weight in weights.items():
        assert difference(shared[0]["dtensor"]["muon"]["weights"][name], weight) < 1e-6


def test_state_of_ranks_goes_on_in_one_process(shared):
    for name in ("lamb", "adafactor", "lamb compiled", "adafactor compiled", "adamw"):
        weights, optimizer = whole_run(MAKE[name])
        fresh = MAKE[name](list(weights.values()))
        for number, weight in enumerate(weights.values()):
            parts = [(found["flat"][name]["pieces"][number][1:], found["flat"][name]["states"][number])
                     for found in shared]
            write_state(fresh, weight, [joined(parts, weight.numel())])
            for theirs, ours in zip(read_state(optimizer, weight), read_state(fresh, weight), strict=True):
                for key, value in {**theirs.whole, **theirs.elementwise}.items():
                    found = {**ours.whole, **ours.elementwise}[key]
                    torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def joined(parts, size):
    """One piece's state from those of parts ((start, stop), (elementwise, whole))."""
    elementwise = {}
    for (start, stop), (own, _) in parts:
        for key, value in own.items():
            elementwise.setdefault(key, torch.zeros(size))[start:stop] = value
    return PieceState(elementwise, parts[0][1][1])


def test_in_backward_under_fsdp2_is_a_plain_step(shared):
    for found in shared:
        (plain, squared), (ours, summed) = found["in_backward"]
        assert all(difference(a, b) < 1e-6 for a, b in zip(ours, plain, strict=True))
        assert float(summed / squared) == pytest.approx(1, rel=1e-6)


# ---- state

@pytest.mark.parametrize("name", [*MAKE, "muon"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_state_survives_another_layout(name, parts):
    """Whole to flat parts and back; the next step is the same to the last bit, near it where 8 bits are cut anew."""
    make = {**MAKE, "muon": make_muon}[name]
    weights, optimizer = whole_run(make, 5)
    again = {key: nn.Parameter(weight.detach().clone()) for key, weight in weights.items()}
    fresh = make(list(again.values()))
    states = [read_state(optimizer, weight)[0] for weight in weights.values()]
    if parts > 1 and name != "muon":
        states = through_flat(make, states, (0, TOTAL // 2 + 3, TOTAL) if parts == 2 else CUTS[3])
    for weight, state in zip(again.values(), states, strict=True):
        write_state(fresh, weight, [state])
    whole_step(optimizer, weights, 5)
    whole_step(fresh, again, 5)
    for key, weight in weights.items():
        if name == "adamw8bit" and parts > 1:
            assert difference(again[key], weight) < 1e-2
        else:
            assert torch.equal(again[key], weight), key


def through_flat(make, states, cuts):
    """States written to flat parts, read from there and joined."""
    found = []
    for begin, end in pairwise(cuts):
        flat = flat_part(numbers(0), begin, end)
        optimizer = make([flat])
        pieces = layout_of(flat).pieces
        write_state(optimizer, flat, [
            PieceState({key: value[piece.start:piece.stop] for key, value in state.elementwise.items()}, state.whole)
            for piece, state in zip(pieces, states, strict=True)])
        found.append(list(zip(pieces, read_state(optimizer, flat), strict=True)))
    return [joined([((piece.start, piece.stop), (state.elementwise, state.whole)) for piece, state in parts],
                   math.prod(parts[0][0].shape)) for parts in zip(*found, strict=True)]


def test_pieces_of_unequal_steps_are_refused():
    flat = flat_part(numbers(0), 0, TOTAL)
    states = [PieceState({}, {"step": torch.tensor(float(number))}) for number in range(len(SHAPES))]
    with pytest.raises(ValueError, match="unequal|different numbers of steps"):
        write_state(Lamb([flat]), flat, states)


@pytest.mark.parametrize("name", [*MAKE, "muon"])
def test_state_dict_goes_on_bitwise(name):
    make = {**MAKE, "muon": make_muon}[name]
    weights, optimizer = whole_run(make, 3)
    again = {key: nn.Parameter(weight.detach().clone()) for key, weight in weights.items()}
    fresh = make(list(again.values()))
    fresh.load_state_dict(deepcopy(optimizer.state_dict()))
    for step in (3, 4):
        whole_step(optimizer, weights, step)
        whole_step(fresh, again, step)
    assert all(torch.equal(again[key], weight) for key, weight in weights.items())


# ---- groups, Muon, 8 bits, tensors without data

def tiny(kind):
    sizes = {"llama": LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                  num_key_value_heads=1, vocab_size=40, attention_bias=True, tie_word_embeddings=False),
             "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8)}  # a tied head
    return AutoModelForCausalLM.from_config(sizes[kind])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_norms_biases_embeddings_and_tied_heads_do_not_decay(kind):
    model = tiny(kind)
    decayed, others = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert sorted(decayed["names"] + others["names"]) == sorted(dict(model.named_parameters()))
    assert not any(word in name for name in decayed["names"] for word in ("norm", "ln_", "bias", "embed", "wte", "wpe"))
    assert ("lm_head.weight" in decayed["names"]) == (kind == "llama")
    matrices = [group for group in muon_groups(model, 0.1) if group["muon"]]
    assert len(matrices) == 1 and matrices[0]["names"] == [n for n in decayed["names"] if n != "lm_head.weight"]
    together = Muon(muon_groups(model, 0.1), lr=1e-3)
    assert sum(len(group["params"]) for group in together.param_groups) == len(list(model.parameters()))


def test_muon_is_torchs_and_refuses_flat_parts():
    shapes = {"matrix": (7, 5)}
    ours, optimizer = whole_run(make_muon, shapes=shapes)
    theirs, _ = whole_run(lambda params: torch.optim.Muon(params, lr=1e-2, adjust_lr_fn="match_rms_adamw"),
                          shapes=shapes)
    assert torch.equal(ours["matrix"], theirs["matrix"])
    before = ours["matrix"].detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    whole_step(optimizer, ours, 0)
    assert torch.equal(ours["matrix"], before)
    flat = flat_part(numbers(0), 0, 100)
    flat.grad = torch.zeros_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match="Muon needs whole matrices"):
        optimizer.step()


def test_8bit_is_near_adamw_and_says_what_it_needs(monkeypatch):
    weights, optimizer = whole_run(MAKE["adamw8bit"])
    exact, _ = whole_run(lambda params: torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1))
    for name, weight in weights.items():
        assert difference(weight, exact[name]) < (2e-2 if name == "big" else 1e-6)
        assert optimizer.state[weight]["state1"].dtype == (torch.uint8 if name == "big" else torch.float32)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        AdamW8bit(list(weights.values()), lr=1.0)


@pytest.mark.parametrize("name", ["lamb", "adafactor", "lamb compiled", "adafactor compiled", "adamw", "muon"])
def test_steps_run_on_tensors_without_data(name):
    with FakeTensorMode():
        weights, optimizer = whole_run_fake({**MAKE, "muon": make_muon}[name])
    assert all(len(optimizer.state[weight]) for weight in weights)


def whole_run_fake(make):
    weights = [nn.Parameter(torch.empty(shape)) for shape in SHAPES.values()]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer = make(weights)
    optimizer.step()
    return weights, optimizer


# ---- in backward

def test_in_backward_is_a_plain_step_and_skips_what_is_not_finite():
    (plain, squared), (ours, summed) = backward_run(False, False), backward_run(True, False)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert float(summed / squared) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_in_backward_holds_few_gradients(name):
    def net():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
        return model, MAKE[name](list(model.parameters()))

    def turn(model, optimizer, step):
        model(torch.ones(2, 256)).square().mean().backward()
        if step:
            optimizer.step()
            optimizer.zero_grad()

    (plain, theirs), (model, ours) = net(), net()
    steps = StepInBackward(ours)
    turn(plain, theirs, True), turn(model, ours, False)
    peaks = [measure(lambda m=m, o=o, s=s: turn(m, o, s), "cpu", [m, o]).peak
             for m, o, s in ((plain, theirs, True), (model, ours, False))]
    assert peaks[0] - peaks[1] > 4 * 256 * 256 * 4, peaks
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    before = [weight.detach().clone() for weight in model.parameters()]
    steps.reset()
    model(torch.full((2, 256), math.nan)).square().mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert int(steps.skipped) == len(before) and not steps.squared_norm.isfinite()
    steps.remove()
    turn(model, ours, False)
    assert all(weight.grad is not None for weight in model.parameters())
