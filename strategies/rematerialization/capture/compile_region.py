"""Run a region by its schedule: traced by torch.compile, partitioned as planned, run by eager kernels or Inductor."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch._functorch.config
import torch._inductor.config
from torch import fx, nn
from torch.fx.graph import _BoxedCodeGen

from strategies.rematerialization.capture.joint_graph import Captured, capture
from strategies.rematerialization.capture.partition import partition

Choose = Callable[[Captured], Sequence[int]]
Notice = Callable[[Captured, Sequence[object]], None]
BEFORE, STANDS_IN = "_forward_before_planning", "_stands_in"


def compiled(choose: Choose, inductor: bool = False, notice: Notice | None = None) -> Callable:
    """A function that calls a module's own forward by a schedule: `call(module, *args, **kwargs)`.

    The forward is captured as one full graph; if that fails, the call raises torch.compile's error before anything
    runs.

    Args:
        choose: returns the order of operations for a captured region; called at most once for each set of shapes and
            dtypes.
        inductor: compile both graphs with Inductor instead of running them with eager kernels.
        notice: called with the captured region and its inputs whenever one runs; not with Inductor.
    """
    # A code object for every schedule, because torch.compile keys its cache and recompile limit by code object.
    function = types.FunctionType(own_forward.__code__.replace(co_name="region"), globals(), "region")
    function = torch.compile(function, backend=_backend(choose, inductor, notice), dynamic=False, fullgraph=True)

    def call(module: nn.Module, *args, **kwargs) -> object:
        with idle_hooks(), in_one_piece():
            return function(module, *args, **kwargs)
    return call


def in_one_piece() -> AbstractContextManager:
    """Within the context, torch.compile does not split a region at DDP's bucket boundaries, as it does inside of DDP.

    It compiles the pieces of a split on fake tensors, and a region's schedule is for the whole region.
    """
    if nn.parallel.DistributedDataParallel._get_active_ddp_module() is None:
        return nullcontext()
    return torch._dynamo.config.patch(optimize_ddp=False)


@contextmanager
def idle_hooks() -> Iterator[None]:
    """Within the context, the hooks with which transformers collects hidden states do nothing, so capture works.

    Once a model has been asked for hidden states, its blocks also have hooks for attention maps, and these read a
    context variable that torch.compile does not support. If more than hidden states is being collected, the hooks stay
    active and the block is not captured.
    """
    collecting = sys.modules.get("transformers.utils.output_capturing")  # if not imported, there are no hooks
    collector = getattr(collecting, "_active_collector", None)
    if collector is None or set(collector.get() or ()) - {"hidden_states", "_hidden_states_layers"}:
        yield
        return
    before = collector.global_var, collector.compiling
    collector.global_var, collector.compiling = None, True  # in this state get() can be captured
    try:
        yield
    finally:
        collector.global_var, collector.compiling = before


def own_forward(module: nn.Module, *args, **kwargs) -> object:
    """Call a region's own forward: one set on the module before ours (by Accelerate, for example), or its class's."""
    if hasattr(module, BEFORE):
        return getattr(module, BEFORE)(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Within the context, these torch loggers are silent, because what they report is expected and handled."""
    before = {name: logging.getLogger(name).disabled for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).disabled = True
        yield
    finally:
        for name, disabled in before.items():
            logging.getLogger(name).disabled = disabled


def gpus_in_use() -> list[int]:
    """The current GPU's index if CUDA is in use, for its RNG state beside the CPU's; else an empty list."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def stood_in(module: nn.Module) -> bool:
    """Whether a module's forward has been replaced by `replace_forward`."""
    return getattr(module.__dict__.get("forward"), STANDS_IN, False)


def replace_forward(module: nn.Module, forward: Callable) -> None:
    """Replace a module's forward, or an earlier replacement, so that `own_forward` still reaches the original."""
    there = module.__dict__.get("forward")
    if there is not None and not stood_in(module):
        module.__dict__[BEFORE] = there
    setattr(forward, STANDS_IN, True)
    module.forward = forward


def restore_forward(module: nn.Module) -> None:
    """Restore the forward that a module had before `replace_forward`."""
    module.__dict__.pop("forward", None)
    if BEFORE in module.__dict__:
        module.forward = module.__dict__.pop(BEFORE)


def _backend(choose: Choose, inductor: bool, notice: Notice | None) -> Callable:
    # Not imported before something is captured: it takes 0.2 s, and a run without a budget captures nothing.
    from torch._functorch.aot_autograd import aot_module_simplified

    def split(joint: fx.GraphModule, joint_inputs: object, *, num_fwd_outputs: int, **_) -> tuple:
        captured = capture(joint, num_fwd_outputs)
        forward, backward = partition(captured, choose(captured))
        forward.meta["captured"] = captured
        return forward, backward

    def noticed(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable:
        return boxed(gm, notice=notice)

    def eager(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable:
        # with retain_graph the backward of a region may run twice, so saved tensors must not be donated
        with torch._functorch.config.patch(donated_buffer=False):
            return aot_module_simplified(gm, inputs, fw_compiler=noticed, bw_compiler=boxed, inference_compiler=boxed,
                                         partition_fn=split)

    def fused(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        # No caches on disk: their keys contain the code, but not the schedule.
        with (torch._functorch.config.patch(donated_buffer=False, enable_autograd_cache=False),
              torch._inductor.config.patch(custom_partitioner_fn=_partitioner(split), fx_graph_cache=False)):
            return compile_fx(gm, inputs)

    return fused if inductor else eager


def _partitioner(split: Callable) -> object:
    """A partitioner in the form that Inductor's hook takes."""
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Partitioner(CustomPartitionerFn):
        def __call__(self, joint: fx.GraphModule, joint_inputs: object, **keywords) -> tuple:
            return split(joint, joint_inputs, **keywords)

        def uuid(self) -> None:
            """None, which disables caching: the schedule is not part of the code that Inductor hashes."""
            return None

    return Partitioner()


def boxed(gm: fx.GraphModule, inputs: Sequence[torch.Tensor] = (), notice: Notice | None = None) -> Callable:
    """A graph as a function of one list, which it empties, so that inputs are freed after their last use."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # as a kernel's strides may differ from the traced ones
    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()

    captured = gm.meta.get("captured")

    def run(arguments: list) -> object:
        if notice is not None and captured is not None:
            notice(captured, arguments)
        return gm.forward(arguments)

    run._boxed_call = True
    return run
