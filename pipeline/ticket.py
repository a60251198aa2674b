"""What a chain knows of a tensor that was sent, and what it counts."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from sidelane.codec.packet import Packet
from sidelane.errors import BudgetError
from sidelane.pipeline.budget import Budget, Claim
from sidelane.pipeline.streams import Event, current_stream
from sidelane.pipeline.tiers import PacketLayout, Pinned

MIB = 1 << 20


class Stored:
    """A packet in host memory, which goes back when this dies."""

    def __init__(self, packet: Packet, raw_nbytes: int, device: torch.device) -> None:
        self.device = device  # where it is to be decoded
        self.nbytes = packet.nbytes
        self.raw_nbytes = raw_nbytes
        self.ready: Event
        self._packet = packet
        self._layout: PacketLayout | None = None
        self._memory: Pinned | None = None
        self._claim: Claim | None = None

    def write(self, budget: Budget, stream: Any) -> None:
        """Enqueue the copy out on `stream`, the current one. Raises BudgetError."""
        packet = self._packet
        if packet.device.type == self.device.type == "cpu":
            self._claim = budget.claim(packet.nbytes)
        else:
            layout = PacketLayout(packet)
            self._memory = Pinned.take(budget, layout.nbytes)
            if self._memory is not None:
                slot = self._memory.begin()
                slot.wait(stream)
                layout.write(packet, slot.tensor)
                self._memory.written(stream.record_event())
                self._layout, self._packet = layout, packet.with_(sections={})
        if self._memory is None and self._claim is None:
            raise BudgetError(
                f"host memory: a packet of {packet.nbytes} bytes finds no room, {budget.held} of "
                f"{budget.limit or 'all'} bytes are held; drop tickets or raise host_budget"
            )
        self.ready = stream.record_event()

    def read(self, stream: Any) -> Packet:
        """Enqueue the copy in on `stream`, the current one."""
        if self._layout is None or self._memory is None:
            return self._packet
        slot = self._memory.open(stream)
        packet = self._layout.read(slot.tensor, self.device)
        slot.released = stream.record_event()
        return packet


class Ticket:
    """A tensor that was sent. Its host memory goes back when the ticket is dropped.

    Attributes:
        number: how many tensors the chain had sent before.
    """

    def __init__(self, number: int, stages: object) -> None:
        self.number = number
        self._stages = stages
        self._read: Future[Event] = Future()
        self._stored: Future[Stored]

    def done(self) -> bool:
        """Whether the packet is in host memory, or has failed to get there."""
        if not self._stored.done():
            return False
        return self._stored.exception() is not None or self._stored.result().ready.query()

    def join(self) -> None:
        """From here on the program may change the tensor that was sent, on the current stream: that waits
        until the encoder has read it. The host waits until the encoder has been started."""
        event: Any = self._read.result()
        current_stream(event.device).wait_event(event)


@dataclass(frozen=True)
class ChainReport:
    """Totals since the chain was made, and what it holds now.

    Attributes:
        sent, received: tensors; `failed` of the sent ones never got to host memory.
        bytes_in, bytes_wire: of the tensors that did, as they were and as packets.
        host_bytes, host_peak: of packets in host memory, now and at most.
        seconds_waited: time that the program's threads stood still in `send`, `receive`, `flush`, `close`.
    """

    lane: str
    sent: int
    received: int
    failed: int
    bytes_in: int
    bytes_wire: int
    host_bytes: int
    host_peak: int
    seconds_waited: float

    @property
    def ratio(self) -> float:
        return self.bytes_in / self.bytes_wire if self.bytes_wire else float("nan")

    def __str__(self) -> str:
        held = f"{self.host_bytes / MIB:.1f} MiB (peak {self.host_peak / MIB:.1f})"
        return (
            f"{self.lane}: sent {self.sent}, received {self.received}, failed {self.failed}; "
            f"{self.bytes_in / MIB:.1f} MiB as {self.bytes_wire / MIB:.1f} MiB (ratio {self.ratio:.2f}); "
            f"host {held}; waited {self.seconds_waited * 1e3:.1f} ms"
        )
