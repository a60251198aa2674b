"""Where the bytes of a packet wait off their device: in pinned memory, or on a disk behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from sidelane.codec.packet import Packet
from sidelane.errors import OffloadError
from sidelane.pipeline.arena import Slot, shared, slot_bytes
from sidelane.pipeline.budget import Budget, Claim
from sidelane.pipeline.disk import Disk, Spill

ALIGNMENT = 256  # of sections in a packet that came back, what kernels may assume


class Memory(Protocol):
    """Room for the bytes of one packet: `begin`, a write, `written`, then any number of `open` and a read."""

    def begin(self) -> Slot:
        """What to write into, on a stream that waits for the slot."""
        ...

    def written(self, event: torch.cuda.Event | None) -> None:
        """The write is done when `event` is reached."""
        ...

    def open(self, stream: torch.cuda.Stream | None) -> Slot:
        """What to read from, on `stream`, or on the host without one. Set `released` afterwards."""
        ...

    def fetch(self) -> None:
        """A hint that `open` comes soon."""
        ...


class Pinned:
    """A slot of pinned memory."""

    def __init__(self, slot: Slot, claim: Claim) -> None:
        self._slot = slot
        self._claim = claim

    @classmethod
    def take(cls, budget: Budget, nbytes: int) -> Pinned | None:
        """Memory of the shared arena, or None where the budget or the machine has no more."""
        claim = budget.claim(slot_bytes(nbytes))
        slot = None if claim is None else shared().take(nbytes)
        return None if slot is None or claim is None else cls(slot, claim)

    def begin(self) -> Slot:
        return self._slot

    def written(self, event: torch.cuda.Event | None) -> None:
        self._slot.released = event

    def open(self, stream: torch.cuda.Stream | None) -> Slot:
        return self._slot

    def fetch(self) -> None:
        pass


class OnDisk:
    """Room in the file of a disk tier."""

    def __init__(self, spill: Spill) -> None:
        self._spill = spill

    @classmethod
    def take(cls, disk: Disk, nbytes: int) -> OnDisk | None:
        """None where the disk has no more, or fails. May wait for earlier writes."""
        spill = disk.place(nbytes)
        return None if spill is None else cls(spill)

    def begin(self) -> Slot:
        if self._spill.slot is None:
            raise OffloadError("a packet was written to disk twice")
        return self._spill.slot

    def written(self, event: torch.cuda.Event | None) -> None:
        self.begin().released = event
        self._spill.write(event)

    def open(self, stream: torch.cuda.Stream | None) -> Slot:
        return self._spill.load(stream)

    def fetch(self) -> None:
        self._spill.fetch()


class HostCopy:
    """How the sections of a packet lie one after the other in `nbytes` of memory.

    Sections that are in one block of memory cross in one copy; others are copied one by one.
    """

    def __init__(self, packet: Packet) -> None:
        self._packet = packet.with_(sections={})
        parts = packet.sections
        self._sizes = {name: part.numel() for name, part in parts.items()}
        self._starts, self.nbytes, _ = _starts(list(parts.values()))

    def write(self, packet: Packet, memory: Tensor) -> None:
        """Copy `packet` to `memory` uint8 [nbytes], on the current stream of its device."""
        parts = list(packet.sections.values())
        whole = _starts(parts)[2]
        if whole is not None:
            memory.copy_(whole, non_blocking=True)
            return
        for part, start in zip(parts, self._starts, strict=True):
            memory[start : start + part.numel()].copy_(part, non_blocking=True)

    def read(self, memory: Tensor, device: torch.device) -> Packet:
        """The packet in `memory` as a copy on `device`, on its current stream."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        buffer.copy_(memory, non_blocking=True)
        items = zip(self._sizes.items(), self._starts, strict=True)
        return self._packet.with_(sections={name: buffer[at : at + size] for (name, size), at in items})


class Spilled:
    """The home of a packet of a CPU tensor on a disk."""

    def __init__(self, packet: Packet, host: HostCopy, memory: Memory) -> None:
        self._host = host
        self._memory = memory
        slot = memory.begin()
        slot.synchronize()
        host.write(packet, slot.tensor)
        memory.written(None)

    @contextmanager
    def use(self) -> Iterator[Packet]:
        yield self._host.read(self._memory.open(None).tensor, torch.device("cpu"))


def _starts(parts: list[Tensor]) -> tuple[list[int], int, Tensor | None]:
    """(start of each section, bytes in all, the vector that the sections are parts of if there is one)."""
    base = parts[0]._base if parts else None
    if base is not None and base.dtype == torch.uint8 and base.is_contiguous():
        first = int(base.storage_offset())
        starts = [int(p.storage_offset()) - first for p in parts]
        ends = [start + p.numel() for start, p in zip(starts, parts, strict=True)]
        close = all(end <= start < end + ALIGNMENT for end, start in zip([0, *ends], starts, strict=False))
        if close and base.numel() < ends[-1] + ALIGNMENT and all(p._base is base for p in parts):
            return starts, base.numel(), base.view(-1)
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end += -(-part.numel() // ALIGNMENT) * ALIGNMENT
    return starts, end, None
