"""A captured region: its joint forward-backward graph, and the rematerialization problem it poses.

The graph is what AOTAutograd traces from the region's unmodified code. Values are storages; views are free and are made
again wherever they are needed. Parameters, buffers and inputs belong to others and cost nothing here.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import fx

from strategies.rematerialization.solve.graph import Graph

aten = torch.ops.aten
# Batch norm in training mode, with the argument positions of its running statistics. Its output does not depend on
# them, so that it can be recomputed after they have been updated.
RUNNING_STATISTICS = {
    aten._native_batch_norm_legit_functional.default: (3, 4),
    aten._batch_norm_with_update_functional.default: (3, 4),
}


@dataclass(frozen=True, eq=False)
class Captured:
    """A region's joint graph, with its nodes divided into operations that compute and views of their results.

    Attributes:
        joint: graph of forward and backward; its placeholders are primals (parameters, buffers, tensor arguments), then
            tangents (incoming gradients).
        forward_outputs: how many of its outputs the forward returns; the others are gradients of the primals.
        operations: nodes that compute, the forward's first, in traced order.
        forward: how many of them belong to the forward.
        maker: (values,) operation that makes each value; a value is a storage.
        size: (values,) bytes.
        values: for every node, the values that its tensors alias; inputs alias none.
        once: operations that must not run twice.
        signature: hash that is equal for regions that compute the same on tensors of the same shapes.
    """

    joint: fx.GraphModule
    forward_outputs: int
    operations: tuple[fx.Node, ...]
    forward: int
    maker: tuple[int, ...]
    size: tuple[int, ...]
    values: dict[fx.Node, tuple[int, ...]]
    once: frozenset[int]
    signature: str

    @cached_property
    def computing(self) -> frozenset[fx.Node]:
        """The operations as a set."""
        return frozenset(self.operations)

    @property
    def primals(self) -> list[fx.Node]:
        """The region's own inputs."""
        return [node for node in self.joint.graph.find_nodes(op="placeholder") if not _is_tangent(node)]

    @property
    def tangents(self) -> list[fx.Node]:
        """Incoming gradients."""
        return [node for node in self.joint.graph.find_nodes(op="placeholder") if _is_tangent(node)]

    @property
    def handed_out(self) -> list[fx.Node | None]:
        """Outputs of the forward."""
        return list(self.joint.graph.output_node().args[0][:self.forward_outputs])

    @property
    def gradients(self) -> list[fx.Node | None]:
        """Outputs of the backward, one for each primal."""
        return list(self.joint.graph.output_node().args[0][self.forward_outputs:])


def capture(joint: fx.GraphModule, forward_outputs: int) -> Captured:
    """Divide the nodes of a joint graph traced by AOTAutograd into operations and views.

    Args:
        joint: the graph; every node's `meta["val"]` has its shape, dtype and storage.
        forward_outputs: how many of its outputs are the forward's.
    """
    forward, backward = _phases(joint, forward_outputs)
    value_of: dict[int, int | None] = {storage: None for node in joint.graph.nodes if is_given(node)
                                       for storage, _ in _storages(node)}
    operations: list[fx.Node] = []
    maker, size = [], []
    for node in [*forward, *backward]:
        fresh = [(storage, count) for storage, count in _storages(node) if storage not in value_of]
        if not fresh and not is_effect(node):
            continue  # a view, or one of several outputs
        for storage, count in fresh:
            value_of[storage] = len(maker)
            maker.append(len(operations))
            size.append(count)
        operations.append(node)
    values = {node: tuple(value for value in (value_of.get(storage) for storage, _ in _storages(node))
                          if value is not None) for node in joint.graph.nodes}
    updated = _updated(joint, forward_outputs)
    once = frozenset(index for index, node in enumerate(operations) if is_effect(node)
                     or not isinstance(node.target, torch._ops.OpOverload) or updated & set(tensor_arguments(node)))
    early = set(forward)
    return Captured(joint, forward_outputs, tuple(operations), sum(node in early for node in operations), tuple(maker),
                    tuple(size), values, once, _signature(joint, forward_outputs))


def problem(captured: Captured, seconds: np.ndarray, workspace: np.ndarray, kept: int | None = None,
            budget: int = 0) -> Graph:
    """The region as a rematerialization problem, with a moment between forward and backward.

    At that moment, operation number `captured.forward`, the forward's outputs leave and their gradients arrive, which
    stay until the end because the autograd engine holds them.

    Args:
        captured: the region.
        seconds: (operations,) cost of each.
        workspace: (operations,) bytes that each needs while it runs, beyond its inputs and outputs.
        kept: maximum bytes kept at that moment, enforced when solved for `budget`; None for no limit.
        budget: the budget that the problem will be solved for; only used with `kept`.
    """
    border = captured.forward
    leaving = {value for node in filter(None, captured.handed_out) for value in captured.values[node]}
    arriving = sum(count for node in captured.tangents for _, count in _storages(node))
    reads = [tuple(sorted(reads_of(captured, node))) for node in captured.operations]
    reads.insert(border, tuple(sorted(leaving)))
    gradients = {value for node in filter(None, captured.gradients) for value in captured.values[node]}
    after = [index + (index >= border) for index in range(len(captured.operations))]
    taken = arriving + sum(captured.size[value] for value in leaving)
    return Graph(
        seconds=np.insert(seconds, border, 0.0), reads=tuple(reads),
        maker=np.array([*(after[index] for index in captured.maker), border]),
        size=np.array([*captured.size, arriving], dtype=np.int64),
        workspace=np.insert(workspace, border, 0 if kept is None else max(0, budget - kept - taken)),
        once=frozenset([border, *(after[index] for index in captured.once)]),
        held=frozenset([*(value for value in gradients if captured.maker[value] >= border), len(captured.size)]),
        forward=border)


def reads_of(captured: Captured, operation: fx.Node) -> set[int]:
    """Values that an operation reads, directly or through views."""
    return {value for node in tensor_arguments(operation) for value in captured.values[node]}


def tensor_arguments(node: fx.Node) -> list[fx.Node]:
    """Nodes that an operation reads, except running statistics, which it only updates."""
    ignored = [node.args[index] for index in RUNNING_STATISTICS.get(node.target, ())]
    return [argument for argument in node.all_input_nodes if argument not in ignored]


def read_by_backward(captured: Captured) -> set[fx.Node]:
    """Primals that the backward's operations read, directly or through views."""
    found: set[fx.Node] = set()
    stack = [argument for node in captured.operations[captured.forward:] for argument in tensor_arguments(node)]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            found.add(node)
        elif node not in captured.computing:
            fresh = set(node.all_input_nodes) - seen
            seen |= fresh
            stack += fresh
    return found


def is_given(node: fx.Node) -> bool:
    """Whether a node exists from the start: an input or a constant."""
    return node.op in ("placeholder", "get_attr")


def is_part(node: fx.Node) -> bool:
    """Whether a node selects one of several outputs."""
    return node.target is operator.getitem


def is_effect(node: fx.Node) -> bool:
    """Whether a node mutates existing tensors, so that it must run exactly once, in its place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws random numbers, or may: custom operations seldom declare it."""
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in node.target.tags or node.target.namespace not in ("aten", "prims"))


def tensors(value: object) -> Iterator[torch.Tensor]:
    """Tensors in a node's value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def _is_tangent(node: fx.Node) -> bool:
    return node.name.startswith("tangents")


def _storages(node: fx.Node) -> list[tuple[int, int]]:
    """Identity and bytes of the storages that a node's tensors use."""
    found = {}
    for tensor in tensors(node.meta.get("val")):
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return list(found.items())


def _phases(joint: fx.GraphModule, forward_outputs: int) -> tuple[list[fx.Node], list[fx.Node]]:
    """Nodes that the forward's outputs need, and further nodes that the backward's need, both in traced order."""
    outputs = joint.graph.output_node().args[0]
    late = _reachable(filter(_is_tangent, joint.graph.find_nodes(op="placeholder")), lambda node: node.users)
    effects = {node for node in joint.graph.nodes if is_effect(node)}
    early = _reachable([*filter(None, outputs[:forward_outputs]), *(effects - late)], lambda node: node.all_input_nodes)
    rest = _reachable([*filter(None, outputs[forward_outputs:]), *(effects & late)], lambda node: node.all_input_nodes)
    computing = [node for node in joint.graph.nodes if not is_given(node) and node.op != "output"]
    return [node for node in computing if node in early], [node for node in computing if node in rest - early]


def _reachable(roots: Iterable[fx.Node], neighbors: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    reached = set(roots)
    stack = list(reached)
    while stack:
        for node in neighbors(stack.pop()):
            if node not in reached:
                reached.add(node)
                stack.append(node)
    return reached


def _updated(joint: fx.GraphModule, forward_outputs: int) -> set[fx.Node]:
    """Buffers of which the forward returns an updated version; what reads one gives another result when rerun."""
    outputs = joint.graph.output_node().args[0]
    still = [node for node, gradient in zip(joint.graph.find_nodes(op="placeholder"), outputs[forward_outputs:],
                                            strict=False) if gradient is None and list(tensors(node.meta.get("val")))]
    found = set()
    for output in filter(None, outputs[:forward_outputs]):
        if still and list(tensors(output.meta.get("val"))):
            sources = _reachable([output], lambda node: node.all_input_nodes)
            found |= {node for node in still if node in sources and _alike(node, output)}
    return found


def _alike(one: fx.Node, other: fx.Node) -> bool:
    return (one.meta["val"].shape, one.meta["val"].dtype) == (other.meta["val"].shape, other.meta["val"].dtype)


def _signature(joint: fx.GraphModule, forward_outputs: int) -> str:
    digest = hashlib.sha256(str(forward_outputs).encode())
    for node in joint.graph.nodes:
        shapes = [(tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device))
                  for tensor in tensors(node.meta.get("val"))]
        target = str(node.target) if node.op == "call_function" else node.op
        digest.update(repr((target, str(node.args), str(node.kwargs), shapes)).encode())
    return digest.hexdigest()
