"""What trips have shown of a step (`Lesson`), from which a `Step` for the planner is made, and a lesson with
its plan (`Script`), by which the next trips know what to do with each tensor they save."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from sidelane.pipeline.machine import LaneSpeed
from sidelane.pipeline.marks import END, OUT, SAVE, USE, Mark, Shown, evened, merge_gaps
from sidelane.pipeline.rates import profiled_speed, tried_speed, wires
from sidelane.pipeline.step_model import (
    AWAY,
    DERIVED,
    HERE,
    KEEP,
    KEPT,
    NO_HOST,
    UPPER,
    Block,
    Choice,
    Code,
    Saved,
    Step,
)
from sidelane.pipeline.step_plan import StepPlan

Pair = tuple[float, float]  # seconds to save a tensor, and to use it
Key = TypeVar("Key")

BOUNDED = "bounded"  # name of the lane that keeps an error bound
WORTH = 0.97  # of the bytes of a tensor: a larger code is not offered
WIRE_SLACK = 1.04  # times as long as alone: the other direction and the program use memory too
# Seconds of the host for a tensor on an H200 with a processor of its time (save, use); in proportion, where a
# trip has shown what it takes to keep one.
HOST_COSTS = {
    KEEP: (20e-6, 15e-6),
    DERIVED: (60e-6, 60e-6),
    HERE: (120e-6, 100e-6),
    AWAY: (180e-6, 110e-6),
}
DERIVE_RATES = {"cuda": 4e12, "cpu": 10e9}  # bytes/s that it moves at most; trips show what it takes besides
HOST_WAIT = 0.3e-3  # seconds that a GPU stands still when the host waits for the size of an exact code


class Call(NamedTuple):
    """One save: which tensor of the step it is, and what tells that it is that one."""

    number: int
    nbytes: int
    dtype: torch.dtype


class Pack(NamedTuple):
    """A tensor that came to the hooks of a block, and which call that was.

    Attributes:
        nbytes: of its elements.
        kept: it stays whatever the plan says.
        call: None for what is kept, or not as the script says.
    """

    nbytes: int
    dtype: torch.dtype
    kept: bool
    call: Call | None


@dataclass
class Entry:
    """A tensor of the step.

    Attributes:
        weight: bytes that it holds; 0 where another entry counts them.
        lossy: name of the lane that may take it with loss, None for none.
        wire: bytes of its exact code, 0 while unknown.
        sources: numbers of the tensors that make it again; None where nobody knows how.
        moved: bytes that this reads and writes.
        widened: its lower halves are empty.
    """

    weight: int
    dtype: torch.dtype
    block: int
    boundary: bool = False
    lossy: str | None = None
    wire: int = 0
    sources: tuple[int, ...] | None = None
    moved: int = 0
    widened: bool = False


@dataclass
class BlockCall:
    """A call of a block.

    Attributes:
        inputs: saves of these if it is recomputed.
        repeatable: whether it can be, as long as its parts are in the same modes (training or not).
    """

    inputs: list[Call]
    repeatable: bool
    modes: tuple[bool, ...]


class Timeline(NamedTuple):
    """When a step does what, in seconds of the program alone since it began, on one clock.

    Attributes:
        times: of each tensor (saved, used, freed). spans: of each block (in, out). seconds: of all of it.
    """

    times: tuple[tuple[float, float, float], ...]
    spans: tuple[tuple[float, float], ...]
    seconds: float


@dataclass(frozen=True)
class Lesson:
    """What trips showed.

    Attributes:
        entries: tensors, in order of saving. rows: calls of each segment.
        marks: of the trip that learned. gaps: seconds of computing alone before each of them; host_gaps: on
            the clock of the host.
        gradients: bytes of those that backward makes.
        exact: speed of the exact lane; None where no tensor took it.
        extra: seconds that a tensor takes in a lane besides those that its kernels should. (encode, decode)
        host_costs: seconds of the host for a tensor, by choice. (save, use)
        level: steps begin with nothing to do for the device, so that it waits for a host that is late.
        lossless: no tensor may lose bits, so that more can be derived.
    """

    device: torch.device
    entries: tuple[Entry, ...]
    rows: tuple[tuple[Call, ...], ...]
    blocks: tuple[BlockCall, ...]
    marks: tuple[Mark, ...]
    gaps: tuple[float, ...]
    host_gaps: tuple[float, ...]
    gradients: int
    exact: LaneSpeed | None = None
    extra: dict[str, Pair] = field(default_factory=dict)
    host_costs: dict[Choice, Pair] = field(default_factory=dict)
    level: bool = True
    lossless: bool = False

    def updated(self, shown: Shown, choices: Sequence[Choice], discard_old: bool = False) -> Lesson:
        """With what another trip showed, of a plan with these choices: the lesser times of both, or with
        `discard_old` the new ones alone (see `merge_gaps`)."""
        extra, host = self._ours(shown, choices)
        return replace(
            self,
            gaps=tuple(merge_gaps(self.marks, self.gaps, shown.marks, shown.device.gaps, discard_old)),
            host_gaps=tuple(
                merge_gaps(self.marks, self.host_gaps, shown.marks, shown.host.gaps, discard_old)
            ),
            extra=self.extra | (extra if discard_old else _least(extra, self.extra)),
            host_costs=self.host_costs | (host if discard_old else _least(host, self.host_costs)),
            level=shown.level,
        )

    def _ours(self, shown: Shown, choices: Sequence[Choice]) -> tuple[dict[str, Pair], dict[Choice, Pair]]:
        """`extra` of lanes, the lower quartile, since some wait for copies besides; `host_costs`: medians."""
        speeds = _Speeds(self.device, self.exact, {})
        extra: defaultdict[str, tuple[list[float], list[float]]] = defaultdict(_lists)
        host: defaultdict[Choice, tuple[list[float], list[float]]] = defaultdict(_lists)
        seen = set()
        for mark, ours, of_host in zip(shown.marks, shown.device.ours, shown.host.ours, strict=True):
            if mark.kind not in (SAVE, USE) or mark in seen:
                continue
            seen.add(mark)
            choice = choices[mark.number]
            host[choice][mark.kind].append(of_host)
            if choice.place == KEEP:
                continue
            for code in speeds.codes(self.entries[mark.number]):
                if code.lane == choice.lane:
                    expected = code.encode if mark.kind == SAVE else code.decode
                    extra[choice.lane][mark.kind].append(max(0.0, ours - expected))
        return (
            {lane: (_low(save, 4), _low(use, 4)) for lane, (save, use) in extra.items()},
            {choice: (_low(save, 2), _low(use, 2)) for choice, (save, use) in host.items()},
        )

    @cached_property
    def timeline(self) -> Timeline:
        """Of the compute stream."""
        return self._timeline(self.gaps, 0.1)

    def _timeline(self, gaps: tuple[float, ...], quantile: float) -> Timeline:
        owners, weights = zip(*((entry.block, entry.weight) for entry in self.entries), strict=True)
        clocks = list(accumulate(evened(self.marks, gaps, owners, weights, quantile)))
        count, end = len(self.entries), clocks[-1]
        saved, used, freed = [-1.0] * count, [-1.0] * count, [-1.0] * count
        spans = [[0.0, 0.0] for _ in self.blocks]
        for (kind, i), clock, following in zip(self.marks, clocks, [*clocks[1:], end], strict=True):
            if kind == SAVE:
                saved[i] = clock if saved[i] < 0 else saved[i]
            elif kind == USE:
                used[i] = clock if used[i] < 0 else used[i]
                freed[i] = following
            elif kind != END:
                spans[i][kind == OUT] = clock
        for i, entry in enumerate(self.entries):
            if entry.boundary:
                saved[i] = spans[entry.block][0]
            if used[i] < 0:
                used[i] = freed[i] = end
        times = tuple((max(a, 0.0), b, c) for a, b, c in zip(saved, used, freed, strict=True))
        return Timeline(times, tuple((a, b) for a, b in spans), end)

    def step(self) -> Step:
        """What a plan is made for."""
        times, spans, seconds = self.timeline
        first = self._used_first([when[1] for when in times])
        speeds = _Speeds(self.device, self.exact, self.extra)
        host = self._timeline(self.host_gaps, 0.5) if self._follows_host else None
        saved = []
        for i, (entry, when) in enumerate(zip(self.entries, times, strict=True)):
            codes, place = speeds.codes(entry), (entry.block, entry.boundary)
            at = host.times[i][:2] if host else NO_HOST
            saved.append(Saved(entry.weight, when[0], first[i], when[2], codes, *place, at))
        inner: list[list[Saved]] = [[] for _ in self.blocks]
        for s in saved:
            if s.block >= 0 and not s.boundary:
                inner[s.block].append(s)
        seconds_of: dict[tuple[int, ...], list[float]] = {}
        for (begin, end), inside in zip(spans, inner, strict=True):
            seconds_of.setdefault(tuple(s.nbytes for s in inside), []).append(end - begin)
        blocks = []
        for b, (call, inside) in enumerate(zip(self.blocks, inner, strict=True)):
            alike = seconds_of[tuple(s.nbytes for s in inside)]  # calls that save the same take the same time
            used = min((s.used for s in inside), default=0.0)
            freed = max((s.freed for s in inside), default=0.0)
            enqueuing = host.spans[b][1] - host.spans[b][0] if host else 0.0
            blocks.append(Block(median(alike), used, freed, call.repeatable and bool(inside), enqueuing))
        for i, s in enumerate(saved):
            if s.boundary:
                used = min((other.host_times[1] for other in inner[s.block]), default=s.host_times[0])
                block = blocks[s.block]
                saved[i] = replace(s, used=block.used, freed=block.freed, host_times=(s.host_times[0], used))
        over = wires(self.device)
        # Packets of CPU tensors stay where they are, and cost nothing to get there.
        out, back = (_nothing, _nothing) if over is None else map(_with_slack, over)
        cost = self._host_cost if host else None
        return Step(tuple(saved), tuple(blocks), seconds, out, back, self.gradients, cost)

    def _used_first(self, used: list[float]) -> list[float]:
        """`used` of tensors, or of what may be derived from them if that comes first."""
        for i in reversed(range(len(used))):  # sources come before
            for source in self.entries[i].sources or ():
                used[source] = min(used[source], used[i])
        return used

    @property
    def _follows_host(self) -> bool:
        return self.level and self.device.type != "cpu"

    def _host_cost(self, choice: Choice) -> Pair:
        """Seconds of the host for a tensor, by rule of thumb as long as none took that choice."""
        save, use = HOST_COSTS[choice.place]
        if choice in self.host_costs:
            save, use = self.host_costs[choice]
        elif KEPT in self.host_costs:
            save *= self.host_costs[KEPT][0] / HOST_COSTS[KEEP][0]
            use *= self.host_costs[KEPT][1] / HOST_COSTS[KEEP][1]
        return save, use


@dataclass(frozen=True)
class Script:
    """A plan for a lesson, by segments: `rows` has the calls that will come, with what to do; `keeps` tells
    blocks that keep all of it, `packs` what came to their hooks."""

    lesson: Lesson
    plan: StepPlan
    rows: tuple[tuple[tuple[Call, Choice], ...], ...]
    keeps: tuple[bool, ...]
    packs: dict[int, list[Pack]] = field(default_factory=dict)

    @classmethod
    def of(cls, lesson: Lesson, plan: StepPlan) -> Script:
        def chosen(calls: Sequence[Call]) -> tuple[tuple[Call, Choice], ...]:
            return tuple((call, plan.choices[call.number]) for call in calls)

        rows = [chosen(calls) for calls in lesson.rows]
        for b, again in enumerate(plan.recompute):
            if again:
                rows[2 * b + 1] = chosen(lesson.blocks[b].inputs)
        keeps = [all(choice == KEPT for _, choice in row) for row in rows]
        for b, again in enumerate(plan.recompute):
            keeps[2 * b + 1] &= not again
        return cls(lesson, plan, tuple(rows), tuple(keeps))

    def predicted_anew(self, lessons: Iterable[Lesson]) -> Script:
        """The same choices, for the one of these lessons that they were made for, as it is known now."""
        lesson = next(lesson for lesson in lessons if lesson.lossless == self.lesson.lossless)
        return Script.of(lesson, self.plan.for_step(lesson.step()))


class _Speeds:
    """Codes of entries, with their times on a device."""

    def __init__(self, device: torch.device, exact: LaneSpeed | None, extra: Mapping[str, Pair]) -> None:
        self._device = device
        self._exact = exact
        self._extra = extra

    def codes(self, entry: Entry) -> tuple[Code, ...]:
        nbytes, out = entry.weight, []
        rate = DERIVE_RATES[self._device.type]
        if nbytes and entry.sources is not None:
            encode, decode = self._extra.get(DERIVED, (0.0, 0.0))
            out.append(Code(DERIVED, 0, encode, decode + entry.moved / rate))
        if nbytes and entry.widened:
            half, seconds = nbytes // 2, 1.5 * nbytes / rate
            encode, decode = self._extra.get(UPPER, (0.0, 0.0))
            out.append(Code(UPPER, half, encode + seconds, decode + seconds))
        coded = 0 < entry.wire < WORTH * nbytes
        if nbytes and not (coded and self._device.type == "cpu"):
            out.append(Code("raw", nbytes, *self._extra.get("raw", (0.0, 0.0))))
        if coded:
            out.append(self._code("exact", entry, entry.wire))
        if nbytes and entry.lossy is not None:
            bits = int(entry.lossy.partition(":")[2] or 8)
            # 64 elements share a scale and an offset of 16 bits each.
            packed = max(1, int(nbytes * (bits + 0.5) / (8 * entry.dtype.itemsize)))
            if packed < WORTH * nbytes:
                out.append(self._code(entry.lossy, entry, packed))
        return tuple(out)

    def _code(self, lane: str, entry: Entry, nbytes: int) -> Code:
        speed = self._exact if lane == "exact" else None
        speed = profiled_speed(lane, entry.dtype, self._device) or speed or tried_speed(lane, self._device)
        waits = 0.0 if lane.startswith("packed") or self._device.type == "cpu" else HOST_WAIT
        encode, decode = self._extra.get(lane, (0.0, 0.0))
        return Code(
            lane, nbytes, encode + waits + speed.encode(entry.weight), decode + speed.decode(entry.weight)
        )


def _lists() -> tuple[list[float], list[float]]:
    return [], []


def _low(seconds: list[float], parts: int) -> float:
    return sorted(seconds)[len(seconds) // parts] if seconds else 0.0


def _least(found: dict[Key, Pair], before: Mapping[Key, Pair]) -> dict[Key, Pair]:
    """The lesser where both have one."""
    return {
        key: (min(a, before[key][0]), min(b, before[key][1])) if key in before else (a, b)
        for key, (a, b) in found.items()
    }


def _with_slack(seconds: Callable[[float], float]) -> Callable[[float], float]:
    """A plan without any slack stalls whenever something takes longer than it did before."""
    return lambda nbytes: WIRE_SLACK * seconds(nbytes)


def _nothing(nbytes: float) -> float:
    return 0.0
