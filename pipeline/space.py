"""Free ranges of memory or of a file: those of the size that is asked for, or else the best fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

Events = tuple[Any, ...]  # torch.cuda.Event, or what waits and answers like one
MAX_EVENTS = 4


class Block:
    """[start, end) of `owner`, which may be overwritten once every event of `after` is reached. Not changed
    once made."""

    __slots__ = ("after", "end", "nbytes", "owner", "start")

    def __init__(self, owner: Any, start: int, nbytes: int, after: Events = ()) -> None:
        self.owner = owner
        self.start = start
        self.nbytes = nbytes
        self.end = start + nbytes
        self.after = after


class Space:
    """The free blocks. Blocks of different owners are never merged. Not thread-safe.

    Steps of a training run ask for the same sizes again, so what is given waits whole for the next who wants
    as much, the first given first. When another size is asked for, neighbours are merged.
    """

    def __init__(self) -> None:
        self._whole: defaultdict[int, deque[Block]] = defaultdict(deque)  # given and not merged, by size
        self._sizes: list[tuple[int, int]] = []  # (nbytes, start) of merged blocks, sorted
        self._starts: dict[int, Block] = {}
        self._ends: dict[int, Block] = {}

    def __iter__(self) -> Iterator[Block]:
        """The free blocks by address, merged."""
        self._merge()
        return iter(sorted(self._starts.values(), key=lambda block: block.start))

    def take(self, nbytes: int) -> Block | None:
        """A block of `nbytes` that was given, or the first of the smallest merged block that holds them."""
        if (whole := self._whole.get(nbytes)) is not None:
            block = whole.popleft()
            if not whole:
                del self._whole[nbytes]
            return block
        self._merge()  # first: pieces may fit together, where a large block would be cut
        i = bisect_left(self._sizes, (nbytes, -1))
        if i == len(self._sizes):
            return None
        found = self._starts[self._sizes[i][1]]
        self.remove(found)
        if found.nbytes == nbytes:
            return found
        self._insert(Block(found.owner, found.start + nbytes, found.nbytes - nbytes, found.after))
        return Block(found.owner, found.start, nbytes, found.after)

    def give(self, block: Block) -> None:
        """Make `block` free."""
        self._whole[block.nbytes].append(block)

    def _merge(self) -> None:
        given = [block for blocks in self._whole.values() for block in blocks]
        self._whole.clear()
        for block in given:
            for other in (self._ends.get(block.start), self._starts.get(block.end)):
                if other is not None and other.owner is block.owner:
                    self.remove(other)
                    start = min(block.start, other.start)
                    after = both(block.after, other.after)
                    block = Block(block.owner, start, block.nbytes + other.nbytes, after)
            self._insert(block)

    def remove(self, block: Block) -> None:
        """Take one of the merged blocks away."""
        del self._sizes[bisect_left(self._sizes, (block.nbytes, block.start))]
        del self._starts[block.start], self._ends[block.end]

    def _insert(self, block: Block) -> None:
        insort(self._sizes, (block.nbytes, block.start))
        self._starts[block.start] = self._ends[block.end] = block


def both(a: Events, b: Events) -> Events:
    """Events that are reached no sooner than all of `a` and `b`; few of them, however often it is applied."""
    if not a or not b:
        return a or b
    events = tuple(dict.fromkeys(a + b))
    if len(events) > MAX_EVENTS:
        events = tuple(event for event in events if not event.query())
    if len(events) > MAX_EVENTS:
        events = (_join(events),)
    return events


_streams: dict[Any, Any] = {}  # by device: streams that do nothing but wait


def _join(events: Events) -> Any:
    import torch

    device = events[-1].device
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream = _streams[device]
    for event in events:
        stream.wait_event(event)
    return stream.record_event()
