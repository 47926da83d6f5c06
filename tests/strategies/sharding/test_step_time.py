"""A step on two streams, by hand on small cases, and beside a search for the earliest times that its rules allow."""

import random
from dataclasses import replace

import pytest

from strategies.sharding.network import Network, Protocol
from strategies.sharding.step_time import UnitSeconds, step_time
from strategies.sharding.traffic import Traffic, UnitTraffic

NO_LATENCY = Protocol(0, 0, 0, 0, 0, 1.0)
UNIT = Network("unit", 2, 1.0, 1.0, (NO_LATENCY,), ("ring",))  # 2 bytes are gathered by two ranks in a second


def units(*counts: tuple[int, int, int]) -> tuple[UnitTraffic, ...]:
    return tuple(UnitTraffic((str(number),), *one) for number, one in enumerate(counts))


def fsdp2_by_rules(traffic: Traffic, seconds: dict) -> float:
    """When all of a micro-batch's events have ended, from what each has to wait for, by repeated relaxation.

    No streams and no order of simulation: each event waits for those named, and the network's for the one before.
    """
    names = [unit.modules for unit in traffic.units]
    last = len(names) - 1
    events: dict[tuple, tuple[float, list[tuple]]] = {}  # seconds; what it waits for: (event, at its "begin" or "end")
    line = []
    for at, unit in enumerate(traffic.units):
        waits = [(("F", at - 1), "begin")] if at else []
        events["G", at] = unit.gathers / 2, waits
        line.append(("G", at))
        events["F", at] = seconds[unit.modules].forward, [(("G", at), "end")] + ([(("F", at - 1), "end")] if at else [])
    events["A", last] = traffic.units[last].regathers / 2, [(("F", last), "end")]
    line.append(("A", last))
    for at in range(last, -1, -1):
        before = [(("B", at + 1), "end")] if at < last else [(("F", last), "end")]
        events["B", at] = seconds[names[at]].backward, [*before, (("A", at), "end")]
        if at:
            events["A", at - 1] = traffic.units[at - 1].regathers / 2, [(("B", at), "begin")]
            line.append(("A", at - 1))
        events["R", at] = traffic.units[at].reduces / 2, [(("B", at), "end")]
        line.append(("R", at))
    line = [event for event in line if events[event][0]]
    for one, following in zip(line, line[1:], strict=False):
        events[following][1].append((one, "end"))
    begins = dict.fromkeys(events, 0.0)
    for _ in range(len(events) + 1):
        for event, (_, waits) in events.items():
            begins[event] = max([0.0, *(begins[other] + (events[other][0] if at == "end" else 0.0)
                                        for other, at in waits)])
    return max(begins[event] + events[event][0] for event in events)


@pytest.mark.parametrize("seed", range(20))
def test_fsdp2s_events_end_when_its_rules_allow(seed):
    draw = random.Random(seed)
    traffic = Traffic(units(*((draw.randrange(9), draw.randrange(9), draw.randrange(9)) for _ in range(5))))
    seconds = {unit.modules: UnitSeconds(draw.random() * 4, draw.random() * 8) for unit in traffic.units}
    step = step_time(traffic, seconds, UNIT, 2)
    assert step.seconds == pytest.approx(fsdp2_by_rules(traffic, seconds))
    assert max(step.compute, step.network) <= step.seconds <= step.compute + step.network + 1e-9
    serial = step_time(replace(traffic, overlaps=False), seconds, UNIT, 2)
    assert serial.seconds == pytest.approx(step.compute + step.network)


def test_a_gather_hides_behind_the_unit_before_it():
    traffic = Traffic(units((2, 0, 0), (4, 0, 0)))
    seconds = {("0",): UnitSeconds(5, 0), ("1",): UnitSeconds(5, 0)}
    step = step_time(traffic, seconds, UNIT, 2)
    assert step.seconds == 1 + 5 + 5 and step.exposed == 1, "only the first gather is waited for"
    assert step_time(traffic, seconds, UNIT, 1).seconds == 10, "alone nothing is sent"


def test_ddp_reduces_full_buckets_while_backward_goes_on():
    """8 bytes of gradients in each of two units, made in 8 s, in buckets of 4, which take 4 s each."""
    traffic = Traffic(units((0, 0, 8), (0, 0, 8)), reduction="all-reduce", bucket=4, each=False)
    seconds = {("0",): UnitSeconds(1, 8), ("1",): UnitSeconds(1, 8)}
    step = step_time(traffic, seconds, UNIT, 2)
    assert step.seconds == 2 + 16 + 4 and step.exposed == 4, "the last bucket is waited for"
    several = step_time(traffic, seconds, UNIT, 2, micro_batches=3)
    assert several.seconds == 3 * 18 + 4 and several.sent == step.sent, "gradients are reduced once a step"
    assert step_time(replace(traffic, each=True), seconds, UNIT, 2, micro_batches=3).sent == 3 * step.sent


def test_stage_one_reduces_at_the_end_and_gathers_after_the_update():
    traffic = Traffic(units((0, 0, 10)), reduction="all-reduce", bucket=4, each=False, at_end=True, overlaps=False,
                      updated=6)
    step = step_time(traffic, {("0",): UnitSeconds(1, 2)}, UNIT, 2, micro_batches=2, update=0.5)
    assert step.seconds == 2 * 3 + 10 + 0.5 + 3 and step.update == 0.5
    assert step.network == 13 and step.exposed == pytest.approx(13)
    assert step.sent == 10 + 3
