"""What every benchmark shares: the environment of a row, CSV files that only grow, figures."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from math import inf
from operator import attrgetter
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPUS = sorted(os.sched_getaffinity(0))  # that the process was given
LOOP, SHORT_LOOP = 20_000, 2_000  # rounds of `loop_us`
DISTURBED = 1.15  # times the least that `loop_us` took: others are on the CPU
TRIES = 20  # of work that is to run undisturbed
STAY = 0.25  # seconds on the same CPUs at least: to look for others takes some milliseconds each
LOOKS = 10
RUNS = 25  # of which the median counts


def environment() -> dict[str, str]:
    """Machine, versions, commit and date, the same columns everywhere; "" for what this machine lacks.

    SIDELANE_COMMIT names the commit where the sources come without their history.
    """
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": os.environ.get("SIDELANE_COMMIT") or _commit(),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "driver": _first_line(Path("/sys/module/nvidia/version")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "av": _version("av"),
    }


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows that share their keys to a CSV file.

    Raises ValueError when the file has another header: then its rows mean something else.
    """
    header = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and _first_line(path) != ",".join(header):
        raise ValueError(f"{path} has other columns: move it away to start a new one")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def loop_us(rounds: int = LOOP) -> float:
    """Microseconds that a loop of Python takes on the present CPU, least of three."""
    least = inf
    for _ in range(3):
        begin, total = perf_counter(), 0
        for i in range(rounds):
            total += i
        least = min(least, perf_counter() - begin)
    return 1e6 * least


def timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def microseconds(run: Callable[[], Any]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of RUNS replays of `run` as a CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    events = [timing_event() for _ in range(RUNS + 1)]
    for _ in range(3):
        graph.replay()
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 for a, b in zip(events, events[1:], strict=False)]
    q1, median, q3 = quantiles(times, n=4)
    return q1, median, q3


@contextmanager
def quiet_cpus(count: int) -> Iterator[Callable[[], None]]:
    """Inside, what moves this process with all of its threads to those `count` of its CPUs on which `loop_us`
    is least now.

    Others on a virtual machine's cores make a program take up to twice as long, for seconds.
    """

    def move() -> None:
        times = []
        for cpu in CPUS:
            os.sched_setaffinity(0, [cpu])
            times.append((loop_us(), cpu))
        _run_on([cpu for _, cpu in sorted(times)[:count]])

    try:
        yield move
    finally:
        _run_on(CPUS)


def _run_on(cpus: Sequence[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cpus)


@dataclass(frozen=True)
class Turn(Generic[T]):
    """What work returned that began at `begin`, and the longest that `loop_us` took before and after it."""

    begin: float
    loop: float
    value: T


@dataclass
class Quiet:
    """Tells by `loop_us` whether others disturb this process, and moves it by `move` where they do."""

    move: Callable[[], None]
    least: float = inf
    _moved: float = field(default=-inf, init=False)

    def run(self, work: Callable[[], T]) -> Turn[T]:
        before = self._loop()
        if before > DISTURBED * self.least and perf_counter() > self._moved + STAY:
            self.move()
            before, self._moved = self._loop(), perf_counter()
        begin = perf_counter()
        value = work()
        return Turn(begin, max(before, self._loop()), value)

    def is_quiet(self, turn: Turn[Any]) -> bool:
        return turn.loop <= DISTURBED * self.least

    def undisturbed(self, work: Callable[[], T]) -> Turn[T]:
        """Of `work` when it runs undisturbed, or the least disturbed of `TRIES` times."""
        turns = [self.run(work)]
        while not self.is_quiet(turns[-1]) and len(turns) < TRIES:
            turns.append(self.run(work))
        return min(turns, key=attrgetter("loop"))

    def look_around(self) -> None:
        """Learn what the loop takes undisturbed: `LOOKS` times, on the CPUs that are quietest then."""
        for _ in range(LOOKS):
            self.move()
            self._loop()

    def _loop(self) -> float:
        loop = loop_us(SHORT_LOOP)
        self.least = min(self.least, loop)
        return loop


@contextmanager
def figure(path: Path, columns: int) -> Iterator[Sequence[Any]]:
    """Axes side by side; the PNG is written at the end."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6.4 * columns, 4.8), layout="constrained")
    yield drawing.subplots(1, columns, squeeze=False)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=130)


def _commit() -> str:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _first_line(path: Path) -> str:
    return path.read_text().partition("\n")[0] if path.exists() else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
