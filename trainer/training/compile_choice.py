"""Install a step's schedule in the student, compiled as `memory.compile` says; `auto` is chosen once in a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

from torch import nn

from strategies.rematerialization.inductor_choice import INSTALL, Choice, Ways, missing_compiler
from trainer.distributed.rank_group import RankGroup
from trainer.errors import UserError
from trainer.planning.step_plan import StepPlan
from trainer.training.train_state import TrainState


def install_schedule(step: StepPlan | None, compile: bool | Literal["auto"], state: TrainState, student: nn.Module,
                     ranks: RankGroup, micro_batches: int, around: Callable[[], AbstractContextManager], sharded: bool,
                     say: Callable[[str], None]) -> None:
    """Install a schedule in the student. A collective call.

    With `auto` the first process chooses, in a run's first start, and where every process has a compiler. Checkpoints
    keep whether blocks are compiled: these round otherwise, and a resumed run must not. A run that begins without
    `auto` and goes on with it stays as it was.

    Args:
        state: the state that the run goes on from.
        micro_batches: forwards and backwards of a step.
        around: context of the forward.
        sharded: whether the student's weights are sharded, so that its blocks cannot be tried one by one.
        say: prints a line on the first process.

    Raises:
        UserError: the run's blocks have been compiled so far, and cannot be here.
    """
    if step is None or step.planner is None or step.schedule is None:
        return
    if compile != "auto":
        step.install(student, inductor=compile)
        state.compiled = compile
        return
    ways = Ways(step.planner, step.schedule, student)
    lacking = next(filter(None, ranks.gather_objects([missing_compiler(ranks.device.type)])), None)
    if state.step:
        choice = Choice(bool(state.compiled), "as this run began")
        if choice.inductor and lacking is not None:
            raise UserError("memory.compile", f"the run began with compiled blocks, and {lacking}", value="auto",
                            way_out=f"{INSTALL}, or set memory.compile=false: eager kernels round otherwise")
    elif lacking is not None or sharded:
        choice = Choice(False, lacking or "blocks of a sharded model are not tried one by one")
    else:
        choice = ranks.gather_objects([ways.choose(ranks.device.type, micro_batches, around)])[0]
    state.compiled = choice.inductor
    say(f"memory.compile=auto takes {choice}")
    ways.install(choice.inductor)
