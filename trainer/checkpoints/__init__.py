"""Checkpoints of a run: weights, optimizer, loss scale, random state and step, in safetensors and JSON.

Every process writes what it holds; any number of processes, under any engine, reads what it needs of that, in parts and
without ever holding more than a parameter.

    model.safetensors       weights, fp32, by name; of a sharded student model-00000-of-00002.safetensors and so on,
                            with what each process holds of a weight, flat, as `name@start`
    optimizer.safetensors   its state: `name/exp_avg` like the weights, `name/=step` and the like the same everywhere
    random-0.safetensors    random state of process 0
    state.json              the manifest: step, loss scale, shapes, the bytes and SHA-256 of every file beside it, and
                            the SHA-256 of itself

What makes a folder `step-00000100` a checkpoint is its name, which it gets last:

1. Every process writes its files into `.step-00000100-1.partial`. From here on training may go on: what is saved is in
   those files, and no copy of it in memory.
2. Every process syncs its files, takes them out of the page cache, hashes what comes back from the disk, and says so in
   `rank-1.json`.
3. The first one writes the manifest, syncs the folder, renames it, and syncs the folder around it.
4. Only then, and when the manifest reads back, older checkpoints than the `keep` newest are removed.

Killed at any moment, a run finds the checkpoint that it had before, or the new one. A start takes the newest one that
verifies; those that do not are kept as `damaged-step-00000100`.
"""

from strategies.common.shards import Piece
from trainer.checkpoints.commit import Checkpoints
from trainer.checkpoints.finding import latest, listed, newest_good
from trainer.checkpoints.manifest import NAME, Unreadable, wrong_with
from trainer.checkpoints.reading import Saved, load, load_whole, names
from trainer.checkpoints.space import check_space, planned_bytes

__all__ = ["NAME", "Checkpoints", "Piece", "Saved", "Unreadable", "check_space", "latest", "listed", "load",
           "load_whole", "names", "newest_good", "planned_bytes", "wrong_with"]
