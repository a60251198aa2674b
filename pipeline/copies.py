"""The two places of a packet that leaves its GPU: memory of the GPU, and memory or a disk off it.

Note: [Device memory and streams]
The caching allocator hands a freed block to later work of the stream it was allocated on, at once. So a block
that another stream reads or writes may be dropped only after its own stream was made to wait for that one.
All device memory here is of the stream that computes: it has written what is sent away, and what is fetched
is allocated there, before a copy that waits for that point of the stream. (Memory of the copy stream would
come from a pool of its own, which the GPU would hold beside that of the forward pass.) So it waits for uses
on other streams, for copies out when their memory is dropped, and for copies in when they are used, or
dropped unused. A slot of the arena carries the event of its last copy, which the stream of the next copy
waits for. When a stash dies while its copy out is running, only that dead copy can be torn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sidelane.codec.packet import Packet
from sidelane.pipeline.budget import Claim
from sidelane.pipeline.streams import current_stream, on, reached, side_stream
from sidelane.pipeline.tiers import Memory, OnDisk, PacketLayout


class DeviceCopy:
    """A packet in device memory of the stream `owner`, filled when `ready` is reached: by that stream, or by
    a copy in.

    Args:
        fetched: the event of the copy in; None where `owner` has written the packet.
    """

    _unwaited = False  # `owner` has still to wait for the copy in; not before all is set

    def __init__(
        self,
        packet: Packet,
        owner: torch.cuda.Stream,
        claim: Claim | None,
        fetched: torch.cuda.Event | None = None,
    ) -> None:
        self.packet = packet
        self.owner = owner
        self.ready: torch.cuda.Event = owner.record_event() if fetched is None else fetched
        self.claim = claim
        self._fetched = self._unwaited = fetched is not None

    def filled(self, stream: torch.cuda.Stream) -> bool:
        """Work enqueued on `stream` from now on would not wait for it."""
        return (stream == self.owner and not self._fetched) or reached(self.ready)

    def open(self, stream: torch.cuda.Stream) -> Packet:
        """The packet, for work enqueued on `stream` from now on."""
        if self._fetched or stream != self.owner:
            stream.wait_event(self.ready)
        if stream == self.owner:
            self._unwaited = False
        return self.packet

    def close(self, stream: torch.cuda.Stream) -> None:
        """`stream` has enqueued its last read: after this the copy may be dropped."""
        if stream != self.owner:
            self.owner.wait_event(stream.record_event())
            self._unwaited = False

    @contextmanager
    def use(self) -> Iterator[Packet]:
        stream = current_stream(self.owner.device)
        packet = self.open(stream)
        try:
            yield packet
        finally:
            self.close(stream)

    def __del__(self) -> None:
        if self._unwaited and not sys.is_finalizing():
            self.owner.wait_event(self.ready)


class StoredCopy:
    """A packet on its way to host memory or a disk, and there when `copied` is reached."""

    def __init__(self, host: PacketLayout, memory: Memory, local: DeviceCopy) -> None:
        self._host = host
        self._memory = memory
        self.device = local.owner.device
        out, slot = side_stream(self.device, "copy out"), memory.begin()
        out.wait_event(local.ready)
        slot.wait(out)
        with on(out):
            host.write(local.packet, slot.tensor)
        self.copied: torch.cuda.Event = out.record_event()
        memory.written(self.copied)

    @property
    def on_disk(self) -> bool:
        return isinstance(self._memory, OnDisk)

    def announce(self) -> None:
        """A hint that `fetch` comes soon."""
        self._memory.announce()

    def give(self, data: Tensor) -> None:
        """Before memory of the device is given away: it may be freed while the copy out reads it."""
        if not reached(self.copied):
            data.record_stream(side_stream(self.device, "copy out"))

    def fetch(self, claim: Claim | None) -> DeviceCopy:
        """Enqueue the copy into memory of the current stream. The host waits for a disk."""
        owner, stream = current_stream(self.device), side_stream(self.device, "copy in")
        slot = self._memory.open(stream)
        buffer = torch.empty(self._host.nbytes, dtype=torch.uint8, device=self.device)
        stream.wait_event(owner.record_event())
        stream.wait_event(self.copied)
        try:
            with on(stream):
                packet = self._host.read_to(buffer, slot.tensor)
            slot.released = stream.record_event()
            return DeviceCopy(packet, owner, claim, slot.released)
        except BaseException:  # an interrupt: the copy may be under way
            slot.released = stream.record_event()
            owner.wait_event(slot.released)
            raise
