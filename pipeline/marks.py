"""What a step does, as marks in the order of its compute stream, and the seconds of computing before each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

SAVE, USE, IN, OUT, END = range(5)

ALIKE = 3  # blocks, from which on long gaps of one are told from those of the others


class Mark(NamedTuple):
    """A tensor is saved or used, a block begins or returns, or a backward pass has ended."""

    kind: int
    number: int  # of the tensor, or of the block


class Seconds(NamedTuple):
    """On one clock: before each mark, where the program computes, and what is ours in it."""

    gaps: tuple[float, ...]
    ours: tuple[float, ...]


class Shown(NamedTuple):
    """What a trip has shown.

    Attributes:
        device, host: seconds of the compute stream and of the program that enqueues.
        level: the device had nothing left to do when the trip began.
    """

    marks: tuple[Mark, ...]
    device: Seconds
    host: Seconds
    level: bool


def merge_gaps(
    marks: Sequence[Mark],
    gaps: Sequence[float],
    others: Sequence[Mark],
    other_gaps: Sequence[float],
    discard_old: bool = False,
) -> list[float]:
    """Seconds before each of `marks` after another trip, which may have more marks and less.

    What only one of the trips did between two marks says nothing of the other, so neighbours are compared
    alone. The shorter time is taken: a host that is late lengthens a gap, nothing shortens one. With
    `discard_old` the other trip counts alone, and gaps that it does not have change as its others did on
    average.
    """
    places: dict[tuple[Mark, int], int] = {}
    count: Counter[Mark] = Counter()
    for i, mark in enumerate(marks):
        places[mark, count[mark]] = i
        count[mark] += 1
    count.clear()
    found: dict[int, float] = {}
    last, since = -1, 0.0
    for mark, gap in zip(others, other_gaps, strict=True):
        since += gap
        place = places.get((mark, count[mark]))
        count[mark] += 1
        if place is not None:
            if place == last + 1:
                found[place] = since
            last, since = place, 0.0
    if not discard_old:
        return [min(gap, found.get(i, gap)) for i, gap in enumerate(gaps)]
    before = sum(gaps[i] for i in found)
    factor = sum(found.values()) / before if before > 0 else 1.0
    return [found.get(i, factor * gap) for i, gap in enumerate(gaps)]


def evened(
    marks: Sequence[Mark],
    gaps: Sequence[float],
    owners: Sequence[int],
    weights: Sequence[int],
    quantile: float = 0.1,
) -> list[float]:
    """`gaps` with a low quantile of blocks that are alike inside of these: the first step computes with
    pauses where kernels are loaded and memory is allocated, and others where the host is late.

    Args:
        owners: block of each tensor, -1 for none. weights: bytes of each tensor.
    """

    def kind(i: int) -> tuple[int, int]:
        return marks[i].kind, weights[marks[i].number] if marks[i].kind in (SAVE, USE) else 0

    alike: dict[object, list[int]] = {}
    for run in _runs(marks, owners):
        inside = tuple(map(kind, run))
        for place, i in enumerate(run):
            before = kind(i - 1) if i and not place else None  # the first gap is one between blocks
            alike.setdefault((inside, place, before), []).append(i)
    out = list(gaps)
    for together in alike.values():
        if len(together) >= ALIKE:
            low = sorted(gaps[i] for i in together)[int(quantile * len(together))]
            for i in together:
                out[i] = low
    return out


def _runs(marks: Sequence[Mark], owners: Sequence[int]) -> list[list[int]]:
    """Neighbouring marks of one block, in forward and in backward."""
    runs: list[list[int]] = []
    owner: tuple[int, int] | None = None
    for i, mark in enumerate(marks):
        before, block = owner, mark.number
        if mark.kind in (SAVE, USE):
            block = owners[mark.number]
        if mark.kind == IN or (mark.kind == USE and block >= 0):
            owner = mark.kind, block
        if owner is not None and block == owner[1] and mark.kind != END:
            if owner != before:
                runs.append([])
            runs[-1].append(i)
        if mark.kind == OUT:
            owner = None
    return runs
