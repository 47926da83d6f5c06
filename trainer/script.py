"""Training from a script of one's own: what `train.py` does, step by step and without a command line."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.distributed.launch import start
from trainer.experiment.load import Source
from trainer.models.build import quiet_libraries
from trainer.pipeline import Launched, begin, prepare
from trainer.planning.plan import Plan
from trainer.run.folder import RunFolder


class Trainer:
    """Trains the student of an experiment from a script.

        from pathlib import Path
        import limbeck
        trainer = limbeck.Trainer(limbeck.read_experiment("experiment.yaml", ["training.steps=100"]))
        print(trainer.plan.memory.peak, "bytes at the peak of a step, planned")
        trainer.train()                            # from its last checkpoint, if its folder has one
        print(trainer.evaluate()["bits_per_byte"])
        student = trainer.student()                # a model of transformers, in fp32
        limbeck.write_student(Path("student"), student, trainer.tokenizer)

    Making one reads and tokenizes the data, plans the memory of a step, trains the teacher first where it has no
    weights, builds the models, and resumes. Nothing is exported or reported by itself: `limbeck.run` does all of that.
    With several processes (`accelerate launch script.py`) every one of them runs the same script.

    Args:
        source: an experiment, as `limbeck.read_experiment` gives it.

    Attributes:
        plan: what is carried out: batches, steps, bytes by part; `plan.memory` is None where nothing can be foretold.
        tokenizer: of the student.
        loop: the training loop, with its `state`, `engine` and `ranks`.

    Raises:
        UserError: a mistake in the experiment or its data, a budget that cannot be met, or a folder of another run.
        RunFailed: a checkpoint that cannot be used, or a teacher whose training failed.
    """

    def __init__(self, source: Source) -> None:
        quiet_libraries()
        experiment, folder = source.experiment, RunFolder(source.experiment.folder)
        folder.check(experiment)
        begun = begin(experiment, Launched(*start(experiment)))
        self.loop = prepare(experiment, begun.experiment, folder, begun.how, begun.text)
        self.plan: Plan = self.loop.plan
        self.tokenizer: PreTrainedTokenizerBase = begun.text.tokenizer

    def train(self) -> None:
        """Train to the last step of the plan, evaluating and saving on the way; metrics go to the run's folder.

        Raises:
            RunFailed: too many steps were not finite, or another process is missing. Checkpoints are kept.
            BudgetUnmet: a measured step took more than the budget, with `memory.exceeded: stop`.
        """
        self.loop.train()

    def evaluate(self) -> dict[str, float]:
        """`bits_per_byte` and `cross_entropy` (nats per token) of the student, as it is now, on held-out rows.

        All processes take part.
        """
        found = self.loop.evaluate(self.loop.student, self.loop.state.step)
        assert found is not None, "nobody asks a script to stop"
        return found

    def student(self) -> nn.Module:
        """The student with fp32 weights, whole, on the main process; where it is sharded, from its last checkpoint.

        Raises:
            RunFailed: it is sharded, and its last step is in no checkpoint.
        """
        return self.loop.whole()
