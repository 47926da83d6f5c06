"""The public entry point: plan recomputation for a training step under a memory budget and install the plan.

A region is a module that gets a schedule of its own: one of the model's repeated blocks, or a whole convolutional
network. A region is captured when torch.compile has traced it into a joint forward-backward graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from strategies.memory.external import held_besides
from strategies.memory.ledger import parameter_bytes
from strategies.memory.residency import Residency
from strategies.memory.units import parse_bytes
from strategies.rematerialization.capture.compile_region import own_forward, stood_in
from strategies.rematerialization.capture.fake_tensors import fake_batch, without_data
from strategies.rematerialization.capture.regions import RegionCall, calling, find_regions, record
from strategies.rematerialization.execute.installed import uninstall
from strategies.rematerialization.inductor_choice import Ways
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.price.costs import DEVICES, Prices, this_device
from strategies.rematerialization.price.equal_blocks import equal_runs
from strategies.rematerialization.price.gpu_attention import as_on_gpus
from strategies.rematerialization.price.option_store import OptionStore
from strategies.rematerialization.price.step_trace import Hooks, Shared, Step, gradients_kept, trace_step, without
from strategies.rematerialization.price.uncaptured_options import fallback_options
from strategies.rematerialization.recompute_plan import BudgetError, RecomputePlan


@dataclass(frozen=True)
class Refuted:
    """Why a block's captured graph cannot stand in for the block.

    Attributes:
        reason: explanation for the user.
        unfit: whether the block cannot be recomputed at all, so that it has to run unchanged.
    """

    reason: str
    unfit: bool


Loss = Callable[[nn.Module, object], torch.Tensor]


def rematerialize(model: nn.Module, example_batch: object, budget: int | str, *,
                  optimizer: torch.optim.Optimizer | None = None, loss: Loss | None = None,
                  autocast: torch.dtype | None = None, accumulate: bool = False, others: Sequence[object] = (),
                  compile: bool | Literal["auto"] = False, solver: str = "auto", cache: str | Path | None = None
                  ) -> RecomputePlan:
    """Make a model train within a memory budget with as little recomputation as possible, and report how much that is.

        plan = limbeck.rematerialize(model, batch, budget="8GiB", optimizer=optimizer)
        print(plan)

    The model's code, parameters and parameter names do not change, and gradients are the same as without recomputation.
    Afterwards its repeated blocks (or, for a convolutional network, the whole model) run by schedules that say which
    activations to keep and which to recompute just before they are used. Call it on every rank, before or after the
    model is prepared by Accelerate or passed to a Trainer, with a batch of the size used in training. `plan.remove()`
    undoes it.

    Args:
        model: the model, on the device it trains on.
        example_batch: what `loss` takes; by default a mapping for `model(**batch)`, labels included.
        budget: peak memory allowed for everything, as bytes or text ("8GiB"): weights, gradients, optimizer state,
            activations, loss and temporaries.
        optimizer: optimizer to account for, including state that it has not allocated yet.
        loss: computes the loss from model and batch; by default the model's output `.loss`, or else its first output.
            It is called a few times, also on fake tensors, so anything it stores itself is meaningless afterwards.
        autocast: mixed-precision dtype, if training uses autocast and the model's forward does not enter it itself.
        accumulate: whether gradients of earlier micro-batches already exist when a step begins.
        others: modules and tensors that stay in memory beside the model, such as a teacher.
        compile: run the schedules through Inductor instead of eager kernels; "auto" does if that pays within the first
            50 steps, each of one batch, which may take a trial; `plan.compiled` then says what and why. Tensors fused
            away take no memory, so the predicted peak is an upper estimate.
        solver: "auto" searches and reports a bound on what is left to gain; "exact" solves Checkmate's program (Jain et
            al. 2020) for each block to proven optimality, and is for blocks with few operations.
        cache: existing folder in which the solutions found for each block are kept for later processes; None keeps
            nothing.

    Returns:
        the plan, already installed in the model.

    Raises:
        BudgetError: no plan fits the budget; the message gives the smallest budget that does.
        NotExact: `solver` is "exact" and a block has too many operations, or was not solved to optimality in time.
        ValueError: the budget is not a number of bytes, the loss is not a single number, or nothing requires gradients.
        CannotPlan: the model does not run on fake tensors, as some mixture-of-experts models do not.
    """
    budget = parse_bytes(budget)
    settings: dict[str, Any] = {"optimizer": optimizer, "loss": loss, "autocast": autocast, "accumulate": accumulate,
                                "others": others, "shared": Shared(), "reserved": _buckets(model), "solver": solver,
                                "cache": None if cache is None else Path(cache) / "plans"}
    whole = planner = study(model, example_batch, regions=False, **settings)
    if not planner.fits_as_it_is(budget, margin=True):
        planner = study(model, example_batch, **settings)
    planner.unchanged = compile is not True
    try:
        plan = planner.plan(budget)
    except BudgetError as error:
        if not whole.fits_as_it_is(budget):
            raise error.beside(whole.keep_all()) from None
        planner, plan = whole, whole.plan(budget)
    uninstall(model)
    ways = Ways(planner, plan)
    if compile == "auto":
        kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
        choice = ways.choose(kind, around=nullcontext if autocast is None else partial(torch.autocast, kind, autocast))
        plan.compiled = str(choice)
    ways.install(choice.inductor if compile == "auto" else compile)
    return plan


def study(model: nn.Module, batch: object, *, optimizer: torch.optim.Optimizer | None = None, loss: Loss | None = None,
          autocast: torch.dtype | None = None, accumulate: bool = False, others: Sequence[object] = (),
          device: str | None = None, reserved: Mapping[str, int] | None = None, residency: Residency | None = None,
          in_backward: Hooks | None = None, regions: bool = True, measure: bool | None = None,
          refuted: Mapping[str, Refuted] | None = None, solver: str = "auto", cache: Path | None = None,
          shared: Shared | None = None, alike: bool = False) -> Planner:
    """Analyze one training step and return the planner that makes plans for any budget; see `rematerialize`.

    Args:
        model: the model. One whose parameters were made under FakeTensorMode is analyzed without computing anything.
        batch: as for `rematerialize`, and so are `optimizer`, `loss`, `autocast`, `accumulate` and `solver`.
        others: modules and tensors beside the model; with `residency`, the optimizer and `others` are part of that.
        device: name of the device to price for; None is the present one.
        reserved: bytes by name that are held by something not visible here.
        residency: what a rank holds of a model that is sharded.
        in_backward: attaches hooks to an optimizer's parameters that step and free gradients during the backward, and
            can `remove` them again.
        regions: whether to plan regions; without, the model runs unchanged and only what that needs is found.
        measure: whether operations are timed on the present device; None times them if the model has data.
        refuted: blocks by name that are not to be captured or, if unfit, that run unchanged.
        cache: folder in which solutions for each block are kept, created if its parent exists.
        shared: what other studies of this step have found; they may differ from this one in `regions` and in how the
            loss goes about its computation.
        alike: whether nothing but the next block reads what a block of a run of equal ones returns, and the loss reads
            nothing of them; then a few of them tell what all need.
    """
    if autocast is not None and not isinstance(autocast, torch.dtype):
        raise ValueError(f"autocast is a dtype such as torch.bfloat16, not {autocast!r}")
    model = _unwrapped(model)
    loss = loss or loss_of
    kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
    if kind == "meta":
        raise ValueError("the model is on the meta device: put it on the device it trains on, or make it under "
                         "torch's FakeTensorMode to plan it without weights")

    def step(model: nn.Module, batch: object) -> torch.Tensor:
        with torch.enable_grad(), torch.autocast(kind, autocast) if autocast is not None else nullcontext():
            found = loss(model, batch)
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(f"the loss is to be one number, not {shape}: give `loss`, a function of model and batch, "
                             "or labels in the batch")
        if not found.requires_grad:
            raise ValueError("no gradient comes back from the loss: nothing in the model trains")
        return found

    standing = {name: module for name, module in model.named_modules() if stood_in(module)}
    with calling(standing, lambda _, module: partial(own_forward, module)):  # bypass an installed plan
        return _study(model, batch, step, optimizer, accumulate, others, device, reserved or {}, regions, residency,
                      in_backward, measure, refuted or {}, solver, None if cache is None else OptionStore(cache),
                      shared or Shared(), alike)


def _study(model: nn.Module, batch: object, step: Callable[[nn.Module, object], torch.Tensor],
           optimizer: torch.optim.Optimizer | None, accumulate: bool, others: Sequence[object], device: str | None,
           reserved: Mapping[str, int], regions: bool, residency: Residency | None, in_backward: Hooks | None,
           measure: bool | None, refuted: Mapping[str, Refuted], solver: str, store: OptionStore | None, shared: Shared,
           alike: bool) -> Planner:
    kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
    pretended = any(isinstance(parameter, FakeTensor) for parameter in model.parameters())
    blocks = None if residency is None else residency.blocks
    modules = _regions(model, blocks) if regions else {}
    for name, why in refuted.items():
        if why.unfit and name in modules:
            _warn(name, modules.pop(name), "runs as it is", why.reason)
    named = device not in (None, "cpu")  # a GPU, which need not be present
    elsewhere = as_on_gpus if pretended and kind != "cuda" and named else nullcontext
    around = [thing for thing in (model, *others) if isinstance(thing, nn.Module)]
    if modules and shared.calls is None:
        with without_data(*around) if pretended else nullcontext((None, None)) as (mode, _), mode or nullcontext(), \
                elsewhere():
            recorded = record(modules, lambda: step(model, batch if mode is None else fake_batch(mode, batch)), around,
                              {name: why.reason for name, why in refuted.items()},
                              _counted(model) if pretended and alike and shared.even else ())
        shared.calls = _plannable(recorded)
        _warn_of([call for call in shared.calls if call.captured is None], "keeps all or only its input")
    calls = [replace(call) for call in shared.calls or ()] if modules else []
    known = DEVICES[device] if device else this_device(kind)
    if kind == "cuda" and not pretended:
        reserved = {**reserved, "held besides": held_besides(
            next(model.parameters()).device, [model, *others, batch, *([] if optimizer is None else [optimizer])])}
    elif named:
        reserved = {**reserved, "libraries": 2 * known.workspace}  # the caller's thread and autograd's
    with gradients_kept(around, optimizer), without_data(*around) as (mode, stand_in), elsewhere():
        calls, frame = trace_step(calls, Step(
            model, fake_batch(mode, batch), lambda batch: step(model, batch), optimizer, stand_in, others,
            accumulate, reserved, on_gpu=kind == "cuda" or named, residency=residency, in_backward=in_backward,
            alike=alike and pretended), mode, shared)
        fallback = {id(call): fallback_options(call.measured, known) for call in calls  # type: ignore[arg-type]  # it ran
                    if call.captured is None}
    prices = Prices(known, measure=not pretended if measure is None else measure, store=store)
    return Planner(calls, frame, prices, lambda call: fallback[id(call)], blocks is not None, solver, store)


def _counted(model: nn.Module) -> set[str]:
    """Names of blocks that are equal to the block before them, and that need not be run to know what they need."""
    return {name for run in equal_runs(model) for name, _ in run.counted}


def _regions(model: nn.Module, blocks: Sequence[str] | None) -> dict[str, nn.Module]:
    """Modules to plan, by name; with `blocks` (a model whose weights are gathered and freed), these blocks.

    Each of these blocks has all its weights while it runs. Inside anything larger, hooks gather weights, and a captured
    graph does not contain hooks.
    """
    if blocks is None:
        return find_regions(model)
    if not blocks:
        warnings.warn(f"{type(model).__name__} is not planned inside and runs as it is: its weights are gathered when "
                      "they are used, and it has no repeated blocks that are gathered as a whole", stacklevel=4)
    return {name: model.get_submodule(name) for name in blocks}


def _buckets(model: nn.Module) -> dict[str, int]:
    """Bytes of the buckets in which data parallelism all-reduces gradients.

    A model that is not wrapped in DistributedDataParallel yet is counted as wrapped if there are several ranks. With
    `gradient_as_bucket_view` the gradients live in the buckets and are already counted as gradients.
    """
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if getattr(model, "gradient_as_bucket_view", False) or not (wrapped or ranks > 1):
        return {}
    return {"communication": parameter_bytes(model, trained=True)}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def _plannable(calls: Sequence[RegionCall]) -> list[RegionCall]:
    """Calls whose modules can be recomputed and have outputs; other modules run unchanged, outside the regions."""
    unfit = [call for call in calls if call.unfit]
    for call in unfit:
        call.reason = call.unfit
    _warn_of(unfit, "runs as it is")
    return without({id(call.module) for call in unfit}, calls)


def _warn_of(calls: Sequence[RegionCall], consequence: str) -> None:
    """Warn once per class of module that has no schedule of its own, naming the first instance."""
    for call in {type(call.module): call for call in reversed(calls)}.values():
        _warn(call.name, call.module, consequence, call.reason)


def _warn(name: str, module: nn.Module, consequence: str, reason: str) -> None:
    told = f"{name} ({type(module).__name__})" if name else type(module).__name__
    warnings.warn(f"{told} is not planned inside and {consequence}: {reason}", stacklevel=5)


def try_blocks(planner: Planner, model: nn.Module, run: Callable[[], object]) -> dict[str, Refuted]:
    """Find blocks of a model with data whose captured graphs do not compute what the blocks compute.

    A plan made from shapes alone could not check this, so every block is run once here.

    Args:
        planner: planner whose blocks are checked, by name.
        model: model of the same shapes, without a plan installed.
        run: calls the model.

    Returns:
        the blocks that failed, by name.
    """
    modules = {call.name: model.get_submodule(call.name) for call in planner.calls if call.captured is not None}
    calls = record(modules, run, [model]) if modules else []
    return {call.name: Refuted(call.unfit or call.reason, bool(call.unfit)) for call in calls
            if call.unfit or call.captured is None}


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """Default loss of a model for a batch: `.loss` or "loss" in its output, or else its first output."""
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(batch) if isinstance(batch, torch.Tensor) else model(*batch)
    if isinstance(out, Mapping):
        loss: Any = out.get("loss")
        return loss
    return out if isinstance(out, torch.Tensor) else out[0]
