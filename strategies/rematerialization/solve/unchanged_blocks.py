"""Let blocks of a schedule run unchanged where there is memory for what autograd keeps.

A block that runs by its graph often keeps less than autograd does, but calls its operations from Python: about a
millisecond on a CPU. What a schedule leaves of the budget pays for some blocks' own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from strategies.rematerialization.solve.chain_program import Block, ChainSchedule, Link, with_option


def with_unchanged(links: Sequence[Link], schedule: ChainSchedule, unchanged: Mapping[int, int],
                   fits: Callable[[ChainSchedule], bool]) -> ChainSchedule:
    """The schedule with as many of its blocks as fit running unchanged, those first that need the fewest bytes more.

    Blocks inside of segments stay as they are.

    Args:
        links: the blocks.
        unchanged: for blocks by position, the option that runs them unchanged.
        fits: whether a schedule keeps the budget.
    """
    def more(item: Block) -> int:
        ways = links[item.position].options
        return ways[unchanged[item.position]].kept - ways[item.option].kept

    blocks = [item for item in schedule if isinstance(item, Block) and item.position in unchanged]
    for item in sorted(blocks, key=lambda item: (more(item), item.position)):
        trial = with_option(schedule, item.position, unchanged[item.position])
        if fits(trial):
            schedule = trial
    return schedule
