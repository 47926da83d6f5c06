"""One side of the comparison, in a process of its own: trains, and waits before steps until it is told to go on.

    python -m benchmarks.end_to_end.contestant NAME FOLDER

It reads from its standard input how many steps to run, and answers with a line of JSON: the seconds that they took, and
the losses known by then. When all steps are done it says how much memory it took, and ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.end_to_end.material import Setting

OURS, TRAINER, SFT, GKD = "limbeck", "transformers Trainer", "trl SFT", "trl GKD"
CONTESTANTS = {"fine-tune": (OURS, TRAINER, SFT), "distill": (OURS, GKD)}


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Gate:
    """Stands at the beginning of each step, and holds it until it is told to go on."""

    def __init__(self, steps: int, device: str) -> None:
        self.device, self.steps, self.done, self.left, self.started = device, steps, 0, 0, 0.0
        self.losses: list[float] = []
        self.imported = resident("VmRSS")
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer

    def begin(self) -> None:
        """A step begins: the one before is over, with all that belongs to it."""
        if self.left == 0:
            self._wait()
        self.left -= 1
        self.done += 1

    def end(self) -> None:
        """The last step is over."""
        peak, before = resident("VmHWM"), self.imported
        if self.device == "cuda":
            import torch

            peak, before = torch.cuda.max_memory_allocated(), 0
        self.answer(peak=peak, imported=before)

    def answer(self, **more: Any) -> None:
        """What is known of the steps since the last answer."""
        line = {"seconds": time.perf_counter() - self.started, "steps": self.done, "losses": self.losses, **more}
        self.answers.write(json.dumps(line) + "\n")
        self.answers.flush()

    def _wait(self) -> None:
        if self.started:
            self.answer()
        else:
            self.answers.write('"ready"\n')
            self.answers.flush()
        self.left = int(sys.stdin.readline())
        self.started = time.perf_counter()


def limbeck_side(room: Path, setting: Setting) -> None:
    """Our run, whole: its loop is held at each step and at its end."""
    import numba  # noqa: F401 - what a run imports on its way, before the count of what is held after imports
    from transformers import LlamaForCausalLM  # noqa: F401

    import limbeck
    from trainer import pipeline  # noqa: F401
    from trainer.training.loop import TrainLoop

    gate = Gate(setting.steps, setting.device)
    step, train = TrainLoop.train_step, TrainLoop.train

    def held(self: TrainLoop, inputs: Any) -> Any:
        gate.begin()
        record = step(self, inputs)
        gate.losses.append(record["loss"])
        return record

    def trained(self: TrainLoop) -> None:
        train(self)
        gate.end()
        os._exit(0)  # evaluations and exports are no part of the comparison

    TrainLoop.train_step, TrainLoop.train = held, trained
    limbeck.run(limbeck.read_experiment(room / "experiment.yaml"))


def peer_side(name: str, room: Path, setting: Setting) -> None:
    """A peer's trainer with its defaults, on the rows of our run in their order."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    from benchmarks.end_to_end.material import BATCH, BETAS, RATE

    kind, arguments = Trainer, TrainingArguments
    if name == SFT:
        from trl import SFTConfig, SFTTrainer

        kind, arguments = SFTTrainer, SFTConfig
    elif name == GKD:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        kind, arguments = GKDTrainer, GKDConfig
    rows = torch.load(room / "rows.pt")
    gate = Gate(setting.steps, setting.device)

    class InOrder(kind):  # type: ignore[valid-type,misc]
        """Rows come as they are given; the loss of each step is kept."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *positional: Any, **named: Any) -> Any:
            found = super().compute_loss(*positional, **named)
            gate.losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

    class AtGate(TrainerCallback):
        """Holds the trainer at each step and at its end."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            gate.end()
            os._exit(0)

    def together(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in batch])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids),
                **({"prompts": ids[:, :1]} if name == GKD else {})}

    settings = arguments(
        output_dir=str(room / "peer"), max_steps=setting.steps, use_cpu=setting.device == "cpu", report_to=[],
        save_strategy="no",
        per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=1.0, logging_strategy="no", disable_tqdm=True,
        bf16=setting.dtype == "bf16", remove_unused_columns=False, dataloader_drop_last=False,
        **({"gradient_checkpointing": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
           if name in (SFT, GKD) else {}), **({"lmbda": 0.0, "beta": 0.5, "temperature": 1.0} if name == GKD else {}))
    model = AutoModelForCausalLM.from_pretrained(room / "student")
    more = {} if name == TRAINER else {"processing_class": AutoTokenizer.from_pretrained(room / "student")}
    if name == GKD:
        more["teacher_model"] = AutoModelForCausalLM.from_pretrained(room / "teacher")
    InOrder(model=model, args=settings, train_dataset=Dataset.from_list([
        {key: value.tolist() for key, value in row.items()} for row in rows]), data_collator=together,
        callbacks=[AtGate()], **more).train()


def main() -> None:
    """Take part."""
    name, room = sys.argv[1], Path(sys.argv[2])
    from benchmarks.end_to_end.material import Setting

    setting = Setting.read(room)
    if name == OURS:
        limbeck_side(room, setting)
    else:
        peer_side(name, room, setting)


if __name__ == "__main__":
    main()
