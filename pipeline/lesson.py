"""What a trip has shown of a step, as one that can be planned; and a plan for it, in order of its saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch

from sidelane.pipeline.machine import LaneSpeed
from sidelane.pipeline.rates import profiled_speed, tried_speed, wires
from sidelane.pipeline.step_model import Block, Choice, Code, Saved, Step
from sidelane.pipeline.step_plan import StepPlan

Phases = tuple[float, float, float]

WORTH = 0.97  # of its bytes: a code that leaves more is none
WIRE_SLACK = 1.04  # times as long as alone: the other direction and the program use memory too
HOST_WAIT = 0.3e-3  # seconds that a GPU stands still when the host waits for the size of an exact code


class Call(NamedTuple):
    """One save: which tensor of the step it is, and what tells that it is that one."""

    number: int
    nbytes: int
    dtype: torch.dtype


@dataclass
class Entry:
    """A tensor of the step.

    Attributes:
        weight: bytes that it holds; 0 where another entry counts them.
        lossy: name of the lane that may take it with loss, None for none.
        wire: bytes of its exact code, 0 while unknown.
    """

    weight: int
    dtype: torch.dtype
    block: int
    boundary: bool = False
    lossy: str | None = None
    wire: int = 0


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


@dataclass(frozen=True)
class Lesson:
    """What a trip showed.

    Attributes:
        entries: tensors, in order of saving. rows: calls of each segment.
        times: of each entry (saved, used, freed); spans: of each block (in, out); in seconds of computing
            alone.
        phases: seconds of computing alone up to the last save, to the first use, and to the last.
        gradients: bytes of those that backward makes.
        exact: speed of the exact lane; None where no tensor took it.
        stretch: by which a later trip was slower in each phase.
    """

    device: torch.device
    entries: tuple[Entry, ...]
    rows: tuple[tuple[Call, ...], ...]
    blocks: tuple[BlockCall, ...]
    times: tuple[tuple[float, float, float], ...]
    spans: tuple[tuple[float, float], ...]
    phases: Phases
    gradients: int
    exact: LaneSpeed | None = None
    stretch: Phases = (1.0, 1.0, 1.0)

    def stretched(self, phases: Phases, again: float) -> Lesson:
        """As seen by a trip whose computing alone took so long; `again`: seconds of recomputing in its last
        phase, as they were predicted."""
        up, over, down = phases
        first = _ratio(up, self.phases[0])
        down -= again / self.stretch[0] * first
        return replace(self, stretch=(first, _ratio(over, self.phases[1]), _ratio(down, self.phases[2])))

    def step(self) -> Step:
        """What a plan is made for."""

        def at(time: float) -> float:
            out = 0.0
            for length, factor in zip(self.phases, self.stretch, strict=True):
                out += min(time, length) * factor
                time = max(time - length, 0.0)
            return out

        speeds = _Speeds(self.device, self.exact)
        saved = []
        for entry, (begin, used, freed) in zip(self.entries, self.times, strict=True):
            codes, place = speeds.codes(entry), (entry.block, entry.boundary)
            saved.append(Saved(entry.weight, at(begin), at(used), at(freed), codes, *place))
        inner: list[list[Saved]] = [[] for _ in self.blocks]
        for s in saved:
            if s.block >= 0 and not s.boundary:
                inner[s.block].append(s)
        seconds_of: dict[tuple[int, ...], list[float]] = {}
        for (begin, end), inside in zip(self.spans, inner, strict=True):
            seconds_of.setdefault(tuple(s.nbytes for s in inside), []).append(at(end) - at(begin))
        blocks = []
        for block, inside in zip(self.blocks, inner, strict=True):
            alike = seconds_of[tuple(s.nbytes for s in inside)]  # calls that save the same take the same time
            used = min((s.used for s in inside), default=0.0)
            freed = max((s.freed for s in inside), default=0.0)
            blocks.append(Block(median(alike), used, freed, block.repeatable and bool(inside)))
        saved = [
            replace(s, used=blocks[s.block].used, freed=blocks[s.block].freed) if s.boundary else s
            for s in saved
        ]
        over = wires(self.device)
        seconds = at(sum(self.phases))
        # Packets of CPU tensors stay where they are, and cost nothing to get there.
        out, back = (_nothing, _nothing) if over is None else map(_with_slack, over)
        return Step(tuple(saved), tuple(blocks), seconds, out, back, self.gradients)


@dataclass(frozen=True)
class Script:
    """A plan for a lesson, by segments: `rows` has the calls that will come, with what to do."""

    lesson: Lesson
    plan: StepPlan
    rows: tuple[tuple[tuple[Call, Choice], ...], ...]

    @classmethod
    def of(cls, lesson: Lesson, plan: StepPlan) -> Script:
        def chosen(calls: Sequence[Call]) -> tuple[tuple[Call, Choice], ...]:
            return tuple((call, plan.choices[call.number]) for call in calls)

        rows = [chosen(calls) for calls in lesson.rows]
        for b, again in enumerate(plan.recompute):
            if again:
                rows[2 * b + 1] = chosen(lesson.blocks[b].inputs)
        return cls(lesson, plan, tuple(rows))


class _Speeds:
    """Codes of entries, with their times on a device."""

    def __init__(self, device: torch.device, exact: LaneSpeed | None) -> None:
        self._device = device
        self._exact = exact

    def codes(self, entry: Entry) -> tuple[Code, ...]:
        nbytes, out = entry.weight, []
        coded = 0 < entry.wire < WORTH * nbytes
        if nbytes and not (coded and self._device.type == "cpu"):
            out.append(Code("raw", nbytes))
        if coded:
            out.append(self._code("exact", entry, entry.wire))
        if nbytes and entry.lossy is not None:
            bits = int(entry.lossy.partition(":")[2] or 8)
            # 64 elements share a scale and an offset of 16 bits each.
            packed = int(nbytes * (bits + 0.5) / (8 * entry.dtype.itemsize))
            if packed < WORTH * nbytes:
                out.append(self._code(entry.lossy, entry, packed))
        return tuple(out)

    def _code(self, lane: str, entry: Entry, nbytes: int) -> Code:
        speed = self._exact if lane == "exact" else None
        speed = profiled_speed(lane, entry.dtype, self._device) or speed or tried_speed(lane, self._device)
        waits = 0.0 if lane.startswith("packed") or self._device.type == "cpu" else HOST_WAIT
        return Code(lane, nbytes, waits + speed.encode(entry.weight), speed.decode(entry.weight))


def _ratio(seconds: float, learned: float) -> float:
    """Within reason."""
    return min(max(seconds / learned, 0.05), 20.0) if learned > 0 else 1.0


def _with_slack(seconds: Callable[[float], float]) -> Callable[[float], float]:
    """A plan without any slack stalls whenever something takes longer than it did before."""
    return lambda nbytes: WIRE_SLACK * seconds(nbytes)


def _nothing(nbytes: float) -> float:
    return 0.0
