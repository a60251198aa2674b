"""Streams joined by events: side streams of a device, slots with two events, rings of slots.

Note: [Slots]
A slot carries one value from the stream that writes it, its owner, to the streams that read it. `fill`
records the event `ready`, which every reader's stream waits for; `give` records `released` on every reader.
The caching allocator hands a freed block to later work of the stream it was allocated on, at once, so the
value of a slot is dropped only after its owner was made to wait for `released`: when the slot is taken again,
or when the event has been reached. The memory behind a ring is therefore what its slots hold, however far the
host runs ahead, and no block needs `record_stream`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar
from weakref import ref

import torch

from sidelane.errors import LaneError, OffloadError

T = TypeVar("T")
MAX_DEPTH = 4096  # slots of a ring
RECHECK = 0.05  # seconds after which a host that waits for a slot looks again


class Event(Protocol):
    """What this module needs of a torch.cuda.Event."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Stream(Protocol):
    """What this module needs of a torch.cuda.Stream."""

    @property
    def device(self) -> torch.device: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any: ...


class HostEvent:
    """Work of the CPU is done when its call returns, so the event is reached when it is made."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seconds = perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Stream) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds, as of a CUDA event."""
        return (end.seconds - self.seconds) * 1e3


class HostStream:
    """The CPU in the place of a stream: to wait for an event is to wait on the host."""

    device = torch.device("cpu")

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        return HostEvent()


HOST = HostStream()
_current: dict[tuple[int, ...], torch.cuda.Stream] = {}
_side: dict[tuple[torch.device, str, int], torch.cuda.Stream] = {}
_side_lock = Lock()


def current_stream(device: torch.device) -> Any:
    """The stream that the calling thread enqueues work of `device` on; `HOST` for the CPU.

    As torch.cuda.current_stream, at a tenth of the time: this is asked several times per saved tensor.
    """
    if device.type == "cpu":
        return HOST
    index = torch.cuda.current_device() if device.index is None else device.index
    key = torch._C._cuda_getCurrentStream(index)
    stream = _current.get(key)
    if stream is None:
        stream = _current[key] = torch.cuda.Stream(  # type: ignore[no-untyped-call]
            stream_id=key[0], device_index=key[1], device_type=key[2]
        )
    return stream


def settle(device: torch.device) -> None:
    """Wait for the work of the current stream: what it makes may then be used on any."""
    if device.type == "cuda":
        current_stream(device).synchronize()


def reached(event: Any) -> bool:
    """Whether the device has come to `event`."""
    return bool(event.query())


def side_stream(device: torch.device, role: str, priority: int = 0) -> Any:
    """The stream of this process for `role` on `device`, made when first asked for; `HOST` for the CPU.

    Args:
        priority: -1 lets its kernels go before those of other streams whenever an SM is free.
    """
    if device.type == "cpu":
        return HOST
    key = (device, role, priority)
    if (stream := _side.get(key)) is not None:
        return stream
    with _side_lock:
        if key not in _side:
            _side[key] = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
        return _side[key]


def timed_event() -> Any:
    """A CUDA event that keeps the time at which it was reached."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class on:
    """Context in which the calling thread enqueues on `stream`, and the device of `stream` is current."""

    __slots__ = ("_before", "_other", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = self._other = None
        stream = self._stream
        if not isinstance(stream, torch.cuda.Stream):
            return
        if stream.device_index == torch.cuda.current_device():
            self._before = current_stream(stream.device)
            torch.cuda.set_stream(stream)
        else:
            self._other = torch.cuda.stream(stream)
            self._other.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            torch.cuda.set_stream(self._before)
        if self._other is not None:
            self._other.__exit__(kind, error, trace)


class _Place(Generic[T]):
    """What a ring keeps of a slot: its value until the readers are done."""

    def __init__(self) -> None:
        self.value: T | None = None
        self.owner: Stream | None = None
        self.readers: list[Stream] = []
        self.released: tuple[Event, ...] | None = None
        self.holder: ref[Slot[T]] | None = None  # the slot that was taken last
        self.turn = 0

    @property
    def free(self) -> bool:
        """No slot of it is alive and not given."""
        slot = None if self.holder is None else self.holder()
        return slot is None or slot.given

    def release(self) -> tuple[Event, ...]:
        """Events after what is enqueued for the value, recorded once."""
        if self.released is None:
            streams = self.readers if self.readers or self.owner is None else [self.owner]
            self.released = tuple(stream.record_event() for stream in dict.fromkeys(streams))
        return self.released

    def empty(self) -> None:
        """Drop the value once its owner waits for the readers."""
        if self.value is not None and self.owner is not None:
            for event in self.release():
                self.owner.wait_event(event)
        self.value = None
        self.readers, self.released = [], ()


class Slot(Generic[T]):
    """One use of a place in a ring: take, fill, open, give. To drop it is to give it.

    See Note: [Slots].
    """

    def __init__(self, place: _Place[T], owner: Stream, wake: Callable[[object], None]) -> None:
        self._place = place
        self._owner = owner
        self._wake = wake
        self.given = False
        self.ready: Event | None = None

    def fill(self, value: T) -> None:
        """Put in what the owner has been told to write."""
        self._check()
        self._place.value = value
        self.ready = self._owner.record_event()

    def open(self, stream: Stream) -> T:
        """The value, for work that is enqueued on `stream` before `give`."""
        value = self.peek()
        self._place.readers.append(stream)
        stream.wait_event(self.ready)
        return value

    def peek(self) -> T:
        """The value, to look at what the host knows of it: shape, dtype, device."""
        self._check()
        if self.ready is None or self._place.value is None:
            raise OffloadError("an empty slot was opened: fill it first")
        return self._place.value

    def give(self) -> None:
        """Return the place: all that reads the value is enqueued. More calls do nothing."""
        if not self.given:
            self._place.release()
            self.given = True
            self._wake(None)

    def _check(self) -> None:
        if self.given:
            raise OffloadError("a slot was used after it was given: take another")


class Ring(Generic[T]):
    """A fixed number of slots, used again in the order they were taken. Thread-safe.

    An exception at any point, also between two bytecodes, leaves no slot behind: a place is in use exactly as
    long as its slot is alive and not given. No lock is taken when a slot dies, since it may die anywhere.

    Raises LaneError for a depth that is not 1 to `MAX_DEPTH`.
    """

    def __init__(self, depth: int) -> None:
        self._places: list[_Place[T]] = []
        if type(depth) is not int or not 1 <= depth <= MAX_DEPTH:
            raise LaneError(f"depth={depth!r} is not a whole number from 1 to {MAX_DEPTH}")
        self._places = [_Place() for _ in range(depth)]
        self._turns = 0
        self._lock = Lock()
        self._given: SimpleQueue[object] = SimpleQueue()  # hints that a place may be free

    def __del__(self) -> None:
        if not sys.is_finalizing():
            for place in self._places:
                place.empty()

    @property
    def free(self) -> int:
        """Slots that can be taken without waiting on the host."""
        return sum(place.free for place in self._places)

    @property
    def held(self) -> int:
        """Values that are not dropped yet."""
        return sum(place.value is not None for place in self._places)

    def take(self, stream: Stream) -> Slot[T]:
        """The free slot that was taken first, for `stream` to fill.

        The stream waits for those who read the value before. The host waits only while no slot is free.
        """
        while True:
            with self._lock:
                slot = self._lend(stream)
            if slot is not None:
                return slot
            with suppress(Empty):
                self._given.get(timeout=RECHECK)

    def sweep(self) -> None:
        """Drop the values whose readers are done; waits for nothing."""
        with self._lock:
            for place in self._places:
                done = place.value is not None and place.free
                if done and all(event.query() for event in place.release()):
                    place.value = None

    def clear(self) -> None:
        """Drop the values of all free slots; their owners wait for the readers."""
        with self._lock:
            for place in self._places:
                if place.free:
                    place.empty()

    def _lend(self, stream: Stream) -> Slot[T] | None:
        free = [place for place in self._places if place.free]
        if not free:
            return None
        while not self._given.empty():
            self._given.get()
        place = min(free, key=_turn)
        for event in place.release():
            stream.wait_event(event)
        place.empty()
        slot = Slot(place, stream, self._given.put)
        place.owner, place.released = stream, None
        self._turns += 1
        place.turn = self._turns
        place.holder = ref(slot, self._given.put)
        return slot


def _turn(place: _Place[Any]) -> int:
    return place.turn
