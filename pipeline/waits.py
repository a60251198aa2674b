"""How long compute streams stand still for copies."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

from sidelane.pipeline.copies import DeviceCopy, StoredCopy
from sidelane.pipeline.streams import reached, timed_event


class Waits:
    """Makes streams wait for copies, between timed events. Thread-safe."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    def open(self, local: DeviceCopy, stream: torch.cuda.Stream) -> None:
        """Open `local` for work on `stream`."""
        if local.filled(stream):
            local.open(stream)
        else:
            with self._around(stream):
                local.open(stream)

    def leave(self, stored: StoredCopy, local: DeviceCopy) -> None:
        """Before `local` is dropped: its stream waits for the copy out. The host does not."""
        if not reached(stored.copied):
            with self._around(local.owner):
                local.owner.wait_event(stored.copied)

    def seconds(self) -> float:
        """Of all waits so far; waits for the device."""
        with self._lock:
            self._fold(block=True)
            return self._seconds

    @contextmanager
    def _around(self, stream: torch.cuda.Stream) -> Iterator[None]:
        begin = stream.record_event(timed_event())
        yield
        with self._lock:
            self._marks.append((begin, stream.record_event(timed_event())))
            self._fold(block=False)

    def _fold(self, block: bool) -> None:
        while self._marks:
            begin, end = self._marks[0]
            if block:
                end.synchronize()
            elif not reached(end):
                return
            self._marks.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3
