"""Packets that travel together: one copy out, one copy in, and one entry in the books for several tensors.

Note: [Bundles]
Sending a packet off costs the host more than coding it. Packets that follow each other on one stream are
gathered, each in the memory that it was encoded to, until the bundle is full. To the wire a bundle is a
packet of unknown size: it leaves when it is full, or when its size is asked for because its memory is needed
or one of its packets is used. It lives as long as one of its packets does. The first bundles of a pass are
small, so that the wire does not stand still until a large one is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from sidelane.codec.packet import Packet, Sections
from sidelane.kernels._launch import ALIGNMENT
from sidelane.pipeline.stash import Home
from sidelane.pipeline.streams import current_stream

SHARE = 16  # part of the device budget that a bundle is
MOST = 128 << 20  # bytes of a bundle
LEAST = 2  # packets that a large bundle has room for
FIRST = 8  # part of a large bundle that the first one is; each has twice the room of the one before
_NONE: dict[str, Tensor] = {}
_WHOLE = Packet("raw", torch.uint8, (0,), (1,))


class Bundle:
    """Packets of one stream, of unknown size until it is closed: a `Pending` of a wire.

    Attributes:
        owner, device: the stream that encodes the packets, and its device.
        nbytes: at most.
        ready: reached when nothing is added any longer.
    """

    def __init__(self, owner: Any, nbytes: int) -> None:
        self.owner = owner
        self.device = owner.device
        self.nbytes = nbytes
        self.ready = _Closed()
        self._left = nbytes
        self._buffers: list[Tensor] = []
        self._lock = Lock()  # the wire may close it at any time, on any thread

    def add(self, buffer: Tensor) -> int | None:
        """The position of `buffer` uint8 [*] in the bundle; None when it does not fit or nothing does."""
        size = buffer.numel()
        size += -size % ALIGNMENT
        with self._lock:
            if self.ready.closed or size > self._left:
                return None
            self._left -= size
            self._buffers.append(buffer)
            return len(self._buffers) - 1

    def close(self) -> None:
        """Nothing is added from now on."""
        with self._lock:
            self.ready.closed = True

    def settle(self) -> Packet:
        """All that was added, as one packet with a section for each; closed from now on."""
        self.close()
        return _WHOLE.with_(sections={str(i): buffer for i, buffer in enumerate(self._buffers)})


class _Closed:
    closed = False

    def query(self) -> bool:
        return self.closed


class Part:
    """The home of a packet in a bundle: of `sections` only the layout is kept."""

    __slots__ = ("_bundle", "_layout", "_name", "_packet")

    def __init__(self, bundle: Home, number: int, packet: Packet, sections: Sections) -> None:
        self._bundle = bundle
        self._name = str(number)
        self._packet = packet.with_(sections=_NONE)
        self._layout = sections.names, sections.starts, sections.sizes

    @contextmanager
    def use(self) -> Iterator[Packet]:
        """As of a `Home`."""
        with self._bundle.use() as whole:
            yield self._packet.with_(sections=Sections(*self._layout, whole.sections[self._name]))


class Carrier(Protocol):
    """What bundles are sent with: a `Wire`, or `Moves`."""

    def send(self, packet: Packet) -> Home | None:
        """A home for a packet; None where there is no room."""
        ...

    def send_late(self, packet: Bundle) -> Home | None:
        """A home for a bundle that is filled later; None where there is no room for it."""
        ...


class Bundles:
    """Sends packets in bundles where a device budget of `limit` bytes has room for several."""

    def __init__(self, carrier: Carrier, limit: int | None) -> None:
        self._carrier = carrier
        self._nbytes = 0 if limit is None else min(MOST, limit // SHARE)
        self._room = 0  # of the last bundle
        self._last: ref[Home] | None = None  # its home
        self._open: ref[Bundle] | None = None  # itself, while something may be added; its memory is not ours
        self._lock = RLock()

    def send(self, packet: Packet) -> Home | None:
        """A home for a packet that the current stream encodes; None where there is no room."""
        sections = packet.sections
        if not isinstance(sections, Sections) or sections.buffer.numel() * LEAST > self._nbytes:
            self.close()
            return self._carrier.send(packet)
        with self._lock:
            return self._add(packet, sections) or self._carrier.send(packet)

    def close(self) -> None:
        """Add to the open bundle no longer, before a packet that goes by itself."""
        with self._lock:
            bundle = None if self._open is None else self._open()
            self._open = None
            if bundle is not None:
                bundle.close()

    def _add(self, packet: Packet, sections: Sections) -> Part | None:
        """To the open bundle, or to a new one; None where there is no room for one."""
        owner = current_stream(sections.buffer.device)
        its_home = None if self._last is None else self._last()
        if self._open is not None:
            last = self._open()
            if last is not None and its_home is not None and last.owner == owner:
                number = last.add(sections.buffer)
                if number is not None:
                    return Part(its_home, number, packet, sections)
            self.close()
        # Without a home nothing of the pass before is left.
        room = self._nbytes // FIRST if its_home is None else min(2 * self._room, self._nbytes)
        size = sections.buffer.numel()
        bundle = Bundle(owner, max(room, size + -size % ALIGNMENT))
        home = self._carrier.send_late(bundle)
        number = None if home is None else bundle.add(sections.buffer)
        if home is None or number is None:  # closed already: another thread needed its room
            return None
        self._room, self._last = room, ref(home)
        self._open = ref(bundle)
        return Part(home, number, packet, sections)
