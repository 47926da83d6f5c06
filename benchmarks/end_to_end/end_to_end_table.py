"""What was found of whole training runs, for people."""

from __future__ import annotations

from typing import Any

from benchmarks.end_to_end.contestant import OURS


def table(rows: list[dict[str, Any]]) -> str:
    """For people; ratios are ours over theirs."""
    lines = ["| trained | vocabulary | dtype | by | tokens/s | ours, times faster | peak, MB | above imports, MB | "
             "ours, share of it | losses differ by |", "|---|---:|---|---|---:|---:|---:|---:|---:|---:|"]
    for one in rows:
        own = next(other for other in rows if other["contestant"] == OURS and all(
            other[key] == one[key] for key in ("task", "vocabulary", "dtype")))
        peer = one is not own
        lines.append(
            f"| {one['task']} | {one['vocabulary']:,} | {one['dtype']} | {one['contestant']} | "
            f"{one['tokens_per_second']:,.0f} | {format(one['ratio'], '.2f') if peer else ''} | "
            f"{one['peak_bytes'] / 1e6:,.0f} | {one['peak_above_imports'] / 1e6:,.0f} | "
            f"{format(own['peak_above_imports'] / one['peak_above_imports'], '.2f') if peer else ''} | "
            f"{format(one['largest_loss_difference'], '.0e') + (' (void)' if one['void'] else '') if peer else ''} |")
    return "\n".join(lines)


def best(rows: list[dict[str, Any]], task: str, peer: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Over all settings of a task: the least and most times that we were faster, and the shares of a peer's memory."""
    pairs = [(one, next(own for own in rows if own["contestant"] == OURS and all(
        own[key] == one[key] for key in ("task", "vocabulary", "dtype"))))
        for one in rows if one["task"] == task and one["contestant"] == peer and not one["void"]]
    faster = [one["ratio"] for one, _ in pairs]
    shares = [own["peak_above_imports"] / one["peak_above_imports"] for one, own in pairs]
    return (min(faster), max(faster)), (min(shares), max(shares))
