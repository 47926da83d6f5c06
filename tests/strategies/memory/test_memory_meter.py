"""The tracker's count, the measured peak and the kernels' own bytes: each against the others."""

import gc
import os
import struct
import subprocess
import sys
import threading
from contextlib import nullcontext

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.memory import meter
from strategies.memory.external import unknown_bytes
from strategies.memory.meter import (
    Measured,
    _threads_of_gloo,
    changes_of,
    changes_of_trace,
    cumulative,
    mark,
    measure,
    resident_tensors,
)
from strategies.memory.plot import Curve, curve, draw_step, progress, shared_phases
from strategies.memory.tracker import LiveBytes
from strategies.memory.workspace import workspace
from tests.conftest import ROOT, TINY, forked

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0,
        "eos_token_id": 0}
SUMS = 60
aten = torch.ops.aten


class Norms(nn.Module):
    """Two convolutions with batch norm, one ReLU in place, one convolution without bias."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, images):
        return self.body(images)


def build(kind):
    """A model and its input. Packed positions: HF decides by values whether it needs a mask, and data-free has none."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128), nn.LayerNorm(128),
                             nn.Linear(128, 10)), (torch.randn(32, 64),)
    if kind == "conv":
        return Norms(), (torch.randn(4, 3, 32, 32),)
    config = {"llama": TINY, "gpt2": GPT2}[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, vocab_size=300))
    positions = torch.cat([torch.arange(20), torch.arange(12)]).expand(2, 32)
    return model, (torch.zeros(2, 32, dtype=torch.long), positions)


def training(kind, dtype, foreach=True):
    """A step of training, and all that stays between steps."""
    torch.manual_seed(0)
    model, inputs = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=foreach)
    labels = torch.zeros(len(inputs[0]), dtype=torch.long)

    def step(note=mark):
        note("forward")
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            if kind in ("llama", "gpt2"):
                output = model(input_ids=inputs[0], position_ids=inputs[1], use_cache=False).logits[:, -1]
            else:
                output = model(inputs[0])
            loss = nn.functional.cross_entropy(output.float(), labels)
        note("backward")
        loss.backward()
        note("optimizer")
        optimizer.step()
        optimizer.zero_grad()

    step(lambda name: None)  # the optimizer's state is made by its first step
    return step, [model, optimizer, inputs, labels]


def tracked(kind, dtype, fake, of_kernels=None, foreach=True):
    with FakeTensorMode() if fake else nullcontext():
        step, resident = training(kind, dtype, foreach)
        tracker = LiveBytes(workspace=of_kernels)
        tracker.watch(resident)
        with tracker:
            step(tracker.mark)
    return tracker


# ---- the three counts of one step

@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["mlp", "conv", "gpt2", "llama"])
def test_count_without_data_is_the_count_with_data(kind, dtype):
    fake, real = tracked(kind, dtype, fake=True), tracked(kind, dtype, fake=False)
    # Torch's shape functions give bf16 statistics to norms whose kernels keep fp32 ones on CPU: here 2 bytes for each
    # of 48 channels, twice. Nothing else may differ.
    tolerance = 2 * 2 * 48 if kind == "conv" and dtype else 0
    assert 0 <= real.peak - fake.peak <= tolerance
    assert [name for name, _ in fake.marks] == ["forward", "backward", "optimizer"]


@pytest.mark.parametrize(("kind", "dtype", "foreach"), [
    ("mlp", None, False), ("mlp", torch.bfloat16, True), ("conv", None, True), ("conv", torch.bfloat16, True),
    ("gpt2", torch.bfloat16, False), ("llama", None, False), ("llama", torch.bfloat16, True)])
def test_measured_peak_is_the_count_and_the_kernels_own(kind, dtype, foreach):
    real = tracked(kind, dtype, fake=False, of_kernels=workspace, foreach=foreach)
    step, resident = training(kind, dtype, foreach)
    measured = measure(step, "cpu", resident)
    # GPT-2's activation multiplies by three Python numbers; autograd keeps each as a tensor of 8 bytes, in each of 2
    # layers, that no operation made.
    hidden = 3 * 2 * 8 if kind == "gpt2" else 0
    assert 0 <= measured.peak - real.peak <= hidden
    assert not real.unknown
    assert measured.base == resident_tensors(resident) and measured.reserved is None
    assert measured.timeline[:, 1].max() == measured.peak
    assert measured.timeline[-1, 1] == measured.base, "what a step makes it frees, once gradients are gone"
    assert [name for name, _ in measured.marks] == ["forward", "backward", "optimizer"]
    assert (numpy.diff(measured.timeline[:, 0]) >= 0).all()


def test_kernels_own_bytes_are_found_from_tensors_without_data():
    for kind in ("mlp", "conv", "llama"):
        fake, real = (tracked(kind, torch.bfloat16, fake, of_kernels=workspace) for fake in (True, False))
        assert not fake.unknown
        assert 0 <= real.peak - fake.peak <= 2 * 2 * 48


def test_checkpointed_step():
    def prepare():
        model, inputs = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), torch.randn(128, 64)

        def step():
            hidden = inputs
            for _ in range(3):
                hidden = checkpoint(model, hidden, use_reentrant=False, preserve_rng_state=False)
            hidden.sum().backward()
            model.zero_grad()
        step()
        return step, [model, inputs]

    def peak():
        step, resident = prepare()
        tracker = LiveBytes()
        tracker.watch(resident)
        with tracker:
            step()
        return tracker.peak

    with FakeTensorMode():
        fake = peak()
    step, resident = prepare()
    assert fake == peak() == measure(step, "cpu", resident).peak


def test_compiled_code_is_measured():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    inputs = torch.randn(128, 64)
    compiled = torch.compile(model, backend="aot_eager")

    def peak(run):
        def step():
            run(inputs).sum().backward()
            model.zero_grad()
        step()
        measured = measure(step, "cpu", [model, inputs])
        assert measured.timeline[-1, 1] == measured.base
        return measured.peak - measured.base

    eager = peak(model)
    assert eager >= 128 * (256 * 2 + 64) * 4, "both hidden tensors and the output were alive at once"
    assert peak(compiled) == pytest.approx(eager, rel=0.3)


# ---- the tracker

def test_views_in_place_and_many_outputs():
    with LiveBytes() as tracker:
        whole = torch.empty(100)
        parts = [*whole.split(10), whole.view(10, 10).t(), whole[3:]]
        whole.add_(1).mul_(2)
        assert tracker.current == tracker.peak == 400
        values, indices = whole.sort()
        assert tracker.current == 400 + 400 + 800
        del values
        assert tracker.current == 400 + 800
        assert tracker.peak == 1600 and indices.shape == (100,)
        del whole
        assert tracker.current == 400 + 800, "views keep their storage"
        del parts, indices
        assert tracker.current == 0
    assert tracker.timeline == [400, 800, 1600, 1200, 800, 0]


def test_older_tensors_count_once_they_are_watched():
    weight = torch.ones(10)
    with LiveBytes() as tracker:
        weight.add_(1)
        weight.view(2, 5).mul_(2)
        aten._unsafe_view(weight, [5, 2])
        assert tracker.peak == 0 and tracker.timeline == []
        made = torch.tensor([1.0, 2.0])
        assert tracker.current == 8 and made.sum().item() == 3
    tracker = LiveBytes()
    tracker.watch([weight, {"again": weight[2:]}])
    assert tracker.current == tracker.peak == 40
    del weight
    gc.collect()
    assert tracker.current == 0 and tracker.timeline == [], "the timeline is of the time inside"


def test_resized_storages():
    with LiveBytes() as tracker:
        tensor = torch.empty(10)
        tensor.resize_(100)
        assert tracker.current == 400 and tracker.peak == 440
        tensor.untyped_storage().resize_(0)
        assert tracker.current == 0
        out = torch.empty(0)
        torch.add(torch.ones(5), 1, out=out)
        assert tracker.current == 20
    assert "tracker" not in repr(torch.UntypedStorage.resize_), "put back"


def test_rounding_device_and_bytes_by_hand():
    with FakeTensorMode(), LiveBytes(round_to=512, device="cuda") as tracker:
        kept = [torch.empty(1, device="cuda"), torch.empty(129, device="cuda"), torch.empty(1000)]
        assert tracker.current == 512 + 1024
        kept.clear()
        tracker.allocate(1)
        tracker.mark("between")
        tracker.transient(513)
        assert (tracker.current, tracker.peak, tracker.marks) == (512, 1536, [("between", len(tracker.timeline) - 2)])
        tracker.release(1)
        with pytest.raises(ValueError, match="release of 1 bytes where 0"):
            tracker.release(1)


def test_tensors_made_of_tensors_and_sparse_ones():
    from torch.testing._internal.two_tensor import TwoTensor

    with LiveBytes() as tracker:
        pair = TwoTensor(torch.ones(10), torch.ones(10))
        total = pair + pair
        assert tracker.current == 160
        del pair, total
        sparse = torch.ones(4, 4).to_sparse()
        assert tracker.current == resident_tensors(sparse) == 16 * (2 * 8 + 4)
    tracker = LiveBytes()
    tracker.watch(TwoTensor(torch.ones(10), torch.ones(10)))
    assert tracker.peak == 80


def test_order_of_the_two_contexts_does_not_matter():
    def peak(outer, inner):
        with outer as first, inner as second:
            nn.Linear(8, 8)(torch.empty(4, 8)).relu().sum().backward()
        return (first if isinstance(first, LiveBytes) else second).peak

    assert peak(FakeTensorMode(), LiveBytes()) == peak(LiveBytes(), FakeTensorMode()) > 0


# ---- the meter

def test_frees_of_older_tensors_count_where_they_are_resident():
    kept = {"old": torch.empty(1000), "unknown": torch.empty(500)}

    def step():
        del kept["old"], kept["unknown"]
        mark("now")
        kept["new"] = torch.empty(100)

    measured = measure(step, "cpu", (kept[name] for name in ["old"]))  # a list would itself keep the tensor alive
    assert (measured.base, measured.peak) == (4000, 4000)
    assert measured.timeline[:, 1].tolist() == [0, 400] and measured.marks == (("now", 1),)


def test_a_block_older_than_the_profile_is_not_taken_for_one_of_an_earlier_profile():
    events = [(5, "", 64, 1), (1, "", -999, 7), (9, "", -64, 1), (7, "limbeck.mark.half", 0, 0), (8, "", -64, 3)]
    assert changes_of(events) == ([(0.005, 64), (0.009, -64)], (("half", 1),))
    held = []
    measure(lambda: held.append(torch.empty(100_000)), "cpu")
    held.clear()  # the profiler goes on believing in this block
    held.append(torch.empty(100_000))
    measured = measure(held.clear, "cpu")
    assert len(measured.timeline) == 0 and measured.peak == 0


def test_other_threads_are_not_included():
    def elsewhere():
        torch.empty(10_000_000)

    def step():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return torch.empty(10)

    assert measure(step, "cpu").peak == 40


def test_what_a_step_raises_ends_the_measuring():
    with pytest.raises(KeyError):
        measure(lambda: {}["absent"], "cpu")
    assert measure(lambda: torch.empty(10), "cpu").peak == 40
    with pytest.raises(ValueError, match="not on meta"):
        measure(lambda: None, "meta")


def test_measuring_writes_nothing():
    code = "import torch; from strategies.memory.meter import measure; measure(lambda: torch.empty(10), 'cpu')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_measuring_keeps_no_operations(monkeypatch):
    """Only allocations and our marks: a training step runs thousands of operations, whose records would take memory."""
    seen = []
    monkeypatch.setattr(meter, "_walk", lambda events: seen.extend(events) or iter(()))

    def step():
        mark("here")
        kept = torch.ones(1000)
        for _ in range(10):
            kept.add_(1.0)

    measure(step, "cpu")
    assert [event.name for event in seen if event.tag.name != "Allocation"] == ["limbeck.mark.here"]
    assert any(event.extra_fields.alloc_size == 4000 for event in seen if event.tag.name == "Allocation")


def test_resident_tensors_count_each_storage_once():
    model = nn.ModuleDict({"first": nn.Embedding(10, 4), "last": nn.Linear(4, 10, bias=False)})
    model["norm"] = nn.BatchNorm1d(3)
    model["last"].weight = model["first"].weight
    norm = 2 * 12 + 2 * 12 + 8
    assert resident_tensors(model, model["last"].weight, model["first"].weight[2:]) == 160 + norm
    optimizer = torch.optim.AdamW([model["first"].weight])
    model["last"](torch.ones(4)).sum().backward()
    assert resident_tensors(model) == 2 * 160 + norm, "gradients count"
    optimizer.step()
    assert resident_tensors(model, optimizer) == 4 * 160 + norm + 4


def test_cuda_trace_becomes_a_timeline():
    trace = [{"action": "alloc", "size": 1, "time_us": 10}, {"action": "segment_alloc", "size": 999, "time_us": 11},
             {"action": "alloc", "size": 513, "time_us": 12}, {"action": "free_requested", "size": 1, "time_us": 15},
             {"action": "free_completed", "size": 1, "time_us": 16}]
    changes, marks = changes_of_trace(trace, [(9.0, "forward"), (13.5, "backward")])
    assert changes == [(10, 512), (12, 1024), (15, -512)] and marks == (("forward", 0), ("backward", 2))
    assert cumulative(changes, 100).tolist() == [[0, 612], [2, 1636], [5, 1124]]
    assert cumulative([], 100).shape == (0, 2)


@pytest.mark.parametrize("recorded_by_others", [False, True])
def test_the_way_through_cuda(monkeypatch, recorded_by_others):
    """The calls and their order, with a stand-in for the allocator."""
    calls, trace = [], [{"action": "alloc", "size": 600, "time_us": 0}]
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: recorded_by_others, raising=False)
    for name, value in {"synchronize": None, "memory_allocated": 1000, "reset_peak_memory_stats": None,
                        "max_memory_allocated": 2024, "max_memory_reserved": 4096}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, value=value: [calls.append(name), value][1])
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history",
                        lambda enabled, **options: calls.append(f"record {enabled}"))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device: {"device_traces": [[], trace]})

    measured = measure(lambda: [calls.append("step"), mark("now")], "cuda:1")
    assert (measured.peak, measured.base, measured.reserved) == (2024, 1000, 4096)
    recording = ["record all"] * (not recorded_by_others), ["record None"] * (not recorded_by_others)
    assert calls == ["synchronize", "memory_allocated", "reset_peak_memory_stats", *recording[0], "step", "synchronize",
                     *recording[1], "max_memory_allocated", "max_memory_reserved"]
    assert measured.timeline.tolist() == ([] if recorded_by_others else [[0, 2024]])
    assert measured.marks == (() if recorded_by_others else (("now", 1),))


# ---- kernels

def test_workspace_of_kernels_that_have_one_and_of_those_that_have_none():
    image, filters = torch.empty(2, 8, 16, 16), torch.empty(8, 8, 3, 3)
    convolution = (image, filters, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        without_data = tuple(mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in convolution)
    before = torch.get_rng_state()
    assert workspace(aten.convolution.default, convolution) == workspace(aten.convolution.default, without_data)
    assert workspace(aten.relu.default, (image,)) == workspace(aten.add_.Tensor, (image, image)) == 0
    assert workspace(aten.add_.Tensor, (image, 1)) <= 16, "a Python number becomes a tensor for a moment"
    assert workspace(aten.mul.Tensor, (image.expand(3, 2, 8, 16, 16), image)) == 0
    assert workspace(aten.view.default, (image, [-1])) == 0
    with FakeTensorMode():
        softmax = workspace(aten._safe_softmax.default, (torch.empty(64, 64), -1))
    assert softmax >= 64 * 64, "a mask of the values at least"
    assert torch.equal(before, torch.get_rng_state())


def test_workspace_is_unknown_where_it_cannot_be_tried():
    with FakeTensorMode():
        large = torch.empty(2**20, 2**12)
        elsewhere = torch.empty(4, device="cuda")
    assert workspace(aten.exp.default, (large,)) is None
    assert workspace(aten.exp.default, (torch.empty(100, 100),), limit=40_000) is None, "arguments and outputs"
    if not torch.cuda.is_available():
        assert workspace(aten.exp.default, (elsewhere,)) is None
    assert workspace(aten.mm.default, (torch.empty(2, 3), torch.empty(2, 3))) is None, "the operation refuses"


def _sums_on_a_busy_core(folder):
    """Measure reductions, where what reduces them is put aside again and again for somebody who computes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(os.environ["RANK"]),
                                         world_size=2)
    torch.distributed.barrier()
    for thread in _threads_of_gloo():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]

    def step():
        for count in range(100_000, 100_000 + SUMS):  # of sizes of their own: none takes the place of one before
            whole, part = torch.zeros(2 * count), torch.zeros(count)
            torch.distributed.reduce_scatter_tensor(part, whole, async_op=True).wait()
            del whole, part
    try:
        print(measure(step, "cpu").peak)
        torch.distributed.barrier()
    finally:
        for process in busy:
            process.kill()
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whether a thread sleeps")
def test_memory_that_gloo_lets_go_of_late_is_seen_to_end(tmp_path):
    done = forked(_sums_on_a_busy_core, (tmp_path,), [{"RANK": "0"}, {"RANK": "1"}], timeout=100)
    assert done.returncode == 0, done.stderr
    largest = 4 * (100_000 + SUMS - 1)
    for peak in map(int, done.stdout.split()):
        assert peak == 5 * largest, "two tensors and a copy of the larger one"


class Hands(torch.autograd.Function):
    """Hands out a gradient that it made before, and may keep it."""

    @staticmethod
    def forward(ctx, weight, keeps):
        ctx.gradient, ctx.keeps = torch.ones_like(weight), keeps
        return weight.sum()

    @staticmethod
    def backward(ctx, upstream):
        found = ctx.gradient
        ctx.gradient = found if ctx.keeps else None
        return found, None


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("fake", [False, True])
def test_gradients_of_a_tied_weight_are_summed_in_place_unless_one_is_held(keeps, fake):
    """As the profiler sees it: autograd adds to a gradient that nobody else has, and makes a third of one that is."""
    def step(weight, ids):
        graph = nn.functional.embedding(ids, weight).sum() + Hands.apply(weight, keeps)
        graph.backward()

    weight, ids = nn.Parameter(torch.ones(1000, 64)), torch.zeros(4, dtype=torch.long)
    step(weight, ids)
    weight.grad = None
    found = measure(lambda: step(weight, ids), "cpu", [weight, ids])
    weight.grad = None
    with FakeTensorMode() if fake else nullcontext():
        like, of = (nn.Parameter(torch.ones(1000, 64)), torch.zeros(4, dtype=torch.long)) if fake else (weight, ids)
        tracker = LiveBytes()
        tracker.watch(like, of)
        with tracker:
            step(like, of)
    assert tracker.peak == max(tracker.timeline) == pytest.approx(found.peak, abs=4096)
    assert tracker.peak // weight.nbytes == (4 if keeps else 3) and tracker.current == found.timeline[-1, 1]


PICKED = {
    "gather": lambda weight, ids: weight.gather(1, ids[None].expand(1000, 4)),
    "index": lambda weight, ids: weight[:, ids], "index_select": lambda weight, ids: weight.index_select(1, ids),
    "largest": lambda weight, ids: weight.max(1).values}


@pytest.mark.parametrize("how", PICKED)
@pytest.mark.parametrize("fake", [False, True])
def test_gradients_of_what_was_picked_are_put_into_zeros_in_place(how, fake):
    """As the profiler sees it; while operations are watched, autograd makes another tensor beside the zeros."""
    def step(weight, ids):
        PICKED[how](weight * 1, ids).sum().backward()

    weight, ids = nn.Parameter(torch.ones(1000, 64)), torch.arange(4)
    step(weight, ids)
    weight.grad = None
    found = measure(lambda: step(weight, ids), "cpu", [weight, ids])
    weight.grad = None
    with FakeTensorMode() if fake else nullcontext():
        like, of = (nn.Parameter(torch.ones(1000, 64)), torch.arange(4)) if fake else (weight, ids)
        tracker = LiveBytes()
        tracker.watch(like, of)
        with tracker:
            step(like, of)
    assert tracker.peak == pytest.approx(found.peak, rel=0.01)


# ---- the picture

def test_picture_opens_and_has_its_size(tmp_path):
    tracker = tracked("mlp", None, fake=True)
    step, resident = training("mlp", None)
    measured = measure(step, "cpu", resident)
    file = draw_step(curve(tracker), curve(measured), measured.peak * 2, tmp_path / "step.png")
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (1080, 540)
    from matplotlib import image

    assert len(numpy.unique(image.imread(file)[..., :3].reshape(-1, 3), axis=0)) > 10
    draw_step(None, curve(Measured(5, 5)), None, tmp_path / "empty.png")


def test_phases_of_both_curves_lie_above_each_other():
    planned = Curve(numpy.array([[0, 1], [10, 5], [100, 2]]), (("forward", 0), ("backward", 10)))
    measured = Curve(numpy.array([[0, 1], [60, 5], [200, 2]]), (("forward", 0), ("backward", 60)))
    phases = shared_phases([planned, measured])
    assert phases == pytest.approx({"forward": 0.0, "backward": 0.2})
    assert progress(planned, phases).tolist() == pytest.approx(progress(measured, phases).tolist())
    later = Curve(numpy.array([[0, 1], [100, 2], [200, 5], [300, 2]]), (("forward", 100), ("backward", 200)))
    phases = shared_phases([planned, later])
    assert progress(planned, phases)[[0, 1]].tolist() == pytest.approx(progress(later, phases)[[1, 2]].tolist())
    other = Curve(measured.points, (("backward", 60),))
    assert shared_phases([planned, other]) == {} and progress(planned, {}).tolist() == pytest.approx([0, 0.1, 1])


def test_what_a_gpu_holds_besides_is_what_nobody_knows_of():
    weight, other = torch.ones(100), torch.ones(200)  # 400 bytes, of which the allocator makes 512, and 800
    assert unknown_bytes(10_000, [weight, weight.view(10, 10), other]) == 10_000 - 512 - 1024
    assert unknown_bytes(100, [weight]) == 0
