"""Held-out loss of one student after distillation by Limbeck and by peers: same teacher, rows and steps.

    python -m benchmarks.distillation.peers_quality DATA_FOLDER --folder FOLDER [--seeds 3] [--json FILE]

FOLDER is that of `benchmarks.distillation.students`, whose teacher and options these are. Peers run in transformers'
Trainer on the very rows of our runs, in their order, with AdamW, learning rates, weight decay and clipping as in ours,
from the same first weights; what differs is the loss:

- `hf_kl`: what scripts write by hand, half cross-entropy and half T^2 KL at T = 2;
- `trl_gkd`: `GKDTrainer`'s own loss (trl, `pip install trl`) with its defaults, JSD at beta 0.5 alone, on the data;
- `distillkit_top_k`: half cross-entropy and half KL at T = 2 over the teacher's 64 most probable tokens, the others
  left out, as DistillKit's documentation recommends;
- `forward_kl`: ours, as the default of the students' table; other names of that table are ours, too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import limbeck
from benchmarks.distillation import students
from benchmarks.quickstart import machine, show
from strategies.distillation.losses.response import IGNORED
from trainer.data.batches import training_batches
from trainer.data.dataset import PreparedData, prepare_text
from trainer.experiment.experiment import Experiment
from trainer.models.build import build_student
from trainer.models.configs import student_config

TOP = 64


def hf_kl(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Half cross-entropy, half T^2 KL at T = 2, from logits (tokens, vocabulary); a mean over tokens."""
    kl = F.kl_div(F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1), log_target=True,
                  reduction="batchmean")
    return 0.5 * F.cross_entropy(student, targets) + 0.5 * 4 * kl


def trl_gkd(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of trl's GKDTrainer with its defaults."""
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], targets[None], beta=0.5)


def distillkit_top_k(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Half cross-entropy, half T^2 KL at T = 2 over the teacher's most probable tokens, without the others."""
    log_q, log_p = F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1)
    chosen = log_p.topk(TOP, -1)
    sparse = (chosen.values.exp() * (chosen.values - log_q.gather(-1, chosen.indices))).sum(-1).mean()
    return 0.5 * F.cross_entropy(student, targets) + 0.5 * 4 * sparse


PEERS = {"hf_kl": hf_kl, "trl_gkd": trl_gkd, "distillkit_top_k": distillkit_top_k}
TITLES = {"hf_kl": "HF Trainer, KL by hand", "trl_gkd": "TRL GKD", "distillkit_top_k": "top-k as DistillKit does it"}


class PeerTrainer(Trainer):
    """transformers' Trainer with a loss between the logits at target tokens; rows come in the order given."""

    def __init__(self, *args: Any, teacher: nn.Module, loss: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teacher, self.loss = teacher, loss

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> torch.Tensor:
        targets = inputs.pop("targets")
        kept = targets != IGNORED
        with torch.no_grad():
            theirs = self.teacher(**inputs, use_cache=False).logits[kept]
        return self.loss(model(**inputs, use_cache=False).logits[kept], theirs, targets[kept])


def main(arguments: list[str] | None = None) -> int:
    """Train the students, print the table, and write what was found."""
    made = students.parser()
    made.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    chosen = made.parse_args(arguments)
    with tempfile.TemporaryDirectory() as room:
        rows = list(of_all(chosen, chosen.folder or Path(room)))
    settings = {name: value for name, value in vars(chosen).items() if name not in ("data", "folder", "json")}
    found = {"settings": settings, "machine": machine(), "rows": rows}
    show(table(found), found, chosen.json)
    return 0


def of_all(chosen: argparse.Namespace, room: Path) -> Any:
    """A row for each seed and way to learn."""
    room.mkdir(parents=True, exist_ok=True)
    students.trained(students.TEACHER, 0, chosen, room)
    for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
        for student in chosen.taught:
            row = students.trained(student, seed, chosen, room)
            yield {"seed": seed, "method": student, "cross_entropy": row["cross_entropy"]}
        for peer in chosen.peers:
            if peer != "trl_gkd" or find_spec("trl"):
                row = {"seed": seed, "method": peer, "cross_entropy": of_peer(peer, seed, chosen, room)}
                print(f"{TITLES[peer]}, seed {seed}: {row['cross_entropy']:.4f} nats per token", flush=True)
                yield row


def of_peer(peer: str, seed: int, chosen: argparse.Namespace, room: Path) -> float:
    """Cross-entropy per token of held-out text after a peer's training."""
    experiment = experiment_of(seed, chosen, room)
    text = prepare_text(experiment)
    model = build_student(experiment, student_config(experiment.student, None, chosen.vocabulary), None,
                          text.tokenizer)
    teacher = AutoModelForCausalLM.from_pretrained(experiment.teacher.path).eval()
    optimizer = experiment.optimizer.build(model)
    rate = experiment.schedule.build(experiment.optimizer.lr, chosen.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step) / experiment.optimizer.lr)
    settings = TrainingArguments(output_dir=str(room / "peer"), max_steps=chosen.steps, use_cpu=True, report_to=[],
                                 per_device_train_batch_size=chosen.batch, max_grad_norm=experiment.training.clip,
                                 save_strategy="no", logging_strategy="no", disable_tqdm=True,
                                 remove_unused_columns=False)
    PeerTrainer(model, settings, train_dataset=rows_of(text, seed, chosen), teacher=teacher, loss=PEERS[peer],
                optimizers=(optimizer, schedule)).train()
    return held_out(model.eval(), text)


def experiment_of(seed: int, chosen: argparse.Namespace, room: Path) -> Experiment:
    """The experiment of our own run with the default loss."""
    import yaml

    file = room / f"peer-{seed}.yaml"
    file.write_text(yaml.safe_dump(students.experiment("forward_kl", seed, chosen, room)))
    return limbeck.read_experiment(file).experiment


def rows_of(text: PreparedData, seed: int, chosen: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """The rows of a run in its order."""
    batches = training_batches(text.train, seed=seed, micro_batch=chosen.batch, replica=0, replicas=1, skip=0,
                               workers=0, pin=False)
    return [{name: batch[name][row] for name in ("input_ids", "position_ids", "targets")}
            for batch, _ in zip(batches, range(chosen.steps), strict=False) for row in range(chosen.batch)]


@torch.no_grad()
def held_out(model: nn.Module, text: PreparedData) -> float:
    """Cross-entropy per token, in nats."""
    total, rows = 0.0, text.held_out
    for begin in range(0, len(rows["input_ids"]), 8):
        part = {name: rows[name][begin:begin + 8] for name in ("input_ids", "position_ids", "targets")}
        kept = (targets := part.pop("targets")) != IGNORED
        total += float(F.cross_entropy(model(**part, use_cache=False).logits[kept], targets[kept], reduction="sum"))
    return total / int((rows["targets"] != IGNORED).sum())


def table(found: dict) -> str:
    """Means over seeds, and the lead of our best, in Markdown."""
    rows, titles = found["rows"], {**students.TITLES, **TITLES}
    of = {method: {row["seed"]: row["cross_entropy"] for row in rows if row["method"] == method}
          for method in dict.fromkeys(row["method"] for row in rows)}
    best = min((method for method in of if method not in PEERS), key=lambda one: statistics.mean(of[one].values()))
    lines = ["| trained by | held-out cross-entropy, nats per token (sd) | above our best, seed by seed (sd) |",
             "|---|---:|---:|"]
    for method, losses in of.items():
        spread, above = (students.spread(values) for values in (
            list(losses.values()), [loss - of[best][seed] for seed, loss in losses.items()]))
        title = titles[method] if method in PEERS else f"Limbeck, {titles[method]}"
        lines.append(f"| {title} | {spread['mean']:.4f} ({spread['sd']:.4f}) | {above['mean']:+.4f} "
                     f"({above['sd']:.4f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
