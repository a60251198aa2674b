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
from time import perf_counter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sidelane.pipeline.lesson import BOUNDED, WORTH, BlockCall, Call, Entry, Lesson, Pack, Script
from sidelane.pipeline.machine import Curve, LaneSpeed
from sidelane.pipeline.marks import END, IN, OUT, SAVE, USE, Mark, Seconds, Shown
from sidelane.pipeline.stash import Stash
from sidelane.pipeline.step_model import Choice
from sidelane.pipeline.streams import current_stream, timed_event

DEPTH = 6  # of a chain of derived tensors: each makes those before it again, unless they are still decoded


class _Work(NamedTuple):
    """What a stream did for us at a mark, between two events."""

    mark: Mark
    before: Stamp
    after: Stamp


class Stamp:
    """A point of the current stream, and when the host came to it and left it."""

    __slots__ = ("_event", "came", "left")

    def __init__(self, device: torch.device) -> None:
        self.came = perf_counter()
        timed = None if device.type == "cpu" else timed_event()
        self._event = current_stream(device).record_event(timed)
        self.left = perf_counter()

    def query(self) -> bool:
        return bool(self._event.query())

    def synchronize(self) -> None:
        self._event.synchronize()

    def elapsed(self, end: Stamp) -> float:
        """Seconds of the device until `end`."""
        return float(self._event.elapsed_time(end._event)) / 1e3


class Uses:
    """How often backward has used a tensor of the trips of one thread, on whatever thread it ran."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Trip:
    """One forward pass with its backward passes: follows a script, or learns one.

    Args:
        script: None to learn.
        timed: mark every save and use with events.
        first: number that the next parcel has.
        level: the device has nothing left to do.
        uses: of the thread that saves.
    """

    def __init__(
        self,
        device: torch.device,
        script: Script | None,
        timed: bool,
        first: int,
        level: bool = False,
        uses: Uses | None = None,
    ) -> None:
        self.device = device
        self.uses = uses or Uses()
        self._level = level
        self.script = script
        self.timed = timed
        self.lost = False  # it is not the step of the script, or failed
        self.failed = False  # with an exception
        self.last = first
        self.gradients = 0
        self.begin = Stamp(device)
        self.end: Stamp | None = None
        self._task = -1  # the backward pass that used something last
        self._work: list[_Work] | None = [] if timed or script is None else None
        self._rows: list[list[Call]] = [[]]
        self.at = 0  # saves that came in this segment
        self._blocks: list[BlockCall] = []
        self._entries: list[Entry] = []
        self._numbers: WeakKeyDictionary[Stash, int] = WeakKeyDictionary()
        self._derived: dict[int, Tensor] = {}  # by number, whether it came out otherwise
        self._widened: dict[int, Tensor] = {}  # by number, whether it has lower halves
        self._inputs: dict[Any, int] = {}

    @property
    def learning(self) -> bool:
        return self.script is None

    @property
    def abandoned(self) -> bool:
        """Of all that was saved to learn from, nothing is left, and there was no backward pass."""
        return self.learning and self.end is None and bool(self._entries) and not self._numbers

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
        return len(self._rows) == len(script.rows) and self.at == len(script.rows[-1])

    @property
    def growth(self) -> tuple[int, int]:
        """Bytes of gradients, and most that a block holds which runs again, as far as they are known."""
        script = self.script
        if script is None:
            return self.gradients, 0
        return script.lesson.gradients, script.plan.forecast.again_bytes

    @property
    def size(self) -> int:
        """Tensors of the step; at least 1."""
        return max(1, len(self._entries) if self.script is None else len(self.script.lesson.entries))

    @property
    def passes(self) -> bool:
        """The block that was entered keeps all that it saves, and nothing of it is timed."""
        script, segment = self.script, len(self._rows) - 1
        return script is not None and not self.lost and self._work is None and script.keeps[segment]

    def expected(self) -> Call | None:
        """The next save of the script in this segment; None where nobody knows."""
        if self.script is None or self.lost:
            return None
        row = self.script.rows[len(self._rows) - 1]
        return row[self.at][0] if self.at < len(row) else None

    @property
    def packs(self) -> list[Pack]:
        """All that came to the hooks in this segment when it passed last."""
        return [] if self.script is None else self.script.packs.get(len(self._rows) - 1, [])

    @packs.setter
    def packs(self, packs: list[Pack]) -> None:
        if self.script is not None and not self.lost:
            self.script.packs[len(self._rows) - 1] = packs

    def entry(self, number: int) -> Entry:
        """A tensor of the step."""
        return self._entries[number] if self.script is None else self.script.lesson.entries[number]

    def save(self, nbytes: int, dtype: torch.dtype) -> tuple[int, Choice | None]:
        """Number of the tensor that is saved now and what to do with it; -1 and None where nobody knows."""
        at, self.at = self.at, self.at + 1
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

    def forbid_deriving(self, stash: Stash) -> None:
        """Do not derive a tensor: something uses it that is not behind it in its graph."""
        number = self._numbers.get(stash)
        if number is not None:
            self._entries[number].sources = None

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
            self.lost = self.at != len(self.script.rows[segment])
        b = len(self._rows) // 2
        self._next_segment()
        self._mark(IN, b)
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
        self._mark(OUT, len(self._rows) // 2 - 1)
        if self.script is None:
            self._blocks[-1].repeatable &= unchanged
        elif not self.lost:
            self.lost = self.at != len(self.script.rows[len(self._rows) - 1])
        self._next_segment()

    def before(self) -> Stamp | None:
        """A stamp, or None in a trip that is not timed."""
        return None if self._work is None else Stamp(self.device)

    def saved(self, number: int, before: Stamp | None) -> None:
        """A tensor was stored."""
        if self._work is not None and before is not None and number >= 0:
            self._work.append(_Work(Mark(SAVE, number), before, Stamp(self.device)))

    def used(self, number: int, before: Stamp | None, wire: int) -> None:
        """A tensor was unpacked; `wire`: bytes of its packet."""
        if self.script is None and 0 <= number < len(self._entries):
            self._entries[number].wire = wire
        task = torch._C._current_graph_task_id()
        if self._work is not None:
            self.end = Stamp(self.device)
            if number >= 0 and before is not None:
                self._work.append(_Work(Mark(USE, number), before, self.end))
        elif task in (-1, self._task) and self.end is not None:
            return
        else:
            self.end = Stamp(self.device)  # until `finish` knows better
        if task not in (-1, self._task):
            self._task = task
            # For its time alone: a pass that fails never calls it.
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)

    def finish(self) -> None:
        """A backward pass has ended."""
        self._mark(END, 0)
        self.end = Stamp(self.device)

    def ended(self) -> bool:
        """The device has done all of it."""
        return self.end is not None and self.end.query()

    def seconds(self) -> float:
        """From the first save to the end of backward; above 0."""
        return 1e-9 if self.end is None else max(self.begin.elapsed(self.end), 1e-9)

    def lesson(self, lossless: bool = False) -> Lesson | None:
        """What a trip has learned that was told to; None if that is nothing. The device must have `ended`.

        Args:
            lossless: no tensor may lose bits, so that more of them can be derived.
        """
        shown = self.shown()
        if not self._entries or shown is None or not any(mark.kind == END for mark in shown.marks):
            return None  # a backward pass that failed shows only a part of the step
        rows, blocks = tuple(map(tuple, self._rows)), tuple(self._blocks)
        known = tuple(map(replace, self._entries))  # later passes over this graph change them
        if lossless:
            for entry in known:
                entry.lossy = None
        depths = [0] * len(known)  # of what is derived from what is derived
        for number, entry in enumerate(known):
            if entry.sources is None:
                continue
            if not self._can_derive(number, entry, [known[source] for source in entry.sources]):
                entry.sources = None
                continue
            depths[number] = 1 + max((depths[source] for source in entry.sources), default=0)
            if depths[number] > DEPTH:
                entry.sources, depths[number] = None, 0
        for number, entry in enumerate(known):
            differs = self._widened.get(number)
            entry.widened = entry.widened and differs is not None and not bool(differs)
        gaps, host = shown.device.gaps, shown.host.gaps
        return Lesson(
            self.device,
            known,
            rows,
            blocks,
            shown.marks,
            gaps,
            host,
            self.gradients,
            self._exact_speed(),
            lossless=lossless,
        )

    def note_derived(self, number: int, differs: Tensor) -> None:
        """A tensor was made again from its sources; `differs` (bool) tells whether it came out otherwise."""
        self._derived[number] = differs

    def note_widened(self, number: int, differs: Tensor) -> None:
        """A tensor that the graph says has empty lower halves was unpacked; `differs` (bool) tells whether it
        has not."""
        self._widened[number] = differs

    def is_widened(self, number: int) -> bool:
        """The graph says that a tensor of a trip that learns has empty lower halves, and none has looked."""
        return number >= 0 and self._entries[number].widened and number not in self._widened

    def _can_derive(self, number: int, entry: Entry, sources: Sequence[Entry]) -> bool:
        """It came out the same, loses no bits that it must not lose if its sources do, and these are there
        when its block runs again."""
        if not all(source.block in (-1, entry.block) for source in sources):
            return False
        lossy = {source.lossy for source in sources} - {None}
        permitted = not lossy or (lossy == {entry.lossy} and entry.lossy != BOUNDED)
        return permitted and number in self._derived and not bool(self._derived[number])

    def shown(self) -> Shown | None:
        """What a timed trip has shown that has `ended`."""
        if not self._work or not self.complete:
            return None
        work = self._work
        between = list(zip([self.begin, *(w.after for w in work)], (w.before for w in work), strict=False))
        within = [(w.before, w.after) for w in work]
        return Shown(
            tuple(w.mark for w in work),
            Seconds(*(tuple(max(0.0, a.elapsed(b)) for a, b in pairs) for pairs in (between, within))),
            Seconds(*(tuple(max(0.0, b.came - a.left) for a, b in pairs) for pairs in (between, within))),
            self._level,
        )

    def _exact_speed(self) -> LaneSpeed | None:
        """As seen in this trip: the median encode, and a fast decode, since others waited for copies."""
        seconds: tuple[list[float], list[float]] = [], []
        seen = set()
        for mark, before, after in self._work or []:
            if mark.kind in (SAVE, USE) and mark not in seen:
                seen.add(mark)
                entry = self._entries[mark.number]
                if 0 < entry.wire < WORTH * entry.weight:
                    seconds[mark.kind].append(before.elapsed(after) / entry.weight)
        if not all(seconds):
            return None
        encode, decode = (sorted(times) for times in seconds)
        rates = encode[len(encode) // 2], decode[len(decode) // 4]
        return LaneSpeed(*(Curve.line(0.0, 1 / max(rate, 1e-15)) for rate in rates))

    @property
    def _inside(self) -> bool:
        return len(self._rows) % 2 == 0

    def _next_segment(self) -> None:
        self._rows.append([])
        self.at = 0

    def _mark(self, kind: int, number: int) -> None:
        if self._work is not None:
            now = Stamp(self.device)
            self._work.append(_Work(Mark(kind, number), now, now))
