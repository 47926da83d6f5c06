"""Structured cuts of many architectures: does plain transformers reload them, and do they compute the right thing.

    python -m benchmarks.pruning.structured [--json FILE] [--families NAME ...] [--without-peer]

Tiny models of random weights are cut in every kind. `masked` is the largest difference of logits from the whole model's
with the same units zeroed, in float64; `reloaded` that of the folder, loaded by transformers in a fresh process, from
the cut model in memory, in fp32; both over the largest logit. Beside it torch-pruning (`pip install torch-pruning`)
removes half of the same models; its result is saved with `save_pretrained` and loaded in the same way, once with the
configuration as it is left, once with the sizes of the weights written into it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.pruning.tiny_families import CUTS, FAMILIES, kinds_of, make, rows
from benchmarks.quickstart import machine, show
from strategies.pruning.structured.cut import Cut
from strategies.pruning.structured.cut_model import cut_model

PEER_SECONDS = 60  # with grouped-query attention torch-pruning may not end
HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Cut everything, print the table, and write what was found."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    made.add_argument("--without-peer", action="store_true")
    made.add_argument("--json", type=Path)
    chosen = made.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as room:
        cuts = [cut_row(family, kind, Path(room) / f"{family}-{kind}") for family in chosen.families
                for kind in kinds_of(family)]
        reload_all([row["folder"] for row in cuts if "folder" in row])
        cuts = [reloaded(row) for row in cuts]
        peers = [] if chosen.without_peer or not find_spec("torch_pruning") else [
            peer_row(family, what, Path(room) / f"peer-{family}-{what}") for family in chosen.families
            for what in (("mlp", "everything") if "mlp" in kinds_of(family) else ("everything",))]
    found = {"machine": machine(), "rows": cuts, "peer": peers, "versions": {
        name: version(name) for name in ("transformers", "torch-pruning") if find_spec(name.replace("-", "_"))}}
    show(table(found), found, chosen.json)
    return 0


def cut_row(family: str, kind: str, folder: Path) -> dict[str, Any]:
    """Cut one model in one kind and save it."""
    model = make(family)
    batch = rows(model)
    row: dict[str, Any] = {"family": family, "kind": kind}
    try:
        smaller, record = cut_model(model, Cut(**CUTS[kind]), [batch])
    except ValueError as error:
        return row | {"refused": str(error)}
    smaller.save_pretrained(folder)
    with torch.no_grad():
        save_file({"logits": smaller(**batch).logits.contiguous()}, folder / "expected.safetensors")
    save_file(batch, folder / "rows.safetensors")
    return row | {"masked": max(step["difference"] for step in record["steps"]), "folder": folder,
                  "parameters": [record[when]["parameters"] for when in ("before", "after")]}


def reload_all(folders: list[Path]) -> None:
    """Load folders in a fresh process that knows nothing of this project."""
    if folders:
        subprocess.run([sys.executable, str(HERE / "reload_plainly.py"), *map(str, folders)], check=True, cwd="/",
                       capture_output=True)


def reloaded(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what its folder's logits were."""
    folder = row.pop("folder", None)
    if folder is None:
        return row
    if (folder / "error.txt").exists():
        return row | {"failed": (folder / "error.txt").read_text()}
    found, expected = (load_file(folder / f"{name}.safetensors")["logits"] for name in ("logits", "expected"))
    return row | {"reloaded": float((found - expected).abs().max() / expected.abs().max())}


def peer_row(family: str, what: str, folder: Path) -> dict[str, Any]:
    """What became of the same model with the peer."""
    print(f"torch-pruning: {family}, {what}", flush=True)
    row: dict[str, Any] = {"family": family, "what": what}
    try:
        subprocess.run([sys.executable, "-m", "benchmarks.pruning.peer_cut", family, what, str(folder)],
                       timeout=PEER_SECONDS, capture_output=True)
    except subprocess.TimeoutExpired:
        return row | {"failed": f"not done after {PEER_SECONDS} s"}
    if not (folder / "mended" / "config.json").exists():
        error = folder / "error.txt"
        return row | {"failed": error.read_text() if error.exists() else "the process died"}
    reload_all([folder / "as_saved", folder / "mended"])
    return row | {name: reloaded({"folder": folder / name}) for name in ("as_saved", "mended")}


def table(found: dict) -> str:
    """A line for each family with the difference of each kind of cut, what was refused, and the peer's."""
    rows_of: dict[str, dict[str, dict]] = {}
    for row in found["rows"]:
        rows_of.setdefault(row["family"], {})[row["kind"]] = row
    kinds = [kind for kind in CUTS if any(kind in own for own in rows_of.values())]
    lines = [f"| family | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    lines += [f"| {family} | {' | '.join(_cell(own.get(kind)) for kind in kinds)} |" for family, own in rows_of.items()]
    done = [row for row in found["rows"] if "refused" not in row]
    again = [row["reloaded"] for row in done if "reloaded" in row]
    lines.append(f"\n{len(done)} cuts, of which transformers reloaded {len(again)}, with logits at most "
                 f"{max(again, default=0):.1e} from those before. {len(found['rows']) - len(done)} were refused:\n")
    for text in dict.fromkeys(_reason(row) for row in found["rows"] if "refused" in row):
        families = dict.fromkeys(row["family"] for row in found["rows"] if "refused" in row and _reason(row) == text)
        lines.append(f"- {', '.join(families)}: {text}")
    if found["peer"]:
        lines += ["\n| torch-pruning | half of | reloaded as it is saved | with the sizes in the configuration |",
                  "|---|---|---|---|", *(_peer_line(row) for row in found["peer"])]
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    return "" if row is None else "refused" if "refused" in row else f"{row['masked']:.0e}"


def _reason(row: dict) -> str:
    """What a refusal says of its kind, without the numbers and the family."""
    text = row["refused"].replace(f" of a {row['family']} model", "").replace(f"a {row['family']} configuration", "it")
    if "logits are" in text:
        return f"{row['kind']}: logits differ from those of the masked model"
    return text.partition(", 16 channels each")[0].partition(": ")[2].partition("; ")[0]


def _peer_line(row: dict) -> str:
    if "failed" in row:
        return f"| {row['family']} | {row['what']} | not cut: {_short(row['failed'])} | |"
    cells = [f"{one['reloaded']:.1e}" if "reloaded" in one else f"no: {_short(one['failed'])}" for one in (
        row["as_saved"], row["mended"])]
    return f"| {row['family']} | {row['what']} | {cells[0]} | {cells[1]} |"


def _short(text: str) -> str:
    text = text.removeprefix("RuntimeError: ") if "nothing" in text else text
    return "other shapes" if "mismatched_sizes" in text else text.replace("|", "/")[:100]


if __name__ == "__main__":
    raise SystemExit(main())
