"""Where the bytes of a packet wait off their device: in pinned memory, or on a disk behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from sidelane.codec.packet import Packet, Sections
from sidelane.errors import OffloadError
from sidelane.kernels._launch import ALIGNMENT, span, starts
from sidelane.pipeline.arena import Slot, shared, slot_bytes
from sidelane.pipeline.budget import Budget, Claim
from sidelane.pipeline.disk import Disk, Spill
from sidelane.pipeline.report import Tally

_Run = tuple[int, int, int]  # the number of its first section, start in memory, bytes
_NONE: dict[str, Tensor] = {}


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

    def announce(self) -> None:
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

    @classmethod
    def promise(cls, budget: Budget, nbytes: int) -> Claim | None:
        """A claim on what `take` needs of the budget, to be dropped before."""
        return budget.claim(slot_bytes(nbytes))

    def begin(self) -> Slot:
        return self._slot

    def written(self, event: torch.cuda.Event | None) -> None:
        self._slot.released = event

    def open(self, stream: torch.cuda.Stream | None) -> Slot:
        return self._slot

    def announce(self) -> None:
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

    def announce(self) -> None:
        self._spill.fetch()


class Tiers:
    """Where the packets of a context go that leave the device: pinned memory, then a disk if there is one."""

    def __init__(self, budget: Budget, disk: Disk | None, tally: Tally) -> None:
        self._budget = budget
        self._disk = disk
        self._tally = tally

    def take(self, nbytes: int) -> Memory | None:
        """Room for `nbytes`, or None where there is none."""
        return Pinned.take(self._budget, nbytes) or self.spill(nbytes)

    def promise(self, nbytes: int) -> Claim | None:
        """A claim on pinned memory for `nbytes`, to be dropped before it is taken, or None."""
        return Pinned.promise(self._budget, nbytes)

    def spill(self, nbytes: int) -> Memory | None:
        room = None if self._disk is None else OnDisk.take(self._disk, nbytes)
        if room is not None:
            self._tally.add("spilled", nbytes)
        return room


class PacketLayout:
    """How the sections of a packet lie one after the other in `nbytes` of memory.

    Sections that follow each other in one block of memory cross in one copy.

    Attributes:
        runs: (number of its first section, start in the memory, bytes) of each copy.
    """

    def __init__(self, packet: Packet) -> None:
        self._packet = packet.with_(sections=_NONE)
        sections = packet.sections
        self._names = tuple(sections)
        if isinstance(sections, Sections) and sections.starts == starts(sections.sizes):
            self._sizes = sections.sizes
            self.nbytes = span(self._sizes)
            self.runs: tuple[_Run, ...] = ((0, 0, self.nbytes),)
            return
        blocks: list[Tensor] = []
        places = []
        for part in sections.values():
            block = part._base
            if block is None or block.dtype != torch.uint8:
                block = part
            if not blocks or block is not blocks[-1]:
                blocks.append(block)
            places.append((part.numel(), int(part.storage_offset()), len(blocks)))
        self._sizes = tuple(size for size, _, _ in places)
        self.nbytes = span(self._sizes)
        whole = bool(blocks) and blocks[0].is_contiguous()  # or it has less memory than elements
        self.runs = _runs(tuple(places), blocks[0].numel() if whole else 0)

    @property
    def raw(self) -> bool:
        """The packet is the elements of a tensor as they are."""
        return self._packet.lane == "raw" and self._packet.dtype != torch.bool

    def write(self, packet: Packet, memory: Tensor) -> None:
        """Copy `packet` to `memory` uint8 [nbytes], on the current stream of its device."""
        sections = packet.sections
        if isinstance(sections, Sections) and sections.buffer.numel() == self.nbytes:
            memory.copy_(sections.buffer, non_blocking=True)
            return
        parts = list(sections.values())
        runs = [run for run in self.runs if run[2]]
        sources = [parts[first].as_strided((size,), (1,)) for first, _, size in runs]
        targets = [memory[start : start + size] for _, start, size in runs]
        if runs:
            torch._foreach_copy_(targets, sources, non_blocking=True)

    def read(self, memory: Tensor, device: torch.device) -> Packet:
        """The packet in `memory` as a copy on `device`, on its current stream."""
        return self.read_to(torch.empty(self.nbytes, dtype=torch.uint8, device=device), memory)

    def read_to(self, buffer: Tensor, memory: Tensor) -> Packet:
        """The packet in `memory`, copied to `buffer` uint8 [nbytes] on the current stream of its device."""
        return self.over(buffer.copy_(memory, non_blocking=True))

    def over(self, buffer: Tensor) -> Packet:
        """The packet in `buffer` uint8 [nbytes], whose memory it shares."""
        return self._packet.with_(sections=Sections(self._names, starts(self._sizes), self._sizes, buffer))


@lru_cache(4096)
def _runs(places: tuple[tuple[int, int, int], ...], first_block: int) -> tuple[_Run, ...]:
    """Sections that lie one after the other already as they do where `cut` puts them.

    `places`: size of each section, its offset and the number of the block of memory that this is an offset
    in. `first_block`: bytes of the first block, as far as they are known to be there. With room for it there,
    a single run takes the padding along, so that all memory is written at once.
    """
    runs: list[_Run] = []
    ahead, last, end = 0, 0, 0  # `ahead`: offset of the section before, less its start
    for i, (size, offset, block) in enumerate(places):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if block != last or offset - ahead != start:
            ahead, last = offset - start, block
            runs.append((i, start, size))
        else:
            first, begin, _ = runs[-1]
            runs[-1] = first, begin, start + size - begin
        end = start + size
    nbytes = -(-end // ALIGNMENT) * ALIGNMENT
    if len(runs) == 1 and places[0][1] + nbytes <= first_block:
        return ((0, 0, nbytes),)
    return tuple(runs)


class Spilled:
    """The home of a packet of a CPU tensor on a disk."""

    def __init__(self, packet: Packet, host: PacketLayout, memory: Memory) -> None:
        self._host = host
        self._memory = memory
        slot = memory.begin()
        slot.synchronize()
        host.write(packet, slot.tensor)
        memory.written(None)

    @contextmanager
    def use(self) -> Iterator[Packet]:
        yield self._host.read(self._memory.open(None).tensor, torch.device("cpu"))
