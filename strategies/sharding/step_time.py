"""Seconds of a sharded training step: two streams, one that computes and one that communicates, event by event.

FSDP2 gathers one unit ahead of the one that runs, in forward and in backward, and reduces a unit's gradients while
the next one's are made (Zhao et al. 2023, section 3.3; torch's fully_shard). DDP reduces a bucket of gradients as soon
as it is full (Li et al. 2020, section 3.2). Ranks are taken to be equally fast, and the processes never to keep a GPU
waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from strategies.sharding.network import Kind, Network
from strategies.sharding.traffic import Traffic, UnitTraffic


@dataclass(frozen=True)
class UnitSeconds:
    """Seconds that a unit computes in a micro-batch; its recomputation is part of the backward."""

    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        seconds: of the whole step.
        compute: of forward and backward alone.
        update: of the optimizer.
        network: of all collectives together.
        sent: bytes that each rank sends.
    """

    seconds: float
    compute: float
    update: float
    network: float
    sent: float

    @property
    def exposed(self) -> float:
        """Seconds in which a rank waits for the network."""
        return max(0.0, self.seconds - self.compute - self.update)


@dataclass
class Streams:
    """When each of the two streams is free again; if they do not overlap, both are one."""

    overlaps: bool
    free: dict[str, float] = field(default_factory=lambda: {"compute": 0.0, "network": 0.0})
    busy: dict[str, float] = field(default_factory=lambda: {"compute": 0.0, "network": 0.0})

    def run(self, stream: str, seconds: float, after: float = 0.0) -> tuple[float, float]:
        """Append to a stream what may begin at `after`; returns when it begins and ends."""
        begin = max(after, self.free[stream]) if self.overlaps else max(after, *self.free.values())
        self.free[stream] = begin + seconds
        self.busy[stream] += seconds
        return begin, begin + seconds

    def wait(self) -> float:
        """Let both streams end; returns when they have."""
        end = max(self.free.values())
        self.free = dict.fromkeys(self.free, end)
        return end


def step_time(traffic: Traffic, seconds: Mapping[tuple[str, ...], UnitSeconds], network: Network, ranks: int,
              micro_batches: int = 1, update: float = 0.0,
              teacher: Mapping[tuple[str, ...], UnitSeconds] | None = None) -> StepTime:
    """Seconds of a step.

    Args:
        traffic: what is sent; of one micro-batch, except for `updated`.
        seconds: what each unit computes in a micro-batch, by the unit's modules.
        micro_batches: how many a rank runs in a step.
        update: seconds of the optimizer.
        teacher: as `seconds`, of the teacher's units, which all run before the student's.
    """
    return _Step(traffic, seconds, teacher or {}, network, ranks).run(micro_batches, update)


class _Step:
    def __init__(self, traffic: Traffic, seconds: Mapping[tuple[str, ...], UnitSeconds],
                 teacher: Mapping[tuple[str, ...], UnitSeconds], network: Network, ranks: int) -> None:
        self.traffic, self.seconds, self.teacher = traffic, seconds, teacher
        self.network, self.ranks = network, ranks
        self.streams = Streams(traffic.overlaps)
        self._waiting = 0  # bytes of gradients in the bucket

    def run(self, micro_batches: int, update: float) -> StepTime:
        for number in range(micro_batches):
            last = number == micro_batches - 1
            self._forward(self.traffic.teacher, self.teacher)
            self._forward(self.traffic.units, self.seconds)
            self._backward(reduces=last or self.traffic.each)
            if number:
                self._send("all-gather", self.traffic.stray)
        self.streams.wait()
        if self.traffic.at_end:
            self._buckets(sum(unit.reduces for unit in self.traffic.units), *self.streams.run("compute", 0.0))
        self._flush()
        self.streams.wait()
        self.streams.run("compute", update)
        self.streams.wait()
        self._send("all-gather", self.traffic.updated)
        busy = self.streams.busy
        return StepTime(self.streams.wait(), busy["compute"] - update, update, busy["network"],
                        self.traffic.sent(micro_batches, self.ranks))

    def _forward(self, units: Sequence[UnitTraffic], seconds: Mapping[tuple[str, ...], UnitSeconds]) -> None:
        before = self.streams.free["compute"]  # the first unit is not gathered before this phase
        for unit in units:
            _, arrived = self._send("all-gather", unit.gathers, before)
            before, _ = self.streams.run("compute", _of(seconds, unit).forward, arrived)

    def _backward(self, reduces: bool) -> None:
        """A unit's gather is put in line when the backward of the unit before it begins, ahead of that one's sums."""
        units = self.traffic.units[::-1]
        _, arrived = self._send("all-gather", units[0].regathers, self.streams.free["compute"])
        for unit, following in zip(units, [*units[1:], UnitTraffic(())], strict=True):
            spent = _of(self.seconds, unit).backward
            begin = max(arrived, self.streams.free["compute"])
            if not self.streams.overlaps:
                begin, end = self.streams.run("compute", spent, arrived)
                _, arrived = self._send("all-gather", following.regathers)
            else:
                _, arrived = self._send("all-gather", following.regathers, begin)
                begin, end = self.streams.run("compute", spent, begin)
            if reduces and not self.traffic.at_end:
                self._reduce(unit.reduces, begin, end)

    def _reduce(self, count: int, begin: float, end: float) -> None:
        if self.traffic.bucket:
            self._buckets(count, begin, end)
        else:
            self._send(self.traffic.reduction, count, end)

    def _buckets(self, count: int, begin: float, end: float) -> None:
        """Put gradients, which are made evenly over time, into buckets, and reduce those that are full."""
        made = 0
        while self._waiting + count - made >= self.traffic.bucket:
            made += self.traffic.bucket - self._waiting
            self._waiting = 0
            self._send(self.traffic.reduction, self.traffic.bucket, begin + (end - begin) * made / count)
        self._waiting += count - made

    def _flush(self) -> None:
        self._send(self.traffic.reduction, self._waiting)
        self._waiting = 0

    def _send(self, kind: Kind, count: int, after: float = 0.0) -> tuple[float, float]:
        if not count or self.ranks == 1:
            return after, after
        return self.streams.run("network", self.network.seconds(kind, count, self.ranks), after)


def _of(seconds: Mapping[tuple[str, ...], UnitSeconds], unit: UnitTraffic) -> UnitSeconds:
    return seconds.get(unit.modules, UnitSeconds())
