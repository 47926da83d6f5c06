"""Which blocks of a schedule run unchanged, against every choice of them on small chains."""

from dataclasses import replace
from itertools import combinations

import pytest

from strategies.rematerialization.solve.chain_program import KEEP, Block, Link, Option, Segment, replay, with_option
from strategies.rematerialization.solve.unchanged_blocks import with_unchanged


def chain(kept: list[int]) -> list[Link]:
    """Blocks of two options: by a graph, keeping 10 bytes, and unchanged, keeping `kept`."""
    return [Link((Option(10, 30, 40, 0.0, (0, 1)), Option(count, 20 + count, 30 + count, 0.0, mode=KEEP)), 5, 1.0, 100,
                 100) for count in kept]


@pytest.mark.parametrize("kept", [[20, 20, 20, 20], [30, 10, 25, 40], [10, 10, 10, 10]])
def test_as_many_as_any_choice_for_the_budget(kept):
    links, plain = chain(kept), (Block(0, 0), Block(1, 0), Block(2, 0), Block(3, 0))
    unchanged = dict.fromkeys(range(4), 1)

    def peak(schedule) -> int:
        return replay(links, schedule, 110).peak

    def all_of(chosen) -> tuple:
        schedule = plain
        for position in chosen:
            schedule = with_option(schedule, position, 1)
        return schedule

    every = [chosen for count in range(5) for chosen in combinations(range(4), count)]
    for budget in range(peak(plain), peak(all_of(range(4))) + 1):
        found = with_unchanged(links, plain, unchanged, lambda trial, budget=budget: peak(trial) <= budget)
        most = max(len(chosen) for chosen in every if peak(all_of(chosen)) <= budget)
        assert peak(found) <= budget and sum(item.option for item in found) == most, budget


def test_blocks_of_segments_and_those_without_the_option_stay():
    links = chain([10, 10, 10, 10])
    links[3] = replace(links[3], options=links[3].options[:1])
    schedule = (Segment(0, 2, (Block(0, 0), Block(1, 0))), Block(2, 0), Block(3, 0))
    found = with_unchanged(links, schedule, dict.fromkeys(range(3), 1), lambda trial: True)
    assert found == (schedule[0], Block(2, 1), Block(3, 0))
