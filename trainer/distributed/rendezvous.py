"""Rendezvous of the processes of one launch, isolated from those of earlier restarts.

torchrun keeps one store for all its restarts (pytorch/pytorch issue 135712), so that entries of earlier processes stay
in it, such as addresses at which nobody answers. Its restart count does not tell the restarts apart, since each machine
counts for itself. So rank 0 draws a random name, and all live processes use it as a prefix in the store.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

METHOD = "limbeck://"  # `init_method` of `init_process_group`
POLL = 0.02  # seconds
_name = ""


def launchers_store() -> bool:
    """Whether the processes use a store kept by their launcher, which outlives them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def generation() -> str:
    """The name that all processes of this launch agreed on; "" if they have a store of their own."""
    return _name


def agreed(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """Agree on a name that all processes of this launch return, and that no other launch shares.

    Each rank writes its own random token to the store, and accepts the published name only if it was published together
    with this token. Rank 0 publishes again until all ranks have accepted. Processes of earlier restarts have left
    tokens, but accept nothing.

    Raises:
        torch.distributed.DistStoreError: a process did not arrive in time.
    """
    token, deadline = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    hello, taken = "limbeck/hello/{}", "limbeck/taken/{}/{}"

    def wait(missing: str) -> None:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{missing} did not come to the start within {timeout.total_seconds():.0f} s")
        time.sleep(POLL)

    if rank:
        store.set(hello.format(rank), token)
        while True:
            if store.check(["limbeck/published"]):
                name, tokens = json.loads(store.get("limbeck/published"))
                if tokens.get(str(rank)) == token:
                    store.set(taken.format(name, rank), "1")
                    return name
            wait("process 0")
    published = None
    while True:
        tokens = {str(other): store.get(hello.format(other)).decode() for other in range(1, ranks)
                  if store.check([hello.format(other)])}
        if tokens != published:
            store.set("limbeck/published", json.dumps([token, tokens]))
            published = tokens
        missing = [other for other in range(1, ranks) if not store.check([taken.format(token, other)])]
        if not missing:
            return token
        wait(f"process {missing[0]}")


def _meet(url: str, timeout: timedelta, **more: Any) -> Iterator[tuple[dist.Store, int, int]]:
    global _name
    store, rank, ranks = next(iter(dist.rendezvous("env://", timeout=timeout, **more)))
    _name = agreed(store, rank, ranks, timeout)
    yield dist.PrefixStore(_name, store), rank, ranks


dist.register_rendezvous_handler(METHOD.partition(":")[0], _meet)
