"""Random layered graphs for the rematerialization solver, made from a seed.

The kind is that of Gagrani et al. 2022 (Neural Topological Ordering for Computation Graphs, appendix A), on which
Bartan et al. 2023 (Moccasin) measured the interval formulation: nodes in layers of random width, edges to neighboring
layers between nodes that lie close together, and skip connections over several layers. There is no backward pass.
"""

from __future__ import annotations

import numpy as np

from strategies.rematerialization.solve.graph import Graph, simulate

WIDTH = 0.66  # mean width of a layer, times the square root of the number of nodes
REACH = 0.2  # of the widest layer's width: how far apart along the layers two neighbors may lie
SKIPS = 0.5  # connections over several layers, for each node
SIZES = ((700.0, 300.0), (2000.0, 700.0), (4500.0, 1000.0))  # mean and deviation of the mixture that sizes come from


def layered(nodes: int, seed: int = 0) -> Graph:
    """A graph of `nodes` operations with one value each, numbered layer by layer; seconds from 1 to 999, any unit."""
    draw = np.random.default_rng([nodes, seed])
    layers = _layers(nodes, draw)
    reads: list[set[int]] = [set() for _ in range(nodes)]
    widest = max(map(len, layers))
    for before, here in zip(layers, layers[1:], strict=False):
        for place, node in enumerate(here):
            _read_near(reads[node], before, (place + 0.5) / len(here), REACH * widest / 2)
        for place, node in enumerate(before):  # whatever is made is read
            if not any(node in reads[later] for later in here):
                reads[here[min(len(here) - 1, place * len(here) // len(before))]].add(node)
    for _ in range(round(SKIPS * nodes)):
        early, late = sorted(draw.choice(len(layers), 2, replace=False))
        if late > early + 1:
            reads[draw.choice(layers[late])].add(int(draw.choice(layers[early])))
    kind = draw.choice(len(SIZES), nodes, p=(0.5, 0.3, 0.2))
    mean, deviation = np.array(SIZES)[kind].T
    size = np.maximum(50, draw.normal(mean, deviation)).astype(np.int64)
    return Graph(draw.integers(1, 1000, nodes).astype(float), tuple(tuple(sorted(read)) for read in reads),
                 np.arange(nodes), size, np.zeros(nodes, np.int64), forward=nodes - 1)


def _layers(nodes: int, draw: np.random.Generator) -> list[list[int]]:
    """Numbers of the nodes of every layer; the first and the last have one."""
    mean = WIDTH * nodes**0.5
    layers, made = [[0]], 1
    while made < nodes - 1:
        width = min(int(draw.integers(round(0.4 * mean), round(1.6 * mean) + 1)), nodes - 1 - made)
        layers.append(list(range(made, made + max(1, width))))
        made += max(1, width)
    return [*layers, [nodes - 1]]


def _read_near(read: set[int], before: list[int], place: float, reach: float) -> None:
    """Let a node at `place` (0 to 1) of its layer read those of the layer before that lie within `reach` of it."""
    center = place * len(before)
    near = [node for spot, node in enumerate(before) if abs(spot + 0.5 - center) <= max(0.5, reach)]
    read.update(near or [before[int(center)]])


def budget_of(graph: Graph, share: float = 0.8) -> int:
    """`share` of the peak of keeping everything, in bytes."""
    return int(share * simulate(graph, range(len(graph.seconds))).peak)
