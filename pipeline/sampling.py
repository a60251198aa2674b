"""How times are taken: medians over sizes within a limit, alone or beside a load, never waiting forever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from statistics import median
from threading import Thread
from time import perf_counter
from typing import TypeVar

import torch

from sidelane.errors import ProfileError, SidelaneError
from sidelane.pipeline.machine import Curve
from sidelane.pipeline.streams import side_stream

REPEATS = 21  # of each size, after one that is not counted
LEAST = 3  # of them, also where these take more than the share of the size
ATTEMPTS = 5  # to have a load last longer than what is timed beside it
FAILURES = (SidelaneError, OSError, RuntimeError, MemoryError)  # of a step, which is then left out

T = TypeVar("T")


def sample(sizes: Sequence[int], once: Callable[[int], float], limit: float) -> Curve:
    """Medians of `once`, which takes bytes and gives seconds, for the sizes that fit in `limit` seconds.

    A size gets an equal share of the limit for its repetitions. Sizes are left out from the first on whose
    least repetitions would not end in time, judged by bytes from the size before.
    """
    end = perf_counter() + limit
    times: list[float] = []
    cost = 0.0  # median seconds of a call, its preparation included
    for i, size in enumerate(sizes):
        if times and (LEAST + 1) * cost * size / sizes[i - 1] > end - perf_counter():
            break
        once(size)
        found: list[float] = []
        costs: list[float] = []
        share = perf_counter() + limit / len(sizes)
        while len(found) < LEAST or (len(found) < REPEATS and perf_counter() + cost < share):
            before = perf_counter()
            found.append(once(size))
            costs.append(perf_counter() - before)
            cost = median(costs)
        times.append(median(found))
    return Curve.fit(sizes[: len(times)], times)


def host_seconds(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    before = perf_counter()
    work()
    return perf_counter() - before


def stream_seconds(stream: torch.cuda.Stream, work: Callable[[], object]) -> float:
    """Seconds until `stream`, which is idle, has done what `work` enqueues on it, by CUDA events."""
    with torch.cuda.stream(stream):
        begin = stream.record_event(_timed_event())
        work()
        end = stream.record_event(_timed_event())
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


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

    def beside(self, timed: Callable[[], float], guess: float) -> float:
        """What `timed` returns while the load runs from before its begin until after its end.

        `guess`: seconds that it takes alone. Raises ProfileError when the load keeps ending earlier.
        """
        pieces = ceil((4 * guess + 1e-3) / self._seconds) + 1
        for _ in range(ATTEMPTS):
            begun = self._stream.record_event()
            with torch.cuda.stream(self._stream):
                for _ in range(pieces):
                    self._enqueue()
            last = self._stream.record_event()
            begun.synchronize()
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


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
