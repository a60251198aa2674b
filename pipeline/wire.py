"""Packets between a GPU and pinned host memory, on side streams, joined by events only.

`Wire` decides what stays on the device where there is no plan: for fixed lanes and steps that are learned.
With a plan `Moves` does. Both claim from one budget, and neither drops what the other holds.

Decoded tensors are allocated by the decoder on the caller's stream like any other tensor of the program; for
the memory of packets see Note: [Device memory and streams] in `copies`. The host waits for the device in
`Wire._learn` alone, for the size of a late packet (see Note: [Late sizes] in `late`): that is when UNKNOWN
bytes wait to be encoded, so that the device does not run dry meanwhile, when their memory is needed, or when
one is used. An open bundle is late too (see Note: [Bundles] in `bundle`); nobody waits for that, it is
closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from threading import RLock
from typing import Any, Protocol
from weakref import ref

import torch

from sidelane.codec.packet import Packet
from sidelane.errors import OffloadError
from sidelane.pipeline.budget import Budget, Claim, Holders
from sidelane.pipeline.copies import DeviceCopy, StoredCopy
from sidelane.pipeline.step_model import AHEAD
from sidelane.pipeline.streams import current_stream, reached
from sidelane.pipeline.tiers import Memory, PacketLayout
from sidelane.pipeline.waits import Waits

READ_AHEAD = 8  # those that a disk is told to read
SIBLINGS = 32  # packets used last, which other nodes of the pass may want too
UNKNOWN = 512 << 20  # bytes of packets, as allocated, whose sizes the host may not know yet
PRUNE = 1024  # transits that are gone and still in the books, beside as many as there are
BACKWARD = 15 / 16  # of the device budget: the program has more memory of its own there than in forward


class Pending(Protocol):
    """A packet whose size is not known yet: of codes that the device has still to make, or of a bundle.

    Attributes:
        owner, device: the stream that makes it, and its device.
        nbytes: that it takes at most.
        ready: reached when the size is known.
    """

    owner: Any
    device: torch.device
    nbytes: int
    ready: Any

    def settle(self) -> Packet:
        """The packet, for work on `owner` from here on. The host waits for its size."""
        ...


def _tell_nobody(_: Packet) -> None:
    pass


@dataclass
class Late:
    """What a transit has in place of a packet until its size is known.

    Attributes:
        before: bytes of all late packets before it.
        claim: on device memory.
        promise: of room off the device.
        tell: called with the packet when it is known.
    """

    packet: Pending
    before: int
    claim: Claim
    promise: object | None
    tell: Callable[[Packet], None]


class Transit:
    """The home of an offloaded packet: host memory or a disk once it is copied out, and device memory until
    that is needed for others, or again while a fetched copy is."""

    def __init__(self, wire: Wire, number: int, device: torch.device, gradients: int) -> None:
        self.number = number
        self.device = device
        self.gradients = gradients  # bytes of weights that were saved before, in this pass
        self.late: Late | None = None
        self.local: DeviceCopy | None = None
        self.stored: StoredCopy | None = None  # None: only the device has it
        self.nbytes = 0
        self._wire = wire
        self._claim = wire.transits.claim()
        self._host: PacketLayout | None = None

    def fill(self, host: PacketLayout, local: DeviceCopy) -> None:
        """The packet is there, in device memory."""
        self._host = host
        self.nbytes = host.nbytes
        self.local = local

    @contextmanager
    def use(self) -> Iterator[Packet]:
        stream = current_stream(self.device)
        local = self._wire.acquire(self, stream)
        try:
            yield local.packet
        finally:
            local.close(stream)

    def store(self, memory: Memory) -> None:
        """Enqueue the copy out."""
        if self.local is None or self._host is None:
            raise OffloadError("a packet that left the device cannot be copied out again")
        self.stored = StoredCopy(self._host, memory, self.local)

    def fetch(self, claim: Claim | None) -> DeviceCopy:
        """Enqueue the copy in, after the copy out. The host waits for a disk."""
        if self.stored is None:
            raise OffloadError("a packet that was never copied out cannot be fetched")
        return self.stored.fetch(claim)


_Queue = dict[int, "ref[Transit]"]


class Wire:
    """The transits of one offload context.

    Packets stay on the device as long as the budget has room and are copied out meanwhile, the oldest leave
    first. The last ones, by the count of the pass before, are not copied out: backward starts with them, and
    with no more than these. What happens to a late packet is decided when its size has become known, at a
    later call, in order.

    Args:
        budget: of device memory; without a limit nothing leaves the device. One packet in the middle of being
            encoded or decoded is not counted. Late packets count as they are allocated.
        take: room for so many bytes off the device, or None when there is none.
        promise: a claim on such room, to be dropped before it is taken, or None.
    """

    def __init__(
        self,
        budget: Budget,
        take: Callable[[int], Memory | None],
        promise: Callable[[int], object | None] = lambda nbytes: None,
    ) -> None:
        self._budget = budget
        self._take = take
        self._promise = promise
        self._lock = RLock()
        self._count = 0
        self.transits = Holders()
        self._by_number: _Queue = {}  # those of this pass
        self._late: _Queue = {}  # of unknown size, oldest first
        self._late_bytes = 0  # of all late packets that there were
        self._unknown = UNKNOWN if budget.limit is None else min(UNKNOWN, budget.limit // 4)
        self._backward_limit = inf if budget.limit is None else BACKWARD * budget.limit
        # Device copies that may be dropped, by number, oldest first. What a queue names may be gone from the
        # device, or be in another queue as well: `_evict` passes over that. A copy in `_held` that finds no
        # room off the device is in no queue until it is used.
        self._used: _Queue = {}  # used, and wanted again if another node or pass comes
        self._ahead: _Queue = {}  # fetched for later
        self._leaving: _Queue = {}  # copied out
        self._held: _Queue = {}  # not copied out
        self._first = 0  # number of the first since there were none
        self._pass_bytes = 0  # bytes since then
        self._last_pass_bytes: int | None = None  # those of the last forward pass
        self._prefetch_at = -1  # number to fetch ahead next, going down
        self._backward_at = 0  # number that backward has come down to
        self._gradients = 0  # bytes of weights that this forward pass saved
        self._grown = 0  # those whose gradients backward has made when it comes to `_backward_at`
        self.waits = Waits()
        self.fetched = 0
        self.prefetched = 0

    def expect_gradient(self, nbytes: int) -> None:
        """A weight was saved, whose gradient will take device memory from here down in backward."""
        with self._lock:
            self._gradients += nbytes

    def send(self, packet: Packet) -> Transit | None:
        """A home for a packet that the current stream encodes; None when it has to leave the device and there
        is no room for it elsewhere."""
        with self._lock:
            host = PacketLayout(packet)
            self._begin()
            stays = self._stays()
            memory = None if stays else self._take(host.nbytes)
            if memory is None and not stays:
                return None
            room = self._make_room(host.nbytes)
            if room is None and memory is None and (memory := self._take(host.nbytes)) is None:
                return None
            stream = current_stream(packet.device)
            transit = self._transit(stream.device)
            transit.fill(host, DeviceCopy(packet, stream, room))
            if memory is not None:
                transit.store(memory)
            if room is None:
                self._drop(transit)
            else:
                (self._held if memory is None else self._leaving)[transit.number] = ref(transit)
            self._pass_bytes += host.nbytes
            return transit

    def send_late(self, packet: Pending, tell: Callable[[Packet], None] = _tell_nobody) -> Transit | None:
        """A home for a packet whose size is not known; None where it might not fit. `tell` is called when the
        size is known, if the home lives then."""
        with self._lock:
            self._begin()
            nothing_leaves = self._budget.limit is None
            promise = None if nothing_leaves else self._promise(packet.nbytes)
            if promise is None and not nothing_leaves:
                return None
            room = self._make_room(packet.nbytes)
            if room is None:
                return None
            transit = self._transit(packet.device)
            transit.late = Late(packet, self._late_bytes, room, promise, tell)
            self._late_bytes += packet.nbytes
            self._late[transit.number] = ref(transit)
            return transit

    def settle(self) -> None:
        """Learn the sizes of all late packets; waits for their encoding."""
        with self._lock:
            self._settle(0)

    def acquire(self, transit: Transit, stream: torch.cuda.Stream) -> DeviceCopy:
        """A device copy, opened for `stream`; what was packed before it is fetched ahead."""
        with self._lock:
            self._settle(self._unknown if transit.late is None else 0)
            self._last_pass_bytes = self._pass_bytes
            self._leaving.pop(transit.number, None)  # it is wanted now
            while self._budget.held > max(self._backward_limit, AHEAD) and self._evict(self._leaving):
                pass
            local = transit.local
            if local is None:
                self.fetched += 1
                self._prefetch_at = max(self._prefetch_at, transit.number)  # another pass, or it was dropped
                room = self._make_room(transit.nbytes)
                local = transit.fetch(room)
                if room is not None:
                    transit.local = local
            self.waits.open(local, stream)
            self._used.pop(transit.number, None)
            self._used[transit.number] = ref(transit)
            _forget_dead(self._used)
            if transit.number >= self._prefetch_at:  # not one that every layer uses
                self._backward_at = transit.number
                self._grown = self._gradients - transit.gradients
            self._prefetch(transit.device)
            return local

    def _begin(self) -> None:
        """Before a packet: forget the pass before, and learn what has become known."""
        if not self.transits.held:
            self._first, self._pass_bytes, self._gradients = self._count, 0, 0
            for queue in (self._by_number, self._used, self._ahead, self._leaving, self._held, self._late):
                queue.clear()  # of those that are gone
        self._settle(self._unknown)

    def _transit(self, device: torch.device) -> Transit:
        transit = Transit(self, self._count, device, self._gradients)
        if len(self._by_number) > 2 * self.transits.held + PRUNE:
            self._by_number = {n: found for n, found in self._by_number.items() if found() is not None}
        self._by_number[self._count] = ref(transit)
        self._prefetch_at = self._count
        self._count += 1
        return transit

    def _transit_of(self, number: int) -> Transit | None:
        found = self._by_number.get(number)
        return None if found is None else found()

    def _settle(self, most: int) -> None:
        """Learn the sizes of late packets, oldest first: of those that are encoded, and of others, waiting
        for them, until no more than `most` bytes are unknown."""
        while self._late and self._settle_first(most):
            pass

    def _settle_first(self, most: int) -> bool:
        """`_settle` of the oldest; False where it is left."""
        number, late = next(iter(self._late.items()))
        transit = late()
        if transit is not None and transit.late is not None:
            unknown = self._late_bytes - transit.late.before
            if unknown <= most and not reached(transit.late.packet.ready):
                return False
            self._learn(transit, transit.late)
        del self._late[number]
        return True

    def _learn(self, transit: Transit, late: Late) -> None:
        """Cut a late packet to its size, and send it off unless it stays. May be repeated after an error."""
        packet = late.packet.settle()
        host = PacketLayout(packet)
        self._budget.shrink(late.claim, host.nbytes)
        late.promise = None
        memory = None if self._stays() else self._take(host.nbytes)
        transit.fill(host, DeviceCopy(packet, late.packet.owner, late.claim))
        if memory is not None:
            transit.store(memory)
        transit.late = None
        (self._held if memory is None else self._leaving)[transit.number] = ref(transit)
        self._pass_bytes += host.nbytes
        late.tell(packet)

    def _stays(self) -> bool:
        """Whether the packet to send next is one of the last that fit on the device."""
        if self._budget.limit is None:
            return True
        last = self._last_pass_bytes
        return last is not None and last - self._pass_bytes <= self._backward_limit

    def _prefetch(self, device: torch.device) -> None:
        """Fetch the newest packets that are not on the device, while the budget has room: backward needs them
        next. It is a hint: what does not fit is left."""
        while self._prefetch_at >= self._first:
            transit = self._transit_of(self._prefetch_at)
            away = transit is not None and transit.local is None and transit.late is None
            if transit is not None and away and transit.device == device:
                if transit.stored is None or not transit.stored.on_disk:
                    claim = self._claim_ahead(transit.nbytes)
                    if claim is None:
                        return
                    transit.local = transit.fetch(claim)
                    self._ahead[transit.number] = ref(transit)
                    self.prefetched += 1
                elif self._prefetch_at > self._backward_at - READ_AHEAD:
                    transit.stored.announce()
                else:
                    return
            self._prefetch_at -= 1

    def _claim_ahead(self, nbytes: int) -> Claim | None:
        """A claim on what the gradients of the weights that were saved leave of the budget. Where they are
        more than that, on less and less of it the further backward comes down."""
        left = (self._prefetch_at - self._first + 1) / (self._count - self._first)
        allowed = max(self._backward_limit - self._grown, left * self._backward_limit, AHEAD)
        spare = 1 if self._prefetch_at >= self._backward_at - 1 else SIBLINGS
        while True:
            claim = self._budget.claim(nbytes) if self._budget.held + nbytes <= allowed else None
            if claim is not None or len(self._used) <= spare or not self._evict(self._used):
                return claim

    def _make_room(self, nbytes: int) -> Claim | None:
        """A claim on device memory, at the cost of copies that can be fetched again; None if not enough."""
        while (claim := self._budget.claim(nbytes)) is None:
            if any(map(self._evict, (self._used, self._ahead, self._leaving))):
                continue
            if self._late:
                self._settle_first(-1)
            elif not self._evict(self._held):
                return None
        return claim

    def _evict(self, queue: _Queue) -> bool:
        """Drop the oldest device copy of `queue`, stored before that if it has no other. False when there is
        none that can be dropped."""
        while queue:
            transit = queue.pop(next(iter(queue)))()
            if transit is None or transit.local is None:
                continue
            if transit.stored is None:
                memory = self._take(transit.nbytes)
                if memory is None:
                    continue
                transit.store(memory)
            self._drop(transit)
            return True
        return False

    def _drop(self, transit: Transit) -> None:
        """Forget a device copy, without waiting on the host, once its stream waits for the copy out."""
        if transit.local is not None and transit.stored is not None:
            self.waits.leave(transit.stored, transit.local)
        transit.local = None


def _forget_dead(queue: _Queue) -> None:
    while queue and queue[next(iter(queue))]() is None:
        del queue[next(iter(queue))]
