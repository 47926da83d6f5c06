"""The function people call: plan a model's training step for a budget of bytes, and make the model keep to it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.price.costs import DEVICES, Prices, this_device
from strategies.rematerialization.price.gpu_attention import attention_as_on_gpus
from strategies.rematerialization.price.option_store import OptionStore
from strategies.rematerialization.price.step_trace import Hooks, Step, gradients_kept, trace_step, without
from strategies.rematerialization.price.uncaptured_options import fallback_options
from strategies.rematerialization.recompute_plan import RecomputePlan


@dataclass(frozen=True)
class Refuted:
    """Why a block is not what its captured graph says.

    Attributes:
        reason: in words.
        unfit: whether it cannot run twice either, so that it runs as it is.
    """

    reason: str
    unfit: bool


Loss = Callable[[nn.Module, object], torch.Tensor]


def rematerialize(model: nn.Module, example_batch: object, budget: int | str, *,
                  optimizer: torch.optim.Optimizer | None = None, loss: Loss | None = None,
                  autocast: torch.dtype | None = None, accumulate: bool = False, others: Sequence[object] = (),
                  compile: bool = False, solver: str = "auto", cache: str | Path | None = None) -> RecomputePlan:
    """Make a model train within a budget of bytes, at the least recomputation found, and say how much that is.

        plan = limbeck.rematerialize(model, batch, budget="8GiB", optimizer=optimizer)
        print(plan)

    The model's code, parameters and names stay as they are; gradients are those of keeping everything. Its repeated
    blocks (or the whole of a convolutional network) then run by schedules of what to keep and what to recompute just
    before it is used. Call it on every rank, before or after the model is prepared by Accelerate or handed to a
    Trainer, with a batch of the size trained on. `plan.remove()` undoes it.

    Args:
        model: on the device it trains on.
        example_batch: what `loss` takes; by default a mapping for `model(**batch)`, labels included.
        budget: bytes ("8GiB") for everything: weights, gradients, optimizer state, activations, loss, temporaries.
        optimizer: counted, its state too, even where that does not exist yet.
        loss: gives the loss from model and batch; by default what the model returns as `.loss`, or first. It is called
            a few times, also on tensors without data: what it keeps for itself is of no use afterwards.
        autocast: dtype of mixed precision, if training uses it and the model's forward does not enter it by itself.
        accumulate: whether gradients of earlier micro-batches exist when a step begins.
        others: modules and tensors that stay beside the model, a teacher for example.
        compile: run the schedules by Inductor instead of by eager kernels. What it fuses needs no memory, so that the
            prediction is an upper estimate.
        solver: "auto" searches and says how much is left to gain at most; "exact" solves Checkmate's program (Jain et
            al. 2020) for each block to its proven optimum, for blocks of few operations.
        cache: an existing folder, in which what was found for each block is kept for the next process; None keeps
            nothing.

    Returns:
        the plan, which is then installed in the model.

    Raises:
        BudgetError: no plan fits; it says what the least is.
        NotExact: `solver` is "exact", and a block has too many operations, or its optimum was not proven in time.
        ValueError: the budget is not a number of bytes, the loss not one number, or nothing trains.
        CannotPlan: the model does not run on tensors without data, as some mixtures of experts do not.
    """
    budget = parse_bytes(budget)
    settings: dict[str, Any] = {"optimizer": optimizer, "loss": loss, "autocast": autocast, "accumulate": accumulate,
                                "others": others, "reserved": _buckets(model), "solver": solver,
                                "cache": None if cache is None else Path(cache) / "plans"}
    planner = study(model, example_batch, regions=False, **settings)
    if not planner.fits_as_it_is(budget):
        planner = study(model, example_batch, **settings)
    plan = planner.plan(budget)
    uninstall(model)
    planner.install(plan, inductor=compile)
    return plan


def study(model: nn.Module, batch: object, *, optimizer: torch.optim.Optimizer | None = None, loss: Loss | None = None,
          autocast: torch.dtype | None = None, accumulate: bool = False, others: Sequence[object] = (),
          device: str | None = None, reserved: Mapping[str, int] | None = None, residency: Residency | None = None,
          in_backward: Hooks | None = None, regions: bool = True, measure: bool | None = None,
          refuted: Mapping[str, Refuted] | None = None, solver: str = "auto", cache: Path | None = None) -> Planner:
    """Learn all about a step that plans for any budget need; see `rematerialize`.

    A model without data (parameters made under FakeTensorMode) is studied without computing anything, and priced for
    the `device` named. `reserved` are bytes by name that are held besides, by whom nothing here knows of. `residency`
    is what a rank holds of the model where it is shared out; the optimizer and the `others` are part of it then.
    `in_backward` puts hooks on an optimizer's parameters, which step and drop gradients, and can `remove` them again.
    Without `regions` the model runs as it is, and only what that needs is found. Blocks whose names are in `refuted`
    are not captured, or run as they are. `measure` is whether operations are timed on the device that is present; None
    for models with data.
    `cache` is the folder where what is found for each block is kept, made where the folder above it exists.
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
    with calling(standing, lambda _, module: functools.partial(own_forward, module)):  # without an older plan
        return _study(model, batch, step, optimizer, accumulate, others, device, reserved or {}, regions, residency,
                      in_backward, measure, refuted or {}, solver, None if cache is None else OptionStore(cache))


def _study(model: nn.Module, batch: object, step: Callable[[nn.Module, object], torch.Tensor],
           optimizer: torch.optim.Optimizer | None, accumulate: bool, others: Sequence[object], device: str | None,
           reserved: Mapping[str, int], regions: bool, residency: Residency | None, in_backward: Hooks | None,
           measure: bool | None, refuted: Mapping[str, Refuted], solver: str, store: OptionStore | None) -> Planner:
    kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
    pretended = any(isinstance(parameter, FakeTensor) for parameter in model.parameters())
    blocks = None if residency is None else residency.blocks
    modules = _regions(model, blocks) if regions else {}
    for name, why in refuted.items():
        if why.unfit and name in modules:
            _warn(name, modules.pop(name), "runs as it is", why.reason)
    named = device not in (None, "cpu")  # a GPU, which need not be there
    elsewhere = attention_as_on_gpus if pretended and kind != "cuda" and named else nullcontext
    around = [thing for thing in (model, *others) if isinstance(thing, nn.Module)]
    with without_data(*around) if pretended else nullcontext((None, None)) as (mode, _), mode or nullcontext(), \
            elsewhere():
        calls = record(modules, lambda: step(model, batch if mode is None else fake_batch(mode, batch)), around,
                       {name: why.reason for name, why in refuted.items()}) if modules else []
    calls = _plannable(calls)
    _warn_of([call for call in calls if call.captured is None], "keeps all or only its input")
    known = DEVICES[device] if device else this_device(kind)
    if kind == "cuda" and not pretended:
        reserved = {**reserved, "held besides": held_besides(
            next(model.parameters()).device, [model, *others, batch, *([] if optimizer is None else [optimizer])])}
    elif named:
        reserved = {**reserved, "libraries": 2 * known.workspace}  # of the caller's thread and of autograd's
    with gradients_kept(around, optimizer), without_data(*around) as (mode, stand_in), elsewhere():
        calls, frame = trace_step(calls, Step(
            model, fake_batch(mode, batch), lambda batch: step(model, batch), optimizer, stand_in, others,
            accumulate, reserved, on_gpu=kind == "cuda" or named, residency=residency, in_backward=in_backward), mode)
        fallback = {id(call): fallback_options(call.measured, known) for call in calls  # type: ignore[arg-type]  # it ran
                    if call.captured is None}
    prices = Prices(known, measure=not pretended if measure is None else measure, store=store)
    return Planner(calls, frame, prices, lambda call: fallback[id(call)], blocks is not None, solver, store)


def _regions(model: nn.Module, blocks: Sequence[str] | None) -> dict[str, nn.Module]:
    """What is planned inside, by name: where weights come and go, the `blocks` that have all of theirs while they run.

    Inside of anything larger they are gathered by hooks, of which a captured graph knows nothing.
    """
    if blocks is None:
        return find_regions(model)
    if not blocks:
        warnings.warn(f"{type(model).__name__} is not planned inside and runs as it is: its weights are gathered when "
                      "they are used, and it has no repeated blocks that are gathered as a whole", stacklevel=4)
    return {name: model.get_submodule(name) for name in blocks}


def _buckets(model: nn.Module) -> dict[str, int]:
    """Bytes in which data parallelism sums gradients; a model that is not wrapped yet will be, where there are ranks.

    With `gradient_as_bucket_view` gradients lie in them, and are counted as gradients.
    """
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if getattr(model, "gradient_as_bucket_view", False) or not (wrapped or ranks > 1):
        return {}
    return {"communication": parameter_bytes(model, trained=True)}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers of torch.compile and data parallelism."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def _plannable(calls: Sequence[RegionCall]) -> list[RegionCall]:
    """Calls whose modules can run twice and hand something out; the others run as they are, as part of the frame."""
    unfit = [call for call in calls if call.unfit]
    for call in unfit:
        call.reason = call.unfit
    _warn_of(unfit, "runs as it is")
    return without({id(call.module) for call in unfit}, calls)


def _warn_of(calls: Sequence[RegionCall], consequence: str) -> None:
    """One warning for each class of module that has no schedule of its own, with the first one's name."""
    for call in {type(call.module): call for call in reversed(calls)}.values():
        _warn(call.name, call.module, consequence, call.reason)


def _warn(name: str, module: nn.Module, consequence: str, reason: str) -> None:
    told = f"{name} ({type(module).__name__})" if name else type(module).__name__
    warnings.warn(f"{told} is not planned inside and {consequence}: {reason}", stacklevel=5)


def try_blocks(planner: Planner, model: nn.Module, run: Callable[[], object]) -> dict[str, Refuted]:
    """Blocks of a model with data whose captured graphs do not compute what they do, by name.

    A plan that was made from shapes alone could not try them; this runs each of them once.

    Args:
        planner: whose blocks are looked at, by name.
        model: of the same shapes, without a plan.
        run: calls the model.
    """
    modules = {call.name: model.get_submodule(call.name) for call in planner.calls if call.captured is not None}
    calls = record(modules, run, [model]) if modules else []
    return {call.name: Refuted(call.unfit or call.reason, bool(call.unfit)) for call in calls
            if call.unfit or call.captured is None}


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss that a model returns for a batch: `.loss`, "loss", or the first thing."""
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(batch) if isinstance(batch, torch.Tensor) else model(*batch)
    if isinstance(out, Mapping):
        loss: Any = out.get("loss")
        return loss
    return out if isinstance(out, torch.Tensor) else out[0]
