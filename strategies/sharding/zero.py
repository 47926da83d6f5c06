"""ZeRO (Rajbhandari et al. 2020) with DeepSpeed, through Accelerate: its configuration, and the engine.

DeepSpeed concatenates the parameters of a group and gives the optimizer a rank's part of the result. `lay_out` tells
the optimizer what that part consists of, so that one that needs whole layers can still work.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from strategies.common.shards import Layout, Piece, lay_out, layout_of
from strategies.sharding.engine import Engine, Update, on_any_rank
from strategies.sharding.gather_units import units_of
from strategies.sharding.master_weights import Frozen, OwnPart, clear_padding

LARGEST_BUCKET = 500_000_000  # elements: DeepSpeed's default bucket size
EVEN = 2  # DeepSpeed requires bucket sizes divisible by this


def bucket_numel(model: nn.Module) -> int:
    """Elements of a bucket of gradients that fits the model: its largest block, at most DeepSpeed's default.

    DeepSpeed's default of half a billion elements takes 1 to 2 GB on each rank whatever the model.
    """
    sizes = [_trained_numel(model.get_submodule(name)) for name in units_of(model).blocks]
    largest = max(sizes, default=_trained_numel(model))
    return -(-min(largest, LARGEST_BUCKET) // EVEN) * EVEN


def _trained_numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def deepspeed_config(*, stage: int, precision: str, micro_batch: int, clip: float | None, bucket: int, gathered: int,
                     accumulates: bool, initial_scale: float = 65536.0, growth_interval: int = 2000,
                     offload_parameters: bool = False, offload_optimizer: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration, with explicit values where its defaults assume large machines.

    Args:
        stage: 1 shards optimizer state, 2 gradients too, 3 weights too.
        precision: fp32, bf16 or fp16; the weights that are updated are fp32 in each case.
        micro_batch: sequences per forward; only used in figures that DeepSpeed reports.
        clip: largest gradient norm, or None.
        bucket: elements of a communication bucket.
        gathered: elements of stage 3's weights that may be gathered ahead of their use.
        accumulates: whether gradients of several micro-batches are accumulated, which stages 2 and 3 then do in fp32.
        initial_scale, growth_interval: fp16 loss scaling.
        offload_parameters, offload_optimizer: what to keep on the CPU.
    """
    pin = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": stage, "overlap_comm": False, "contiguous_gradients": True, "reduce_scatter": True,
        "round_robin_gradients": False, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": gathered, "stage3_max_live_parameters": gathered,
        "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0, "sub_group_size": 1_000_000_000,
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
    config: dict[str, Any] = {
        "zero_optimization": zero, "gradient_clipping": clip or 0.0, "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # the trainer itself marks where a step ends
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "loss_scale_window": growth_interval, "hysteresis": 1,
                          "initial_scale_power": max(0, round(math.log2(initial_scale))), "min_loss_scale": 1}
    if precision != "fp32" and accumulates and stage > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Within the context, DeepSpeed does not log every buffer it sets up; the engine checks what matters itself."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def ask_for_gradients(model: nn.Module) -> None:
    """Have frozen embeddings give what a gradient is asked for, as stage 3 needs for a base beneath adapters.

    DeepSpeed learns from the gradient of a block's input that the block's backward is over. For an input without one
    it concludes so at once, and empties the adapters' weights before their gradients are made.
    """
    embeddings = model.get_input_embeddings()
    if not embeddings.weight.requires_grad:
        embeddings.register_forward_hook(
            lambda module, args, output: output.requires_grad_() if torch.is_grad_enabled() else output)


def _seen_backward(block: nn.Module, args: tuple, output: Any) -> Any:
    """A block's output, as a tuple if it is a list, because torch only calls backward hooks for tensors and tuples.

    Otherwise DeepSpeed's hooks of the block would not run, and its gradients would be lost (GPT's blocks return a
    list).

    Raises:
        TypeError: the block returns neither tensors nor a tuple of them.
    """
    if isinstance(output, list):
        output = tuple(output)
    if torch.is_grad_enabled() and not isinstance(output, (torch.Tensor, tuple)):
        raise TypeError(f"{type(block).__name__} gives a {type(output).__name__}, and DeepSpeed learns of gradients "
                        "where blocks give tensors or a tuple of them: use another engine")
    return output


class Zero(Engine):
    """A student trained by DeepSpeed: a rank holds a part of the fp32 weights and of the optimizer's state.

    Args:
        student: the whole student, on the CPU or the device.
        make_optimizer: makes the student's optimizer.
        prepare: Accelerate's, with DeepSpeed's plugin.
        config: configuration given to the plugin.

    Raises:
        ValueError: the optimizer cannot work on parts of parameters.
    """

    sharded = True

    def __init__(self, student: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
                 prepare: Callable[..., tuple[Any, Any]], config: dict[str, Any]) -> None:
        self.stage = config["zero_optimization"]["stage"]
        self.casts, self.scales = "bf16" in config or "fp16" in config, "fp16" in config
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        shapes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
        optimizer = make_optimizer(student)
        groups, rank = [list(group["params"]) for group in optimizer.param_groups], dist.get_rank()
        unrounded = OwnPart(groups, names, self.stage, rank, dist.get_world_size()) if self.casts else None
        self._frozen = Frozen(student, rank, apart=self.casts or self.stage == 3)
        if self.stage == 3:
            self._gather_by_block(student)
        with quiet_deepspeed():
            self.engine, _ = prepare(student, optimizer)
        self.zero = self.engine.optimizer
        self._step, self._allowed = optimizer.step, True
        self._reached: set[str] = set()
        self._unreached = [names[id(parameter)] for group in groups for parameter in group]  # same on every rank
        for parameter in (parameter for group in groups for parameter in group):
            parameter.register_post_accumulate_grad_hook(partial(self._reach, names[id(parameter)]))
        optimizer.step = self._step_if_allowed
        if not self.casts and "offload_optimizer" not in config["zero_optimization"]:
            self._share_fp32()
        for tensor, layout in self._layouts(names, shapes):
            lay_out(tensor, layout)
            clear_padding(tensor, layout)
            if unrounded is not None:
                unrounded.put_back(tensor, layout)
        if self.stage == 3:
            self.refresh()  # so that the padding of the partitioned weights is cleared too
        super().__init__(self.engine, student, optimizer)
        self._check()

    def _gather_by_block(self, student: nn.Module) -> None:
        """Gather blocks as a whole, because a captured graph of a block's inside does not contain DeepSpeed's hooks."""
        from deepspeed.utils import set_z3_leaf_module

        for name in units_of(student).blocks:
            block = student.get_submodule(name)  # by instance: others of its class need not be blocks
            set_z3_leaf_module(block, True)
            block.register_forward_hook(_seen_backward)
        ask_for_gradients(student)

    def _share_fp32(self) -> None:
        """In fp32, use one copy both as the weights that are updated and as those that the forward uses.

        DeepSpeed intends to do so in stage 3, but does not, because it compares a device with the name of one.
        """
        if self.stage == 3:
            for flat, own in zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_partitioned_groups_flat,
                                 strict=True):
                flat.data = own.data
            return
        rank = dist.get_rank(self.zero.dp_process_group)
        for flat, parts in zip(self.zero.single_partition_of_fp32_groups, self.zero.parallel_partitioned_bit16_groups,
                               strict=True):
            flat.data = parts[rank].data

    def _check(self) -> None:
        """Assert that DeepSpeed does what was requested."""
        assert self.engine.zero_optimization_stage() == self.stage, "DeepSpeed runs another stage"
        assert dist.get_world_size(self.zero.dp_process_group) == dist.get_world_size(), "DeepSpeed uses fewer ranks"
        whole = sum(math.prod(piece.shape) for _, layout in self._trained() for piece in layout.pieces)
        held = torch.tensor(sum(piece.numel for _, layout in self._trained() for piece in layout.pieces),
                            device=self.engine.device)
        dist.all_reduce(held)
        assert int(held) == whole, f"the ranks hold {int(held)} elements of {whole}"

    # ---- a step

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """See `Engine`; stages 2 and 3 reduce gradients over ranks in every micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self.engine.step()  # only counts a micro-batch

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self, clip: float | None, allowed: bool, scale: float = 1.0) -> Update:
        """See `Engine`; DeepSpeed clips, and decides over all ranks whether the gradient is finite."""
        assert clip == (self.engine.gradient_clipping() or None) and scale == 1.0
        self._allowed = allowed
        self._agree()
        self.engine.step()
        finite = not self.zero.overflow
        norm = self.engine.get_global_grad_norm()
        return Update(float(norm) if norm is not None else math.nan, finite and allowed, finite)

    def _step_if_allowed(self, closure: None = None) -> None:
        """Replaces the optimizer's step: a loss that is not finite may have a finite gradient.

        Parameters that no loss has reached yet are restored after the step.
        """
        if not self._allowed:
            return
        kept = [(part, part.clone()) for part in self._parts(self._unreached)]
        self._step()
        for part, before in kept:
            part.copy_(before)

    def _reach(self, name: str, parameter: torch.Tensor) -> None:
        self._reached.add(name)

    def _agree(self) -> None:
        """Let the ranks agree on the parameters that no loss has reached yet.

        DeepSpeed gives these a zero gradient, so that weight decay would change weights that every other engine leaves
        alone. In most models there are none after the first step.
        """
        if not self._unreached:
            return
        reached = on_any_rank([name in self._reached for name in self._unreached], self.engine.device,
                              self.zero.dp_process_group)
        self._unreached = [name for name, is_reached in zip(self._unreached, reached, strict=True) if not is_reached]

    def _parts(self, names: list[str]) -> Iterator[torch.Tensor]:
        """This rank's parts of the named parameters, as views."""
        asked = frozenset(names)
        for flat, layout in self._trained() if asked else ():
            for piece in layout.pieces:
                if piece.name in asked and piece.numel:
                    yield flat.data[piece.offset:piece.offset + piece.numel]

    @property
    def loss_scale(self) -> float:
        """The factor by which DeepSpeed multiplies the loss."""
        return float(self.zero.loss_scale)

    def scale_state(self) -> dict[str, float]:
        """Loss scaling state as plain numbers."""
        scaler = self.zero.loss_scaler
        return {name: getattr(scaler, name) for name in ("cur_scale", "cur_iter", "last_overflow_iter")
                if hasattr(scaler, name)}

    def load_scale_state(self, state: dict[str, float], loss_scale: float) -> None:
        """See `Engine`."""
        for name, value in (state or ({"cur_scale": loss_scale} if self.scales else {})).items():
            setattr(self.zero.loss_scaler, name, value)

    # ---- what a rank holds

    def tensors(self) -> Iterator[tuple[torch.Tensor, Layout]]:
        """See `Engine`; frozen parameters are whole on every rank, but for a base that is cast or shared out."""
        yield from self._trained()
        yield from self._frozen.tensors()

    def _trained(self) -> Iterator[tuple[torch.Tensor, Layout]]:
        flats = (self.zero.fp32_partitioned_groups_flat if self.stage == 3
                 else self.zero.single_partition_of_fp32_groups)
        for flat in flats:
            yield flat, layout_of(flat)

    def resident(self) -> list[object]:
        """See `Engine`."""
        held: list[object] = [*super().resident(), [tensor for tensor, _ in self.tensors()]]
        if self.stage < 3:
            return [*held, self.zero.bit16_groups_flat]
        parts = [parameter.ds_tensor for parameter in self.student.parameters()]
        return [*held, parts, self.zero.grad_partitions_flat_buffer,
                [bucket.buffer for bucket in self.zero.ipg_buckets.values()]]

    def refresh(self) -> None:
        """See `Engine`; the weights that the forward uses are updated from the fp32 ones."""
        with torch.no_grad():
            self._frozen.refresh()
            if self.stage < 3:
                self.zero.update_lp_params()
                return
            for number in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(number)

    def release(self) -> None:
        """See `Engine`."""
        self.engine.destroy()

    def _layouts(self, names: dict[int, str], shapes: dict[str, tuple[int, ...]]
                 ) -> Iterator[tuple[torch.Tensor, Layout]]:
        group = self.zero.dp_process_group
        if self.stage < 3:
            for parameters, flat in zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True):
                named = [(parameter, names[id(parameter)]) for parameter in parameters]
                yield flat, Layout(tuple(_fragment(parameter, name, shapes[name]) for parameter, name in named), group)
            return
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        for parameters, flat in zip(self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat, strict=True):
            pieces, offset = [], 0
            for parameter in parameters:
                shape = shapes[names[id(parameter)]]
                part, count = parameter.partition_numel(), math.prod(shape)
                assert part == -(-count // ranks), "DeepSpeed cuts parameters otherwise than into equal parts"
                start, stop = min(rank * part, count), min((rank + 1) * part, count)
                pieces.append(Piece(names[id(parameter)], shape, start, stop, offset))
                offset += part
            assert offset == flat.numel()
            yield flat, Layout(tuple(pieces), group)


def _fragment(parameter: nn.Parameter, name: str, shape: tuple[int, ...]) -> Piece:
    """The part of a parameter in this rank's partition, in stages 1 and 2."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return Piece(name, shape, 0, 0)
    part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Piece(name, shape, part.start, part.start + part.numel, place.start)
