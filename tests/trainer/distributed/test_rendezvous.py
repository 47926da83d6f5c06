"""The processes of a restart find each other in a store that still has what those before them left."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from trainer.distributed.rendezvous import agreed

SOON, NEVER = timedelta(seconds=30), timedelta(seconds=0.2)


def all_of(store: dist.Store, ranks: int, first: int = 0) -> list[str]:
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: agreed(store, (rank + first) % ranks, ranks, SOON), range(ranks)))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_each_start_has_a_name_of_its_own(first):
    """Whoever comes first, and with more or fewer processes than before."""
    store = dist.HashStore()
    names = [all_of(store, 3, first), all_of(store, 3), all_of(store, 2), all_of(store, 4)]
    assert all(len(set(found)) == 1 for found in names) and len({found[0] for found in names}) == 4


def test_what_the_dead_left_is_not_taken():
    """Those before had published, said hello, and been on their way; one of them had not even come."""
    store = dist.HashStore()
    store.set("limbeck/published", json.dumps(["old", {"1": "gone"}]))
    store.set("limbeck/hello/1", "gone")
    store.set("limbeck/taken/old/1", "1")
    (name,) = set(all_of(store, 3))
    assert name != "old"


def test_one_that_does_not_come_is_named():
    with pytest.raises(dist.DistStoreError, match="process 2 did not come to the start within"):
        store = dist.HashStore()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(agreed, store, 1, 3, NEVER)
            agreed(store, 0, 3, timedelta(seconds=2))
    with pytest.raises(dist.DistStoreError, match="process 0 did not come"):
        agreed(dist.HashStore(), 1, 2, NEVER)
