"""What a machine can do, as tables: seconds over bytes for every wire and lane, kept in a JSON file.

`pipeline/probe.py` measures them, `sidelane profile` keeps them in the cache folder, planners read them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch

from sidelane.errors import ProfileError

FORMAT = "sidelane machine profile"
VERSION = 1
MAX_FILE = 1 << 20  # bytes
MAX_AGE = 30  # days
MAX_POINTS = 64  # of a curve
MAX_NAMES = 256  # of a table
MAX_SIZE = 1 << 50  # bytes that a curve speaks of

WIRES = ("d2h", "h2d", "d2h both", "h2d both", "disk write", "disk read", "tcp", "peer")
CHAIN_LANES = ("exact", "packed:8", "packed:4", "packed:2")  # beside raw
CHAIN_TIMES = ("chain out", "chain back")  # of raw; with the name of another lane behind: of that lane
HOST_TIMES = (  # tables among those of wires that nothing can be sent over
    *CHAIN_TIMES,
    *(f"{name} {lane}" for name in CHAIN_TIMES for lane in CHAIN_LANES),
)
LOAD_SIDE = 4096  # of the matrices beside whose products lanes are timed, see Note: [Busy]
MACHINE_KEYS = ("gpu", "cpu", "cores")  # the other keys are versions, but for
DISK_FOLDER = "disk"  # the folder whose disk was measured

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """Seconds for n bytes.

    Straight in n between the points that were measured, so that latency + n / rate is met exactly; below the
    first along the first piece (never below zero), beyond the last at the rate of the last. More bytes never
    take less time.

    Args:
        sizes: bytes, ascending.
        seconds: for each, positive and never descending; `fit` takes noise out.

    Raises ProfileError for points that are not so.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) == len(self.seconds) <= MAX_POINTS:
            raise ProfileError(f"a curve has {len(self.sizes)} sizes for {len(self.seconds)} times")
        if any(type(size) is not int or not 0 < size <= MAX_SIZE for size in self.sizes):
            raise ProfileError(f"a curve has a size that is no whole number from 1 to {MAX_SIZE}")
        if any(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ProfileError("the sizes of a curve do not ascend")
        if any(not isinstance(s, float) or not 0 < s < math.inf for s in self.seconds):
            raise ProfileError("a curve has a time that is not finite and positive")
        if any(a > b for a, b in zip(self.seconds, self.seconds[1:], strict=False)):
            raise ProfileError("a curve takes less time for more bytes")

    def __call__(self, nbytes: float) -> float:
        """Seconds for `nbytes`, 0 or more."""
        sizes, seconds = self.sizes, self.seconds
        if nbytes >= sizes[-1]:
            return seconds[-1] * (nbytes / sizes[-1])
        i = max(bisect_right(sizes, nbytes) - 1, 0)
        slope = (seconds[i + 1] - seconds[i]) / (sizes[i + 1] - sizes[i]) if i + 1 < len(sizes) else 0.0
        if nbytes < sizes[0]:
            slope = min(slope, seconds[0] / sizes[0])
        return seconds[i] + (nbytes - sizes[i]) * slope

    def rate(self, nbytes: float) -> float:
        """Bytes/s at that size."""
        return nbytes / self(nbytes)

    def lesser(self, other: Curve) -> Curve:
        """The lesser time at each size that either was measured at."""
        seconds: dict[int, float] = {}
        for curve in (self, other):
            for size, found in zip(curve.sizes, curve.seconds, strict=True):
                seconds[size] = min(seconds.get(size, found), found)
        sizes = sorted(seconds)
        return Curve.fit(sizes, [seconds[size] for size in sizes])

    @classmethod
    def line(cls, latency: float, rate: float) -> Curve:
        """`latency` seconds and n / `rate` (bytes/s)."""
        if not 0 <= latency < math.inf or not 0 < rate < math.inf:
            raise ProfileError(f"latency={latency}, rate={rate}: a line has seconds from 0 up and bytes/s")
        sizes = (1, MAX_SIZE)
        return cls(sizes, tuple(latency + size / rate for size in sizes))

    @classmethod
    def fit(cls, sizes: Sequence[int], seconds: Sequence[float]) -> Curve:
        """Through measured times: neighbours that descend are replaced by their geometric mean until none
        does, which is the never descending curve nearest to them in log time (pool adjacent violators)."""
        blocks: list[tuple[float, int]] = []  # mean of log time, points
        for value in seconds:
            blocks.append((math.log(value), 1))
            while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
                (b, n), (a, m) = blocks.pop(), blocks.pop()
                blocks.append(((a * m + b * n) / (m + n), m + n))
        fitted = [math.exp(mean) for mean, count in blocks for _ in range(count)]
        return cls(tuple(sizes), tuple(accumulate(fitted, max)))  # as exp may round two of them apart


@dataclass(frozen=True)
class LaneSpeed:
    """Of one lane, for one dtype, under one load: seconds over raw bytes."""

    encode: Curve
    decode: Curve


@dataclass(frozen=True)
class Machine:
    """Tables of one machine.

    Attributes:
        key: what they hold for, see `current_key`; "disk": the folder whose disk was measured, if one was.
        wires: "d2h", "h2d": GPU to pinned memory and back; "d2h both", "h2d both": the same while the other
            direction is full; "disk write", "disk read": the disk tier; "tcp": loopback; "peer": to the next
            GPU. Those of `WIRES` that the machine has. "chain out", "chain back": host time of a `Chain` of
            raw for each tensor; "chain out exact" and so on: of the other `CHAIN_LANES`, for bf16.
        lanes: by f"{lane}|{dtype}|{load}": lane "raw", "exact", "packed:8", "packed:4", "packed:2" or
            "video"; dtype "bfloat16" or "float32"; load "idle", or "busy" beside bf16 matrix products.
        gemm: FLOP/s of bf16 matrix products.
        engines: number of "nvenc" and "nvdec" engines.
        created: seconds since 1970.
        left_out: what could not be measured, and why.
    """

    key: dict[str, str]
    wires: dict[str, Curve]
    lanes: dict[str, LaneSpeed]
    gemm: float
    engines: dict[str, int]
    created: float = field(default_factory=time.time)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def product(self) -> float:
        """Seconds of one of the products beside which "busy" tables hold."""
        return 2 * LOAD_SIDE**3 / self.gemm

    def save(self, path: str | Path) -> None:
        """Write JSON, all or nothing; folders are made. Raises ProfileError when that is impossible."""
        path = Path(path)
        text = json.dumps({"format": FORMAT, "version": VERSION, **_plain(self)}, indent=1) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid4().hex}")
            try:
                temporary.write_text(text)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise ProfileError(f"{path}: the profile cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path, *, foreign: bool = False) -> Machine:
        """The tables in a file.

        Args:
            path: what `save` wrote.
            foreign: take those of another machine, of other versions, and old ones too: to plan for it.

        Raises ProfileError for a file that cannot be read or is no profile; and unless `foreign`, for one of
        another machine, of other versions, or older than 30 days.
        """
        path = Path(path)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE + 1)
        except OSError as error:
            raise ProfileError(
                f"{path}: the profile cannot be read ({error.strerror}): {_again(path)}"
            ) from error
        try:
            machine = _parse(data)
        except (ProfileError, ValueError, RecursionError) as error:
            raise ProfileError(f"{path} is no profile ({error}): {_again(path)}") from error
        if not foreign:
            _check_present(path, machine)
        return machine

    @classmethod
    def cached(cls) -> Machine | None:
        """The tables of this machine in the cache folder; None if it was never measured with these versions.

        Raises ProfileError as `load`.
        """
        path = cache_path()
        try:
            path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ProfileError(
                f"{path}: the profile cannot be read ({error.strerror}): set XDG_CACHE_HOME to a folder"
            ) from error
        return cls.load(path)


def current_key() -> dict[str, str]:
    """What the tables of this machine depend on: GPU (the current one), CPU and its cores, and the versions
    of driver, torch, triton and sidelane. "none" for what is not there."""
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "driver": driver_version() if gpu else "none",
        "torch": torch.__version__,
        "triton": _triton(),
        "sidelane": version("sidelane"),
    }


def cache_path() -> Path:
    """The file of this machine and these versions, below $XDG_CACHE_HOME or ~/.cache."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = named if named.is_absolute() else Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps(current_key(), sort_keys=True).encode()).hexdigest()
    return folder / "sidelane" / f"machine-{digest[:16]}.json"


def driver_version() -> str:
    """Of the NVIDIA driver; "unknown" where it is not loaded or does not say."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"


def _cpu() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def _again(path: Path) -> str:
    """What makes the file new."""
    return "run sidelane profile" if path == cache_path() else "run sidelane profile --out FILE --force"


def _check_present(path: Path, machine: Machine) -> None:
    """Raises ProfileError unless the tables are of this machine as it is today."""
    for name, value in current_key().items():
        found = machine.key.get(name, "none")
        if found != value:
            whose = "of another machine" if name in MACHINE_KEYS else "stale"
            raise ProfileError(f"{path} is {whose} ({name} {found}, here {value}): {_again(path)}")
    days = (time.time() - machine.created) / 86400
    if not -1 <= days <= MAX_AGE:
        raise ProfileError(f"{path} is stale ({days:.0f} days old): {_again(path)}")


def _plain(machine: Machine) -> dict[str, Any]:
    lanes = machine.lanes.items()
    return {
        "created": machine.created,
        "key": machine.key,
        "gemm": machine.gemm,
        "engines": machine.engines,
        "wires": {name: _points(curve) for name, curve in machine.wires.items()},
        "lanes": {name: {"encode": _points(s.encode), "decode": _points(s.decode)} for name, s in lanes},
        "left_out": machine.left_out,
    }


def _points(curve: Curve) -> dict[str, Any]:
    return {"sizes": list(curve.sizes), "seconds": list(curve.seconds)}


def _parse(data: bytes) -> Machine:
    """Raises ProfileError or ValueError for anything but the bytes of `Machine.save`."""
    if len(data) > MAX_FILE:
        raise ProfileError(f"more than {MAX_FILE} bytes")
    document = _Reader("the file", json.loads(data, parse_constant=_refuse))
    if document.take("format", _text) != FORMAT or document.take("version", _count) != VERSION:
        raise ProfileError(f"not of format '{FORMAT}', version {VERSION}")
    machine = Machine(
        key=document.table("key", _text),
        wires=document.table("wires", _curve),
        lanes=document.table("lanes", _speed),
        gemm=document.take("gemm", _positive),
        engines=document.table("engines", _count),
        created=document.take("created", _positive),
        left_out=document.table("left_out", _text),
    )
    document.done()
    return machine


class _Reader:
    """Takes the entries of a JSON object one by one. Raises ProfileError for what is not as expected."""

    def __init__(self, name: str, value: Any) -> None:
        if not isinstance(value, dict) or len(value) > MAX_NAMES:
            raise ProfileError(f"{name} is no object of at most {MAX_NAMES} entries")
        self._name, self._left = name, dict(value)

    def take(self, name: str, read: Callable[[str, Any], T]) -> T:
        if name not in self._left:
            raise ProfileError(f"{self._name} has no '{name}'")
        return read(name, self._left.pop(name))

    def table(self, name: str, read: Callable[[str, Any], T]) -> dict[str, T]:
        entries = self.take(name, _Reader)
        return {key: entries.take(key, read) for key in list(entries._left)}

    def done(self) -> None:
        if self._left:
            raise ProfileError(f"{self._name} has an unknown entry '{next(iter(self._left))[:40]}'")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise ProfileError(f"'{name[:40]}' is no text of at most 1000 characters")
    return value


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 16:
        raise ProfileError(f"'{name[:40]}' is no small whole number")
    return value


def _positive(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise ProfileError(f"'{name[:40]}' is not a finite positive number")
    return float(value)


def _curve(name: str, value: Any) -> Curve:
    entries = _Reader(f"'{name[:40]}'", value)
    sizes, seconds = entries.take("sizes", _list), entries.take("seconds", _list)
    entries.done()
    return Curve(tuple(sizes), tuple(_positive("seconds", s) for s in seconds))


def _speed(name: str, value: Any) -> LaneSpeed:
    entries = _Reader(f"'{name[:40]}'", value)
    speed = LaneSpeed(entries.take("encode", _curve), entries.take("decode", _curve))
    entries.done()
    return speed


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_POINTS:
        raise ProfileError(f"'{name}' is no list of at most {MAX_POINTS} numbers")
    return value


def _refuse(word: str) -> float:
    raise ProfileError(f"{word} is no number")
