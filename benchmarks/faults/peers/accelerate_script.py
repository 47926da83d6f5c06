"""A training script on Accelerate that saves as its guide to checkpoints shows: numbered folders, a limit to them.

    python accelerate_script.py --rows ROWS.safetensors --model CONFIG.json --folder FOLDER [--total-limit 2]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM, get_linear_schedule_with_warmup


class Progress:
    """Steps done, as an object that Accelerate keeps with the rest."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """What is kept."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """What was kept."""
        self.step = state["step"]


def parser() -> argparse.ArgumentParser:
    """What both peers are told."""
    found = argparse.ArgumentParser()
    for name in ("rows", "model", "folder"):
        found.add_argument(f"--{name}", type=Path, required=True)
    found.add_argument("--steps", type=int, default=40)
    found.add_argument("--save-every", type=int, default=1)
    found.add_argument("--total-limit", type=int, default=2)
    found.add_argument("--seedable", action="store_true")
    return found


def main() -> None:
    """Train, going on from the newest checkpoint where there is one."""
    options = parser().parse_args()
    accelerator = Accelerator(
        project_config=ProjectConfiguration(project_dir=str(options.folder), automatic_checkpoint_naming=True,
                                            total_limit=options.total_limit),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=options.seedable))
    set_seed(0)
    rows = load_file(options.rows)
    loader = DataLoader(TensorDataset(rows["input_ids"], rows["weight"]), batch_size=8, shuffle=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(options.model.read_text())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, options.steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    checkpoints = options.folder / "checkpoints"
    if checkpoints.exists() and any(checkpoints.iterdir()):
        accelerator.load_state()
        accelerator.project_configuration.iteration = progress.step // options.save_every
        print(f"resumed at step {progress.step}", flush=True)
    losses = (options.folder / "losses.jsonl").open("a")
    model.train()
    while progress.step < options.steps:
        epoch, done = divmod(progress.step, len(loader))
        batches = accelerator.skip_first_batches(loader, done) if done else loader
        batches.set_epoch(epoch)
        for ids, weight in batches:
            logits = model(input_ids=ids).logits[:, :-1]
            each = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
            loss = (each * weight).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.step += 1
            print(json.dumps({"step": progress.step, "loss": loss.item()}), file=losses, flush=True)
            print(f"step {progress.step}/{options.steps}  loss {loss.item():.4f}", flush=True)
            if progress.step % options.save_every == 0:
                accelerator.save_state()
            if progress.step == options.steps:
                break


if __name__ == "__main__":
    main()
