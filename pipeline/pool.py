"""Pieces of large regions, lent until they are collected: the books behind pinned memory and file space.

Note: [Interrupts]
Signals and the garbage collector run Python code in the middle of any function, so no lock is taken when a
piece dies: its weak reference appends itself to a queue, in C, and the next call under the lock reads the
queue. Every call sets `_torn` while it changes the books. One that finds it set follows an interrupted one,
and rebuilds them from the two things that are always true: the regions, and which pieces are alive.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar
from weakref import ref

from sidelane.pipeline.space import Block, Events, Space

GRANULE = 4096  # page, and what direct I/O aligns to


def rounded(nbytes: int) -> int:
    """`nbytes` in whole granules, at least one."""
    return max(-(-nbytes // GRANULE), 1) * GRANULE


class Region(Protocol):
    """[start, end) of something, to lend from."""

    start: int
    nbytes: int

    def close(self) -> None: ...


R = TypeVar("R", bound=Region)


class Piece:
    """A lent block; it returns to its pool when it is collected, on any thread."""

    __slots__ = ("__weakref__", "_loan")
    _loan: _Loan

    @property
    def region(self) -> Any:
        return self._loan.block.owner

    @property
    def start(self) -> int:
        return self._loan.block.start

    @property
    def nbytes(self) -> int:
        return self._loan.block.nbytes

    @property
    def after(self) -> Events:
        """Events of earlier users: not to be written before they are reached."""
        return self._loan.block.after

    @property
    def released(self) -> Any:
        """The event of the last user, which stands for those of all users before."""
        return self._loan.released

    @released.setter
    def released(self, event: Any) -> None:
        self._loan.released = event


class _Loan(ref[Piece]):
    """The pool's side of a piece. See Note: [Interrupts]."""

    __slots__ = ("block", "released")
    block: Block
    released: Any


class Pool(Generic[R]):
    """Lends pieces of regions, which it opens when it needs them. Thread-safe.

    Args:
        open_region: a region of so many bytes, or None when there is no room for it.
        settle: wait until nobody is at work in memory that was given back.
        limit: bytes of all regions at most, or None.
        step: bytes of a region, unless more are asked for or fewer are left.
        first: bytes of the first region; later ones have as much as there is already, up to `step`,
            which is the default.
    """

    def __init__(
        self,
        open_region: Callable[[int], R | None],
        settle: Callable[[], None],
        limit: int | None,
        step: int,
        first: int | None = None,
    ) -> None:
        self.limit = limit
        self.peak = 0
        self._open_region = open_region
        self._settle = settle
        self._step, self._first = step, first or step
        self._lock = Lock()
        self._returned: deque[_Loan] = deque()
        self._live: dict[int, _Loan] = {}  # by id: a weak reference hashes like what it refers to
        self._regions: list[R] = []
        self._space = Space()
        self._held = 0
        self._torn = self._closed = False

    @property
    def held(self) -> int:
        """Bytes of the pieces that are alive."""
        with self._lock:
            self._begin()
            self._torn = False
            return self._held

    @property
    def reserved(self) -> int:
        """Bytes of all regions."""
        return sum(region.nbytes for region in self._regions)

    def take(self, nbytes: int) -> Piece | None:
        """A piece of `rounded(nbytes)` bytes, or None. What `open_region` raises comes through."""
        size = rounded(nbytes)
        with self._lock:
            self._begin()
            block = self._space.take(size)
            if block is None and not self._closed and self._grow(size):
                block = self._space.take(size)
            piece = None if block is None else self._lend(block)
            self._torn = False
        return piece

    def trim(self) -> int:
        """Close the regions that are free; returns their bytes. Waits for their users."""
        with self._lock:
            self._begin()
            freed = self._drop_regions(wait=True)
            self._torn = False
        return freed

    def close(self) -> None:
        """Lend no more, and close what is free."""
        self._closed = True
        self.trim()

    def _begin(self) -> None:
        """Bring the books up to date and open them for a change."""
        if self._torn:
            self._rebuild()
        self._torn = True
        while self._returned:
            loan = self._returned.popleft()
            if self._live.pop(id(loan), None) is not loan:
                continue  # of a time before the books were rebuilt
            block = loan.block
            self._held -= block.nbytes
            after = block.after if loan.released is None else (loan.released,)
            pending = tuple(event for event in after if not event.query())
            self._space.give(Block(block.owner, block.start, block.nbytes, pending))

    def _lend(self, block: Block) -> Piece:
        piece = Piece()
        loan = _Loan(piece, self._returned.append)
        loan.block, loan.released = block, None
        piece._loan = loan
        self._live[id(loan)] = loan
        self._held += block.nbytes
        self.peak = max(self.peak, self._held)
        return piece

    def _rebuild(self) -> None:
        alive = [(loan, piece) for loan in list(self._live.values()) if (piece := loan()) is not None]
        self._settle()  # in place of the events that were lost
        self._live = {id(loan): loan for loan, _ in alive}
        self._held = sum(loan.block.nbytes for loan, _ in alive)
        self._space = Space()
        for region in self._regions:
            lent = [loan.block for loan, _ in alive if loan.block.owner is region]
            first, end = region.start, region.start + region.nbytes
            for block in sorted(lent, key=lambda block: block.start):
                if first < block.start:
                    self._space.give(Block(region, first, block.start - first))
                first = block.end
            if first < end:
                self._space.give(Block(region, first, end - first))

    def _grow(self, size: int) -> bool:
        """Open a region that holds `size` bytes, or none."""
        step = min(self._step, max(self._first, self.reserved))
        for wanted in (max(size, step), size):
            nbytes = min(rounded(wanted), self._room())
            if nbytes < size:
                self._drop_regions(wait=False)
                nbytes = min(size, self._room())
            if self._add(nbytes, size):
                return True
        # The machine has refused; what is free is its memory too.
        return self._drop_regions(wait=False) > 0 and self._add(min(size, self._room()), size)

    def _add(self, nbytes: int, least: int) -> bool:
        """Open a region of so many bytes, unless they are too few."""
        if nbytes < least or (region := self._open_region(nbytes)) is None:
            return False
        self._regions.append(region)
        self._space.give(Block(region, region.start, nbytes))
        return True

    def _room(self) -> int:
        if self.limit is None:
            return sys.maxsize
        return (self.limit - self.reserved) // GRANULE * GRANULE

    def _drop_regions(self, wait: bool) -> int:
        """Close the free regions; unless `wait`, only those whose users are done."""
        freed = 0
        for block in list(self._space):
            region: R = block.owner
            if block.nbytes < region.nbytes or not (wait or all(e.query() for e in block.after)):
                continue
            for event in block.after:
                event.synchronize()
            self._space.remove(block)
            self._regions.remove(region)
            region.close()
            freed += region.nbytes
        return freed
