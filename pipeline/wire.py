"""Packets between a GPU and pinned host memory, on side streams, joined by events only.

Note: [Device memory and streams]
The caching allocator hands a freed block to later work of the stream it was allocated on, at once. So a block
that another stream reads may be dropped only after its own stream was made to wait for that reader. Two kinds
of blocks are affected, and nothing else here is ever read across streams:
- what an encoder wrote (its own stream: the encoder's; reader: the copy out). Dropped when the copy has
  completed, or earlier after the encoder's stream waits for it.
- what was fetched (its own stream: the copy in; reader: the decoder). Dropped after the copy stream waits for
  the decoder.
Decoded tensors are allocated by the decoder on the caller's stream like any other tensor of the program, and
pinned blocks are held back by PyTorch's host allocator until the copies that use them are done. When a stash
dies while its copy out is running, only that dead copy can be torn.
The host never waits for the device in this module, except in `Wire.seconds_waited`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from sidelane.codec.packet import Packet
from sidelane.pipeline.stash import Budget, Claim

DEPTH = 2  # packets fetched ahead of the one in use
SEARCH = 64  # numbers looked back for them
GRANULE = 1 << 16  # smallest pinned block
ALIGNMENT = 256  # of sections in a fetched packet, what kernels may assume


@cache
def side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """(copy out, copy in) of a device. The current stream of the program is looked up at each call."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def pinned_blocks(nbytes: int) -> list[int]:
    """Powers of two, largest first, whose sum is `nbytes` rounded up to GRANULE: the host allocator rounds
    each block up to a power of two, so that one block of the whole size would take up to twice the memory."""
    units = -(-nbytes // GRANULE)
    return [GRANULE << i for i in reversed(range(units.bit_length())) if units >> i & 1]


class HostCopy:
    """Sections of a packet one after the other in pinned blocks."""

    def __init__(self, packet: Packet) -> None:
        self.starts: dict[str, int] = {}
        self.sizes = {name: part.numel() for name, part in packet.sections.items()}
        self.nbytes = 0
        for name, size in self.sizes.items():
            self.starts[name] = self.nbytes
            self.nbytes += -(-size // ALIGNMENT) * ALIGNMENT
        self._blocks: list[Tensor] = []
        self._template = packet.with_(sections={})

    @property
    def pinned(self) -> int:
        return sum(pinned_blocks(self.nbytes))

    def write(self, packet: Packet) -> None:
        """Enqueue the copy out on the current stream."""
        self._blocks = [
            torch.empty(n, dtype=torch.uint8, device="cpu", pin_memory=True)
            for n in pinned_blocks(self.nbytes)
        ]
        for name, part in packet.sections.items():
            for block, low, high in self._ranges(self.starts[name], self.sizes[name]):
                block.copy_(part[low:high], non_blocking=True)

    def read(self, device: torch.device) -> Packet:
        """Enqueue the copy in on the current stream."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        for block, low, high in self._ranges(0, self.nbytes):
            buffer[low:high].copy_(block, non_blocking=True)
        parts = {name: buffer[start : start + self.sizes[name]] for name, start in self.starts.items()}
        return self._template.with_(sections=parts)

    def _ranges(self, start: int, size: int) -> Iterator[tuple[Tensor, int, int]]:
        """The parts of blocks that hold [start, start + size), each with its range counted from `start`."""
        first = 0
        for block in self._blocks:
            low, high = max(start, first), min(start + size, first + block.numel())
            if low < high:
                yield block[low - first : high - first], low - start, high - start
            first += block.numel()


class DeviceCopy:
    """A packet in device memory that belongs to the pool of the stream `owner` and is filled when `ready` is
    reached."""

    def __init__(self, packet: Packet, owner: torch.cuda.Stream, claim: Claim | None) -> None:
        self._packet = packet
        self.owner = owner
        self.ready: torch.cuda.Event = owner.record_event()
        self._claim = claim

    def open(self) -> Packet:
        """The packet, for work enqueued on the current stream from now on."""
        torch.cuda.current_stream(self.owner.device).wait_event(self.ready)
        return self._packet

    def close(self) -> None:
        """The current stream has enqueued its last read: after this the copy may be dropped."""
        current = torch.cuda.current_stream(self.owner.device)
        if current != self.owner:
            self.owner.wait_event(current.record_event())

    @contextmanager
    def use(self) -> Iterator[Packet]:
        packet = self.open()
        try:
            yield packet
        finally:
            self.close()


class Transit:
    """The home of an offloaded packet: pinned memory, and device memory while the copy out or a prefetch
    keeps it."""

    def __init__(self, wire: Wire, number: int, host: HostCopy, claim: Claim, local: DeviceCopy) -> None:
        self.number = number
        self.host = host
        self.local: DeviceCopy | None = local
        self.device = local.owner.device
        self._wire = wire
        self._claim = claim
        out = side_streams(self.device)[0]
        out.wait_event(local.ready)
        with torch.cuda.stream(out):
            host.write(local._packet)
        self.copied: torch.cuda.Event = out.record_event()

    @contextmanager
    def use(self) -> Iterator[Packet]:
        local, packet = self._wire.acquire(self)
        try:
            yield packet
        finally:
            local.close()
            self._wire.release(self, local)

    def fetch(self, claim: Claim | None) -> DeviceCopy:
        """Enqueue the copy in, after the copy out."""
        stream = side_streams(self.device)[1]
        stream.wait_event(self.copied)
        with torch.cuda.stream(stream):
            packet = self.host.read(self.device)
        return DeviceCopy(packet, stream, claim)

    def evict(self) -> None:
        """Drop the device copy, without waiting on the host."""
        if self.local is not None and not _reached(self.copied):
            self.local.owner.wait_event(self.copied)
        self.local = None


class Wire:
    """The transits of one offload context.

    Args:
        budget: of device memory. Copies that do not fit are dropped early or not prefetched; one packet in
            the middle of being encoded or decoded is not counted.
        keep_last: newest packets whose device copy stays after it was copied out, because backward starts
            with them.
    """

    def __init__(self, budget: Budget, keep_last: int) -> None:
        self._budget = budget
        self._keep_last = keep_last
        self._lock = RLock()
        self._count = 0
        self._transits: WeakValueDictionary[int, Transit] = WeakValueDictionary()
        self._leaving: deque[ref[Transit]] = (
            deque()
        )  # those with a device copy from their encoder, oldest first
        self._ahead: deque[ref[Transit]] = deque()  # those with a prefetched device copy, oldest first
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0
        self.fetched = 0
        self.prefetched = 0

    def send(self, packet: Packet, host: HostCopy, claim: Claim) -> Transit:
        """Start the copy out of a packet that the current stream encodes; `claim` is for the pinned bytes."""
        with self._lock:
            self._retire()
            room = self._make_room(host.nbytes)
            local = DeviceCopy(packet, torch.cuda.current_stream(packet.device), room)
            transit = Transit(self, self._count, host, claim, local)
            self._transits[self._count] = transit
            self._count += 1
            if room is None:
                transit.evict()
            else:
                self._leaving.append(ref(transit))
            return transit

    def acquire(self, transit: Transit) -> tuple[DeviceCopy, Packet]:
        """A device copy, opened for the current stream; what was packed before it is fetched ahead."""
        with self._lock:
            local = transit.local
            if local is None:
                self.fetched += 1
                local = transit.fetch(self._make_room(transit.host.nbytes))
            stream = torch.cuda.current_stream(transit.device)
            if local.owner == stream:
                packet = local.open()
            else:
                begin = stream.record_event(_timed_event())
                packet = local.open()
                self._waits.append((begin, stream.record_event(_timed_event())))
                self._fold(block=False)
            self._prefetch(transit)
            return local, packet

    def release(self, transit: Transit, local: DeviceCopy) -> None:
        """Forget a fetched copy after its use; the encoder's copy stays until it is retired."""
        with self._lock:
            if transit.local is local and local.owner == side_streams(transit.device)[1]:
                transit.local = None

    def seconds_waited(self) -> float:
        """Time that compute streams stood still for packets; waits for the device."""
        with self._lock:
            self._fold(block=True)
            return self._seconds

    def _prefetch(self, after: Transit) -> None:
        """Fetch what was packed before `after`: a hint, so what does not fit is left."""
        wanted = DEPTH
        for number in range(after.number - 1, max(after.number - SEARCH, -1), -1):
            transit = self._transits.get(number)
            if transit is None or transit.device != after.device:
                continue
            if transit.local is None:
                claim = self._budget.claim(transit.host.nbytes)
                if claim is None:
                    return
                transit.local = transit.fetch(claim)
                self._ahead.append(ref(transit))
                self.prefetched += 1
            wanted -= 1
            if not wanted:
                break
        while len(self._ahead) > 2 * DEPTH:  # guesses that were wrong
            self._evict(self._ahead)

    def _retire(self) -> None:
        """Drop the device copies whose copy out has completed, but for the newest `keep_last`."""
        while len(self._leaving) > self._keep_last:
            transit = self._leaving[0]()
            if transit is not None and not _reached(transit.copied):
                break
            self._evict(self._leaving)

    def _make_room(self, nbytes: int) -> Claim | None:
        """A claim on device memory, at the cost of copies that can be fetched again; None if not enough."""
        while (claim := self._budget.claim(nbytes)) is None:
            queue = self._ahead or self._leaving
            if not queue:
                return None
            self._evict(queue)
        return claim

    @staticmethod
    def _evict(queue: deque[ref[Transit]]) -> None:
        transit = queue.popleft()()
        if transit is not None:
            transit.evict()

    def _fold(self, block: bool) -> None:
        while self._waits:
            begin, end = self._waits[0]
            if block:
                end.synchronize()
            elif not _reached(end):
                return
            self._waits.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3


def _reached(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
