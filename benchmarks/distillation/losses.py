"""Losses beside the naive ones, torch's, TRL's and Liger's: memory, time, and how right their gradients are.

    python -m benchmarks.distillation.losses --json FILE
    python -m benchmarks.distillation.losses --device cuda --hidden 4096 --vocabulary 128256 --tokens 8192

Each implementation is given the same hidden states and heads of student and teacher, and runs forward and backward.
Peak bytes are what is added to them, gradients included; what does not fit this machine is counted on tensors without
data and not timed. Times are medians over rounds in which all take turns. Errors are against the definition in float64:
of the hidden states' gradient at some rows, and in a table before that of all gradients, at many spreads of the logits
and with a student 0.01 from its teacher. `rate` is that of the products which no implementation can do without, over
the whole of its seconds, in FLOP/s; `machine_rate` is what matrix products of that dtype make here alone. Cross-entropy
alone has torch's two as peers: of all logits, as the naive one, and `linear_cross_entropy`, which takes a chunk of them
at a time. TRL and Liger: `pip install trl liger-kernel`. A file that is there already keeps the rows of what is not
measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from benchmarks.rematerialization.frontier import machine
from strategies.common.cpu_products import faster_fp32_products
from strategies.distillation.losses.divergences import Divergence
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.response import ResponseObjective
from strategies.distillation.losses.teacher_targets import HiddenTargets
from strategies.memory.meter import measure
from strategies.memory.tracker import LiveBytes
from tests.strategies.distillation.distilling import NEAR, WHOLE, Case, definition, relative

LARGEST = 14e9  # bytes beyond which an implementation is counted and not run on a CPU
ROWS = 8  # whose gradient is compared with float64 in the large cases
Loss = Callable[[str, Case], torch.Tensor]


# ---- implementations: the sum of a loss over positions

def limbeck(name: str, case: Case) -> torch.Tensor:
    """Ours."""
    text = name == "cross_entropy"
    objective = ResponseObjective(float(text), () if text else (Divergence(name),))
    teacher_targets = None if text else HiddenTargets(case.teacher_targets, Head(case.their_weight))
    return objective(case.hidden, teacher_targets, case.targets, head=Head(case.weight))[0]


def naive(name: str, case: Case) -> torch.Tensor:
    """All logits, in fp32 from the moment they exist, and torch's cross-entropy or the definition."""
    if name == "cross_entropy":
        return functional.cross_entropy((case.hidden @ case.weight.T).float(), case.targets, reduction="sum")
    teacher = case.teacher_targets @ case.their_weight.T
    return definition(name, (case.hidden @ case.weight.T).float(), teacher.float(), case.targets)


def trl(name: str, case: Case) -> torch.Tensor:
    """TRL's generalized Jensen-Shannon loss, which has forward and reverse KL at its ends."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = case.hidden @ case.weight.T, case.teacher_targets @ case.their_weight.T
    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], case.targets[None], reduction="sum",
                                           beta={"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[name])


def liger(name: str, case: Case) -> torch.Tensor:
    """Liger's chunked losses."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[name]
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=case.hidden.is_cuda)
    return (
        loss(case.hidden, case.weight, case.teacher_targets, case.their_weight, case.targets)
        * (case.targets >= 0).sum()
    )


def chunked_by_torch(_: str, case: Case) -> torch.Tensor:
    """torch's cross-entropy of a chunk of logits at a time, with the policies that it chooses by itself."""
    return functional.linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="sum", ignore_index=-100,
                                           options=torch.nn.LinearCrossEntropyOptions())


IMPLEMENTATIONS: dict[str, tuple[Loss, tuple[str, ...]]] = {
    "limbeck": (limbeck, ("cross_entropy", *WHOLE)), "naive": (naive, ("cross_entropy", *WHOLE)),
    "torch, chunked": (chunked_by_torch, ("cross_entropy",)),
    "trl": (trl, ("forward_kl", "reverse_kl", "jsd")), "liger": (liger, ("forward_kl", "reverse_kl", "jsd"))}


def present(implementation: str) -> bool:
    """Whether it is installed."""
    if implementation == "torch, chunked":
        return hasattr(functional, "linear_cross_entropy")
    needed = {"trl": "trl", "liger": "liger_kernel"}.get(implementation)
    return needed is None or find_spec(needed) is not None


# ---- memory and time

def make(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str, spread: float = 2.0,
         distance: float | None = None, seed: int = 0) -> Case:
    """Hidden states and heads whose logits have a standard deviation of `spread`."""
    torch.manual_seed(seed)
    width = spread / hidden**0.5

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=device).mul_(scale).to(dtype)

    mine, weight = random(tokens, hidden), random(vocabulary, hidden, scale=width)
    if distance is None:
        teacher_targets, theirs = random(tokens, hidden), random(vocabulary, hidden, scale=width)
    else:
        teacher_targets, theirs = (
            (mine + distance * torch.randn(tokens, hidden, device=device)).to(dtype),
            weight.clone(),
        )
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    targets[::16] = -100
    empty = torch.empty(0)
    return Case(mine.requires_grad_(), weight.requires_grad_(), empty, teacher_targets, theirs, empty, targets)


def run(loss: Loss, name: str, case: Case) -> None:
    """Forward and backward of the mean over tokens."""
    case.hidden.grad = case.weight.grad = None
    (loss(name, case) / len(case.targets)).backward()


def counted(loss: Loss, name: str, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Peak bytes that a loss adds, on tensors without data."""
    with FakeTensorMode():
        case = make(tokens, hidden, vocabulary, dtype, "cpu")
        case.targets = torch.zeros(tokens, dtype=torch.long)
        with LiveBytes() as tracker:
            if name == "cross_entropy":
                loss(name, case).backward()
                return tracker.peak
            student, teacher = case.hidden @ case.weight.T, case.teacher_targets @ case.their_weight.T
            if loss is naive:
                log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
                log_m = torch.logaddexp(log_p, log_q) if name == "jsd" else log_q
                found = (log_p.exp() * (log_p - log_m)).sum()
                if name == "jsd":
                    found = found + (log_q.exp() * (log_q - log_m)).sum()
            else:
                from trl.experimental.gkd.gkd_trainer import GKDTrainer

                found = GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.0 if name == "forward_kl" else 0.5,
                                                        reduction="sum")
            found.backward()
    return tracker.peak


def sizes(arguments: argparse.Namespace) -> list[dict]:
    """One row for each loss, implementation, dtype and number of tokens."""
    rows = []
    for tokens in arguments.tokens:
        for dtype in arguments.dtypes:
            case = make(tokens, arguments.hidden, arguments.vocabulary, getattr(torch, dtype), arguments.device)
            for name in arguments.losses:
                rows += _compared(name, case, dtype, arguments, rounds(tokens, arguments))
            del case
    return rows


def rounds(tokens: int, arguments: argparse.Namespace) -> int:
    """How often each implementation is timed: fewer times where there are more tokens, since it takes longer."""
    return max(1, round(arguments.rounds * min(arguments.tokens) / tokens))


def _compared(name: str, case: Case, dtype: str, arguments: argparse.Namespace, rounds: int) -> list[dict]:
    tokens, device = len(case.targets), torch.device(arguments.device)
    shape = {"dtype": dtype, "tokens": tokens, "vocabulary": arguments.vocabulary, "hidden": arguments.hidden}
    rows, running = [], {}
    for implementation, (loss, names) in IMPLEMENTATIONS.items():
        if name not in names or implementation not in arguments.implementations or not present(implementation):
            continue
        row = {"loss": name, "implementation": implementation, **shape}
        rows.append(row)
        if device.type == "cpu" and implementation in ("naive", "trl"):
            peak = counted(loss, name, tokens, arguments.hidden, arguments.vocabulary, getattr(torch, dtype))
            if peak > LARGEST:
                row |= {"peak_bytes": peak, "seconds": None, "gradient_error": None, "ran": False}
                continue
        case.hidden.grad = case.weight.grad = None
        resident = [case.hidden, case.weight, case.teacher_targets, case.their_weight, case.targets]
        found = measure(lambda loss=loss: run(loss, name, case), device, resident)
        row |= {"peak_bytes": found.peak - found.base, "gradient_error": error_of_rows(name, case), "ran": True}
        running[implementation] = row, loss
    times: dict[str, list[float]] = {implementation: [] for implementation in running}
    for _ in range(rounds):
        for implementation, (_, loss) in running.items():
            times[implementation].append(timed(lambda loss=loss: run(loss, name, case), device))
    for implementation, (row, _) in running.items():
        seconds = statistics.median(times[implementation])
        row |= {"seconds": seconds, "rounds": rounds, "rate": products_of(name, case) / seconds}
    print("\n".join(table(rows).splitlines()[2:]), flush=True)
    return rows


def products_of(name: str, case: Case) -> int:
    """FLOPs of the products of a forward and a backward, for the positions that have a target."""
    products = 3 if name == "cross_entropy" else 4  # logits, and gradients of both factors; the teacher's logits
    return products * 2 * int((case.targets >= 0).sum()) * case.weight.numel()


def machine_rate(dtype: torch.dtype, device: str, size: int = 2048) -> float:
    """FLOP/s of a square matrix product, the best of ten."""
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with faster_fp32_products(torch.device(device)):
        return 2 * size**3 / min(timed(lambda: one @ other, torch.device(device)) for _ in range(10))


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def error_of_rows(name: str, case: Case) -> float:
    """Relative error of the hidden states' gradient at a few rows, of which each depends on its own logits only."""
    rows = torch.argwhere(case.targets >= 0)[:ROWS, 0]
    hidden = case.hidden.detach()[rows].double().requires_grad_()
    student = hidden @ case.weight.detach().double().T
    teacher = case.teacher_targets[rows].double() @ case.their_weight.double().T
    definition(name, student, teacher, case.targets[rows]).div(len(case.targets)).backward()
    return relative(case.hidden.grad[rows], hidden.grad)


# ---- errors

def errors(device: str) -> list[dict]:
    """Relative errors of value and all gradients, by spread of the logits and distance of the student."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for spread in (0.1, 1.0, 3.0, 30.0):
            for distance in (None, NEAR):
                case = make(256, 128, 4096, dtype, device, spread, distance)
                for name in ("cross_entropy", *WHOLE):
                    rows += _errors(name, case, {"dtype": str(dtype)[6:], "spread": spread, "distance": distance})
    return rows


def _errors(name: str, case: Case, labels: dict) -> list[dict]:
    exact = Case(*(tensor.detach().double() if tensor.is_floating_point() else tensor
                   for tensor in case.__dict__.values()))
    exact.hidden.requires_grad_(), exact.weight.requires_grad_()
    wanted = definition(
        name, exact.hidden @ exact.weight.T, exact.teacher_targets @ exact.their_weight.T, exact.targets
    )
    wanted.backward()
    rows = []
    for implementation, (loss, names) in [*IMPLEMENTATIONS.items(), ("limbeck, float64", (wide, WHOLE)),
                                          ("limbeck, of logits", (None, WHOLE))]:
        if name not in names or not present(implementation.partition(",")[0]):
            continue
        if loss is None:
            found = of_logits(name, case) if labels["dtype"] == "float32" else None
        else:
            case.hidden.grad = case.weight.grad = None
            value = loss(name, case)
            value.backward()
            found = {"value": relative(value.detach(), wanted.detach()), "hidden": relative(
                case.hidden.grad, exact.hidden.grad), "weight": relative(case.weight.grad, exact.weight.grad)}
        if found is not None:
            rows.append({"loss": name, "implementation": implementation, **labels, **found})
    return rows


def wide(name: str, case: Case) -> torch.Tensor:
    """Ours, accumulated in float64."""
    return ResponseObjective(0.0, (Divergence(name),))(
        case.hidden, HiddenTargets(case.teacher_targets, Head(case.their_weight)), case.targets, head=Head(case.weight),
        accumulate=torch.float64)[0]


def of_logits(name: str, case: Case) -> dict[str, float]:
    """Ours, of logits that are given in fp32: what the loss itself adds to the error of products."""
    student = (case.hidden.detach().double() @ case.weight.detach().double().T).float().requires_grad_()
    teacher = (case.teacher_targets.double() @ case.their_weight.double().T).float()
    exact = student.detach().double().requires_grad_()
    value = ResponseObjective(0.0, (Divergence(name),))(student, teacher, case.targets)[0]
    wanted = definition(name, exact, teacher.double(), case.targets)
    value.backward()
    wanted.backward()
    return {"value": relative(value.detach(), wanted.detach()), "logits": relative(student.grad, exact.grad)}


# ---- printing

def table(rows: list[dict]) -> str:
    """Memory and time, for people; ratios are to ours."""
    lines = ["| loss | dtype | tokens | implementation | peak, MB | ratio | seconds | ratio | gradient error |",
             "|---|---|---:|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        own = next(one for one in rows if one["implementation"] == "limbeck" and all(
            one[key] == row[key] for key in ("loss", "dtype", "tokens")))
        ran = (f"{row['seconds']:.2f} | x{row['seconds'] / own['seconds']:.2f} | {row['gradient_error']:.1e}"
               if row["ran"] else "too large to run | | ") if row.get("seconds") or not row["ran"] else " | | "
        lines.append(f"| {row['loss']} | {row['dtype']} | {row['tokens']:,} | {row['implementation']} | "
                     f"{row['peak_bytes'] / 1e6:,.0f} | x{row['peak_bytes'] / own['peak_bytes']:.2f} | {ran} |")
    return "\n".join(lines)


def side_by_side(rows: list[dict]) -> str:
    """A line for each loss, dtype and number of tokens: peak, time and error of each, with ratios to ours."""
    names = list(IMPLEMENTATIONS)
    lines = [f"| loss, dtype, tokens | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for case in dict.fromkeys((row["loss"], row["dtype"], row["tokens"]) for row in rows):
        own = {row["implementation"]: row for row in rows if (row["loss"], row["dtype"], row["tokens"]) == case}
        lines.append(f"| {case[0]}, {case[1]}, {case[2]:,} | "
                     + " | ".join(_cell(own.get(name), own["limbeck"]) for name in names) + " |")
    return "\n".join(lines)


def _cell(row: dict | None, ours: dict) -> str:
    if row is None:
        return ""
    peak = f"{row['peak_bytes'] / 1e6:,.0f} MB"
    if row is ours:
        rate = f"{row['rate'] / 1e9:,.0f} GFLOP/s, " if "rate" in row else ""
        return f"{peak}, {row['seconds']:.1f} s, {rate}error {row['gradient_error']:.0e}"
    peak += f" (x{row['peak_bytes'] / ours['peak_bytes']:.1f})"
    if not row["ran"]:
        return f"{peak}, counted"
    return f"{peak}, x{row['seconds'] / ours['seconds']:.2f} time, error {row['gradient_error']:.0e}"


def errors_table(rows: list[dict]) -> str:
    """Largest error of each implementation over its losses and all spreads, far from the teacher and near it."""
    lines = ["| implementation | dtype | student | value | gradients | largest of its gradients' errors |",
             "|---|---|---|---:|---:|---|"]
    for key in dict.fromkeys((row["dtype"], row["distance"], row["implementation"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["distance"], row["implementation"]) == key
               and row["loss"] not in ("cross_entropy", "total_variation")]
        if not own:
            continue
        worst = max(own, key=gradient_error)
        middle = statistics.median(map(gradient_error, own))
        lines.append(f"| {key[2]} | {key[0]} | {'far' if key[1] is None else f'{key[1]:g} away'} | "
                     f"{max(row['value'] for row in own):.1e} | {middle:.1e} (median) | {gradient_error(worst):.1e} "
                     f"({worst['loss']}, spread {worst['spread']:g}) |")
    return "\n".join(lines)


def gradient_error(row: dict) -> float:
    """The largest relative error of a row's gradients."""
    return max(row.get(name, 0.0) for name in ("hidden", "weight", "logits"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--losses", nargs="+", default=["cross_entropy", "forward_kl", "reverse_kl", "jsd"])
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--rounds", type=int, default=3, help="of the smallest case; larger ones have fewer")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    found = {"machine": machine(chosen.device), "threads": torch.get_num_threads(),
             "versions": {name: version(name) for name in ("torch", "trl", "liger-kernel") if find_spec(
                 name.replace("-", "_"))}, "device": chosen.device,
             "machine_rate": {dtype: machine_rate(getattr(torch, dtype), chosen.device) for dtype in chosen.dtypes},
             "errors": errors(chosen.device)}
    print(errors_table(found["errors"]), "\n", flush=True)
    found["rows"] = sizes(chosen)
    print("\n" + table(found["rows"]))
    if chosen.json:
        chosen.json.write_text(json.dumps(found | {"rows": with_earlier(found["rows"], chosen.json)}, indent=1) + "\n")
    return 0


def with_earlier(rows: list[dict], file: Path) -> list[dict]:
    """These rows, after those of earlier calls with the same file that measured something else."""
    def what(row: dict) -> tuple:
        return tuple(row[key] for key in ("loss", "dtype", "tokens", "vocabulary", "hidden"))

    earlier = json.loads(file.read_text())["rows"] if file.exists() else []
    every = [row for row in earlier if what(row) not in set(map(what, rows))] + rows
    return sorted(every, key=lambda row: (row["tokens"], row["dtype"] != "float32"))


if __name__ == "__main__":
    raise SystemExit(main())
