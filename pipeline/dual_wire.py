"""One tensor over two lanes that run at the same time, to pinned host memory and back into one destination.

Note: [Two lanes, one wire]
A tensor is cut into blocks of rows, each block into a raw and a coded part (`split_rows`). Coded parts cross
first, since work comes before them (store) or after them (load). Where the coder is not ready for or with the
next one, the wire carries raw bytes, so it stands still at the end only, if the coded share is too large.
- Raw parts are copied between tensor and host memory once, directly.
- Coded parts are copied as packets, and once more on the device, from what the lane decoded to their place.
- Video streams stay on the host, where the decoder reads them; they take their time on a simulated wire.
The calling thread drives the wire, a few pieces ahead of it; workers, with a stream each, run the lane.
All of it is done when a call returns or raises, so host memory and destinations may be used for other things.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import SimpleQueue
from threading import Lock, Semaphore, local
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidelane.codec.packet import Packet, compact_strides, flatten
from sidelane.errors import BudgetError, DriverError, LaneError, PacketError
from sidelane.pipeline.arena import Slot, shared
from sidelane.pipeline.compress import compress, present_device
from sidelane.pipeline.dual import DualLane, parts_of, row_length, split_rows
from sidelane.pipeline.lanes import decode_packet, plain, undisturbed
from sidelane.pipeline.octets import as_bytes
from sidelane.pipeline.streams import current_stream, on, side_stream
from sidelane.pipeline.throttle import TokenBucket

BLOCKS = (
    4 << 20,
    64 << 20,
)  # bytes of a tensor that are cut and coded together: a sixteenth of it within these
PIECES = (
    1 << 16,
    32 << 20,
)  # fewest and most raw bytes that the wire carries before it looks for coded parts
PIECE_SECONDS = 4e-3  # what such a piece takes on a simulated wire
AHEAD = 3  # copies that are enqueued on a real wire at a time
ALIGNMENT = 256  # of sections in memory
ON_HOST = "bitstream"  # the section that decoders read there
FAILURES = (LaneError, DriverError, torch.OutOfMemoryError)  # of a lane, after which its part goes raw


@dataclass(frozen=True)
class Parcel:
    """A tensor in host memory.

    Attributes:
        like: an empty packet with shape, dtype and strides of the tensor.
        packets: of consecutive elements, in memory order; their sections are in pinned memory.
        memory: what owns that memory.
    """

    like: Packet
    packets: tuple[Packet, ...]
    memory: tuple[Slot, ...] = field(default=(), repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all sections, which cross the wire."""
        return sum(part.numel() for packet in self.packets for part in packet.sections.values())

    @property
    def ratio(self) -> float:
        return self.like.raw_nbytes / self.nbytes if self.nbytes else 1.0


class DualWire:
    """Sends tensors to host memory and back, raw and through a lane at once: Note: [Two lanes, one wire].

    What the lane cannot encode, since an engine is missing or fails or its code is not smaller, goes raw. A
    context manager, not to be used by several threads at a time.

        with DualWire(DualLane(open_lane("video"), dual_share(wire, lane, ratio))) as wire:
            parcel = wire.send(x)
            y = wire.receive(parcel)

    Args:
        lane: how much of a tensor is coded, and by what.
        device: where tensors are received.
        wire: a simulated wire that all bytes cross; None for the wire as it is.
        block: bytes of a tensor that are cut and coded together; default: a sixteenth of it within `BLOCKS`.
            Each costs the host some 0.3 ms, during which other threads wait for the interpreter.
        workers: threads that run the lane.
        depth: coded parts on the device that wait for the wire or the lane.
        max_rel_error: bound on the relative Frobenius error of every coded part, and so of the tensor.

    Raises LaneError for a bad argument.
    """

    def __init__(
        self,
        lane: DualLane,
        device: torch.device | str = "cuda",
        *,
        wire: TokenBucket | None = None,
        block: int | None = None,
        workers: int = 3,
        depth: int = 6,
        max_rel_error: float | None = None,
    ) -> None:
        if not isinstance(lane, DualLane):
            raise LaneError(f"lane={lane!r} is no DualLane: make one of the lane and its share")
        if wire is not None and not isinstance(wire, TokenBucket):
            raise LaneError(f"wire={wire!r} is no TokenBucket: leave it out for the wire that there is")
        for name, value in (("block", block), ("workers", workers), ("depth", depth)):
            if name == "block" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise LaneError(f"{name}={value!r} is not a whole number from 1 up")
        self.device = present_device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.fallbacks = 0  # coded parts that went raw because the lane failed
        self._share, self._basis = lane.share, getattr(lane.lane, "basis", None)
        self._encode: Callable[[Tensor], Packet] = lane.lane.encode
        if max_rel_error is not None:
            self._encode = partial(compress, lane=lane.lane, max_rel_error=max_rel_error)
        self._wire, self._block, self._depth = wire, block, depth
        self._piece = PIECES[1]
        if wire is not None:
            self._piece = min(max(int(wire.rate * PIECE_SECONDS), PIECES[0]), PIECES[1])
        self._copies: deque[Any] = deque()  # events after those that are enqueued
        self._lock, self._thread, self._numbers = Lock(), local(), count()
        self._closed = False
        self._pool = ThreadPoolExecutor(workers, "sidelane-dual")

    def __enter__(self) -> DualWire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and refuse further work."""
        self._closed = True
        self._pool.shutdown()

    def send(self, tensor: Tensor) -> Parcel:
        """Copy a tensor to host memory.

        Raises LaneError for a tensor that no lane takes, BudgetError when host memory is full, and what the
        lane raises other than `FAILURES`.
        """
        self._check()
        tensor = plain(tensor)
        like, flat = Packet.like("raw", tensor), flatten(tensor)
        with undisturbed(flat.device):
            outgoing = _Outgoing(like, side_stream(flat.device, "dual store"), self._piece)
            outgoing.stream.wait_event(current_stream(flat.device).record_event())
            jobs: list[Future[_Encoded | None]] = []
            room = Semaphore(self._depth)
            try:
                self._send(flat, outgoing, jobs, room)
            finally:
                for job in jobs:
                    job.cancel()
                    room.release()  # for those that wait
                wait(jobs)
                outgoing.stream.record_event().synchronize()
        return outgoing.parcel()

    def receive(self, parcel: Parcel, out: Tensor | None = None) -> Tensor:
        """The tensor of a parcel.

        Args:
            parcel: what `send` returned, or packets of any lane on the host.
            out: where it goes: of its shape, strides and dtype, on `device`; default: memory of its own.

        Raises PacketError and BasisError as `decode_packet`, what the lane raises, and LaneError for an `out`
        that does not fit. Then `out` is undefined.
        """
        self._check()
        if not isinstance(parcel, Parcel):
            raise LaneError(f"{type(parcel).__name__} is no Parcel: pass what send returned")
        like = parcel.like
        if sum(packet.flat_numel for packet in parcel.packets) != like.flat_numel:
            raise PacketError("shape", f"the packets do not hold {like.flat_numel} elements")
        if any(packet.dtype != like.dtype for packet in parcel.packets):
            raise PacketError("dtype", f"not every packet is of {like.dtype}")
        with undisturbed(self.device):
            flat = self._destination(like, out)
            stream = side_stream(self.device, "dual load")
            stream.wait_event(current_stream(self.device).record_event())
            jobs: list[Future[None]] = []
            try:
                self._receive(parcel.packets, flat, stream, jobs)
            finally:
                wait(jobs)
                stream.record_event().synchronize()
            for job in jobs:
                job.result()
        return like.unflatten(flat)

    def _send(
        self, flat: Tensor, outgoing: _Outgoing, jobs: list[Future[_Encoded | None]], room: Semaphore
    ) -> None:
        start, ready = perf_counter(), current_stream(flat.device).record_event()
        encoded: SimpleQueue[_Announced] = SimpleQueue()
        for first, last in _blocks(outgoing.like, self._block):
            block = flat[first:last]
            split = split_rows(_block_like(outgoing.like, block), self._share)
            middle = first + split.raw
            if split.raw:
                outgoing.add_raw(first, block[: split.raw])
            if middle < last:
                job = self._pool.submit(self._encode_part, split.rows(block[split.raw :]), ready, room)
                jobs.append(job)
                job.add_done_callback(partial(_announce, encoded, middle, last))
        left = len(jobs)
        flying: deque[tuple[Any, _Encoded]] = deque()
        while left or outgoing.raw:
            if left and (not outgoing.raw or not encoded.empty()):
                since, first, last, job = encoded.get()
                left -= 1
                part = job.result()
                if part is None:
                    outgoing.add_raw(first, flat[first:last])
                    continue
                outgoing.stream.wait_event(part.ready)
                outgoing.packets[first] = self._store(part.packet, outgoing, since)
                flying.append((outgoing.stream.record_event(), part))
                while len(flying) > self._depth // 2:
                    flying.popleft()[0].synchronize()
                    room.release()
            else:
                self._move(*outgoing.raw.popleft(), outgoing.stream, start)

    def _encode_part(self, x: Tensor, ready: Any, room: Semaphore) -> _Encoded | None:
        """What a worker does to store: a coded part, which keeps a place in `room`, or None for a raw one."""
        room.acquire()
        stream = self._stream(x.device)
        try:
            with on(stream), undisturbed(x.device):
                stream.wait_event(ready)
                packet = self._encode(x)
                if packet.lane != "raw":
                    done = stream.record_event()
                    if self._wire is not None:
                        done.synchronize()
                    return _Encoded(packet, done)
        except FAILURES:
            with self._lock:
                self.fallbacks += 1
        except BaseException:
            room.release()
            raise
        room.release()
        return None

    def _store(self, packet: Packet, outgoing: _Outgoing, since: float) -> Packet:
        """`packet`, which is there `since` then, in host memory once the stream gets there."""
        names = sorted(packet.sections, key=lambda name: name == ON_HOST)
        parts = [packet.sections[name] for name in names]
        copies = self._carry(parts, outgoing.take, outgoing.stream, since)
        return packet.with_(sections=dict(zip(names, copies, strict=True)))

    def _receive(
        self, packets: tuple[Packet, ...], flat: Tensor, stream: Any, jobs: list[Future[None]]
    ) -> None:
        raw: deque[tuple[Tensor, Tensor]] = deque()
        coded: deque[tuple[Packet, Tensor]] = deque()
        first = 0
        for whole in packets:
            place = flat[first : first + whole.flat_numel]
            first += whole.flat_numel
            packet: Packet | None = whole
            data = None
            if whole.lane == "dual":
                data, packet = parts_of(whole)
            elif whole.lane == "raw" and whole.dtype != torch.bool:
                data, packet = whole.section("data", numel=whole.raw_nbytes), None
            if data is not None and data.numel():
                raw.extend(_pieces(data, as_bytes(place)[: data.numel()], self._piece))
            if packet is not None and packet.flat_numel:
                coded.append((packet, place[-packet.flat_numel :]))
        start = perf_counter()
        room: SimpleQueue[float] = SimpleQueue()  # since when each place is free
        for _ in range(self._depth):
            room.put(start)
        while (coded or raw) and not any(job.done() and job.exception() for job in jobs):
            if coded and not (raw and room.empty()):
                since = room.get()
                packet, place = coded.popleft()
                loaded = self._load(packet, stream, since)
                job = self._pool.submit(self._decode_part, loaded, stream.record_event(), place)
                job.add_done_callback(lambda _: room.put(perf_counter()))
                jobs.append(job)
                del loaded
            else:
                self._move(*raw.popleft(), stream, start)

    def _load(self, packet: Packet, stream: Any, since: float) -> Packet:
        """`packet` on the device but for what decoders read on the host, once `stream` gets there."""
        if self.device.type == "cpu" and self._wire is None:
            return packet
        names = [name for name in packet.sections if name != ON_HOST]
        parts = [packet.sections[name] for name in names]
        take = partial(torch.empty, dtype=torch.uint8, device=self.device)
        sections = dict(zip(names, self._carry(parts, take, stream, since), strict=True))
        if ON_HOST in packet.sections:
            sections[ON_HOST] = packet.sections[ON_HOST]
            if self._wire is not None:
                self._wire.take(sections[ON_HOST].numel(), since)
        return packet.with_(sections=sections)

    def _decode_part(self, packet: Packet, loaded: Any, place: Tensor) -> None:
        """What a worker does to load: `packet` into `place`, complete."""
        stream = self._stream(self.device)
        with on(stream), undisturbed(self.device):
            stream.wait_event(loaded)
            try:
                place.copy_(flatten(decode_packet(packet, self._basis)))
            finally:
                stream.record_event().synchronize()

    def _carry(
        self, parts: list[Tensor], take: Callable[[int], Tensor], stream: Any, since: float
    ) -> list[Tensor]:
        """Copies of `parts` in memory that is taken on `stream`."""
        whole = _together(parts)
        if whole is not None:
            origin = parts[0].storage_offset()
            starts, nbytes = [int(part.storage_offset()) - int(origin) for part in parts], whole.numel()
        else:
            starts, nbytes = [], 0
            for part in parts:
                starts.append(nbytes)
                nbytes += -(-part.numel() // ALIGNMENT) * ALIGNMENT
        with on(stream):
            memory = take(nbytes)
        copies = [memory[at : at + part.numel()] for at, part in zip(starts, parts, strict=True)]
        moves = zip(parts, copies, strict=True) if whole is None else [(whole, memory)]
        for source, target in moves:
            if source.numel():
                self._move(source, target, stream, since)
        return copies

    def _move(self, source: Tensor, target: Tensor, stream: Any, since: float) -> None:
        """Copy what is there `since` then; what the host takes to notice costs a simulated wire no time."""
        if self._wire is not None:
            self._wire.copy(source, target, stream=stream, ready=since)
            return
        with on(stream):
            target.copy_(source, non_blocking=True)
        self._copies.append(stream.record_event())
        while len(self._copies) > AHEAD:
            self._copies.popleft().synchronize()

    def _destination(self, like: Packet, out: Tensor | None) -> Tensor:
        """`out` as flat elements in memory order."""
        if out is None:
            return torch.empty(like.flat_numel, dtype=like.dtype, device=self.device)
        if not isinstance(out, Tensor):
            raise LaneError(f"out is a {type(out).__name__}: pass a tensor")
        flat = flatten(out)
        found = (tuple(out.shape), compact_strides(out), out.dtype, out.device)
        wanted = (like.shape, like.strides, like.dtype, self.device)
        if found != wanted or flat.data_ptr() != out.data_ptr() or out.requires_grad:
            text = f"{like.dtype} {list(like.shape)}, dense strides {list(like.strides)}, on {self.device}"
            raise LaneError(f"out is not {text}, without gradient: pass such a tensor")
        return flat

    def _check(self) -> None:
        if self._closed:
            raise LaneError("this wire is closed: make another one")

    def _stream(self, device: torch.device) -> Any:
        """The stream of the calling worker."""
        if not hasattr(self._thread, "number"):
            self._thread.number = next(self._numbers)
        return side_stream(device, f"dual lane {self._thread.number}", -1)


class _Encoded(NamedTuple):
    """A coded part on the device, once `ready` is reached."""

    packet: Packet
    ready: Any


class _Outgoing:
    """A parcel that is being filled on `stream`. `raw`: copies to be made; `packets`: by first element."""

    def __init__(self, like: Packet, stream: Any, piece: int) -> None:
        self.like, self.stream, self._piece = like, stream, piece
        self.raw: deque[tuple[Tensor, Tensor]] = deque()
        self.packets: dict[int, Packet] = {}
        self._memory: list[Slot] = []

    def add_raw(self, first: int, flat: Tensor) -> None:
        data = as_bytes(flat)
        memory = self.take(data.numel())
        self.raw.extend(_pieces(data, memory, self._piece))
        self.packets[first] = _block_like(self.like, flat).with_(sections={"data": memory})

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of host memory. Raises BudgetError."""
        slot = shared().take(nbytes)
        if slot is None:
            raise BudgetError(f"host memory has no room for {nbytes} bytes: drop parcels")
        slot.synchronize()
        self._memory.append(slot)
        return slot.tensor

    def parcel(self) -> Parcel:
        packets = (self.packets[first] for first in sorted(self.packets))
        return Parcel(self.like, tuple(packets), tuple(self._memory))


class _Announced(NamedTuple):
    """Elements `first` to `last` are encoded, `since` then by perf_counter, or failed to be."""

    since: float
    first: int
    last: int
    job: Future[_Encoded | None]


def _announce(queue: SimpleQueue[_Announced], first: int, last: int, job: Future[_Encoded | None]) -> None:
    queue.put(_Announced(perf_counter(), first, last, job))


def _block_like(like: Packet, flat: Tensor) -> Packet:
    """An empty raw packet of flat elements: in the rows of the tensor where they are whole rows of it."""
    length = row_length(like)
    if length and not flat.numel() % length:
        return like.with_(shape=(flat.numel() // length, length), strides=(length, 1))
    return like.with_(shape=(flat.numel(),), strides=(1,))


def _blocks(like: Packet, nbytes: int | None) -> Iterator[tuple[int, int]]:
    """First and last elements of blocks of about `nbytes`: whole rows, where these are shorter than that."""
    nbytes = nbytes or min(max(like.raw_nbytes // 16, BLOCKS[0]), BLOCKS[1])
    size = max(nbytes // like.dtype.itemsize, 1)
    length = row_length(like)
    if length:
        size = max(size // length, 1) * length
    for first in range(0, like.flat_numel, size):
        yield first, min(first + size, like.flat_numel)


def _pieces(source: Tensor, target: Tensor, nbytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(source, nbytes), torch.split(target, nbytes), strict=True)


def _together(parts: list[Tensor]) -> Tensor | None:
    """The memory of `parts`, if they lie in it in order, without wide gaps."""
    if not parts:
        return None
    start = end = int(parts[0].storage_offset())
    for part in parts:
        at = int(part.storage_offset())
        same = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not (same and end <= at < end + ALIGNMENT):
            return None
        end = at + part.numel()
    return parts[0].as_strided((end - start,), (1,), start)
