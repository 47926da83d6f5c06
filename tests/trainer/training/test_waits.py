"""How often a step waits for its device: counted, so that a machine without a GPU shows it too."""

import traceback
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import limbeck
from strategies.distillation.losses import divergences
from trainer.training import loop
from trainer.training.step_input import StepInputs

# What asks a device for a number, or for how many there are of something.
ASKING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique_dim",
          "aten::_unique2", "aten::repeat_interleave.Tensor", "aten::is_nonzero"}


class Waits(TorchDispatchMode):
    """Keeps the places that would wait for a device; what a step does with tensors on the CPU does not count.

    Nor does what transformers asks in the forward of a model, whether its rows are packed: that is the model's.
    """

    def __init__(self):
        super().__init__()
        self.paused, self.places = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().rpartition(".")[0] if function.name().endswith(".out") else function.name()
        masked = "aten::index" in name and any(
            index is not None and index.dtype == torch.bool for index in args[1] if isinstance(args[1], list | tuple))
        if (name in ASKING or masked) and not self.paused:
            places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
            if not any("transformers/masking_utils.py" in place for place in places):
                self.places.append(f"{name}: {' < '.join(places[-6:])}")
        return function(*args, **(kwargs or {}))

    @contextmanager
    def on_host(self):
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1


@pytest.mark.parametrize("changes", [
    {}, {"student": {"architecture": None, "from_teacher": [0, 2]}},
    {"student": {"quantization": {"bits": 4, "group_size": 16}}, "training": {"batch_size": 8, "micro_batch": 2}},
    {"optimizer": {"name": "lamb"}}, {"precision": {"dtype": "bf16"}}, {"optimizer": {"name": "adafactor"}},
], ids=["plain", "distilled", "quantized and accumulated", "lamb", "bf16", "adafactor"])
def test_a_step_waits_for_its_device_at_most_once_before_the_weights_move_and_once_besides(
        train_here, monkeypatch, tmp_path, changes):
    monkeypatch.setattr(divergences, "_unseen", lambda tensor: True)  # as on a GPU
    if "from_teacher" in changes.get("student", {}):
        teacher = train_here("teacher", training={"steps": 1})
        limbeck.write_student(tmp_path / "large", teacher.whole(), teacher.text.tokenizer, torch.float32)
        changes = {**changes, "teacher": {"path": str(tmp_path / "large")}, "data": {"tokenizer": {
            "train_vocabulary": None}}}
    trainer = train_here("waits", report={"control": False}, training={"steps": 2, **changes.get("training", {})},
                         **{name: value for name, value in changes.items() if name != "training"})
    waits, plain, tolist = Waits(), loop.with_learned, torch.Tensor.tolist

    def hosted(function):
        def call(*args):
            with waits.on_host():
                return function(*args)
        return call

    def told(tensor):
        if not waits.paused:
            waits.places.append("tolist")
        with waits.on_host():
            return tolist(tensor)

    monkeypatch.setattr(loop, "with_learned", hosted(plain))
    for name in ("take", "look_ahead"):
        monkeypatch.setattr(StepInputs, name, hosted(getattr(StepInputs, name)))
    monkeypatch.setattr(torch.Tensor, "tolist", told)
    trainer.plan = replace(trainer.plan, steps=10)  # so that the step looks ahead
    inputs = trainer.inputs()
    record = trainer.train_step(inputs)
    waits.places = []
    with waits:
        record = trainer.train_step(inputs)
    assert record["loss"] > 0 and record["tokens"] > 0
    assert len(waits.places) == 2, waits.places
