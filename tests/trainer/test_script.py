"""Training from a script of one's own, with the names of `limbeck` alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import limbeck


@pytest.fixture
def source(write_experiment):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def read(*overrides: str):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return limbeck.read_experiment(write_experiment(), list(overrides))
    return read


def test_ten_lines_train_evaluate_and_write_a_student_that_is_the_trained_one(source, tmp_path):
    trainer = limbeck.Trainer(source())
    assert trainer.plan.steps == 4 and trainer.plan.memory.peak > 0
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert set(after) == {"bits_per_byte", "cross_entropy"} and after["bits_per_byte"] < before["bits_per_byte"]
    student = trainer.student()
    limbeck.write_student(tmp_path / "student", student, trainer.tokenizer, torch.float32)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "student")(input_ids=ids).logits
        assert torch.equal(written, student.eval()(input_ids=ids).logits)


def test_a_script_goes_on_from_its_last_checkpoint_and_refuses_the_folder_of_another_run(source):
    first = limbeck.Trainer(source("training.checkpoint_every=2"))
    first.train()
    again = limbeck.Trainer(source("training.checkpoint_every=2"))
    assert again.loop.state.step == 4 and again.evaluate() == first.evaluate()
    with pytest.raises(limbeck.UserError, match="belongs to another experiment: optimizer.lr was"):
        limbeck.Trainer(source("optimizer.lr=1"))
