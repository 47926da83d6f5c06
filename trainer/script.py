"""The `Trainer` for use from a script: what `train.py` does, step by step and without a command line."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.distributed.launch import start
from trainer.errors import UserError
from trainer.experiment.load import Source
from trainer.models.build import quiet_libraries
from trainer.pipeline import begin
from trainer.planning.plan import Plan
from trainer.preparation import Launched, prepare
from trainer.run.folder import RunFolder
from trainer.run.run_status import RunStatus
from trainer.run.working import working


class Trainer:
    """Trains the student of an experiment from a script.

        from pathlib import Path
        import limbeck
        trainer = limbeck.Trainer(limbeck.read_experiment("experiment.yaml", ["training.steps=100"]))
        print(trainer.plan.memory.peak, "bytes of planned peak memory")
        trainer.train()                            # resumes from the last checkpoint in the run folder, if any
        print(trainer.evaluate()["bits_per_byte"])
        student = trainer.student()                # a transformers model, in fp32
        limbeck.write_student(Path("student"), student, trainer.tokenizer)

    The constructor reads and tokenizes the data, plans the memory of a step, trains the teacher first if it has no
    weights, builds the models, and restores the last checkpoint. It does not export or write a report; `limbeck.run`
    does all of that. With several processes (`accelerate launch script.py`), each of them runs the same script.

    Args:
        source: an experiment as returned by `limbeck.read_experiment`.

    Attributes:
        plan: the plan in use: batches, steps, memory by part; `plan.memory` is None if memory cannot be predicted.
        tokenizer: the student's tokenizer.
        loop: the training loop, with its `state`, `engine` and `ranks`.

    Raises:
        UserError: a mistake in the experiment or its data, a budget that cannot be met, or a folder of another run.
        RunFailed: a checkpoint cannot be used, or the training of the teacher failed.
    """

    def __init__(self, source: Source) -> None:
        quiet_libraries()
        if source.experiment.stages:
            raise UserError("stages", "a Trainer trains one student, and this experiment has several stages",
                            value=len(source.experiment.stages), way_out="use limbeck.run, or leave `stages` out")
        experiment, folder = source.experiment, RunFolder(source.experiment.folder)
        self._status = RunStatus(experiment.name, folder, lambda: folder.check(experiment))
        folder.check(experiment)
        begun = begin(experiment, Launched(*start(experiment)))
        self.loop = prepare(experiment, begun.experiment, folder, begun.how, begun.text)
        self.plan: Plan = self.loop.plan
        self.tokenizer: PreTrainedTokenizerBase = begun.text.tokenizer

    def train(self) -> None:
        """Train to the last step of the plan, with periodic evaluation and checkpoints; metrics go to the run folder.

        Raises:
            RunFailed: too many consecutive steps were not finite, or another process is missing; checkpoints are kept.
            BudgetUnmet: a measured step exceeded the budget, with `memory.exceeded: stop`.
        """
        with self._status, working(self._status.name, "training", quiet=True, model="student"):
            self.loop.train()

    def evaluate(self) -> dict[str, float]:
        """Evaluate the student in its present state on the held-out set; a collective call on all processes.

        Returns:
            `bits_per_byte` and `cross_entropy` (nats per token).
        """
        found = self.loop.evaluations.held_out(self.loop.student, self.loop.state.step)
        assert found is not None, "nobody asks a script to stop"
        return found

    def student(self) -> nn.Module:
        """The unsharded student with fp32 weights, on the main process; a sharded one is read from its last checkpoint.

        Raises:
            RunFailed: the student is sharded, and no checkpoint holds its last step.
        """
        return self.loop.whole()
