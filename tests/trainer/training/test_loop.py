"""The loop's promises: a loss that does not depend on how a batch is split, and weights that nothing bad reaches."""

import json
import math

import pytest
import torch

from strategies.distillation.losses.response import IGNORED
from tests.conftest import ROOT, TINY, forked, on_two_ranks, train_py, two_ranks
from tests.trainer.checkpoints.test_sharded_checkpoints import SETTINGS, same_tensors, tensors_of
from tests.trainer.distributed.test_sharding import ENGINES
from trainer.errors import RunFailed, UserError
from trainer.run.metrics import read_lines
from trainer.training.loop import TrainLoop

UNEVEN = {"packing": False, "sequence_length": 64}  # rows of different length: only true token counts are right


def losses(trainer) -> list[float]:
    return [line["loss"] for line in read_lines(trainer.folder.metrics) if "loss" in line]


def relative(one, other) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def test_accumulation_does_not_change_the_loss_curve(train_here):
    """Silent error 5. Batch of 8 as 8x1, 4x2 (two splits) and 1x8."""
    curves, weights = {}, {}
    for micro_batch in (8, 4, 2, 1):
        trainer = train_here(f"micro{micro_batch}", data=UNEVEN, training={"micro_batch": micro_batch, "steps": 12})
        assert trainer.plan.accumulation == 8 // micro_batch
        curves[micro_batch] = losses(trainer)
        weights[micro_batch] = torch.cat([p.detach().flatten() for p in trainer.unwrapped.parameters()])
    assert curves[8][-1] < curves[8][0]
    for micro_batch in (4, 2, 1):
        assert relative(curves[8], curves[micro_batch]) < 1e-6, micro_batch
        assert torch.allclose(weights[8], weights[micro_batch], atol=2e-5)


def test_two_processes_train_as_one(write_experiment, tmp_path):
    """Silent errors 4, 5 and 8: real processes, the same losses, schedule and weights."""
    curves, rates, held_out = {}, {}, {}
    for name, processes, run in (("one", 1, train_py), ("two", 2, on_two_ranks)):
        file = write_experiment(
            name, data=UNEVEN, training={"steps": 10, "micro_batch": 2, "evaluate_every": 5},
            teacher={"architecture": TINY, "train": {"steps": 3}}, report={"control": False})
        done = run("--config", str(file))
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{name}: {processes} process(es) on cpu" in done.stdout
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        curves[name] = [line["loss"] for line in lines if "loss" in line]
        rates[name] = [line["learning_rate"] for line in lines if "loss" in line]
        held_out[name] = [line["held_out"]["bits_per_byte"] for line in lines if "held_out" in line]
        assert done.stdout.count("step 10/10  loss") == 1, "lines come from rank 0 only"
    assert relative(curves["one"], curves["two"]) < 1e-6
    assert relative(held_out["one"], held_out["two"]) < 1e-6
    assert rates["one"] == rates["two"]
    plan = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert plan["topology"]["data_parallel"] == 2 and plan["accumulation"] == 2


GOLDEN = {  # changes to the experiment, and the tolerance
    # Kernels for AVX-512, AVX2 and SSE gave curves within 3e-7 of each other.
    "plain": ({}, 5e-6),
    # A weight near the middle of two integers goes to one or the other by its last bit: the same kernels gave 3e-4.
    "quantized": ({"student": {"quantization": {"bits": 8}}}, 2e-3),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(train_here, name):
    """100 steps in fp32 on CPU against a curve kept in the repository, within the tolerance above.

    To write them anew after a change that is meant to change them: `python -m tests.golden.write_golden`.
    """
    golden = json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())[name]
    changes, tolerance = GOLDEN[name]
    found = losses(train_here(f"golden-{name}", training={"steps": 100}, **changes))
    assert len(found) == len(golden) == 100
    assert relative(golden, found) < tolerance
    assert found[-1] < 0.6 * found[0]


def test_same_seed_is_bitwise_the_same_and_another_is_not(train_here):
    first, again, other = (losses(train_here(name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again != other


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_is_what_it_says(train_here, precision):
    """Nothing is silently something else: matrix products run in the dtype asked for, weights stay fp32."""
    trainer = train_here(precision, precision={"dtype": precision}, training={"steps": 2})
    seen = set()
    layer = trainer.unwrapped.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.steps = 3
    trainer.train()
    assert seen == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert {parameter.dtype for parameter in trainer.unwrapped.parameters()} == {torch.float32}
    state = trainer.engine.optimizer.state
    assert {value.dtype for entry in state.values() for value in entry.values()} == {torch.float32}
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_fp16_overflow_backs_off_skips_and_goes_on(train_here):
    """The scale begins far too high: it halves, no such step reaches the weights, then training goes on; it grows."""
    changes = {"precision": {"dtype": "fp16", "loss_scale": {"initial": 2.0**32, "growth_interval": 4}}}
    trainer = train_here("overflow", training={"steps": 40}, **changes)
    lines = [line for line in read_lines(trainer.folder.metrics) if "loss" in line]
    scales = [line["loss_scale"] for line in lines]
    skipped = trainer.precision.skipped
    assert skipped >= 3 and scales[skipped - 1] < 2.0**32 and trainer.precision.growths >= 1
    assert all("nonfinite" not in line for line in lines), "an overflow of the scale is no failure"
    assert all(torch.isfinite(parameter).all() for parameter in trainer.unwrapped.parameters())
    # While every step is skipped the weights do not move: each loss is that of the untouched student on its batch.
    untouched = losses(train_here("untouched", training={"steps": 3}, optimizer={"lr": 1e-12},
                                  precision={"dtype": "fp16"}))
    assert relative(untouched[:3], [line["loss"] for line in lines[:3]]) < 1e-3
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3


def poison(trainer, rows: set[int]):
    """Make the loss of batches that hold one of these rows NaN, as a bad sample would."""
    original = trainer._loss

    def loss(batch):
        total, terms = original(batch)
        return (total * float("nan") if rows & set(batch["row"].tolist()) else total), terms

    trainer._loss = loss


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_non_finite_loss_never_reaches_the_weights(train_here, precision):
    """Silent error 9. One bad row: its step is skipped and logged with its place; the run goes on."""
    trainer = train_here("nan", training={"steps": 1, "micro_batch": 4}, precision={"dtype": precision})
    order = [row for batch in _next_rows(trainer) for row in batch]
    poison(trainer, {order[5]})
    before = [parameter.detach().clone() for parameter in trainer.unwrapped.parameters()]
    trainer.steps = 2
    trainer.train()
    after = list(trainer.unwrapped.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    line = [line for line in read_lines(trainer.folder.metrics) if "nonfinite" in line][-1]
    assert line["loss"] == "nan" and line["step"] == 2
    assert line["nonfinite"] == [{"process": 0, "micro_batch": 1, "rows": order[4:8]}]
    poison(trainer, set())
    trainer.steps = 3
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.unwrapped.parameters(), strict=True))


def _next_rows(trainer):
    """Rows of the micro-batches of the trainer's next step."""
    batches = trainer._batches()
    return [next(batches)["row"].tolist() for _ in range(trainer.plan.accumulation)]


def test_too_many_non_finite_steps_stop_the_run_with_good_weights(train_here):
    trainer = train_here("stuck", training={"steps": 2, "nonfinite_limit": 3})
    poison(trainer, set(range(10_000)))
    before = [parameter.detach().clone() for parameter in trainer.unwrapped.parameters()]
    trainer.steps = 20
    with pytest.raises(RunFailed) as caught:
        trainer.train()
    said = str(caught.value)
    assert "the loss was not finite for 3 steps in a row, last at step 5; process 0, micro-batch 0, rows [" in said
    assert "optimizer.lr" in said and "checkpoints" in said
    from safetensors.torch import load_file

    saved = load_file(max(trainer.folder.checkpoints.glob("step-*")) / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.unwrapped.parameters(), strict=True))


class NaNBehind(torch.autograd.Function):
    """The same forward, and NaN backward."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def poison_gradient(trainer, kind: str, step: int) -> None:
    """Make the gradient of a step NaN, and not its loss."""
    plain = trainer._loss

    def loss(batch):
        total, terms = plain(batch)
        return (NaNBehind.apply(total) if trainer.state.step + 1 == step else total), terms

    trainer._loss = loss


def mask(trainer, steps: set[int]) -> None:
    """Take the target tokens from all micro-batches of some steps, counted from 1."""
    plain = trainer._batches

    def masked():
        begin = trainer.state.step * trainer.plan.accumulation
        for number, batch in enumerate(plain(), begin):
            if number // trainer.plan.accumulation + 1 in steps:
                batch = {**batch, "targets": torch.full_like(batch["targets"], IGNORED)}
            yield batch

    trainer._batches = masked


def state_of(trainer) -> list[torch.Tensor]:
    moments = [value for entry in trainer.engine.optimizer.state.values() for value in entry.values()]
    return [tensor.detach().clone() for tensor in (*trainer.unwrapped.parameters(), *moments)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_targets_is_counted_and_changes_nothing(train_here, capsys, precision):
    """Silent error 5. No loss of 0.0 and no NaN, no gradient, no step; said once, and at the end."""
    settings = {"training": {"steps": 2, "micro_batch": 4, "evaluate_every": 100, "checkpoint_every": 100},
                "precision": {"dtype": precision, "loss_scale": {"growth_interval": 3}}}
    trainer = train_here("empty", **settings)
    trainer.state.nonfinite = 1
    before, scale = state_of(trainer), trainer.precision.state_dict()
    mask(trainer, {3, 4, 6})
    trainer.steps = 4
    trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(before, state_of(trainer), strict=True))
    assert trainer.precision.state_dict() == scale and trainer.state.nonfinite == 1 and trainer.state.empty_steps == 2
    trainer.steps = 6
    trainer.train()
    assert any(not torch.equal(one, other) for one, other in zip(before, state_of(trainer), strict=True))
    lines = [line for line in read_lines(trainer.folder.metrics) if "loss" in line]
    assert [line.get("empty_steps") for line in lines] == [None, None, 1, 2, None, 3]
    for line in lines:
        empty = "empty" in line
        assert (line["loss"] is None) == empty and (line["tokens"] == 0) == empty and "nonfinite" not in line
    said = capsys.readouterr().out
    assert said.count("no target token in the whole batch, so that there is no loss and nothing is learned") == 1
    assert "step 3: no target token" in said and "3 of 6 steps had no target token and taught nothing" in said
    from trainer.run.report import _training

    assert "3 of the steps had no target token and taught nothing" in _training(lines)


def test_held_out_text_without_targets_is_refused(train_here):
    trainer = train_here("refused", training={"steps": 1})
    trainer.text.held_out["targets"].fill_(IGNORED)
    with pytest.raises(UserError, match="no held-out row has a target token") as caught:
        TrainLoop(trainer.experiment, trainer.plan, trainer.folder, trainer.accelerator, trainer.text,
                  trainer.unwrapped)
    assert caught.value.key == "data.validation" and "data.sequence_length" in caught.value.way_out


def test_empty_steps_are_remembered_by_a_resumed_run(train_here):
    settings = {"training": {"steps": 3, "evaluate_every": 100, "checkpoint_every": 100}}
    trainer = train_here("resumed", until=0, **settings)
    del trainer.train_step  # which would interrupt it again
    mask(trainer, {2})
    trainer.train()
    assert train_here("resumed", **settings).state.empty_steps == 1


def test_a_gradient_that_is_not_finite_is_traced_to_its_micro_batch(train_here):
    """The loss is finite; which rows it comes from is seen before gradients are mixed."""
    trainer = train_here("gradient", training={"steps": 1, "micro_batch": 4, "nonfinite_limit": 1})
    order = [row for batch in _next_rows(trainer) for row in batch]
    before, plain = state_of(trainer), trainer._loss

    def loss(batch):
        total, terms = plain(batch)
        return (NaNBehind.apply(total) if order[5] in batch["row"].tolist() else total), terms

    trainer._loss = loss
    trainer.steps = 2
    with pytest.raises(RunFailed, match="the gradient was not finite for 1 steps in a row, last at step 2; process 0, "
                                        "micro-batch 1, rows"):
        trainer.train()
    line = [line for line in read_lines(trainer.folder.metrics) if "nonfinite" in line][-1]
    assert math.isfinite(line["loss"]) and line["gradient_norm"] == "nan"
    assert line["nonfinite"] == [{"process": 0, "micro_batch": 1, "rows": order[4:8]}]
    assert all(torch.equal(one, other) for one, other in zip(before, state_of(trainer), strict=True))


def test_weights_that_an_update_made_infinite_are_not_saved(train_here):
    """Loss and gradient were finite; the learning rate is beyond what fp32 holds. The checkpoint before stays."""
    settings = {"training": {"steps": 4, "checkpoint_every": 1}, "schedule": {"warmup": 0}}
    trainer = train_here("wild", **{**settings, "training": {"steps": 2, "checkpoint_every": 1}})
    trainer.steps, trainer.learning_rate = 4, lambda step: 1e39
    with pytest.raises(RunFailed) as caught:
        trainer.train()
    assert "weights are not finite at step 3, though loss and gradient were in every step" in str(caught.value)
    assert "lower optimizer.lr" in str(caught.value)
    assert max(path.name for path in trainer.folder.checkpoints.glob("step-*")) == "step-00000002"


@pytest.mark.timeout(600)
def test_on_ranks_no_target_and_no_finite_gradient_is_no_step(write_experiment, tmp_path):
    """Under any engine: step 2 has no target on either rank; in step 3 the gradient of one is NaN, its loss is not."""
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 4, "checkpoint_every": 1,
                                         "keep_checkpoints": 4}}
    engines = {**ENGINES, "in_backward": [*ENGINES["fsdp2"], "optimizer.in_backward=true", "training.clip=null",
                                          "training.micro_batch=4"]}
    runs = [{"name": engine, "file": str(write_experiment(engine, **settings)), "overrides": how,
             "poison": ["gradient", 3]} for engine, how in engines.items()]
    done = forked(_rank, (runs, tmp_path), two_ranks())
    assert done.returncode == 0, done.stderr[-6000:]
    for name in engines:
        first, second, third, fourth = [line for line in read_lines(tmp_path / name / "metrics.jsonl")
                                        if "loss" in line]
        assert second["loss"] is None and second["empty_steps"] == 1 and second["tokens"] == 0, name
        assert math.isfinite(third["loss"]) and third["tokens"] > 0, name
        assert {one["process"] for one in third["nonfinite"]} == {1}, name
        states = [tensors_of(tmp_path / name / "checkpoints" / f"step-0000000{step}") for step in (1, 2, 3, 4)]
        for kind in ("model", "optimizer"):
            assert same_tensors(states[0][kind], states[1][kind]), (name, kind)
            assert same_tensors(states[1][kind], states[2][kind]), (name, kind)
            assert not same_tensors(states[2][kind], states[3][kind]), (name, kind)


def _rank(runs: list[dict], folder) -> None:
    from benchmarks.sharding import sharded_runs

    plain = sharded_runs.remembered

    def remembered(trainer):
        mask(trainer, {2})
        return plain(trainer)

    sharded_runs.remembered, sharded_runs.poison = remembered, poison_gradient
    for run in runs:
        sharded_runs.one(run, folder)


def test_clipping_bounds_the_update(train_here):
    trainer = train_here("clip", training={"steps": 1, "clip": 1e-3})
    lines = read_lines(trainer.folder.metrics)
    assert lines[0]["gradient_norm"] > 1e-3, "the norm is logged before clipping"
    total = torch.cat([entry["exp_avg"].flatten() for entry in trainer.engine.optimizer.state.values()]).norm()
    assert float(total) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 - beta1) times the clipped gradient


def test_targets_of_prompts_are_not_learned(train_here, tmp_path):
    records = [{"q": f"what {number}", "a": "yes"} for number in range(20)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    trainer = train_here("prompts", data={"path": str(tmp_path / "records.jsonl"), "prompt": "q", "response": "a"},
                         training={"steps": 1})
    batch = next(trainer._batches())
    tokenizer = trainer.text.tokenizer
    loss_mask = {tokenizer.decode([int(token)]) for token in batch["targets"][batch["targets"] != IGNORED]}
    assert loss_mask <= set("yes") | {"yes", "ye", "es", tokenizer.eos_token} and tokenizer.eos_token in loss_mask
