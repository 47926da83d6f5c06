"""Adapters on a frozen base: beside peft with the HF Trainer on the same rows, and in bytes beside full fine-tuning.

    python -m benchmarks.adapters [--blocks 8] [--steps 8] [--bases nf4 ...] [--json FILE]

The model has the shapes of SmolLM2-135M with random weights, so that no network is needed; `--blocks` are those of the
comparison with the HF Trainer, bytes are those of all 30. Each run is a process of its own. Peaks of processes are of
their resident set; bytes are those that the plan foretells, and those that a measured step holds, for rows of several
documents, and for rows that are pieces of a long one. (A plan is for rows of several: it counts their mask, and the
keys and values that transformers repeats beside a mask. Pieces of one document do without both.)
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
SMOL = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048, "bos_token_id": 0,
        "eos_token_id": 0}
RANK, ALPHA, RATE, BLOCKS = 16, 32.0, 1e-3, 30
COMPARED, HELD = (8, 256), (4, 128)  # rows of a batch and tokens of a row: beside the HF Trainer, and of the bytes
QUANTIZATION = {"method": "rtn", "bits": 4, "group_size": 64}  # of a base that is held as it is exported
ROWS = ("several documents", "one document")
WORDS = 10  # of a document, with about 8 tokens each, where a row of `HELD` has several
MIB = 2**20


def main() -> None:
    """Run all, print the tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--bases", nargs="+", default=["float32", "bfloat16", "int8", "nf4", "quantized"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return CHILDREN[arguments.child[0]](Path(arguments.child[1]), *arguments.child[2:])
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        make_text(room)
        make_base(room / "small", arguments.blocks)
        rows = [child("ours", room, room / "small", arguments.steps), child("hf_trainer", room, room / "small")]
        make_base(room / "whole", BLOCKS)
        held = [child("bytes_of", room, room / "whole", kind, rows) for rows in ROWS
                for kind in ("full", *(arguments.bases if rows == ROWS[0] else ["nf4"]))]
    result = {"command": " ".join(["python -m benchmarks.adapters", *sys.argv[1:]]), "blocks": arguments.blocks,
              "rows and length": {"compared": COMPARED, "bytes": HELD},
              "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
              "machine": platform.processor() or platform.machine(), "rows": rows, "bytes": held,
              "summary": summary(*rows, held)}
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def child(kind: str, room: Path, *words: Any) -> dict[str, Any]:
    """What a process of its own finds."""
    command = [sys.executable, "-m", "benchmarks.adapters", "--child", kind, str(room), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.strip().split("\n")[-1])
    print(f"{kind} {' '.join(map(str, words[1:]))}: {json.dumps(found)}", flush=True)
    return found


def summary(ours: dict, theirs: dict, held: list[dict]) -> dict[str, float]:
    """The figures that count."""
    pairs = list(zip(ours["losses"], theirs["losses"], strict=True))
    by_kind = {(row["kind"], row["rows"]): row for row in held}
    shares = {f"nf4_of_full, {rows}": by_kind["nf4", rows]["measured"] / by_kind["full", rows]["measured"]
              for rows in ROWS}
    plans = {rows: [row["planned"] / row["measured"] for row in held if row["rows"] == rows] for rows in ROWS}
    return {"largest_relative_loss_difference": max(abs(one / other - 1) for one, other in pairs),
            "step_time_ratio": ours["seconds"] / theirs["seconds"],
            "resident_set_ratio": ours["resident_set"] / theirs["resident_set"],
            **shares, **{f"plan_of_measured, {rows}": [min(found), max(found)] for rows, found in plans.items()}}


def table(result: dict) -> str:
    """Both tables in Markdown."""
    lines = ["| | loss of the last step | seconds a step | peak resident set, MiB |", "|---|---:|---:|---:|"]
    lines += [f"| {row['system']} | {row['losses'][-1]:.6f} | {row['seconds']:.2f} | {row['resident_set'] / MIB:,.0f} |"
              for row in result["rows"]]
    lines += ["", "| trained | rows | planned MiB | measured MiB | of full fine-tuning |", "|---|---|---:|---:|---:|"]
    full = {row["rows"]: row["measured"] for row in result["bytes"] if row["kind"] == "full"}
    lines += [f"| {NAMES.get(row['kind'], row['kind'])} | {row['rows']} | {row['planned'] / MIB:,.1f} | "
              f"{row['measured'] / MIB:,.1f} | {row['measured'] / full[row['rows']]:.3f} |" for row in result["bytes"]]
    found = result["summary"]
    plans = ", ".join(f"x{found[f'plan_of_measured, {rows}'][0]:.5f} to x{found[f'plan_of_measured, {rows}'][1]:.5f} "
                      f"for rows of {rows}" for rows in ROWS)
    return "\n".join([*lines, "", f"Losses differ by at most {found['largest_relative_loss_difference']:.1e} of their "
                      f"size; step time is x{found['step_time_ratio']:.2f}, resident set x"
                      f"{found['resident_set_ratio']:.2f} of peft with the HF Trainer. Planned bytes over measured: "
                      f"{plans}."])


NAMES = {"full": "all weights", "quantized": "adapters on quantized (4 bits, groups of 64)"} | {
    base: f"adapters on {base}" for base in ("float32", "bfloat16", "int8", "nf4")}


# ---- material

def make_text(room: Path) -> None:
    """Text with something to learn."""
    generator = torch.Generator().manual_seed(0)
    words = [f"word{number}" for number in range(500)]
    lines = [" ".join(words[at] for at in torch.randint(0, 500, (40,), generator=generator)) for _ in range(800)]
    (room / "text").mkdir()
    (room / "text" / "all.txt").write_text("\n".join(lines))
    (room / "documents").mkdir()
    (room / "documents" / "all.jsonl").write_text("".join(
        json.dumps({"text": " ".join(line.split()[:WORDS])}) + "\n" for line in lines))


def make_base(folder: Path, blocks: int) -> None:
    """A model of SmolLM2-135M's shapes, with random weights and a tokenizer of 49152 tokens at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOL, num_hidden_layers=blocks)).save_pretrained(folder)
    alphabet = {token: number + 1 for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, **alphabet}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
                            ).save_pretrained(folder)


def experiment_of(room: Path, base: str, name: str, steps: int, student: dict, size: tuple[int, int],
                  data: dict | None = None) -> Any:
    """The experiment of a run, read from its file."""
    from trainer.experiment.load import read_experiment

    file = room / f"{name}.yaml"
    file.write_text(yaml.safe_dump({
        "name": name, "student": {"path": base, **student},
        "data": {"path": str(room / "text"), "sequence_length": size[1], "validation": {"rows": 4}, **(data or {})},
        "optimizer": {"lr": RATE, "weight_decay": 0.0, "betas": [0.9, 0.999]}, "schedule": {"shape": "constant",
                                                                                           "warmup": 0},
        "training": {"steps": steps, "batch_size": size[0], "micro_batch": size[0], "evaluate_every": steps,
                     "checkpoint_every": steps},
        "run": {"folder": str(room / name), "cache": str(room / "cache"), "threads": torch.get_num_threads()}}))
    return read_experiment(file).experiment


def loop_of(experiment: Any) -> Any:
    """The training loop of an experiment, ready to run."""
    from trainer.data.dataset import prepare_text
    from trainer.distributed.launch import start
    from trainer.models.build import quiet_libraries
    from trainer.preparation import Launched, prepare
    from trainer.run.folder import RunFolder

    quiet_libraries()
    how = Launched(*start(experiment))
    return prepare(experiment, experiment, RunFolder(experiment.folder), how, prepare_text(experiment))


def resident_set() -> int:
    """Most bytes that this process had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- in processes of their own

def ours(room: Path, base: str, steps: str) -> None:
    """Train adapters here; leaves the rows that it trained on, and the adapters that it began with."""
    from safetensors.torch import save_file

    loop = loop_of(experiment_of(room, base, "ours", int(steps), {"adapter": {"rank": RANK, "alpha": ALPHA}},
                                 COMPARED))
    begun = {name: tensor.detach().clone() for name, tensor in loop.unwrapped.named_parameters() if "lora_" in name}
    taken: dict[str, list[torch.Tensor]] = {"input_ids": [], "position_ids": [], "targets": []}
    own = loop._loss

    def noted(batch: dict[str, torch.Tensor]) -> Any:
        for name, kept in taken.items():
            kept.append(batch[name])
        return own(batch)

    loop._loss, loop._measured_at = noted, -1  # nothing is measured beside: that would take time
    loop.train()
    save_file({name: torch.cat(kept).contiguous() for name, kept in taken.items()}, room / "rows.safetensors")
    save_file(begun, room / "begun.safetensors")
    lines = [json.loads(line) for line in loop.folder.metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    seconds = statistics.median(line["seconds"] for line in lines[1:] if "seconds" in line)
    print(json.dumps({"system": "Limbeck", "losses": losses, "seconds": seconds, "resident_set": resident_set()}))


def hf_trainer(room: Path, base: str) -> None:
    """Train the same adapters on the same rows by peft and the HF Trainer."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    rows, begun = load_file(room / "rows.safetensors"), load_file(room / "begun.safetensors")
    data = [{"input_ids": ids, "position_ids": positions, "labels": targets, "shift_labels": targets}
            for ids, positions, targets in zip(*rows.values(), strict=True)]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    model.load_state_dict({f"base_model.model.{name}": tensor for name, tensor in begun.items()}, strict=False)
    losses, moments = [], []

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(data)

        def compute_loss(self, model: Any, inputs: Any, *more: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(model, inputs, *more, **kwargs)
            losses.append(float(found))
            return found

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments[-1] = time.perf_counter() - moments[-1]

    settings = TrainingArguments(
        output_dir=str(room / "hf"), max_steps=len(data) // COMPARED[0], learning_rate=RATE,
        per_device_train_batch_size=COMPARED[0], lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=1.0, logging_steps=1000, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False)
    InOrder(model=model, args=settings, train_dataset=data, callbacks=[Watch()]).train()
    print()
    print(json.dumps({"system": "peft with HF Trainer", "losses": losses, "seconds": statistics.median(moments[1:]),
                      "resident_set": resident_set()}))


def bytes_of(room: Path, base: str, kind: str, rows: str) -> None:
    """Planned and measured bytes of the third step."""
    student: dict[str, Any] = {} if kind == "full" else {"adapter": {"rank": RANK, "alpha": ALPHA, "base": kind}}
    if kind == "quantized":
        student["quantization"] = QUANTIZATION
    loop = loop_of(experiment_of(room, base, f"bytes-{kind}-{len(rows)}", 3, student, HELD, {
        "path": str(room / ("documents" if rows == ROWS[0] else "text"))}))
    loop.saver.save = lambda state: None
    loop.train()
    lines = [json.loads(line) for line in loop.folder.metrics.read_text().splitlines()]
    measured = next(line["memory"]["peak"] for line in lines if "memory" in line)
    print(json.dumps({"kind": kind, "rows": rows, "planned": loop.plan.memory.peak, "measured": measured,
                      "parts": loop.plan.memory.parts}))


CHILDREN = {"ours": ours, "hf_trainer": hf_trainer, "bytes_of": bytes_of}

if __name__ == "__main__":
    main()
