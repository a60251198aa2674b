"""What a step does, learned from one pass: what is saved and used when, and how long computing takes.

Note: [Trips]
A trip is a forward pass with the backward passes of its graph: from the first saved tensor after a backward
pass (or after nothing of the context was alive) to the next such tensor. Saves are counted in segments, one
inside every call of a block and one between calls, so that a block that is recomputed, and saves its inputs
alone, leaves the counting of the others as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from sidelane.pipeline.lesson import WORTH, BlockCall, Call, Entry, Lesson, Phases, Script
from sidelane.pipeline.machine import Curve, LaneSpeed
from sidelane.pipeline.stash import Stash
from sidelane.pipeline.step_model import Choice
from sidelane.pipeline.streams import current_stream, timed_event

ALIKE = 3  # blocks, from which on odd gaps of one are told from those of the others

_SAVE, _USE, _IN, _OUT, _END = range(5)


class Mark(NamedTuple):
    """Something of ours that a stream did, between two events."""

    kind: int
    number: int
    before: Any
    after: Any


class Trip:
    """One forward pass with its backward passes: follows a script, or learns one.

    Args:
        script: None to learn.
        timed: mark every save and use with events.
        first: number that the next parcel has.
    """

    def __init__(self, device: torch.device, script: Script | None, timed: bool, first: int) -> None:
        self.device = device
        self.script = script
        self.lost = False  # it is not the step of the script, or failed
        self.failed = False  # with an exception
        self.last = first
        self.gradients = 0
        self.begin = stamp(device)
        self.end: Any = None
        self._task = -1  # the backward pass that used something last
        self._marks: list[Mark] | None = [] if timed or script is None else None
        self._rows: list[list[Call]] = [[]]
        self._at = 0
        self._blocks: list[BlockCall] = []
        self._entries: list[Entry] = []
        self._numbers: WeakKeyDictionary[Stash, int] = WeakKeyDictionary()
        self._inputs: dict[Any, int] = {}

    @property
    def learning(self) -> bool:
        return self.script is None

    @property
    def complete(self) -> bool:
        """Backward has begun, and all came that was to come."""
        return not self.lost and self.end is not None and (self.script is None or self.played)

    @property
    def played(self) -> bool:
        """All saves of the script have come."""
        script = self.script
        if script is None or self.lost:
            return False
        return len(self._rows) == len(script.rows) and self._at == len(script.rows[-1])

    @property
    def growth(self) -> int:
        """Bytes that backward itself allocates, as far as they are known."""
        return self.gradients if self.script is None else self.script.plan.forecast.growth

    @property
    def size(self) -> int:
        """Tensors of the step; at least 1."""
        return max(1, len(self._entries) if self.script is None else len(self.script.lesson.entries))

    def save(self, nbytes: int, dtype: torch.dtype) -> tuple[int, Choice | None]:
        """Number of the tensor that is saved now and what to do with it; -1 and None where nobody knows."""
        at, self._at = self._at, self._at + 1
        if self.script is None or self.lost:
            return -1, None
        rows, segment = self.script.rows, len(self._rows) - 1
        if segment < len(rows) and at < len(rows[segment]):
            call, choice = rows[segment][at]
            if call.nbytes == nbytes and call.dtype == dtype:
                return call.number, choice
        self.lost = True
        return -1, None

    def learn(self, stash: Stash, entry: Entry) -> int:
        """The number of a tensor that was saved as `stash`, in a trip that learns."""
        number, block = self._numbers.get(stash), len(self._blocks) - 1 if self._inside else -1
        if number is None:
            number = self._numbers[stash] = len(self._entries)
            entry.block = block
            self._entries.append(entry)
        elif self._entries[number].block != block:
            self._entries[number].block = -1  # no one block saves it: a table that all of them use
        self._rows[-1].append(Call(number, entry.weight, entry.dtype))
        return number

    def enter(
        self, inputs: Callable[[], list[tuple[Any, Entry]]], repeatable: bool, modes: tuple[bool, ...] = ()
    ) -> bool:
        """A block is called; whether to run it again in backward.

        Args:
            inputs: the tensors that it would save then, with what identifies their memory.
            modes: of its parts. In others it is another block.
        """
        segment = len(self._rows) - 1
        if self.script is not None and not self.lost and segment < len(self.script.rows):
            self.lost = self._at != len(self.script.rows[segment])
        b = len(self._rows) // 2
        self._next_segment()
        self._mark(_IN, b)
        if self.script is not None:
            recompute = self.script.plan.recompute
            self.lost = self.lost or b >= len(recompute) or modes != self.script.lesson.blocks[b].modes
            return repeatable and not self.lost and recompute[b]
        calls = []
        for key, entry in inputs() if repeatable else ():
            weight = entry.weight
            if self._inputs.setdefault(key, b) != b:
                entry.weight = 0
            entry.block, entry.boundary = b, True
            calls.append(Call(len(self._entries), weight, entry.dtype))
            self._entries.append(entry)
        self._blocks.append(BlockCall(calls, repeatable, modes))
        return False

    def leave(self, unchanged: bool) -> None:
        """The block has returned."""
        self._mark(_OUT, len(self._rows) // 2 - 1)
        if self.script is None:
            self._blocks[-1].repeatable &= unchanged
        elif not self.lost:
            self.lost = self._at != len(self.script.rows[len(self._rows) - 1])
        self._next_segment()

    def before(self) -> Any:
        """An event, or None in a trip that is not timed."""
        return None if self._marks is None else stamp(self.device)

    def saved(self, number: int, before: Any) -> None:
        """A tensor was stored."""
        if self._marks is not None and number >= 0:
            self._marks.append(Mark(_SAVE, number, before, stamp(self.device)))

    def used(self, number: int, before: Any, wire: int) -> None:
        """A tensor was unpacked; `wire`: bytes of its packet."""
        if self.script is None and 0 <= number < len(self._entries):
            self._entries[number].wire = wire
        self.end = stamp(self.device)
        if self._marks is not None and number >= 0:
            self._marks.append(Mark(_USE, number, before, self.end))
        task = torch._C._current_graph_task_id()
        if task not in (-1, self._task):
            self._task = task
            # For its time alone: a pass that fails never calls it.
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)

    def finish(self) -> None:
        """A backward pass has ended."""
        self._mark(_END, 0)
        self.end = stamp(self.device)

    def ended(self) -> bool:
        """The device has done all of it."""
        return self.end is not None and bool(self.end.query())

    def seconds(self) -> float:
        """From the first save to the end of backward; above 0."""
        return max(_seconds(self.begin, self.end), 1e-9)

    def lesson(self) -> Lesson | None:
        """What a trip has learned that was told to, or has seen that recomputed nothing; None if that is
        nothing. The device must have `ended`."""
        entries = self._known()
        if not self.complete or not entries or not self._marks:
            return None
        gaps = self._evened(self._gaps())
        clocks = list(accumulate(gaps))
        count, end = len(entries), clocks[-1]
        saved, used, freed = [-1.0] * count, [-1.0] * count, [-1.0] * count
        spans = [[0.0, 0.0] for _ in range(len(self._rows) // 2)]
        for mark, clock, following in zip(self._marks, clocks, [*clocks[1:], end], strict=True):
            if mark.kind == _SAVE:
                saved[mark.number] = clock if saved[mark.number] < 0 else saved[mark.number]
            elif mark.kind == _USE:
                used[mark.number] = clock if used[mark.number] < 0 else used[mark.number]
                freed[mark.number] = following
            elif mark.kind != _END:
                spans[mark.number][mark.kind == _OUT] = clock
        for i, entry in enumerate(entries):
            if entry.boundary:
                saved[i] = spans[entry.block][0]
            if used[i] < 0:
                used[i] = freed[i] = end
        times = tuple((max(a, 0.0), b, c) for a, b, c in zip(saved, used, freed, strict=True))
        seen = times, tuple((a, b) for a, b in spans), self._phases(gaps)
        if self.script is not None:
            before = self.script.lesson
            return replace(before, times=seen[0], spans=seen[1], phases=seen[2], stretch=(1.0, 1.0, 1.0))
        rows, blocks = tuple(map(tuple, self._rows)), tuple(self._blocks)
        known = tuple(map(replace, entries))  # later passes over this graph change them
        return Lesson(self.device, known, rows, blocks, *seen, self.gradients, self._exact_speed())

    def _known(self) -> Sequence[Entry]:
        """The tensors of the step."""
        return self._entries if self.script is None else self.script.lesson.entries

    def _exact_speed(self) -> LaneSpeed | None:
        """As seen in this trip: the median encode, and a fast decode, since others waited for copies."""
        seconds: tuple[list[float], list[float]] = [], []
        seen = set()
        for mark in self._marks or []:
            if mark.kind in (_SAVE, _USE) and (mark.kind, mark.number) not in seen:
                seen.add((mark.kind, mark.number))
                entry = self._entries[mark.number]
                if 0 < entry.wire < WORTH * entry.weight:
                    seconds[mark.kind].append(_seconds(mark.before, mark.after) / entry.weight)
        if not all(seconds):
            return None
        encode, decode = (sorted(times) for times in seconds)
        rates = encode[len(encode) // 2], decode[len(decode) // 4]
        return LaneSpeed(*(Curve.line(0.0, 1 / max(rate, 1e-15)) for rate in rates))

    def computing(self) -> Phases | None:
        """Seconds of computing alone in each phase, of a timed trip that has `ended`."""
        return self._phases(self._gaps()) if self._marks and self.complete else None

    @property
    def _inside(self) -> bool:
        return len(self._rows) % 2 == 0

    def _next_segment(self) -> None:
        self._rows.append([])
        self._at = 0

    def _mark(self, kind: int, number: int) -> None:
        if self._marks is not None:
            now = stamp(self.device)
            self._marks.append(Mark(kind, number, now, now))

    def _gaps(self) -> list[float]:
        """Seconds of computing alone before each mark."""
        marks = self._marks or []
        afters = [self.begin, *(mark.after for mark in marks)]
        return [max(0.0, _seconds(after, mark.before)) for after, mark in zip(afters, marks, strict=False)]

    def _phases(self, gaps: list[float]) -> Phases:
        turn = next((i for i, mark in enumerate(self._marks or []) if mark.kind == _USE), len(gaps))
        return sum(gaps[:turn]), sum(gaps[turn : turn + 1]), sum(gaps[turn + 1 :])

    def _evened(self, gaps: list[float]) -> list[float]:
        """`gaps` with the median of blocks that are alike inside of these: the first of all steps computes
        with pauses in its first blocks, where kernels are loaded and memory is allocated."""
        alike: dict[Any, list[list[int]]] = {}
        for run in self._runs():
            alike.setdefault(tuple(self._signature(i) for i in run), []).append(run)
        out = list(gaps)
        for runs in alike.values():
            if len(runs) >= ALIKE:
                for together in list(zip(*runs, strict=True))[1:]:  # what is before a run is not of its block
                    middle = median(gaps[i] for i in together)
                    for i in together:
                        out[i] = middle
        return out

    def _runs(self) -> list[list[int]]:
        """Neighbouring marks of one block, in forward and in backward."""
        runs: list[list[int]] = []
        entries = self._known()
        owner: tuple[int, int] | None = None
        for i, mark in enumerate(self._marks or []):
            before, block = owner, mark.number
            if mark.kind in (_SAVE, _USE):
                block = entries[mark.number].block
            if mark.kind == _IN or (mark.kind == _USE and block >= 0):
                owner = mark.kind, block
            if owner is not None and block == owner[1] and mark.kind != _END:
                if owner != before:
                    runs.append([])
                runs[-1].append(i)
            if mark.kind == _OUT:
                owner = None
        return runs

    def _signature(self, i: int) -> tuple[int, int]:
        mark = (self._marks or [])[i]
        return mark.kind, self._known()[mark.number].weight if mark.kind in (_SAVE, _USE) else 0


def stamp(device: torch.device) -> Any:
    """An event with a time, after what the current stream was told to do."""
    if device.type == "cpu":
        return current_stream(device).record_event()
    return current_stream(device).record_event(timed_event())


def _seconds(a: Any, b: Any) -> float:
    return float(a.elapsed_time(b)) / 1e3
