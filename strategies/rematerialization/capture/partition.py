"""Turn an order of operations into the forward and backward graphs that run it, recomputation included."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

from strategies.rematerialization.capture.joint_graph import (
    RUNNING_STATISTICS,
    Captured,
    is_given,
    is_part,
    is_random,
    tensor_arguments,
    tensors,
)


def partition(captured: Captured, order: Sequence[int]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward graphs that run the operations of `problem(captured, ...)` in `order`.

    Returns:
        forward: takes the primals; returns the region's outputs followed by what is kept.
        backward: takes what is kept and the tangents; returns the gradients.
    """
    border = list(order).index(captured.forward)
    nodes = [*captured.operations[:captured.forward], None, *captured.operations[captured.forward:]]
    early, late = [nodes[index] for index in order[:border]], [nodes[index] for index in order[border + 1:]]
    again = {node for node in dict.fromkeys(early) if is_random(node) and (node in late or early.count(node) > 1)}
    kept = _kept(captured, late, set(early))
    forward = _Writer(captured, again)
    for node in captured.primals:
        forward.placeholder(node)
    forward.run(early)
    states = [node for node in again if node in late]
    handed = [forward.read(node) for node in captured.handed_out]
    forward_module = forward.finish([*handed, *map(forward.read, kept), *(forward.states[node] for node in states)])
    backward = _Writer(captured, set(states), ran=early)
    for node in kept:
        backward.placeholder(node)
    for node in states:
        backward.state_placeholder(node)
    for node in captured.tangents:
        backward.placeholder(node)
    backward.run(late)
    return forward_module, backward.finish([backward.read(node) for node in captured.gradients])


def fits(captured: Captured, order: Sequence[int]) -> bool:
    """Whether an order can run a region, even one found for other shapes: every read finds its value."""
    border = captured.forward
    once = [border, *(index + (index >= border) for index in captured.once)]
    if set(order) != set(range(len(captured.operations) + 1)) or any(list(order).count(index) != 1 for index in once):
        return False
    try:
        partition(captured, order)
    except ValueError:
        return False
    return True


def _kept(captured: Captured, late: Sequence[fx.Node], early: set[fx.Node]) -> list[fx.Node]:
    """Nodes saved from forward to backward: what the backward reads before making it, inputs included."""
    kept: dict[fx.Node, None] = {}
    made: set[fx.Node] = set(captured.tangents)

    def need(node: fx.Node) -> None:
        if node in made:
            return
        if is_base(captured, node) or node.op == "placeholder":
            kept[node] = None
        else:
            for argument in node.all_input_nodes:
                need(argument)

    for node in late:
        for argument in tensor_arguments(node) if node in early else node.all_input_nodes:
            need(argument)
        made |= {node, *filter(is_part, node.users)}
    for node in filter(None, captured.gradients):
        need(node)
    return list(kept)


def is_base(captured: Captured, node: fx.Node) -> bool:
    """Whether a node is an operation's result rather than a view of it."""
    return node in captured.computing or (is_part(node) and node.args[0] in captured.computing)


def state_like(operation: fx.Node) -> torch.Tensor:
    """A fake tensor like the state of the RNG that an operation draws from."""
    value = next(tensors(operation.meta["val"]))
    count = 16 if value.device.type == "cuda" else torch.get_rng_state().numel()
    with value.fake_mode:
        return torch.empty(count, dtype=torch.uint8, device="cpu")


def _updates(operation: fx.Node) -> list[fx.Node]:
    """The running statistics that an operation outputs: the last two of its outputs."""
    if operation.target not in RUNNING_STATISTICS:
        return []
    count = len(operation.meta["val"])
    return [part for part in operation.users if is_part(part) and part.args[1] >= count - 2]


class _Writer:
    """Writes one of the two graphs: operations in the given order, views where they are first read."""

    def __init__(self, captured: Captured, replayed: set[fx.Node], ran: Sequence[fx.Node] = ()) -> None:
        self.captured = captured
        self.graph = fx.Graph()
        self.newest: dict[fx.Node, fx.Node] = {}
        self.ran = set(ran)
        self.replayed = replayed
        self.states: dict[fx.Node, fx.Node] = {}
        self.final: set[fx.Node] = set()  # running statistics as updated by the first run
        self.looks_at: dict[int, list[fx.Node]] = {}
        for node, values in captured.values.items():
            for value in values:
                self.looks_at.setdefault(value, []).append(node)

    def placeholder(self, node: fx.Node) -> None:
        """Add an input that stands for a node of the joint graph."""
        self.newest[node] = self.graph.placeholder(node.name)
        self.newest[node].meta = dict(node.meta)

    def state_placeholder(self, operation: fx.Node) -> None:
        """Add an input for the RNG state from which a random operation first drew."""
        self.states[operation] = self.graph.placeholder(f"state_{operation.name}")
        self.states[operation].meta = {"val": state_like(operation)}

    def run(self, operations: Sequence[fx.Node]) -> None:
        """Write operations one after another; when a value is made again, views of its old copy are forgotten."""
        for node in operations:
            made = self._random(node) if node in self.replayed else self._copy(node)
            for value in self.captured.values[node]:
                for view in self.looks_at[value]:
                    if view not in self.final:
                        self.newest.pop(view, None)
            self.newest[node] = made
            for part in filter(is_part, node.users):  # now, so that the tuple does not keep unused outputs alive
                if part not in self.final:
                    self.newest[part] = self._copy(part)
            self.final.update(_updates(node))
            self.ran.add(node)

    def read(self, node: fx.Node | None) -> fx.Node | None:
        """The newest copy of a node; a view is made on demand.

        Raises:
            ValueError: the value it aliases has not been computed.
        """
        if node is None or node in self.newest:
            return self.newest.get(node)
        if not is_given(node) and is_base(self.captured, node):
            raise ValueError(f"{node.name} is read before it is computed")
        self.newest[node] = self._copy(node)
        return self.newest[node]

    def finish(self, outputs: Sequence[fx.Node | None]) -> fx.GraphModule:
        """The graph with its outputs, as a module."""
        self.graph.output(tuple(outputs))
        self.graph.lint()
        return fx.GraphModule(self.captured.joint, self.graph)

    def _copy(self, node: fx.Node) -> fx.Node:
        blank = {node.args[index]: self._blank(node.args[index])
                 for index in RUNNING_STATISTICS.get(node.target, ()) if node in self.ran}
        copied = self.graph.node_copy(node, lambda argument: blank.get(argument) or self.read(argument))
        copied.meta = dict(node.meta)
        return copied

    def _blank(self, node: fx.Node) -> fx.Node:
        """Dummy running statistics for a rerun to update."""
        value = node.meta["val"]
        return self._call(torch.ops.aten.zeros.default, (list(value.shape),), value,
                          {"dtype": value.dtype, "device": value.device})

    def _random(self, operation: fx.Node) -> fx.Node:
        """Run a random operation and save its RNG state, or rerun it from the saved state."""
        arguments = fx.node.map_arg(operation.args, self.read)
        keywords = fx.node.map_arg(operation.kwargs, self.read)
        value = operation.meta["val"]
        if operation in self.states:
            drawn = (self.states[operation], operation.target, *arguments)
            return self._call(run_with_rng_state, drawn, value, keywords)
        state = state_like(operation)
        both = self._call(run_and_save_rng_state, (operation.target, *arguments), (state, value), keywords)
        self.states[operation] = self._call(operator.getitem, (both, 0), state)
        return self._call(operator.getitem, (both, 1), value)

    def _call(self, target: object, arguments: tuple, value: object, keywords: dict | None = None) -> fx.Node:
        node = self.graph.call_function(target, arguments, keywords or {})
        node.meta = {"val": value}
        return node
