"""The fault matrix: real runs that something happens to, and one table of what became of them.

    python -m benchmarks.faults [--kills 200] [--only ROW ...] [--short] [--json FILE]

Every run trains a small GPT-NeoX with dropout on the interpreter's own library, and is compared with the run that was
never stopped: weights, optimizer state and logged losses, to the last bit. `forked` processes come from one that has
imported everything already, so that 200 kills take minutes; `launched` ones are started as a person would. Where files
are damaged, ours ends with training, and exports nothing. Beside ours are two training scripts on plain Accelerate and
on the Trainer of transformers (benchmarks/faults/peers), with the same model, rows and moments. A run is unrecoverable
if, started again with the same command, it does not go on from a checkpoint that it had finished, or if it ends with
weights that are not finite and says nothing. The exit code is 1 where one of ours is.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.faults import damage, disk, kills, nans, rank_faults, signal_faults
from benchmarks.faults.contenders import AccelerateScript, Contender, HFTrainer, Limbeck
from benchmarks.faults.fault_material import Material, make
from benchmarks.faults.judging import Row, table
from benchmarks.faults.processes import FORKED, NEEDED, Started
from benchmarks.rematerialization.frontier import machine

Work = Callable[[Path], list[Row]]  # what makes rows in a folder
FSDP2 = ("sharding.engine=fsdp2",)


def works(material: Material, options: argparse.Namespace) -> dict[str, list[Work]]:
    """What there is to do, by the names that --only knows."""
    short, full = options.short, Limbeck(material)
    alone = replace(full, script=Path(__file__).with_name("training_alone.py"))
    ours = alone if short else full
    peers: list[Contender] = [AccelerateScript(material, limit=2, seedable=True), AccelerateScript(material, limit=1),
                              HFTrainer(material)]
    how, hit = ("forked", (1,)) if short else ("launched", (0, 1))
    first = ("model", "state") if short else None
    return {
        "kill": [lambda room, one=one: [kills.kill_row(one, options.kills, room)] for one in (ours, *peers)],
        "damage": [lambda room, one=one, more=more: damage.damage_rows(replace(one, options=more), room, "", first)
                   for one, more in ((alone, damage.OURS), *((peer, damage.PEERS) for peer in peers[::2]))],
        "shards": [lambda room: damage.damage_rows(replace(alone, options=(*damage.OURS, *FSDP2)), room, ", FSDP2",
                                                   ("model-00001",) if short else None, processes=2)],
        "signal": [lambda room: [signal_faults.signal_row(full, room,
                                                          ("step", "export") if short else signal_faults.PHASES,
                                                    how=how)]],
        "disk": [lambda room: [disk.disk_row(ours, room)]],
        "nan": [lambda room, one=one: [nans.sample_row(one, room)] for one in (ours, *peers[::2])]
        + [lambda room: [*nans.rank_rows(ours, room), nans.stopped_row(ours, room)]],
        "death": [lambda room: [rank_faults.lost_rank_row(ours, room, signal.SIGKILL, how, hit)]],
        "stall": [lambda room: [rank_faults.lost_rank_row(ours, room, signal.SIGSTOP, how, hit)]],
        "world": [lambda room: [rank_faults.world_row(ours, room)]],
        "workers": [lambda room: [rank_faults.workers_row(ours, room)]],
    }


def carried_out(work: Work, room: Path) -> list[Row]:
    """Its rows, each told as soon as there are some."""
    room.mkdir(parents=True)
    began = time.monotonic()
    try:
        rows = work(room)
    except Exception as error:  # one that cannot be made must not take the others with it
        rows = [Row(room.name, "Limbeck", "could not be carried out", tries=1, unrecoverable=1)]
        rows[0].fails(type(error).__name__, str(error))
    for row in rows:
        print(f"{row.fault}, {row.system}: {row.tries} tries, {row.resumed} resumed, {row.unrecoverable} unrecoverable "
              f"({time.monotonic() - began:.0f} s)", flush=True)
        for failure in row.failures[:20]:
            print(f"  {failure}", flush=True)
    return rows


def side_by_side(chosen: list[tuple[Work, Path]], at_once: int) -> list[list[Row]]:
    """Carry out so many at once. Interrupted, or where one fails, it leaves no process behind."""
    with ThreadPoolExecutor(at_once) as pool:
        try:
            return list(pool.map(carried_out, *zip(*chosen, strict=True)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for started in Started.every:
                started.kill()
            raise


def main(arguments: list[str] | None = None) -> int:
    """Do it, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of each program")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--short", action="store_true", help="a few of each, without export")
    parser.add_argument("--at-once", type=int, default=2, help="kinds of fault that are tried side by side")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        every = works(make(room), options)
        if unknown := set(options.only) - set(every):
            parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
        chosen = [(work, room / f"{key}{number}") for key, some in every.items()
                  if not options.only or key in options.only for number, work in enumerate(some)]
        rows = [row.to_dict() for some in side_by_side(chosen, options.at_once) for row in some]
    words = [word for word in sys.argv[1:] if word not in ("--json", str(options.json))]
    found = {"command": " ".join(["python -m benchmarks.faults", *words]), "machine": machine("cpu"),
             "rows": rows}
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(any(row["unrecoverable"] for row in rows if row["system"].startswith("Limbeck")))


if __name__ == "__main__":
    FORKED.set_forkserver_preload(NEEDED)
    raise SystemExit(main())
