"""Saved tensors that a plan keeps on their GPU, or sends off it and fetches back in time.

`step_model.Simulator` mirrors what `Moves` does, decision by decision; without a plan `Wire` decides.

For the memory of packets see Note: [Device memory and streams] in `copies`. A tensor that is sent away as it
is may be of another stream's memory than the one that computes: `record_stream` then keeps the allocator from
handing it out before that stream has waited for the copy.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import RLock
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sidelane.codec.packet import Packet
from sidelane.errors import OffloadError
from sidelane.pipeline.budget import Budget, Claim
from sidelane.pipeline.bundle import Bundle, Bundles
from sidelane.pipeline.copies import DeviceCopy, StoredCopy
from sidelane.pipeline.stash import Kept
from sidelane.pipeline.step_model import allowed_ahead
from sidelane.pipeline.streams import current_stream
from sidelane.pipeline.tiers import Memory, PacketLayout
from sidelane.pipeline.waits import Waits


class Held(Kept):
    """A tensor that stays as it is, with its share of the device budget."""

    __slots__ = ("_claim",)

    def __init__(self, tensor: Tensor, claim: Claim) -> None:
        super().__init__(tensor)
        self._claim = claim


class Parcel:
    """The home of a packet that leaves the device: host memory or a disk, and the device until that is needed
    for others, or again once it was fetched.

    Args:
        number: position in the order of fetching; greater ones come back first.
        stream: the current one, which has written the packet.
        source: the tensor whose memory the packet shares, None if the packet has memory of its own.
        claim: on device memory; without one it is to be dropped.
    """

    def __init__(
        self,
        moves: Moves,
        number: int,
        packet: Packet,
        host: PacketLayout,
        memory: Memory,
        stream: torch.cuda.Stream,
        source: Tensor | None,
        claim: Claim | None,
    ) -> None:
        self.number = number
        self.device = stream.device
        self.nbytes = host.nbytes
        self._moves = moves
        self._raw = host.raw
        self._local: DeviceCopy | None = DeviceCopy(packet, stream, claim)
        self._claim: Claim | None = None  # on what was given away
        self._given: StorageWeakRef | None = None
        self._source = source
        self._version = 0 if source is None else source._version
        self._changed = False
        self._stored = StoredCopy(host, memory, self._local)

    @contextmanager
    def use(self) -> Iterator[Packet]:
        """As of a `Home`: valid inside, for work on the current stream."""
        stream = current_stream(self.device)
        local = self._moves.acquire(self)
        self._moves.waits.open(local, stream)
        try:
            yield local.packet
        finally:
            local.close(stream)

    def give(self) -> Tensor | None:
        """The elements, flat, in memory that is the caller's; None where the packet has to be decoded, or its
        memory is not only of this parcel."""
        with self._moves.lock:
            if not self._raw or (self._local is not None and self._source is not None):
                return None
            local = self._moves.acquire(self)
            self._local = None
        stream = current_stream(self.device)
        self._moves.waits.open(local, stream)
        data = local.packet.sections["data"]
        self._stored.give(data)
        self._given, self._claim = StorageWeakRef(data.untyped_storage()), local.claim  # type: ignore[no-untyped-call]
        self._moves.given.append(ref(self))
        if stream != local.owner:
            data.record_stream(stream)
        return data.view(local.packet.dtype)

    def returned(self) -> bool:
        """What was given away is free again."""
        if self._given is not None and not self._given.expired():  # type: ignore[no-untyped-call]
            return False
        self._claim = self._given = None
        return True

    @property
    def here(self) -> bool:
        return self._local is not None

    @property
    def on_disk(self) -> bool:
        return self._stored.on_disk

    def announce(self) -> None:
        """A hint that `fetch` comes soon."""
        self._stored.announce()

    def local(self) -> DeviceCopy | None:
        """What is on the device. Raises OffloadError when the tensor was changed after it was saved."""
        self._check()
        return self._local

    def drop(self) -> None:
        """Leave the device, without waiting on the host, once the compute stream waits for the copy out."""
        local = self._local
        if local is None:
            return
        if self._source is not None:
            self._changed = self._source._version != self._version
        self._moves.waits.leave(self._stored, local)
        if self._source is not None:
            for part in local.packet.sections.values():
                part.record_stream(local.owner)
        self._local = self._source = None

    def fetch(self, claim: Claim | None) -> DeviceCopy:
        """Enqueue the copy in. It stays on the device where it has a claim."""
        self._check()
        local = self._stored.fetch(claim)
        if claim is not None:
            self._local = local
        return local

    def _check(self) -> None:
        if self._source is not None:
            self._changed = self._source._version != self._version
        if self._changed:
            raise OffloadError(
                "a tensor needed for backward was modified in place after it was saved: clone it before the "
                "change"
            )


class Crate:
    """The home of a bundle: a parcel once it is closed, or where there is no room for one, memory of the
    device."""

    def __init__(self, moves: Moves, bundle: Bundle, claim: Claim, promise: object) -> None:
        self._moves = moves
        self._open: tuple[Bundle, Claim] | None = (bundle, claim)
        self._promise: object | None = promise  # of room off the device
        self._home: Parcel | DeviceCopy | None = None

    @property
    def closed(self) -> bool:
        """Nothing is added to it any longer."""
        return self._open is None or self._open[0].ready.closed

    @contextmanager
    def use(self) -> Iterator[Packet]:
        """As of a `Home`."""
        with self._moves.lock:
            home = self.close()
        with home.use() as packet:
            yield packet

    def close(self) -> Parcel | DeviceCopy:
        """Send the bundle off, once. May be repeated after an error."""
        if self._open is not None:
            self._promise = None  # which is taken now
            self._home = self._home or self._moves.send_bundle(*self._open)
            self._open = None  # its memory and the claim are those of the parcel
        if self._home is None:
            raise OffloadError("a bundle was closed and sent nowhere")
        return self._home


class Moves:
    """The parcels of one context, and what its plan keeps on the device.

    Attributes:
        bundles: what packets are sent with that share no memory with a tensor.

    Args:
        budget: of device memory.
        take: room for so many bytes off the device, or None when there is none.
        promise: a claim on such room, to be dropped before it is taken, or None.
    """

    def __init__(
        self,
        budget: Budget,
        take: Callable[[int], Memory | None],
        promise: Callable[[int], object | None],
    ) -> None:
        self.lock = RLock()
        self.count = 0  # number of the next parcel
        self.fetched = 0
        self.prefetched = 0
        self.waits = Waits()
        self.bundles = Bundles(self, budget.limit)
        self._budget = budget
        self._take = take
        self._promise = promise
        self._leaving: deque[ref[Parcel]] = deque()  # copied out and on the device, oldest first
        self._away: list[tuple[int, ref[Parcel]]] = []  # those that are not on the device, by number
        self.given: deque[ref[Parcel]] = deque()  # what they hold is with nodes, oldest first
        self._crates: deque[ref[Crate]] = deque()  # not sent yet, oldest first
        self._kept: WeakValueDictionary[Hashable, Claim] = WeakValueDictionary()

    @property
    def holding(self) -> bool:
        """Something of the context is on the device."""
        return self._budget.held > 0

    @property
    def waiting(self) -> bool:
        """Something can be fetched ahead."""
        return bool(self._away)

    def keep(self, tensor: Tensor, data: Hashable, nbytes: int) -> Held | None:
        """`tensor` as it is, its memory `data` counted once; None when the budget has no room."""
        claim = self.claim(data, nbytes)
        return None if claim is None else Held(tensor, claim)

    def claim(self, data: Hashable | None, nbytes: int) -> Claim | None:
        """A claim on device memory for a tensor that stays, counted once for all that lie in the memory
        `data`, None if it is not shared; None when the budget has no room."""
        if data is None:
            return self._budget.claim(nbytes) or self.room(nbytes)
        with self.lock:
            claim = self._kept.get(data)
            if claim is None and (claim := self.room(nbytes)) is not None:
                self._kept[data] = claim
        return claim

    def room(self, nbytes: int) -> Claim | None:
        """A claim on device memory, at the cost of parcels that leave; None if not enough do."""
        with self.lock:
            self._take_back()
            while (claim := self._budget.claim(nbytes)) is None:
                parcel = self._leaving.popleft()() if self._leaving else None
                if parcel is not None and parcel.here:
                    parcel.drop()
                    insort(self._away, (parcel.number, ref(parcel)))
                elif not self._leaving and not self._close_crates(all_of_them=True):
                    return None
        return claim

    def send(self, packet: Packet, source: Tensor | None = None) -> Parcel | None:
        """A parcel of a packet that the current stream has written; None where there is no room for it off
        the device."""
        host = PacketLayout(packet)
        memory = self._take(host.nbytes)
        if memory is None:
            return None
        stream = current_stream(packet.device)
        self.bundles.close()
        with self.lock:
            self._close_crates()
            return self._part_with(packet, host, memory, stream, source, self.room(host.nbytes))

    def send_late(self, bundle: Bundle) -> Crate | None:
        """A home for a bundle that is filled later; None where there may be no room for it."""
        with self.lock:
            self._close_crates()
            promise = self._promise(bundle.nbytes)
            claim = None if promise is None else self.room(bundle.nbytes)
            if promise is None or claim is None:
                return None
            crate = Crate(self, bundle, claim, promise)
            self._crates.append(ref(crate))
            return crate

    def send_bundle(self, bundle: Bundle, claim: Claim) -> Parcel | DeviceCopy:
        """A home for what is in a bundle, which has `claim`: a parcel where there is room for it."""
        packet = bundle.settle()
        host = PacketLayout(packet)
        self._budget.shrink(claim, host.nbytes)
        memory = self._take(host.nbytes)
        if memory is None:
            return DeviceCopy(packet, bundle.owner, claim)
        return self._part_with(packet, host, memory, bundle.owner, None, claim)

    def _part_with(
        self,
        packet: Packet,
        host: PacketLayout,
        memory: Memory,
        stream: torch.cuda.Stream,
        source: Tensor | None,
        claim: Claim | None,
    ) -> Parcel:
        parcel = Parcel(self, self.count, packet, host, memory, stream, source, claim)
        self.count += 1
        if claim is None:
            parcel.drop()
            insort(self._away, (parcel.number, ref(parcel)))
        else:
            self._leaving.append(ref(parcel))
        return parcel

    def _close_crates(self, all_of_them: bool = False) -> bool:
        """Send off the bundles that nothing is added to any longer; whether there were some."""
        found = False
        while self._crates:
            crate = self._crates[0]()
            if crate is not None:
                if not all_of_them and not crate.closed:
                    break
                crate.close()
                found = True
            self._crates.popleft()
        return found

    def acquire(self, parcel: Parcel) -> DeviceCopy:
        """What is on the device of it, fetched if need be."""
        with self.lock:
            local = parcel.local()
            if local is None:
                self.fetched += 1
                self._forget(parcel.number)
                local = parcel.fetch(self.room(parcel.nbytes))
            return local

    def fetch_ahead(self, end: int, gradients: int, again: int, left: float) -> None:
        """Fetch the newest parcels below number `end`, while `allowed_ahead` has room."""
        if not self._away:
            return
        with self.lock:
            self._close_crates()
            self._take_back()
            limit = self._budget.limit or 0
            allowed = allowed_ahead(limit, gradients, again, left)
            while (at := bisect_left(self._away, (end,))) > 0:
                parcel = self._away[at - 1][1]()
                if parcel is None or parcel.here:
                    del self._away[at - 1]
                    continue
                if parcel.on_disk:
                    parcel.announce()
                    return
                fits = self._budget.held + parcel.nbytes <= allowed
                claim = self._budget.claim(parcel.nbytes) if fits else None
                if claim is None:
                    return
                del self._away[at - 1]
                parcel.fetch(claim)
                self.prefetched += 1

    def _take_back(self) -> None:
        """Let go of claims on what nodes have done with, though a graph that is retained holds the parcel."""
        while self.given:
            parcel = self.given[0]()
            if parcel is not None and not parcel.returned():
                return
            self.given.popleft()

    def _forget(self, number: int) -> None:
        at = bisect_left(self._away, (number,))
        if at < len(self._away) and self._away[at][0] == number:
            del self._away[at]
