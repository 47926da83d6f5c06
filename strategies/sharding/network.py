"""Seconds of collectives on a cluster, by the α-β model: each hop costs a latency, and each byte its share of a link.

Two kinds of links are told apart: those within a node (NVLink, PCIe) and those between nodes (InfiniBand, Ethernet).
Algorithms are those of NCCL: rings (Patarasuk & Yuan 2009) and, for all-reduce, double binary trees (Sanders et al.
2009); beside them the hierarchical ones, which cross between nodes once with a node's share (Thakur et al. 2005 for
the costs). Latencies and the bandwidth of a link within a node are those that NCCL's own model plans with
(NVIDIA/nccl: src/graph/tuning.cc and src/graph/topo.h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]
Algorithm = Literal["ring", "tree", "hierarchical"]
TREE_SHARE = 0.9  # of the bandwidth, in NCCL's model


@dataclass(frozen=True)
class Protocol:
    """How NCCL moves the bytes of a message; small ones are better off with less latency and less bandwidth.

    Attributes:
        base: seconds of any collective.
        within, between: seconds of a ring's hop within a node and between two.
        tree_within, tree_between: the same in a tree.
        share: of a link's bandwidth.
    """

    base: float
    within: float
    between: float
    tree_within: float
    tree_between: float
    share: float


SIMPLE = Protocol(8.4e-6, 3.4e-6, 14e-6, 4e-6, 14e-6, 1.0)
LL128 = Protocol(14e-6, 1.9e-6, 4e-6, 1.25e-6, 8.5e-6, 0.92)
PCIE = replace(SIMPLE, within=5.7e-6)  # NCCL uses LL128 with NVLink only
NVLINK = (SIMPLE, LL128)


@dataclass(frozen=True)
class Network:
    """The links of a cluster of equal nodes.

    Attributes:
        name: short name.
        node: ranks of a node, one per GPU.
        within: bytes per second that a rank sends to another one of its node, while it receives as many.
        between: the same to other nodes: a rank's share of its node's adapters.
        protocols: those that are chosen from.
        algorithms: those that are chosen from; rings are always possible.
    """

    name: str
    node: int
    within: float
    between: float
    protocols: tuple[Protocol, ...] = NVLINK
    algorithms: tuple[Algorithm, ...] = ("ring", "tree")

    def seconds(self, kind: Kind, count: int, ranks: int) -> float:
        """Seconds of a collective over the first `ranks` ranks, by the best of the algorithms and protocols.

        Args:
            count: bytes of the whole: what an all-gather gives to each rank, and what the others take from each.
        """
        if ranks == 1 or not count:
            return 0.0
        ways = {"ring": ring, "tree": tree, "hierarchical": hierarchical}
        allowed = [name for name in self.algorithms if name != "tree" or kind == "all-reduce"] or ["ring"]
        return min(ways[name](self, protocol, kind, count, ranks) for name in allowed for protocol in self.protocols)

    def nodes(self, ranks: int) -> int:
        """Number of nodes of so many ranks."""
        return math.ceil(ranks / self.node)

    def bus(self, ranks: int) -> float:
        """Bytes per second of rings: as many run side by side as a node has adapters, each of which serves one."""
        if ranks <= self.node:
            return self.within
        return min(self.within, self.node * self.between)


def sent(kind: Kind, count: int, ranks: int) -> float:
    """Bytes that each rank sends in a ring for a collective of `count` bytes; no algorithm needs fewer on average."""
    return (2 if kind == "all-reduce" else 1) * count * (ranks - 1) / ranks


def ring(network: Network, protocol: Protocol, kind: Kind, count: int, ranks: int) -> float:
    """Seconds of a ring: a part of the bytes goes around, over all links but one, while all others do the same."""
    nodes, turns = network.nodes(ranks), 2 if kind == "all-reduce" else 1
    crossings = 0 if nodes == 1 else min(nodes, ranks - 1)
    latency = crossings * protocol.between + (ranks - 1 - crossings) * protocol.within
    return protocol.base + turns * latency + sent(kind, count, ranks) / (network.bus(ranks) * protocol.share)


def tree(network: Network, protocol: Protocol, kind: Kind, count: int, ranks: int) -> float:
    """Seconds of an all-reduce by two trees, up and down: chains within nodes, binary trees between them."""
    assert kind == "all-reduce", "trees only reduce for all"
    nodes = network.nodes(ranks)
    depth = (math.ceil(ranks / nodes) - 1) * protocol.tree_within + math.ceil(math.log2(nodes)) * protocol.tree_between
    return protocol.base + 2 * depth + 2 * count / (TREE_SHARE * network.bus(ranks) * protocol.share)


def hierarchical(network: Network, protocol: Protocol, kind: Kind, count: int, ranks: int) -> float:
    """Seconds of a collective in two levels: a rank exchanges its node's share with its counterparts in other nodes."""
    nodes = network.nodes(ranks)
    if nodes == 1 or ranks % nodes:
        return ring(network, protocol, kind, count, ranks)
    local = ranks // nodes
    across = replace(network, node=1, within=network.between)
    inner = "all-gather" if kind == "all-reduce" else kind
    seconds = ring(network, protocol, inner, count, local) if local > 1 else 0.0
    return (2 if kind == "all-reduce" else 1) * seconds + ring(across, protocol, kind, count // local, nodes)


NETWORKS = {network.name: network for network in (
    # 6 NVLinks of 20 GB/s, 4 adapters of 100 Gb/s
    Network("dgx-v100", 8, 6 * 20.0e9, 4 / 8 * 12.5e9),
    # 12 NVLinks of 20 GB/s, of which NCCL counts on 235, 8 adapters of 200 Gb/s
    Network("dgx-a100", 8, 235e9, 25e9),
    # 18 NVLinks of 20.6 GB/s, 8 adapters of 400 Gb/s
    Network("dgx-h100", 8, 18 * 20.6e9, 50e9),
    # PCIe of the third generation, and one adapter of 100 Gb/s for a node
    Network("pcie", 8, 12e9, 12.5e9 / 8, (PCIE,)),
)}
FITTING = {"v100": "dgx-v100", "a100-40gb": "dgx-a100", "a100-80gb": "dgx-a100", "h100": "dgx-h100",
           "h200": "dgx-h100"}  # by device; others have no NVLink


def network_of(device: str) -> Network:
    """The network of the nodes in which a device is usually sold."""
    return NETWORKS[FITTING.get(device, "pcie")]
