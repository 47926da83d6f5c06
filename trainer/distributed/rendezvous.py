"""How the processes that a launcher started find each other, and only each other.

torchrun keeps one store for all its restarts (pytorch/pytorch issue 135712), and what the processes of
before left in it is there still: addresses at which nobody answers. Its count of restarts does not tell them apart,
since each machine has its own. So the first process draws a name, under which all that are alive go on.
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

METHOD = "limbeck://"  # for `init_process_group`
POLL = 0.02  # seconds
_name = ""


def launchers_store() -> bool:
    """Whether the processes meet in a store that their launcher keeps, and which outlives them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def generation() -> str:
    """What this start of all processes is called, on each of them; empty where they have a store of their own."""
    return _name


def agreed(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """A name that every process of one start returns, and none of another.

    A process says hello with a token of its own, and takes the name that is published with this token; the first one
    publishes anew until all have taken it. The dead of before have left hellos, and take nothing.

    Raises:
        torch.distributed.DistStoreError: one of them did not come in time.
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
