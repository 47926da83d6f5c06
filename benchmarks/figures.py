"""Six figures for the README, each from the committed results of the command beside it."""

from __future__ import annotations

from typing import Any

from benchmarks.end_to_end.contestant import GKD, TRAINER
from benchmarks.end_to_end.end_to_end_table import best

FILES = ("quickstart-cpu.json", "rematerialization-frontier-cpu.json", "distillation-losses-cpu.json",
         "quantization-runtimes-cpu.json", "faults-cpu.json", "end-to-end-cpu.json")


def table(quickstart: dict, frontier: list, losses: dict, runtimes: dict, faults: dict, end_to_end: dict) -> str:
    """What was measured, and the command that measures it again."""
    rows = [
        ("quickstart --seeds 3", _quickstart(quickstart)),
        ("end_to_end --vocabulary 8192 32768", _end_to_end(end_to_end)),
        ("rematerialization.frontier --model all", _frontier(frontier)),
        ("distillation.losses --tokens 2048", _losses(losses)),
        ("quantization.runtimes", _runtimes(runtimes)),
        ("faults", _faults(faults)),
    ]
    lines = ["| what was measured | measure it again |", "|---|---|"]
    return "\n".join([*lines, *(f"| {said} | `python -m benchmarks.{command}` |" for command, said in rows)])


def _quickstart(found: dict) -> str:
    summary = found["summary"]
    gain, share = summary["control_minus_student"], summary["times_smaller"]
    student, teacher = (summary[name]["mean"] for name in ("student", "teacher"))
    return (f"**Size.** The quickstart's 4-bit student is {share:.1f} times smaller than its teacher, at "
            f"{student:.3f} against {teacher:.3f} bits per byte of held-out text. "
            f"Learning from the teacher saves {gain['mean']:.4f} (sd {gain['sd']:.4f}, {len(found['rows'])} seeds).")


def _end_to_end(found: dict) -> str:
    (low, high), (least, most) = best(found["rows"], "fine-tune", TRAINER)
    (taught_low, taught_high), (taught_least, taught_most) = best(found["rows"], "distill", GKD)
    return (f"**Speed.** With the same weights, rows and losses, fine-tuning is {low:.1f} to {high:.1f} times as fast "
            f"as the HF Trainer, with {least:.2f} to {most:.2f} of its memory; distillation {taught_low:.1f} to "
            f"{taught_high:.1f} times as fast as TRL GKD, with {taught_least:.2f} to {taught_most:.2f}.")


def _frontier(rows: list[dict]) -> str:
    plans = [row for row in rows if row["method"] == "limbeck"]
    over = sum(row["measured_peak"] > row["budget_bytes"] for row in plans)
    worst = max(abs(row["predicted_peak"] / row["measured_peak"] - 1) for row in plans)
    return (f"**Budgets.** Of {len(plans)} memory plans for {len({row['model'] for row in plans})} models, {over} "
            f"measured above their budget. Predicted peaks are within {worst:.2%} of measured ones.")


def _losses(found: dict) -> str:
    case = {"loss": "forward_kl", "dtype": "float32", "tokens": 2048}
    rows = {row["implementation"]: row for row in found["rows"] if all(row[key] == case[key] for key in case)}
    ours, liger, trl = (f"{_megabytes(rows[name])} MB and {rows[name]['seconds']:.1f} s"
                        for name in ("limbeck", "liger", "trl"))
    cases, shares = _faster(found["rows"])
    return (f"**Loss.** Forward KL in fp32 over {rows['limbeck']['vocabulary']:,} tokens of vocabulary takes {ours} "
            f"for 2,048 positions, Liger's {liger}, TRL's {trl}. A peer was faster in {len(shares)} of {cases} cases, "
            f"by {1 - min(shares, default=1.0):.0%} at most.")


def _faster(rows: list[dict]) -> tuple[int, list[float]]:
    """Number of cases, and where another implementation took less time than ours, its share of that."""
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        cases.setdefault((row["loss"], row["dtype"], row["tokens"]), []).append(row)
    least = [min(row["seconds"] for row in each if row.get("seconds")) /
             next(row["seconds"] for row in each if row["implementation"] == "limbeck") for each in cases.values()]
    return len(cases), [share for share in least if share < 1]


def _megabytes(row: dict) -> str:
    return f"{row['peak_bytes'] / 1e6:,.0f}"


def _runtimes(found: dict) -> str:
    rows = {row["runtime"]: row for row in found["rows"] if row["scheme"] == "4 bits, 32 a scale"}
    shown = ", ".join(f"{rows[name]['difference'] / rows[name]['largest_logit']:.1g} in {words}" for name, words in
                      (("transformers", "transformers"), ("onnx", "ONNX Runtime"), ("gguf", "GGUF")))
    return (f"**Export.** A 4-bit student's logits, reloaded in a fresh process, differ from training by {shown}, as a "
            "share of the largest logit.")


def _faults(found: dict[str, Any]) -> str:
    rows = {row["system"].split(",")[0] + (" 1" if "total_limit=1" in row["system"] else ""): row
            for row in found["rows"] if row["fault"] == "SIGKILL around saves"}
    ours = rows["Limbeck"]
    return (f"**Crashes.** Of {ours['tries']} kills around a checkpoint, {ours['resumed']} runs resumed by the same "
            f"command, {ours['bitwise']} of them to the last bit; plain Accelerate scripts resumed "
            f"{rows['Accelerate']['resumed']}, the HF Trainer {rows['HF Trainer']['resumed']}.")
