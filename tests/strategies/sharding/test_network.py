"""Seconds of collectives, beside a simulation that sends every message of every rank."""

import math
from dataclasses import replace

import pytest

from strategies.sharding.network import (
    LL128,
    NETWORKS,
    PCIE,
    SIMPLE,
    Network,
    hierarchical,
    network_of,
    ring,
    sent,
    tree,
)

EVEN = Network("even", 4, 100e9, 25e9)  # four adapters of a node are as fast as the link within it
SLOW = Network("slow", 4, 100e9, 5e9)


def messages(network: Network, protocol, kind: str, count: int, ranks: int) -> tuple[float, float]:
    """Seconds, and bytes that a rank sends, of a ring that is simulated message by message.

    A rank sends on what it has received, one message at a time on its link; a message arrives a latency after its last
    byte has left. Of a node's ranks the last one's link leads to the next node, over all of the node's adapters, since
    as many rings run side by side. An all-reduce is a reduce-scatter followed by an all-gather.
    """
    def link(rank: int) -> tuple[float, float]:
        crosses = (rank + 1) % ranks // network.node != rank // network.node
        speed = network.node * network.between if crosses else network.within
        return (protocol.between if crosses else protocol.within), speed

    part, had, free = count / ranks, [0.0] * ranks, [0.0] * ranks
    rounds = (ranks - 1) * (2 if kind == "all-reduce" else 1)
    for _ in range(rounds):
        arrived = [0.0] * ranks
        for rank in range(ranks):
            latency, speed = link(rank)
            free[rank] = max(free[rank], had[rank]) + part / speed
            arrived[(rank + 1) % ranks] = free[rank] + latency
        had = arrived
    return protocol.base + max(had), rounds * part


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce"])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("protocol", [SIMPLE, PCIE])
def test_a_ring_takes_as_long_as_its_messages(kind, ranks, protocol):
    """Exactly within a node; with links of equal speed between nodes, too, but for one latency a round trip."""
    for count in (1 << 12, 1 << 20, 1 << 30):
        found, bytes_sent = messages(EVEN, protocol, kind, count, ranks)
        assert sent(kind, count, ranks) == pytest.approx(bytes_sent)
        turns = 2 if kind == "all-reduce" else 1
        within = turns * (protocol.between - protocol.within) + 1e-12 if ranks > EVEN.node else 1e-12
        assert ring(EVEN, protocol, kind, count, ranks) == pytest.approx(found, abs=within)


def test_a_ring_over_slow_links_is_as_slow_as_they_are():
    found, _ = messages(SLOW, SIMPLE, "all-gather", 1 << 30, 64)
    assert ring(SLOW, SIMPLE, "all-gather", 1 << 30, 64) == pytest.approx(found, rel=0.02)
    assert ring(SLOW, SIMPLE, "all-gather", 1 << 30, 64) > 4.8 * ring(EVEN, SIMPLE, "all-gather", 1 << 30, 64)


def test_hierarchical_collectives_cross_between_nodes_with_a_nodes_share():
    """By hand: 4 ranks of a node gather a fourth of the bytes each from 16 nodes, then all of it from one another."""
    count, nodes = 1 << 30, 16
    across = (nodes - 1) * SIMPLE.between + count / 4 * (nodes - 1) / nodes / SLOW.between
    inside = 3 * SIMPLE.within + count * 3 / 4 / SLOW.within
    assert hierarchical(SLOW, SIMPLE, "all-gather", count, 64) == pytest.approx(2 * SIMPLE.base + across + inside)
    assert hierarchical(SLOW, SIMPLE, "all-reduce", count, 64) == pytest.approx(
        3 * SIMPLE.base + 2 * (across + inside))
    assert hierarchical(SLOW, SIMPLE, "all-gather", count, 4) == ring(SLOW, SIMPLE, "all-gather", count, 4)


def test_small_all_reduces_go_by_trees_and_large_ones_by_rings():
    network = NETWORKS["dgx-h100"]
    assert network.seconds("all-reduce", 1 << 10, 1024) == min(
        tree(network, protocol, "all-reduce", 1 << 10, 1024) for protocol in (SIMPLE, LL128))
    rings = replace(network, algorithms=("ring",))
    assert network.seconds("all-reduce", 1 << 10, 1024) < rings.seconds("all-reduce", 1 << 10, 1024) / 10
    assert network.seconds("all-reduce", 1 << 36, 16) == rings.seconds("all-reduce", 1 << 36, 16)
    depth = 2 * (7 * LL128.tree_within + math.log2(128) * LL128.tree_between)
    assert tree(network, LL128, "all-reduce", 0, 1024) == pytest.approx(LL128.base + depth)


def test_what_needs_no_network_takes_no_time():
    network = network_of("a100-80gb")
    assert network.name == "dgx-a100" and network_of("l4").name == "pcie"
    assert network.seconds("all-gather", 1 << 30, 1) == network.seconds("all-gather", 0, 8) == 0
    assert network.bus(8) == network.within and network.bus(9) == 8 * network.between
