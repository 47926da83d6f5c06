"""A training script on the Trainer of transformers: `save_steps`, `save_total_limit`, `resume_from_checkpoint=True`.

    python hf_trainer_script.py --rows ROWS.safetensors --model CONFIG.json --folder FOLDER [--total-limit 2]
"""

from __future__ import annotations

import json
import os

from accelerate_script import parser
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


class Weighted(Trainer):
    """Each row's loss times its weight."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over rows."""
        ids, weight = inputs["input_ids"], inputs["weight"]
        output = model(input_ids=ids)
        each = cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
        loss = (each * weight).mean()
        return (loss, output) if return_outputs else loss


class Progress(TrainerCallback):
    """Says where training begins, and each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Where it begins."""
        if state.global_step:
            print(f"resumed at step {state.global_step}", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        """A step."""
        print(f"step {state.global_step}/{state.max_steps}", flush=True)


def main() -> None:
    """Train, going on from the newest checkpoint where there is one."""
    options = parser().parse_args()
    set_seed(0)
    rows = load_file(options.rows)
    data = [{"input_ids": ids, "weight": weight}
            for ids, weight in zip(rows["input_ids"], rows["weight"], strict=True)]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(options.model.read_text())))
    settings = TrainingArguments(
        output_dir=str(options.folder), max_steps=options.steps, per_device_train_batch_size=8, learning_rate=1e-3,
        warmup_steps=5, save_strategy="steps", save_steps=options.save_every, save_total_limit=options.total_limit,
        logging_steps=1, report_to="none", use_cpu=True, seed=0, disable_tqdm=True, remove_unused_columns=False)
    trainer = Weighted(model=model, args=settings, train_dataset=data, callbacks=[Progress()])
    there = os.path.isdir(options.folder) and get_last_checkpoint(str(options.folder)) is not None
    trainer.train(resume_from_checkpoint=True if there else None)


if __name__ == "__main__":
    main()
