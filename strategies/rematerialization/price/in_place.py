"""A region's rematerialization problem within the step around it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from strategies.rematerialization.price.non_region_memory import NonRegionMemory
from strategies.rematerialization.solve.graph import Graph


def in_place(graph: Graph, frame: NonRegionMemory, index: int, last: bool, given: int, seconds: np.ndarray | None = None
             ) -> Graph:
    """A region's problem with the memory that others hold during each of its phases.

    Memory held in only one of the phases is added to the workspace of every operation of that phase. Between forward
    and backward that is `head` for the last region, which includes the region's own output and its gradient.

    Args:
        graph: the problem of the region alone.
        frame: memory held outside the regions.
        index: the region's place in the chain.
        last: whether it is the last one.
        given: bytes of its input, if nothing else counts them.
        seconds: (operations,) cost of each; None for those of the graph.
    """
    border = graph.forward
    fixed = min(frame.before[index], frame.behind[index])
    beside = np.where(np.arange(len(graph.seconds)) < border, frame.before[index], frame.behind[index])
    workspace = graph.workspace + beside - fixed
    leaving, arriving = (sum(int(graph.size[value]) for value in values)
                         for values in (graph.reads[border], graph.makes[border]))
    workspace[border] = (frame.head - arriving if last else frame.behind[index]) - leaving - fixed
    return replace(graph, seconds=graph.seconds if seconds is None else np.insert(seconds, border, 0.0),
                   workspace=workspace, fixed=fixed + given)
