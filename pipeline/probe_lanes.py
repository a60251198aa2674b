"""Measure what lanes take: encode and decode, alone and beside matrix products.

The data of the lanes is smooth sums and noise, so that kernels meet what they meet in use; ratios do not come
from here.

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
them are timed in turns, several times; the least median of each counts. Calls in a row start kernels some 7 %
faster than in use, hence the pauses (`seconds_in_use`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from random import Random
from statistics import median
from threading import Thread
from time import perf_counter

import torch
from torch import Tensor

from sidelane.codec.engines import encoding_engine
from sidelane.codec.lane import Lane
from sidelane.errors import ProfileError
from sidelane.layout import FORMATS
from sidelane.pipeline.lanes import decode_packet, open_lane
from sidelane.pipeline.machine import Curve, LaneSpeed
from sidelane.pipeline.sampling import (
    Load,
    host_seconds,
    sample,
    sample_both,
    seconds_in_use,
    stream_seconds,
)
from sidelane.pipeline.streams import side_stream
from sidelane.pipeline.tiers import PacketLayout

KIB, MIB = 1 << 10, 1 << 20
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
SMALL = 4 * MIB  # the largest size on the CPU
TURNS = 8 * KIB, 16 * MIB  # the smallest and the largest size that is timed in turns, and beside products:
TURNS_BESIDE = MIB, 64 * MIB

Times = list[tuple[float, float]]  # seconds of encode and decode
Timed = Callable[[int, Callable[[], object]], float]  # seconds of work on so many bytes


def pairs() -> list[tuple[str, str]]:
    """The lanes and dtypes that have kernels."""
    return [(name, dtype) for dtype in DTYPES for name in LANES if name != "video"]


class Lanes:
    """The curves of lanes as they are found on a device, None for the CPU.

    Attributes:
        curves: what is known so far, by "lane|dtype|load".
    """

    def __init__(self, device: torch.device | None) -> None:
        self.curves: dict[str, LaneSpeed] = {}
        self._device = device
        self._apart: dict[str, LaneSpeed] = {}  # curves beside products as `measure` found them
        self._beside: dict[tuple[str, int], Times] = {}  # in turns, by key and size

    def compile(self, limit: float) -> None:
        """The kernels of all lanes at once, which takes many seconds one after the other. What is not done by
        `limit`, or fails, is left to `measure`."""
        end = perf_counter() + limit
        threads = [Thread(target=self._compile, args=pair, daemon=True) for pair in pairs()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(end - perf_counter(), 0.0))
        synchronize(self._device)

    def measure(
        self, name: str, dtype: str, sizes: Sequence[int], load: Callable[[], Load], limit: float
    ) -> None:
        """A lane idle and on a GPU beside `load`, one after the other, since they share kernels and packets.

        Raises ProfileError without room for any size, LaneUnavailable.
        """
        sizes = _fitting(self._device, sizes)
        subject = self._subject(name, activations(sizes[-1], DTYPES[dtype], self._device))
        if self._device is None:
            self.keep(
                f"{name}|{dtype}|idle", subject.speed(sizes, limit, lambda size, work: host_seconds(work))
            )
            return
        stream = _stream(self._device)
        with torch.cuda.stream(stream):
            subject.decode(sizes[0])()  # compiles
        synchronize(self._device)
        idle = subject.speed(sizes, limit * 0.4, lambda size, work: seconds_in_use(stream, work))
        self.keep(f"{name}|{dtype}|idle", idle)
        running = load()

        def beside(size: int, work: Callable[[], object]) -> float:
            guess = max(idle.encode(size), idle.decode(size))
            return running.beside(partial(stream_seconds, stream, work), guess)

        sizes = idle.encode.sizes
        if name == "video" and encoding_engine(self._device.index, FORMATS["nv12"], None).name != "nvenc":
            decode = sample(sizes, lambda size: beside(size, subject.decode(size)), limit * 0.6)
            busy = LaneSpeed(idle.encode, decode)
        else:
            busy = subject.speed(sizes, limit * 0.6, beside)
        self.keep(f"{name}|{dtype}|busy", busy)

    def keep(self, key: str, found: LaneSpeed) -> None:
        """The lesser times of `found` and of what is known, as what disturbs the host only adds to them."""
        if (known := self.curves.get(key)) is not None:
            found = LaneSpeed(known.encode.lesser(found.encode), known.decode.lesser(found.decode))
        self.curves[key] = found

    def in_turns(self, limit: float) -> None:
        """All lanes idle once more, one call of each after the other. See Note: [Turns]."""
        clock = host_seconds if self._device is None else partial(seconds_in_use, _stream(self._device))
        found = self._take_turns("idle", TURNS, limit, lambda key, size, work: clock(work))
        for key in {key for key, _ in found}:
            timed = {size: _medians(times) for (known, size), times in found.items() if known == key}
            self.keep(key, _speed(timed))

    def in_turns_beside(self, load: Callable[[], Load], limit: float) -> None:
        """The same beside `load`, into curves of all such calls so far. See Note: [Busy]."""
        clock = host_seconds if self._device is None else partial(stream_seconds, _stream(self._device))
        running = load()

        def beside(key: str, size: int, work: Callable[[], object]) -> float:
            idle = self.curves[key.replace("busy", "idle")]
            return running.beside(partial(clock, work), max(idle.encode(size), idle.decode(size)))

        for at, times in self._take_turns("busy", TURNS_BESIDE, limit, beside).items():
            self._beside.setdefault(at, []).extend(times)
        for key in {key for key, _ in self._beside}:
            known = self._apart.setdefault(key, self.curves[key])
            points = {size: (known.encode(size), known.decode(size)) for size in known.encode.sizes}
            timed = {size: _medians(times) for (name, size), times in self._beside.items() if name == key}
            self.curves[key] = _speed(points | timed)

    def _take_turns(
        self,
        load: str,
        sizes: tuple[int, int],
        limit: float,
        timed: Callable[[str, int, Callable[[], object]], float],
    ) -> dict[tuple[str, int], Times]:
        """By key and size, of all curves for `load`, in rounds of random order, the first of which does not
        count. `sizes`: the smallest and the largest."""
        keys = [key for key in self.curves if key.endswith(f"|{load}") and not key.startswith("video")]
        within = {
            key: [n for n in self.curves[key].encode.sizes if sizes[0] <= n <= sizes[1]] for key in keys
        }
        turns = [(key, size) for key in keys for size in within[key]]
        found: dict[tuple[str, int], Times] = {turn: [] for turn in turns}
        if not turns:
            return found
        largest = max(size for _, size in turns)
        data = {dtype: activations(largest, kind, self._device) for dtype, kind in DTYPES.items()}
        subjects = {}
        for key in keys:
            name, dtype, _ = key.split("|")
            subjects[key] = self._subject(name, data[dtype])
        end, rounds, order = perf_counter() + limit, 0, Random(0)
        while rounds < 2 or perf_counter() < end:
            for key, size in order.sample(turns, len(turns)):
                subject = subjects[key]
                times = timed(key, size, subject.encode(size)), timed(key, size, subject.decode(size))
                if rounds:
                    found[key, size].append(times)
            rounds += 1
        return found

    def _compile(self, name: str, dtype: str) -> None:
        with suppress(Exception), torch.cuda.device(self._device):
            subject = self._subject(name, activations(TURNS[0], DTYPES[dtype], self._device))
            subject.decode(TURNS[0])()

    def _subject(self, name: str, data: Tensor) -> _Subject:
        kind, options = LANES[name]
        return _Subject(open_lane(kind, **options), data)


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
            synchronize(self._data.device)
            self._arrived[size] = layout, memory
        layout, memory = self._arrived[size]
        return lambda: decode_packet(layout.over(memory))

    def speed(self, sizes: Sequence[int], limit: float, timed: Timed) -> LaneSpeed:
        """Encode and decode in turns, as they come in use."""

        def once(size: int) -> tuple[float, float]:
            return timed(size, self.encode(size)), timed(size, self.decode(size))

        return LaneSpeed(*sample_both(sizes, once, limit))


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


def _stream(device: torch.device) -> torch.cuda.Stream:
    """As a chain has."""
    stream: torch.cuda.Stream = side_stream(device, "lane of a profile", -1)
    return stream


def _medians(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    encode, decode = zip(*times, strict=True)
    return median(encode), median(decode)


def _speed(points: Mapping[int, tuple[float, float]]) -> LaneSpeed:
    """Of seconds of encode and decode by size."""
    sizes = sorted(points)
    encode, decode = zip(*(points[size] for size in sizes), strict=True)
    return LaneSpeed(Curve.fit(sizes, encode), Curve.fit(sizes, decode))


def _fitting(device: torch.device | None, sizes: Sequence[int]) -> tuple[int, ...]:
    """Those that memory has room for 16 times, with float32 scratch and packets; on the CPU small ones."""
    room = SMALL
    if device is not None:
        torch.cuda.empty_cache()
        room = torch.cuda.mem_get_info(device)[0] // 16
    if not (fitting := tuple(size for size in sizes if size <= room)):
        raise ProfileError(f"memory has room for {room >> 10} KiB, which is less than any size asked for")
    return fitting


def synchronize(device: torch.device | None) -> None:
    """Wait for a GPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
