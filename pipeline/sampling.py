"""How times are taken: medians over sizes within a limit, alone or beside a load, never waiting forever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil
from statistics import median
from threading import Thread
from time import perf_counter
from typing import TypeVar

import torch

from sidelane.errors import ProfileError, SidelaneError
from sidelane.pipeline.machine import Curve
from sidelane.pipeline.spread import GOLDEN
from sidelane.pipeline.streams import side_stream, timed_event

REPEATS = 21  # of each size, after one that is not counted
LEAST = 3  # of them, for all sizes before any is repeated more often
ATTEMPTS = 5  # to have a load last longer than what is timed beside it
PAUSE = 3e-4  # seconds before what is timed as it comes in use
FAILURES = (SidelaneError, OSError, RuntimeError, MemoryError)  # of a step, which is then left out

T = TypeVar("T")


def sample(
    sizes: Sequence[int],
    once: Callable[[int], float],
    limit: float,
    moved: Callable[[int], int] = lambda size: size,
) -> Curve:
    """Medians of `once`, which takes bytes and gives seconds, for the sizes that fit in `limit` seconds.

    First every size is repeated `LEAST` times. Sizes are left out from the first on whose least repetitions
    would not end in time, judged by the bytes that a call has `moved` for the size before. In what is left of
    the limit sizes take turns, up to `REPEATS` times each, as speeds drift.
    """
    end = perf_counter() + limit
    times: list[list[float]] = []
    costs: list[float] = []  # median seconds of a call, its preparation included
    for i, size in enumerate(sizes):
        if times and (LEAST + 1) * costs[-1] * moved(size) / moved(sizes[i - 1]) > end - perf_counter():
            break
        once(size)
        times.append([])
        marks = [perf_counter()]
        for _ in range(LEAST):
            times[-1].append(once(size))
            marks.append(perf_counter())
        costs.append(median(b - a for a, b in pairwise(marks)))
    for _ in range(REPEATS - LEAST):
        for size, found, cost in zip(sizes, times, costs, strict=False):
            if perf_counter() + cost < end:
                found.append(once(size))
    return Curve.fit(sizes[: len(times)], [median(found) for found in times])


def sample_both(
    sizes: Sequence[int],
    once: Callable[[int], tuple[float, float]],
    limit: float,
    moved: Callable[[int], int] = lambda size: size,
) -> tuple[Curve, Curve]:
    """`sample` of two times that a call gives, as out and back, for the same sizes."""
    seconds: dict[int, list[float]] = {}

    def first(size: int) -> float:
        one, other = once(size)
        seconds.setdefault(size, []).append(other)
        return one

    curve = sample(sizes, first, limit, moved)
    return curve, Curve.fit(curve.sizes, [median(seconds[size][1:]) for size in curve.sizes])


def host_seconds(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    before = perf_counter()
    work()
    return perf_counter() - before


def stream_seconds(stream: torch.cuda.Stream, work: Callable[[], object]) -> float:
    """Seconds until `stream`, which is idle, has done what `work` enqueues on it, by CUDA events."""
    with torch.cuda.stream(stream):
        begin = stream.record_event(timed_event())
        work()
        end = stream.record_event(timed_event())
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def seconds_in_use(stream: torch.cuda.Stream, work: Callable[[], object]) -> float:
    """`stream_seconds` after `PAUSE`: calls in a row start kernels faster than those between which a program
    does something else."""
    _spin(PAUSE)
    return stream_seconds(stream, work)


class Load:
    """Work that fills a stream of its own while something else is timed.

    Args:
        device: of the stream.
        enqueue: one piece of the work, on the current stream.
        seconds: that a piece takes.
    """

    def __init__(self, device: torch.device, enqueue: Callable[[], object], seconds: float) -> None:
        self._stream: torch.cuda.Stream = side_stream(device, "load of a profile")
        self._enqueue, self._seconds = enqueue, seconds
        self._moment = 0.0  # of a piece, at which the last call began

    def beside(self, timed: Callable[[], float], guess: float) -> float:
        """What `timed` returns while the load runs from before its begin until after its end. It begins
        somewhere in the third piece, as work beside a program does, whose clocks are up: each time at another
        moment, so spread that few calls have met them all.

        `guess`: seconds that it takes alone. Raises ProfileError when the load keeps ending earlier.
        """
        pieces = ceil((4 * guess + 1e-3) / self._seconds) + 4
        for _ in range(ATTEMPTS):
            begun = self._stream.record_event()
            with torch.cuda.stream(self._stream):
                for _ in range(pieces):
                    self._enqueue()
            last = self._stream.record_event()
            begun.synchronize()
            self._moment = (self._moment + GOLDEN) % 1
            _spin((2 + self._moment) * self._seconds)
            seconds = timed()
            covered = not last.query()
            last.synchronize()
            if covered:
                return seconds
            pieces *= 4
        raise ProfileError("the load ended before what was timed beside it")


def watched(work: Callable[[], T], limit: float) -> T:
    """What `work` returns or raises. Raises ProfileError when it takes more than `limit` seconds; it is left
    to itself then, on a thread that does not keep the process alive."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run, daemon=True, name="sidelane-profile")
    thread.start()
    thread.join(limit)
    if errors:
        raise errors[0]
    if not results:
        raise ProfileError(f"stalled: not done after {limit:.1f} s")
    return results[0]


def _spin(seconds: float) -> None:
    """Too short a time to sleep."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass
