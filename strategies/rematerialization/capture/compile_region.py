"""Run a region by its schedule: captured by torch.compile, split as planned, run by eager kernels or Inductor."""

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
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.fx.graph import _BoxedCodeGen

from strategies.rematerialization.capture.joint_graph import Captured, capture
from strategies.rematerialization.capture.partition import partition

Choose = Callable[[Captured], Sequence[int]]
Notice = Callable[[Captured, Sequence[object]], None]
BEFORE, STANDS_IN = "_forward_before_planning", "_stands_in"


def compiled(choose: Choose, inductor: bool = False, notice: Notice | None = None) -> Callable:
    """A function that calls a module's own forward by a schedule: `call(module, *args, **kwargs)`.

    Whatever the module does is captured whole, or the call raises what torch.compile has to say: nothing is run half.

    Args:
        choose: gives the order of operations for a region captured, at most once for every shape and dtype.
        inductor: compile the two graphs instead of running them by eager kernels.
        notice: told which captured region runs, and on what, whenever one does; not with Inductor.
    """
    # Every schedule has a code object of its own: torch.compile keeps its cache, and counts recompilations, by it.
    function = types.FunctionType(own_forward.__code__.replace(co_name="region"), globals(), "region")
    function = torch.compile(function, backend=_backend(choose, inductor, notice), dynamic=False, fullgraph=True)

    def call(module: nn.Module, *args, **kwargs) -> object:
        with idle_hooks(), in_one_piece():
            return function(module, *args, **kwargs)
    return call


def in_one_piece() -> AbstractContextManager:
    """Within the context, torch.compile does not cut a region where DDP's buckets end, as it does inside of DDP.

    What it cuts is compiled on tensors without data, and a region's schedule is for all of it.
    """
    if nn.parallel.DistributedDataParallel._get_active_ddp_module() is None:
        return nullcontext()
    return torch._dynamo.config.patch(optimize_ddp=False)


@contextmanager
def idle_hooks() -> Iterator[None]:
    """Within the context, hooks by which transformers collects hidden states do nothing, and can be captured.

    Once a model has been asked for hidden states, there are hooks inside of its blocks too, for attention maps, which
    look into a context variable that torch.compile does not know. If more than hidden states is being collected, they
    stay as they are: the block is then not captured.
    """
    collecting = sys.modules.get("transformers.utils.output_capturing")  # not there, no hooks
    collector = getattr(collecting, "_active_collector", None)
    if collector is None or set(collector.get() or ()) - {"hidden_states", "_hidden_states_layers"}:
        yield
        return
    before = collector.global_var, collector.compiling
    collector.global_var, collector.compiling = None, True  # the state in which get() can be captured
    try:
        yield
    finally:
        collector.global_var, collector.compiling = before


def own_forward(module: nn.Module, *args, **kwargs) -> object:
    """A region's own forward: the one put on the module by others (Accelerate does) before ours, or its class's."""
    if hasattr(module, BEFORE):
        return getattr(module, BEFORE)(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Within the context, loggers of torch say nothing: what they would tell of is expected and taken care of."""
    before = {name: logging.getLogger(name).disabled for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).disabled = True
        yield
    finally:
        for name, disabled in before.items():
            logging.getLogger(name).disabled = disabled


def gpus_in_use() -> list[int]:
    """The current GPU, if any is in use: whose generator runs beside the CPU's."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def stood_in(module: nn.Module) -> bool:
    """Whether something stands in place of a module's forward."""
    return getattr(module.__dict__.get("forward"), STANDS_IN, False)


def replace_forward(module: nn.Module, forward: Callable) -> None:
    """Put a forward on a module in place of its own, or of another that was put there so; its own stays in reach."""
    there = module.__dict__.get("forward")
    if there is not None and not stood_in(module):
        module.__dict__[BEFORE] = there
    setattr(forward, STANDS_IN, True)
    module.forward = forward


def restore_forward(module: nn.Module) -> None:
    """Give a module back the forward that it had before `replace_forward`."""
    module.__dict__.pop("forward", None)
    if BEFORE in module.__dict__:
        module.forward = module.__dict__.pop(BEFORE)


def _backend(choose: Choose, inductor: bool, notice: Notice | None) -> Callable:
    def split(joint: fx.GraphModule, joint_inputs: object, *, num_fwd_outputs: int, **_) -> tuple:
        captured = capture(joint, num_fwd_outputs)
        forward, backward = partition(captured, choose(captured))
        forward.meta["captured"] = captured
        return forward, backward

    def noticed(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable:
        return boxed(gm, notice=notice)

    def eager(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable:
        # a region may be turned back twice (retain_graph), so what it keeps is never given away
        with torch._functorch.config.patch(donated_buffer=False):
            return aot_module_simplified(gm, inputs, fw_compiler=noticed, bw_compiler=boxed, inference_compiler=boxed,
                                         partition_fn=split)

    def fused(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        # Nothing from caches on disk: they know the code, not the schedule.
        with (torch._functorch.config.patch(donated_buffer=False, enable_autograd_cache=False),
              torch._inductor.config.patch(custom_partitioner_fn=_Partitioner(split), fx_graph_cache=False)):
            return compile_fx(gm, inputs)

    return fused if inductor else eager


class _Partitioner(CustomPartitionerFn):
    """Inductor's hook for a partitioner."""

    def __init__(self, split: Callable) -> None:
        self.split = split

    def __call__(self, joint: fx.GraphModule, joint_inputs: object, **keywords) -> tuple:
        return self.split(joint, joint_inputs, **keywords)

    def uuid(self) -> None:
        """No identity: the schedule is not part of the code that Inductor hashes."""
        return None


def boxed(gm: fx.GraphModule, inputs: Sequence[torch.Tensor] = (), notice: Notice | None = None) -> Callable:
    """A graph as a function of one list, which it empties, so that inputs are freed after their last use."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # where a kernel's strides are not those that tracing foretold
    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()

    captured = gm.meta.get("captured")

    def run(arguments: list) -> object:
        if notice is not None and captured is not None:
            notice(captured, arguments)
        return gm.forward(arguments)

    run._boxed_call = True
    return run
