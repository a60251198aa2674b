"""The stages of a chain: where each runs, and the slots between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch

from sidelane.pipeline.streams import Ring, Slot, Stream, on, side_stream
from sidelane.pipeline.trace import Recorder

T = TypeVar("T")


class Stages:
    """Streams and rings by the name of the stage that writes into them.

    Args:
        depth: of each ring.
        width: streams that each thread runs a stage of kernels on, in turn.
        priority: of these.
        recorder: of spans, or None.

    Raises LaneError for a bad depth.
    """

    def __init__(self, depth: int, width: int, priority: int, recorder: Recorder | None) -> None:
        self.rings = {stage: Ring[Any](depth) for stage in ("source", "kernel", "encode", "load", "decode")}
        self.copying = {"store": threading.Lock(), "load": threading.Lock()}  # one thread at a time
        self._width = width
        self._priority = priority
        self._recorder = recorder
        self._thread = _Thread()

    def pool(self, name: str, workers: int) -> Executor:
        """Runs work on so many threads of its own, or without any where it is submitted."""
        if not workers:
            return Inline()
        return ThreadPoolExecutor(workers, f"sidelane-{name}", _set_number, (self._thread, count()))

    def next(self) -> None:
        """This thread begins with a tensor."""
        self._thread.turn = (self._thread.turn + 1) % self._width

    def stream(self, stage: str, device: torch.device) -> Any:
        """The stream on which this thread runs `stage` of its tensor. Copies share one in each direction."""
        return side_stream(device, self._role(stage), 0 if stage in self.copying else self._priority)

    def run(self, stage: str, number: int, stream: Stream, work: Callable[[], T], nbytes: int) -> T:
        """Enqueue `work` on `stream`."""
        with on(stream):
            if self._recorder is None:
                return work()
            begin = self._recorder.mark(stream)
            value = work()
            end = self._recorder.mark(stream)
            self._recorder.add(self._role(stage), stream.device, number, begin, end, nbytes)
            return value

    def fill(
        self,
        slots: ExitStack,
        stage: str,
        number: int,
        inputs: tuple[Slot[Any], ...],
        work: Callable[[Any], T],
        device: torch.device,
        nbytes: int,
    ) -> Slot[T]:
        """Run `work` on the first of `inputs`; what it returns is in a slot that `slots` gives."""
        stream = self.stream(stage, device)
        slot: Slot[T] = self.rings[stage].take(stream)
        slots.callback(slot.give)
        values = [each.open(stream) for each in inputs]
        slot.fill(self.run(stage, number, stream, partial(work, values[0]), nbytes))
        return slot

    def sweep(self) -> None:
        """Drop the values whose readers are done."""
        for ring in self.rings.values():
            ring.sweep()

    def clear(self) -> None:
        """Drop the values of all slots that were given."""
        for ring in self.rings.values():
            ring.clear()

    def _role(self, stage: str) -> str:
        number = 0 if stage in self.copying else self._thread.number * self._width + self._thread.turn
        return f"{stage} {number}" if number else stage


class Inline(Executor):
    """Runs what is submitted at once."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Thread(threading.local):
    number = 0  # among the threads of its direction
    turn = -1  # among the streams of the thread


def _set_number(thread: _Thread, numbers: Iterator[int]) -> None:
    thread.number = next(numbers)
