"""Packets between a GPU and pinned host memory, on side streams, joined by events only.

Note: [Device memory and streams]
The caching allocator hands a freed block to later work of the stream it was allocated on, at once. So a block
that another stream reads may be dropped only after its own stream was made to wait for that reader. Two kinds
of blocks are affected, and nothing else here is ever read across streams:
- what an encoder wrote (its own stream: the encoder's; reader: the copy out). Dropped when the copy has
  completed, or earlier after the encoder's stream waits for it.
- what was fetched (its own stream: the copy in; reader: the decoder). Dropped after the copy stream waits for
  the decoder.
Decoded tensors are allocated by the decoder on the caller's stream like any other tensor of the program. A
slot of the arena carries the event of its last copy, which the stream of the next copy waits for. When a
stash dies while its copy out is running, only that dead copy can be torn.
The host never waits for the device in this module, except in `Wire.seconds_waited`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from threading import RLock
from typing import NamedTuple
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from sidelane.codec.packet import Packet
from sidelane.pipeline.arena import Slot, shared, slot_bytes
from sidelane.pipeline.stash import Budget, Claim

SEARCH = 256  # packets looked back for those to fetch ahead
ALIGNMENT = 256  # of sections in a fetched packet, what kernels may assume
KEPT = 0.9  # of the device budget, for the packets that backward starts with


@cache
def side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """(copy out, copy in) of a device. The current stream of the program is looked up at each call."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Pinned(NamedTuple):
    """Host memory for one packet."""

    slot: Slot
    claim: Claim


def take_pinned(budget: Budget, nbytes: int) -> Pinned | None:
    """Memory for a packet, or None where the budget or the machine has no more."""
    claim = budget.claim(slot_bytes(nbytes))
    slot = None if claim is None else shared().take(nbytes)
    return None if slot is None or claim is None else Pinned(slot, claim)


class HostCopy:
    """The sections of a packet in pinned memory, which is set before the first copy.

    Sections that lie in one block of device memory cross in one copy; others are copied one by one.
    """

    def __init__(self, packet: Packet) -> None:
        self.pinned: Pinned | None = None
        self._packet = packet.with_(sections={})
        self._sizes = {name: part.numel() for name, part in packet.sections.items()}
        self._starts, self.nbytes, self._base = _starts(list(packet.sections.values()))

    def write(self, packet: Packet) -> None:
        """Enqueue the copy out on the current stream."""
        target = self._target()
        parts = list(packet.sections.values())
        if self._base is not None:
            parts = [_bytes_of(parts[0].untyped_storage(), self._base, self.nbytes)]
        for part, start in zip(parts, self._starts, strict=False):
            target[start : start + part.numel()].copy_(part, non_blocking=True)

    def read(self, device: torch.device) -> Packet:
        """Enqueue the copy in on the current stream."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        buffer.copy_(self._target(), non_blocking=True)
        items = zip(self._sizes.items(), self._starts, strict=True)
        return self._packet.with_(sections={name: buffer[at : at + size] for (name, size), at in items})

    def release(self, after: torch.cuda.Event) -> None:
        """Whoever gets the slot next writes after `after`, the event of a copy enqueued last."""
        if self.pinned is not None:
            self.pinned.slot.released = after

    def _target(self) -> Tensor:
        if self.pinned is None:
            raise RuntimeError("a packet without pinned memory cannot be copied")
        return self.pinned.slot.tensor


def _starts(parts: list[Tensor]) -> tuple[list[int], int, int | None]:
    """(start of each section in a slot, bytes of the slot, offset of the first in their common storage)."""
    if parts and all(p.untyped_storage()._cdata == parts[0].untyped_storage()._cdata for p in parts):
        base = int(parts[0].storage_offset())
        starts = [int(p.storage_offset()) - base for p in parts]
        ends = [start + p.numel() for start, p in zip(starts, parts, strict=True)]
        if all(end <= start < end + ALIGNMENT for end, start in zip(ends, starts[1:], strict=False)):
            return starts, ends[-1], base
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end += -(-part.numel() // ALIGNMENT) * ALIGNMENT
    return starts, end, None


def _bytes_of(storage: torch.UntypedStorage, start: int, nbytes: int) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, start, (nbytes,), (1,))


class DeviceCopy:
    """A packet in device memory that belongs to the pool of the stream `owner` and is filled when `ready` is
    reached."""

    def __init__(self, packet: Packet, owner: torch.cuda.Stream, claim: Claim | None) -> None:
        self.packet = packet
        self.owner = owner
        self.ready: torch.cuda.Event = owner.record_event()
        self._claim = claim

    def open(self) -> Packet:
        """The packet, for work enqueued on the current stream from now on."""
        current = torch.cuda.current_stream(self.owner.device)
        if current != self.owner:
            current.wait_event(self.ready)
        return self.packet

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
    """The home of an offloaded packet: pinned memory once it is copied out, and device memory until that is
    needed for others, or again while a fetched copy is."""

    def __init__(self, wire: Wire, number: int, host: HostCopy, local: DeviceCopy) -> None:
        self.number = number
        self.host = host
        self.local: DeviceCopy | None = local
        self.device = local.owner.device
        self.copied: torch.cuda.Event | None = None  # None: only the device has it
        self._wire = wire

    @contextmanager
    def use(self) -> Iterator[Packet]:
        local, packet = self._wire.acquire(self)
        try:
            yield packet
        finally:
            local.close()
            self._wire.release(self, local)

    def store(self, pinned: Pinned) -> None:
        """Enqueue the copy out."""
        if self.local is None:
            raise RuntimeError("a packet that left the device cannot be copied out again")
        out = side_streams(self.device)[0]
        out.wait_event(self.local.ready)
        pinned.slot.wait(out)
        self.host.pinned = pinned
        with _on(out):
            self.host.write(self.local.packet)
        self.copied = out.record_event()
        self.host.release(self.copied)

    def fetch(self, claim: Claim | None) -> DeviceCopy:
        """Enqueue the copy in, after the copy out."""
        if self.copied is None:
            raise RuntimeError("a packet that was never copied out cannot be fetched")
        stream = side_streams(self.device)[1]
        stream.wait_event(self.copied)
        with _on(stream):
            packet = self.host.read(self.device)
        copy = DeviceCopy(packet, stream, claim)
        self.host.release(copy.ready)
        return copy

    def evict(self) -> None:
        """Drop the device copy, without waiting on the host."""
        if self.local is not None and self.copied is not None and not _reached(self.copied):
            self.local.owner.wait_event(self.copied)
        self.local = None


class Wire:
    """The transits of one offload context.

    Packets stay on the device as long as the budget has room and are copied out meanwhile, the oldest leave
    first. The last ones, by the count of the pass before, are not copied out: backward starts with them.

    Args:
        budget: of device memory; without a limit nothing leaves the device. One packet in the middle of being
            encoded or decoded is not counted.
        take: so many bytes of pinned memory, or None when there are none.
    """

    def __init__(self, budget: Budget, take: Callable[[int], Pinned | None]) -> None:
        self._budget = budget
        self._take = take
        self._lock = RLock()
        self._count = 0
        self._transits: WeakValueDictionary[int, Transit] = WeakValueDictionary()
        # Device copies that may be dropped, oldest first.
        self._ahead: deque[ref[Transit]] = deque()  # fetched for later
        self._leaving: deque[ref[Transit]] = deque()  # copied out
        self._held: deque[ref[Transit]] = deque()  # not copied out
        self._sent = 0  # bytes since there were no transits
        self._expected: int | None = None  # those of the last forward pass
        self._last = 0  # number that was used last
        self._next = -1  # number to fetch ahead next, going down
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0
        self.fetched = 0
        self.prefetched = 0

    def send(self, packet: Packet) -> Transit | None:
        """A home for a packet that the current stream encodes; None when it has to leave the device and host
        memory does not take it."""
        with self._lock:
            host = HostCopy(packet)
            if not self._transits:
                self._sent = 0
            stays = self._stays()
            pinned = None if stays else self._take(host.nbytes)
            if pinned is None and not stays:
                return None
            room = self._make_room(host.nbytes)
            if room is None and pinned is None and (pinned := self._take(host.nbytes)) is None:
                return None
            local = DeviceCopy(packet, torch.cuda.current_stream(packet.device), room)
            transit = Transit(self, self._count, host, local)
            if pinned is not None:
                transit.store(pinned)
            if room is None:
                transit.evict()
            else:
                (self._held if pinned is None else self._leaving).append(ref(transit))
            self._transits[self._count] = transit
            self._count += 1
            self._sent += host.nbytes
            return transit

    def acquire(self, transit: Transit) -> tuple[DeviceCopy, Packet]:
        """A device copy, opened for the current stream; what was packed before it is fetched ahead."""
        with self._lock:
            self._expected = self._sent
            local = transit.local
            if local is None:
                self.fetched += 1
                local = transit.fetch(self._make_room(transit.host.nbytes))
            stream = torch.cuda.current_stream(transit.device)
            if local.owner == stream or _reached(local.ready):
                packet = local.open()
            else:
                begin = stream.record_event(_timed_event())
                packet = local.open()
                self._waits.append((begin, stream.record_event(_timed_event())))
                self._fold(block=False)
            self._prefetch(transit)
            return local, packet

    def release(self, transit: Transit, local: DeviceCopy) -> None:
        """Forget a fetched copy after its use; the encoder's copy stays until room is needed."""
        with self._lock:
            if transit.local is local and local.owner == side_streams(transit.device)[1]:
                transit.local = None

    def seconds_waited(self) -> float:
        """Time that compute streams stood still for packets; waits for the device."""
        with self._lock:
            self._fold(block=True)
            return self._seconds

    def _stays(self) -> bool:
        """Whether the packet to send next is one of the last that fit on the device."""
        limit = self._budget.limit
        if limit is None:
            return True
        return self._expected is not None and self._expected - self._sent <= KEPT * limit

    def _prefetch(self, used: Transit) -> None:
        """Fetch what was packed before `used`, up to half of the budget. It is a hint: what does not fit is
        left."""
        if not self._next < used.number <= self._last:  # a new pass, or another order than the reverse
            self._next = used.number - 1
        self._last = used.number
        room = (self._budget.limit or 0) // 2 - self._bytes_ahead()
        while self._next >= max(used.number - SEARCH, 0):
            transit = self._transits.get(self._next)
            if transit is not None and transit.local is None and transit.device == used.device:
                room -= transit.host.nbytes
                claim = self._budget.claim(transit.host.nbytes) if room >= 0 else None
                if claim is None:
                    return
                transit.local = transit.fetch(claim)
                self._ahead.append(ref(transit))
                self.prefetched += 1
            self._next -= 1

    def _bytes_ahead(self) -> int:
        """Bytes fetched and not used yet; forgets the others."""
        waiting = [r for r in self._ahead if (t := r()) is not None and t.local is not None]
        self._ahead = deque(waiting)
        return sum(t.host.nbytes for r in waiting if (t := r()) is not None)

    def _make_room(self, nbytes: int) -> Claim | None:
        """A claim on device memory, at the cost of copies that can be fetched again; None if not enough."""
        while (claim := self._budget.claim(nbytes)) is None:
            if not (self._evict(self._ahead) or self._evict(self._leaving) or self._evict(self._held)):
                return None
        return claim

    def _evict(self, queue: deque[ref[Transit]]) -> bool:
        """Drop the oldest device copy of `queue`, stored before that if it has no other. False when there is
        none that can be dropped."""
        while queue:
            transit = queue.popleft()()
            if transit is None or transit.local is None:
                continue
            if transit.copied is None:
                pinned = self._take(transit.host.nbytes)
                if pinned is None:
                    continue
                transit.store(pinned)
            transit.evict()
            return True
        return False

    def _fold(self, block: bool) -> None:
        while self._waits:
            begin, end = self._waits[0]
            if block:
                end.synchronize()
            elif not _reached(end):
                return
            self._waits.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3


def _on(stream: torch.cuda.Stream) -> AbstractContextManager[None]:
    return torch.cuda.stream(stream)


def _reached(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
