"""Install a step's schedule in the student, compiled as `memory.compile` says; `auto` is chosen once in a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

from torch import nn

from strategies.rematerialization.inductor_choice import Choice, Ways, missing_compiler
from trainer.distributed.rank_group import RankGroup
from trainer.errors import UserError
from trainer.planning.step_plan import StepPlan
from trainer.training.train_state import TrainState


def install_schedule(step: StepPlan | None, compile: bool | Literal["auto"], state: TrainState, student: nn.Module,
                     ranks: RankGroup, micro_batches: int, around: Callable[[], AbstractContextManager], sharded: bool,
                     say: Callable[[str], None]) -> None:
    """Install a schedule in the student. A collective call.

    With `auto` the first process chooses, in a run's first start, and the checkpoint's state keeps the choice: compiled
    blocks round otherwise, and a resumed run must not.

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
        return
    ways = Ways(step.planner, step.schedule, student)
    if state.compiled is None:
        own = Choice(False, "blocks of a sharded model are not tried one by one") if sharded else ways.choose(
            ranks.device.type, micro_batches, around)
        choice = ranks.gather_objects([own])[0]
    else:
        choice = Choice(state.compiled, "as this run began")
        lacking = missing_compiler(ranks.device.type) if choice.inductor else None
        if lacking is not None:
            raise UserError("memory.compile", f"the run began with compiled blocks, and {lacking}", value="auto",
                            way_out="install one (g++ or clang++; CXX names another), or set memory.compile=false: "
                                    "eager kernels round otherwise")
    state.compiled = choice.inductor
    say(f"memory.compile=auto takes {choice}")
    ways.install(choice.inductor)
