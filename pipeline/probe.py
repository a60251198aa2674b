"""Measure a machine in seconds: wires, lanes, matrix products, engines; what is missing is named.

Every step has a limit and is watched, so that a wire that stalls costs its own curves only. The data of the
lanes is smooth sums and noise, so that kernels meet what they meet in use; ratios do not come from here.

Note: [Busy]
Beside matrix products a kernel begins when the product under way ends, even on a stream that goes first. An
encode or decode that is alone and begins at some moment of a product takes half a product longer, and more
for each wait of the host or of its next kernel. That is what "busy" curves hold, for products of 4096 x 4096
x 4096 (0.2 ms on an H200). Several tensors on streams of their own, as in a chain, wait together. Each call
meets another moment, so all that are made in turns count, whenever they were; the few calls of one step
scatter by a quarter.

Note: [Turns]
What starting kernels costs the host changes by a factor of up to two within seconds, with the CPU that a
thread runs on. A choice between lanes needs times of the same moments, so after each had its own, all of
them are timed in turns, several times; the least median of each counts. Calls in a row
start kernels some 7 % faster than in use, hence the pauses (`seconds_in_use`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from threading import Thread
from time import perf_counter

import torch
from torch import Tensor

from sidelane.codec.engines import encoding_engine
from sidelane.codec.lane import Lane
from sidelane.codec.nvenc import encoder_caps
from sidelane.codec.probe import probe_nvdec
from sidelane.errors import DriverError, LaneUnavailable, ProfileError
from sidelane.layout import FORMATS
from sidelane.pipeline import probe_chain, probe_wires
from sidelane.pipeline.lanes import decode_packet, open_lane
from sidelane.pipeline.machine import DISK_FOLDER, LOAD_SIDE, Curve, LaneSpeed, Machine, current_key
from sidelane.pipeline.sampling import (
    FAILURES,
    Load,
    host_seconds,
    sample,
    sample_both,
    seconds_in_use,
    stream_seconds,
    watched,
)
from sidelane.pipeline.streams import side_stream
from sidelane.pipeline.tiers import PacketLayout

KIB, MIB = 1 << 10, 1 << 20
SIZES = (8 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
SMALL = 4 * MIB  # the largest for lanes on the CPU
DISK = tuple(64 * KIB << i for i in range(9))  # sizes for the disk, to 16 MiB
TURNS = 8 * KIB, 16 * MIB  # the smallest and the largest size that is timed in turns, and beside products:
TURNS_BESIDE = MIB, 64 * MIB
VIDEO = 64 * KIB, 16 * MIB  # the smallest and the largest for the video lane
LANES = {
    "packed:4": ("packed", {"bits": 4}),
    "exact": ("exact", {}),
    "raw": ("raw", {}),
    "packed:8": ("packed", {"bits": 8}),
    "packed:2": ("packed", {"bits": 2}),
    "video": ("video", {}),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHANNELS = 1024  # of the data
SIDE, SIDE_CPU = 8192, 512  # of the matrices whose products are timed
BUDGET = 27.0  # seconds for everything
OVER = 2.5  # at most beyond it
GRACE = 3.0  # seconds beyond its limit after which a step counts as stalled
COMPILE = 6.0  # the same where kernels are compiled or libraries loaded

Progress = Callable[[str, int, int], None]
Timed = Callable[[int, Callable[[], object]], float]  # seconds of work on so many bytes


@dataclass
class Tables:
    """What was found so far; see `Machine`.

    Attributes:
        apart: curves beside products as the steps of single lanes found them.
        beside: seconds of encode and decode there, timed in turns, by lane and size.
    """

    wires: dict[str, Curve] = field(default_factory=dict)
    lanes: dict[str, LaneSpeed] = field(default_factory=dict)
    gemm: float = 0.0
    engines: dict[str, int] = field(default_factory=lambda: {"nvenc": 0, "nvdec": 0})
    apart: dict[str, LaneSpeed] = field(default_factory=dict)
    beside: dict[tuple[str, int], list[tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A part of the measurement: `work` takes the seconds that it may use. `slack`: beyond them, at most.
    `again`: what an earlier step has measured; it may fail."""

    name: str
    seconds: float
    work: Callable[[float], None]
    slack: float = GRACE
    again: bool = False


def measure(
    spill_dir: str | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    budget: float = BUDGET,
    progress: Progress = lambda name, i, n: None,
) -> Machine:
    """Measure this machine on the current GPU, or without one its disk, its network stack and its CPU lanes.

    Args:
        spill_dir: folder of the disk wire; default: the system's for temporary files.
        sizes: bytes, ascending, multiples of 8 KiB; each curve has those that it has time and room for.
        budget: seconds; steps that do not fit are left out.
        progress: called before each step with its name, its number and how many there are.

    Raises ProfileError when not even a matrix product runs.
    """
    end = perf_counter() + budget
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    tables = Tables()
    left_out: dict[str, str] = {}
    folder = tempfile.gettempdir() if spill_dir is None else spill_dir
    steps = list(_steps(tables, device, tuple(sizes), folder))
    for i, step in enumerate(steps):
        progress(step.name, i, len(steps))
        limit = min(step.seconds, end - perf_counter())
        try:
            if limit <= 0:
                raise ProfileError(f"no time left in {budget:.0f} s: run again, kernels stay compiled")
            watched(partial(step.work, limit), min(limit + step.slack, end - perf_counter() + OVER))
        except FAILURES as error:
            if not step.again:
                left_out[step.name] = " ".join(str(error).split())[:300] or type(error).__name__
        else:
            left_out.pop(step.name, None)
    if device is None:
        left_out["busy"] = "no GPU whose matrix products could be a load"
    if not tables.gemm:
        raise ProfileError(f"no matrix product runs here ({left_out['products']}): see sidelane doctor")
    # Copies, as a step that stalled may go on and add to its tables.
    found = dict(tables.wires), dict(tables.lanes), tables.gemm, dict(tables.engines)
    disk = {DISK_FOLDER: str(Path(folder).resolve())} if "disk write" in found[0] else {}
    return Machine(current_key() | disk, *found, left_out=left_out)


def activations(nbytes: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """[T, CHANNELS] of `nbytes`: in each channel three slow waves and a fifth of noise, over two decades of
    scale between channels, a few of which are ten times larger still."""
    rows = nbytes // (CHANNELS * dtype.itemsize)
    random = torch.Generator(device or "cpu").manual_seed(0)
    t = torch.arange(rows, device=device, dtype=torch.float32)[:, None]
    make = partial(torch.rand, CHANNELS, generator=random, device=device)
    x = torch.zeros(rows, CHANNELS, device=device)
    for period in (37.0, 211.0, 1201.0):
        x += torch.sin(t * (6.2832 / period) + 6.2832 * make())
    x += 0.2 * torch.randn(rows, CHANNELS, generator=random, device=device)
    scale = 10 ** (2 * make() - 1)
    scale[::97] *= 10
    return (x * scale).to(dtype)


def _steps(
    tables: Tables, device: torch.device | None, sizes: tuple[int, ...], folder: str
) -> Iterator[Step]:
    """Those without which planning makes no sense come first."""
    yield Step("products", 0.8, partial(_gemm, tables, device), slack=COMPILE)
    if device is not None:
        yield Step("d2h, h2d", 2.4, lambda limit: tables.wires.update(probe_wires.pcie(device, sizes, limit)))
        yield Step("kernels", 8.0, partial(_compile, device))
    some = tuple(size for size in DISK if sizes[0] <= size <= sizes[-1]) or sizes[-1:]
    yield Step("disk", 2.5, lambda limit: tables.wires.update(probe_wires.disk(folder, some, limit, device)))
    yield Step("tcp", 1.0, lambda limit: tables.wires.update(probe_wires.tcp(sizes, limit)))
    if device is not None:
        yield Step("engines", 1.0, lambda limit: tables.engines.update(_engines(device)))
    if device is not None and torch.cuda.device_count() > 1:
        yield Step("peer", 1.0, lambda limit: tables.wires.update(probe_wires.peer(device, sizes, limit)))
    lanes = [(name, dtype, partial(_lane, tables, device, sizes, name, dtype)) for name, dtype in _pairs()]
    for name, dtype, work in lanes:
        yield Step(f"{name} {dtype}", 0.65, work, COMPILE)
    turns: list[Step] = []
    if device is not None:

        def beside(limit: float) -> None:
            _in_turns_beside(tables, device, _load(tables, device), limit)

        turns = [
            Step("lanes in turns", 0.5, partial(_in_turns, tables, device), again=True),
            Step("lanes beside products", 1.3, beside, again=True),
        ]
        yield Step("chain", 2.0, lambda limit: tables.wires.update(probe_chain.chains(device, limit)))
        yield from turns
        yield from turns
    few = tuple(size for size in sizes if VIDEO[0] <= size <= VIDEO[1])
    for dtype in DTYPES:
        yield Step(f"video {dtype}", 4.0, partial(_lane, tables, device, few, "video", dtype), COMPILE)
    if device is None:
        for name, dtype, work in lanes:
            yield Step(f"{name} {dtype}", 0.3, work, COMPILE, again=True)
    yield from turns


def _pairs() -> list[tuple[str, str]]:
    """Lanes and dtypes of kernels."""
    return [(name, dtype) for dtype in DTYPES for name in LANES if name != "video"]


def _gemm(tables: Tables, device: torch.device | None, limit: float) -> None:
    """After a quarter of the limit, so that clocks are those of a busy device."""
    side = SIDE_CPU if device is None else SIDE
    product = _product(device, side)
    stream = None if device is None else side_stream(device, "products of a profile")

    def once(side: int) -> float:
        return host_seconds(product) if stream is None else stream_seconds(stream, product)

    once(side)
    warm = perf_counter() + limit / 4
    while perf_counter() < warm:
        once(side)
    tables.gemm = 2 * side**3 / sample((side,), once, limit / 2)(side)


def _product(device: torch.device | None, side: int) -> Callable[[], object]:
    a, b, out = (torch.randn(side, side, device=device).bfloat16() for _ in range(3))
    _synchronize(device)
    return partial(torch.mm, a, b, out=out)


def _compile(device: torch.device, limit: float) -> None:
    """The kernels of all lanes at once, which takes many seconds one after the other. What is not done by
    `limit`, or fails, is left to the steps of the lanes."""

    def compile_lane(name: str, dtype: str) -> None:
        kind, options = LANES[name]
        with suppress(Exception), torch.cuda.device(device):
            subject = _Subject(open_lane(kind, **options), activations(SIZES[0], DTYPES[dtype], device))
            subject.decode(SIZES[0])()

    end = perf_counter() + limit
    threads = [Thread(target=compile_lane, args=pair, daemon=True) for pair in _pairs()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(end - perf_counter(), 0.0))
    _synchronize(device)


def _engines(device: torch.device) -> dict[str, int]:
    """Raises LaneUnavailable or DriverError when the driver's decoder library does not answer."""
    try:
        nvenc = encoder_caps(device).engines
    except (LaneUnavailable, DriverError):
        nvenc = 0
    return {"nvenc": nvenc, "nvdec": max((c.engines for c in probe_nvdec(device) if c.supported), default=0)}


def _lane(
    tables: Tables, device: torch.device | None, sizes: tuple[int, ...], name: str, dtype: str, limit: float
) -> None:
    """Idle and busy, one after the other, since they share kernels and packets."""
    kind, options = LANES[name]
    sizes = _fitting(device, sizes)
    subject = _Subject(open_lane(kind, **options), activations(sizes[-1], DTYPES[dtype], device))
    if device is None:
        idle = subject.speed(sizes, limit, lambda size, work: host_seconds(work))
        _keep(tables, f"{name}|{dtype}|idle", idle)
        return
    stream = side_stream(device, "lane of a profile", -1)  # as a chain has
    with torch.cuda.stream(stream):
        subject.decode(sizes[0])()  # compiles
    _synchronize(device)
    idle = subject.speed(sizes, limit * 0.4, lambda size, work: seconds_in_use(stream, work))
    _keep(tables, f"{name}|{dtype}|idle", idle)

    load = _load(tables, device)

    def beside(size: int, work: Callable[[], object]) -> float:
        return load.beside(partial(stream_seconds, stream, work), max(idle.encode(size), idle.decode(size)))

    sizes = idle.encode.sizes
    if name == "video" and encoding_engine(device.index, FORMATS["nv12"], None).name != "nvenc":
        decode = sample(sizes, lambda size: beside(size, subject.decode(size)), limit * 0.6)
        busy = LaneSpeed(idle.encode, decode)
    else:
        busy = subject.speed(sizes, limit * 0.6, beside)
    _keep(tables, f"{name}|{dtype}|busy", busy)


def _in_turns(tables: Tables, device: torch.device | None, limit: float) -> None:
    """All lanes idle once more, one call of each after the other. See Note: [Turns]."""
    clock = _clock(device, seconds_in_use)

    def in_use(key: str, size: int, work: Callable[[], object]) -> float:
        return clock(work)

    found = _take_turns(tables, device, "idle", TURNS, limit, in_use)
    for key in {key for key, _ in found}:
        timed = {size: _medians(times) for (known, size), times in found.items() if known == key}
        _keep(tables, key, _speed(timed))


def _in_turns_beside(tables: Tables, device: torch.device | None, load: Load, limit: float) -> None:
    """The same beside products, into curves of all such calls so far. See Note: [Busy]."""
    clock = _clock(device, stream_seconds)

    def beside(key: str, size: int, work: Callable[[], object]) -> float:
        alone = tables.lanes[key.replace("busy", "idle")]
        guess = max(alone.encode(size), alone.decode(size))
        return load.beside(partial(clock, work), guess)

    for at, times in _take_turns(tables, device, "busy", TURNS_BESIDE, limit, beside).items():
        tables.beside.setdefault(at, []).extend(times)
    for key in {key for key, _ in tables.beside}:
        known = tables.apart.setdefault(key, tables.lanes[key])
        points = {size: (known.encode(size), known.decode(size)) for size in known.encode.sizes}
        timed = {size: _medians(times) for (name, size), times in tables.beside.items() if name == key}
        tables.lanes[key] = _speed(points | timed)


def _take_turns(
    tables: Tables,
    device: torch.device | None,
    load: str,
    sizes: tuple[int, int],
    limit: float,
    timed: Callable[[str, int, Callable[[], object]], float],
) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Seconds of encode and decode by lane and size, of all curves for `load`, in rounds of random order, the
    first of which does not count. `sizes`: the smallest and the largest."""
    keys = [key for key in tables.lanes if key.endswith(f"|{load}") and not key.startswith("video")]
    within = {key: [n for n in tables.lanes[key].encode.sizes if sizes[0] <= n <= sizes[1]] for key in keys}
    turns = [(key, size) for key in keys for size in within[key]]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {turn: [] for turn in turns}
    if not turns:
        return found
    largest = max(size for _, size in turns)
    data = {dtype: activations(largest, kind, device) for dtype, kind in DTYPES.items()}
    subjects = {}
    for key in keys:
        name, dtype, _ = key.split("|")
        kind, options = LANES[name]
        subjects[key] = _Subject(open_lane(kind, **options), data[dtype])
    end, rounds, order = perf_counter() + limit, 0, Random(0)
    while rounds < 2 or perf_counter() < end:
        for key, size in order.sample(turns, len(turns)):
            subject = subjects[key]
            times = timed(key, size, subject.encode(size)), timed(key, size, subject.decode(size))
            if rounds:
                found[key, size].append(times)
        rounds += 1
    return found


def _clock(
    device: torch.device | None, on_stream: Callable[[torch.cuda.Stream, Callable[[], object]], float]
) -> Callable[[Callable[[], object]], float]:
    """Seconds of a call, by `on_stream` where there is a GPU, on a stream as a chain has."""
    return (
        host_seconds if device is None else partial(on_stream, side_stream(device, "lane of a profile", -1))
    )


def _medians(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    encode, decode = zip(*times, strict=True)
    return median(encode), median(decode)


def _speed(points: Mapping[int, tuple[float, float]]) -> LaneSpeed:
    """Of seconds of encode and decode by size."""
    sizes = sorted(points)
    encode, decode = zip(*(points[size] for size in sizes), strict=True)
    return LaneSpeed(Curve.fit(sizes, encode), Curve.fit(sizes, decode))


def _load(tables: Tables, device: torch.device) -> Load:
    if not tables.gemm:
        raise ProfileError("no matrix product was measured that could be a load")
    return Load(device, _product(device, LOAD_SIDE), 2 * LOAD_SIDE**3 / tables.gemm)


def _keep(tables: Tables, key: str, found: LaneSpeed) -> None:
    """The lesser times of `found` and of an earlier step, as what disturbs the host only adds to them."""
    if (known := tables.lanes.get(key)) is not None:
        found = LaneSpeed(known.encode.lesser(found.encode), known.decode.lesser(found.decode))
    tables.lanes[key] = found


class _Subject:
    """A lane with the data that it encodes, and the packets that it decodes, which are kept."""

    def __init__(self, lane: Lane, data: Tensor) -> None:
        self._lane, self._data = lane, data
        self._arrived: dict[int, tuple[PacketLayout, Tensor]] = {}

    def encode(self, size: int) -> Callable[[], object]:
        """The first rows, `size` bytes of them."""
        return partial(self._lane.encode, self._data[: size // (CHANNELS * self._data.itemsize)])

    def decode(self, size: int) -> Callable[[], object]:
        """Of a packet that has just arrived."""
        if size not in self._arrived:
            packet = self._lane.encode(self._data[: size // (CHANNELS * self._data.itemsize)])
            layout = PacketLayout(packet)
            memory = torch.empty(layout.nbytes, dtype=torch.uint8, device=packet.device)
            layout.write(packet, memory)
            _synchronize(self._data.device)
            self._arrived[size] = layout, memory
        layout, memory = self._arrived[size]
        return lambda: decode_packet(layout.over(memory))

    def speed(self, sizes: Sequence[int], limit: float, timed: Timed) -> LaneSpeed:
        """Encode and decode in turns, as they come in use."""

        def once(size: int) -> tuple[float, float]:
            return timed(size, self.encode(size)), timed(size, self.decode(size))

        return LaneSpeed(*sample_both(sizes, once, limit))


def _fitting(device: torch.device | None, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Those that memory has room for 16 times, with float32 scratch and packets; on the CPU small ones."""
    room = SMALL
    if device is not None:
        torch.cuda.empty_cache()
        room = torch.cuda.mem_get_info(device)[0] // 16
    if not (fitting := tuple(size for size in sizes if size <= room)):
        raise ProfileError(f"memory has room for {room >> 10} KiB, which is less than any size asked for")
    return fitting


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
