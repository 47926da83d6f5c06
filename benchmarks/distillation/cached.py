"""A teacher's cached targets alone: bytes of a token, tokens a second, and how far their gradients are from exact ones.

    python -m benchmarks.distillation.cached [--json FILE] [--vocabularies 32000 151936] [--width 896]

The teacher is a random head over random hidden states, whose length differs from position to position as the certainty
of a language model does: logits are Gaussian with a standard deviation of around `SPREAD`, which gives a mean entropy
of about 2 nats, from 0.2 at one position in ten to 4 or 5 at another. The mean entropy is stated, and the mean mass
outside of the 64 most probable tokens.

`bytes stated` is what `total_bytes` says before anything is written (for samples, from the mean number of distinct
tokens), `bytes on disk` what all files of the cache take. Tokens a second are medians over rounds: `made` from the
teacher's logits, `written` to a disk that is synced, and `read` a few rows at a time in a random order, from files that
the system has in memory and whose checksums have been compared.

Errors are of the gradient of KL(teacher || student) by the student's logits, at all of some positions, as a share of
its norm in float64 from the teacher in fp32. `one` is that of one set of targets (the root of its mean square over
seeds). `mean` is that of the mean gradient over seeds, which is what training sees over time: where draws have no bias
it is about `one` divided by the root of their number, which is `unbiased`, and where nothing is drawn it is `one`. A
student is far, with hidden states and a head of its own, or near, with the teacher's head and hidden states `NEAR`
away, where the exact gradient is small. Of a teacher that runs in bf16 nothing is lost by hidden states in bf16.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.quickstart import machine, show
from strategies.distillation.losses.divergences import Divergence
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.response import ResponseObjective
from strategies.distillation.losses.teacher_targets import HiddenTargets, Targets, TopTargets
from strategies.distillation.teacher_cache.cache_reader import (
    Identity,
    TargetCache,
    TargetWriter,
    bytes_per_token,
    total_bytes,
)
from strategies.distillation.teacher_cache.sampling import draw_samples, sampled_targets, top_k

SPREAD, VARIED = 7.0, 0.4  # median of the standard deviation of a position's logits, and the spread of its logarithm
NEAR = 0.01  # distance of a near student's hidden states, as a share of the teacher's
DRAWS, K = 50, 64
READ = 8  # rows at a time
TITLES = {"hidden": "hidden states", "samples": f"{DRAWS} draws", "top_k": f"top {K}"}
Content = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Teacher:
    """Hidden states (tokens, width) and a head (vocabulary, width), fp32."""

    hidden: torch.Tensor
    head: torch.Tensor


def main(arguments: list[str] | None = None) -> int:
    """Measure every kind at every vocabulary, print the table, and write what was found."""
    chosen = parser().parse_args(arguments)
    rows = []
    for vocabulary in chosen.vocabularies:
        rows += rows_of(vocabulary, chosen)
        print(f"vocabulary of {vocabulary:,}: done", flush=True)
    settings = {name: value for name, value in vars(chosen).items() if name != "json"}
    found = {"settings": settings, "machine": machine(), "rows": rows}
    show(table(found), found, chosen.json)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 151_936])
    made.add_argument("--width", type=int, default=896)
    made.add_argument("--rows", type=int, default=32, help="sequences in a cache")
    made.add_argument("--length", type=int, default=256, help="tokens of each, all learned")
    made.add_argument("--rounds", type=int, default=5, help="that are timed")
    made.add_argument("--positions", type=int, default=32, help="whose gradients are compared")
    made.add_argument("--repeats", type=int, default=64, help="seeds of draws that the mean gradient is over")
    made.add_argument("--json", type=Path)
    return made


def rows_of(vocabulary: int, chosen: argparse.Namespace) -> list[dict]:
    """One row for each kind of cache."""
    torch.manual_seed(0)
    teacher = random_teacher(chosen.rows * chosen.length, chosen.width, vocabulary)
    part = replace(teacher, hidden=teacher.hidden[:chosen.positions])
    said = certainty(part)
    students = {"far": student_far(part), "near": student_near(part)}
    found = []
    for identity in identities(vocabulary, chosen):
        row = {"kind": identity.kind, "dtype": identity.dtype, "vocabulary": vocabulary, **said}
        row |= bytes_and_speed(identity, teacher, chosen.rounds)
        found.append(row | gradient_errors(identity, part, students, chosen.repeats))
    return found


def identities(vocabulary: int, chosen: argparse.Namespace) -> list[Identity]:
    """Of the caches that are compared."""
    common = {"rows": chosen.rows, "sequence_length": chosen.length, "teacher": "random", "tokenizer": "none",
              "data": "random"}
    softmax = {"vocabulary": vocabulary, "temperature": 1.0}
    return [*(Identity("hidden", dtype=dtype, width=chosen.width, **common) for dtype in ("bfloat16", "float32")),
            Identity("samples", draws=DRAWS, **softmax, **common), Identity("top_k", k=K, **softmax, **common)]


# ---- the teacher and its students

def random_teacher(tokens: int, width: int, vocabulary: int) -> Teacher:
    """Logits of a standard deviation that is log-normal over positions."""
    spread = SPREAD * torch.exp(VARIED * torch.randn(tokens, 1))
    return Teacher(spread * torch.randn(tokens, width), torch.randn(vocabulary, width) / width**0.5)


def certainty(teacher: Teacher) -> dict[str, float]:
    """Mean entropy in nats, and mean mass outside of the most probable `K` tokens."""
    log_p = (teacher.hidden @ teacher.head.T).log_softmax(-1)
    outside = log_p.sort(-1, descending=True).values[:, K:].exp().sum(-1)
    return {"entropy": float(torch.special.entr(log_p.exp()).sum(-1).mean()), "outside_top_k": float(outside.mean())}


def student_far(teacher: Teacher) -> torch.Tensor:
    """Logits (positions, vocabulary) of a student that knows nothing of its teacher."""
    stranger = random_teacher(len(teacher.hidden), teacher.head.shape[1], teacher.head.shape[0])
    return stranger.hidden @ stranger.head.T


def student_near(teacher: Teacher) -> torch.Tensor:
    """Logits (positions, vocabulary) of a student close to its teacher."""
    size = teacher.hidden.square().mean(-1, keepdim=True).sqrt()
    return (teacher.hidden + NEAR * size * torch.randn_like(teacher.hidden)) @ teacher.head.T


# ---- bytes and speed

def bytes_and_speed(identity: Identity, teacher: Teacher, rounds: int) -> dict[str, float]:
    """Bytes of a token, and median tokens a second."""
    tokens = identity.rows * identity.sequence_length
    contents, seconds = zip(*(made(identity, teacher, row) for row in range(identity.rows)), strict=True)
    made_per_second = None if identity.kind == "hidden" else identity.sequence_length / statistics.median(seconds)
    distinct = None
    if identity.kind == "samples":
        distinct = sum(int(content["distinct"].sum()) for content in contents) / tokens
    with tempfile.TemporaryDirectory() as room:
        folders = [Path(room) / str(number) for number in range(rounds)]
        written = [timed(lambda folder=folder: write(folder, identity, contents)) for folder in folders]
        size = sum(file.stat().st_size for file in folders[0].rglob("*") if file.is_file())
        cache = TargetCache(folders[0], identity)
        cache.verify()
        read = [timed(lambda number=number: read_all(cache, identity.rows, number)) for number in range(rounds)]
    return {"bytes_stated": total_bytes(identity, tokens, distinct) / tokens, "bytes_on_disk": size / tokens,
            "bytes_at_most": bytes_per_token(identity), "distinct": distinct,
            "made_per_second": made_per_second,
            "written_per_second": tokens / statistics.median(written),
            "read_per_second": tokens / statistics.median(read)}


def made(identity: Identity, teacher: Teacher, row: int) -> tuple[Content, float]:
    """What the cache is given for a row, and the seconds that this takes once the teacher has run."""
    length = identity.sequence_length
    numbers = torch.arange(row * length, (row + 1) * length)
    hidden = teacher.hidden[numbers]
    says = hidden if identity.kind == "hidden" else hidden @ teacher.head.T
    begun = time.perf_counter()
    content = content_of(identity, says, numbers, seed=0)
    seconds = time.perf_counter() - begun
    return {"tokens": torch.tensor([length]), **content}, seconds


def content_of(identity: Identity, says: torch.Tensor, numbers: torch.Tensor, seed: int) -> Content:
    """What is kept of hidden states (tokens, width), or of logits (tokens, vocabulary)."""
    if identity.kind == "hidden":
        return {"hidden": says.to(getattr(torch, identity.dtype))}
    if identity.kind == "samples":
        return draw_samples(says, DRAWS, identity.temperature, seed, numbers)
    return top_k(says, K, identity.temperature)


def write(folder: Path, identity: Identity, contents: Sequence[Content]) -> None:
    """A whole cache."""
    with TargetWriter(folder, identity) as writer:
        for row in writer.rows_left():
            writer.add([row], contents[row])


def read_all(cache: TargetCache, rows: int, seed: int) -> None:
    """Every row once, in an order of its own for each seed."""
    order = random.Random(seed).sample(range(rows), rows)
    for first in range(0, rows, READ):
        cache.read(order[first:first + READ])


def timed(step: Callable[[], object]) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


# ---- gradients

def gradient_errors(identity: Identity, teacher: Teacher, students: dict[str, torch.Tensor], repeats: int
                    ) -> dict[str, dict[str, float]]:
    """Relative errors of the gradient by each student's logits: of one set of targets, and of the mean over seeds."""
    log_p = (teacher.hidden.double() @ teacher.head.double().T).log_softmax(-1)
    wanted = {name: student.double().softmax(-1) - log_p.exp() for name, student in students.items()}
    repeats = repeats if identity.kind == "samples" else 1
    squares, means = dict.fromkeys(wanted, 0.0), {name: torch.zeros_like(exact) for name, exact in wanted.items()}
    for seed in range(repeats):
        teacher_targets = targets_of(identity, teacher, seed)
        for name, student in students.items():
            found = gradient(teacher_targets, student)
            squares[name] += error(found, wanted[name]) ** 2 / repeats
            means[name] += found / repeats
    return {name: {"one": squares[name] ** 0.5, "mean": error(means[name], exact),
                   "unbiased": (squares[name] / repeats) ** 0.5} for name, exact in wanted.items()}


def targets_of(identity: Identity, teacher: Teacher, seed: int) -> Targets:
    """What a student is given of all positions."""
    numbers = torch.arange(len(teacher.hidden))
    says = teacher.hidden if identity.kind == "hidden" else teacher.hidden @ teacher.head.T
    content = content_of(identity, says, numbers, seed)
    if identity.kind == "hidden":
        return HiddenTargets(content["hidden"], Head(teacher.head))
    if identity.kind == "samples":
        return sampled_targets(content, DRAWS, identity.temperature)
    return TopTargets(**content, temperature=identity.temperature)


def gradient(teacher_targets: Targets, student: torch.Tensor) -> torch.Tensor:
    """Of KL(teacher || student), by the student's logits (positions, vocabulary), in fp32."""
    logits = student.clone().requires_grad_()
    everywhere = torch.zeros(len(logits), dtype=torch.long)
    ResponseObjective(0.0, (Divergence("forward_kl"),))(logits, teacher_targets, everywhere)[0].backward()
    return logits.grad


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference as a share of the norm."""
    return float((found - wanted).norm() / wanted.norm())


# ---- printing

def table(found: dict) -> str:
    """Rows as a Markdown table."""
    lines = ["| cached | vocabulary | bytes per token stated | on disk | times smaller than fp16 logits | made, "
             "tokens/s | written, tokens/s | read, tokens/s | gradient error, student far: one; mean (unbiased) | "
             "near: one; mean (unbiased) |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in found["rows"]:
        speeds = [row[f"{what}_per_second"] for what in ("made", "written", "read")]
        figures = [f"{row['vocabulary']:,}", f"{row['bytes_stated']:,.1f}", f"{row['bytes_on_disk']:,.1f}",
                   f"x{2 * row['vocabulary'] / row['bytes_on_disk']:,.0f}",
                   *("" if speed is None else f"{speed:,.0f}" for speed in speeds),
                   *(f"{row[distance]['one']:.1e}; {row[distance]['mean']:.1e} ({row[distance]['unbiased']:.1e})"
                     for distance in ("far", "near"))]
        lines.append(f"| {TITLES[row['kind']]}, {row['dtype']} | {' | '.join(figures)} |")
    certain = {row["vocabulary"]: row for row in found["rows"]}
    said = "; ".join(f"{row['entropy']:.2f} nats over {size:,} tokens, {row['outside_top_k']:.1%} outside of the {K} "
                     "most probable" for size, row in certain.items())
    lines.append(f"\nThe teacher's mean entropy: {said}. Means are over {found['settings']['repeats']} sets of draws.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
