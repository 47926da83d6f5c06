"""Crash-safe sharded checkpoints: weights, optimizer state, loss scale, random state and step, in safetensors and JSON.

Every process writes what it holds. Any number of processes, under any engine, can read the parts that they need,
without ever holding more than one parameter at a time.

    model.safetensors       fp32 weights by name; for a sharded student model-00000-of-00002.safetensors and so on, each
                            with the parts of weights that one process holds, flat, as `name@start`
    optimizer.safetensors   optimizer state: `name/exp_avg`, in parts like the weights; `name/=step` and other values
                            that are the same on all ranks
    random-0.safetensors    random state of process 0
    state.json              the manifest: step, loss scale, shapes, size in bytes and SHA-256 of every other file, and
                            the SHA-256 of the manifest itself

A folder becomes a checkpoint when it gets the name `step-00000100`, which happens last:

1. Every process writes its files into `.step-00000100-1.partial`. After this step training may continue: the files hold
   everything, and no copy is kept in memory.
2. Every process syncs its files, drops them from the page cache, hashes what reads back from the disk, and reports the
   result in `rank-1.json`.
3. The first process writes the manifest, syncs the folder, renames it, and syncs its parent folder.
4. Only then, and after the manifest has been read back, checkpoints older than the `keep` newest are removed, except
   that of the best evaluation.

A run killed at any moment finds either its previous checkpoint or the new one. On start it takes the newest checkpoint
that verifies; newer ones that do not are kept as `damaged-step-00000100`.
"""

from strategies.common.shards import Piece
from trainer.checkpoints.commit import Checkpoints
from trainer.checkpoints.finding import best_kept, latest, listed, newest_good, progress
from trainer.checkpoints.manifest import NAME, Unreadable, wrong_with
from trainer.checkpoints.reading import Saved, load, load_whole, names
from trainer.checkpoints.space import check_space, planned_bytes
from trainer.checkpoints.warm_start import WarmStart

__all__ = ["NAME", "Checkpoints", "Piece", "Saved", "Unreadable", "WarmStart", "best_kept", "check_space", "latest",
           "listed", "load", "load_whole", "names", "newest_good", "planned_bytes", "progress", "wrong_with"]
