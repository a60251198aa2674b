"""What an offload context did, in numbers: counted while it runs, read as a `Report`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import isnan, nan
from threading import Lock

import torch

from sidelane.codec.packet import Packet
from sidelane.pipeline.policy import Kind, Shape

MAX_CLASSES = 256  # of a report; tensors of further shapes are counted together
MIB = 1 << 20

_Class = tuple[Shape | None, str, int]


@dataclass
class Count:
    """Tensors and the bytes of their distinct elements."""

    count: int = 0
    nbytes: int = 0

    def add(self, nbytes: int) -> None:
        self.count += 1
        self.nbytes += nbytes


@dataclass
class TensorClass:
    """Encoded tensors of one dtype, shape and lane.

    Attributes:
        dtype, shape: of the saved tensors; None for those of many shapes that are counted together.
        lane, bits: of the packets, after any fallback to a finer one; 0 bits where the lane has no width.
        count, bytes_in: packets, and the bytes that went into them: those of a whole storage where it was
            stored.
        bytes_wire: of the packets.
        worst_error: largest relative Frobenius error; 0 where exact, NaN where no bound was asked for.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...] | None
    lane: str
    bits: int = 0
    count: int = 0
    bytes_in: int = 0
    bytes_wire: int = 0
    worst_error: float = 0.0

    @property
    def ratio(self) -> float:
        return self.bytes_in / self.bytes_wire if self.bytes_wire else nan

    def add(self, packet: Packet) -> None:
        self.count += 1
        self.bytes_in += packet.raw_nbytes
        self.bytes_wire += packet.nbytes
        self.worst_error = nan if isnan(packet.rel_error) else max(self.worst_error, packet.rel_error)


@dataclass(frozen=True)
class Report:
    """Totals since the context was made, and what it holds now.

    Attributes:
        classes: one row per dtype, shape and lane, most bytes first.
        kept: tensors left where they were, by reason.
        deduplicated: saves that found their data stored already.
        over_budget, spilled: packets that stayed on the device, or went to disk, because the host budget was
            full.
        unpacks, decodes: tensors given back, and how many of them had to be decoded.
        fetched, prefetched: copies to the device on demand, and ahead of it (CUDA).
        seconds_waited: time that compute streams stood still for those copies (CUDA).
        host_bytes, host_peak, device_bytes, device_peak: held now and at most, as the budgets count them.
        tickets: saved tensors that somebody can still ask for.
        checked: tensors given back that `checker` verified.
        plan: of lane "auto", as `Plan.explain` tells it.
    """

    classes: tuple[TensorClass, ...]
    kept: dict[str, Count]
    deduplicated: Count
    over_budget: Count
    spilled: Count
    unpacks: int
    decodes: int
    fetched: int
    prefetched: int
    seconds_waited: float
    host_bytes: int
    host_peak: int
    device_bytes: int
    device_peak: int
    tickets: int
    checked: int = 0
    plan: str = ""

    @property
    def total(self) -> TensorClass:
        """All classes together."""
        out = TensorClass(None, None, "all")
        for row in self.classes:
            out.count += row.count
            out.bytes_in += row.bytes_in
            out.bytes_wire += row.bytes_wire
            out.worst_error = nan if isnan(row.worst_error) else max(out.worst_error, row.worst_error)
        return out

    def __str__(self) -> str:
        header = ("tensors", "lane", "count", "MiB in", "MiB wire", "ratio", "worst error")
        table = [header, *(_cells(row) for row in (*self.classes, self.total))]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = ["  ".join(_align(line, widths)).rstrip() for line in table]
        kept = ", ".join(
            f"{name} {c.count} ({c.nbytes / MIB:.1f} MiB)" for name, c in sorted(self.kept.items())
        )
        checked = f" ({self.checked} checked)" if self.checked else ""
        lines += [
            f"kept: {kept or 'none'}",
            f"deduplicated: {self.deduplicated.count} ({self.deduplicated.nbytes / MIB:.1f} MiB); "
            f"over budget: {self.over_budget.count}; spilled: {self.spilled.count}",
            f"unpacked {self.unpacks}{checked}, decoded {self.decodes}, fetched {self.fetched} on demand and "
            f"{self.prefetched} ahead, waited {self.seconds_waited * 1e3:.1f} ms",
            f"held: host {self.host_bytes / MIB:.1f} MiB (peak {self.host_peak / MIB:.1f}), device "
            f"{self.device_bytes / MIB:.1f} MiB (peak {self.device_peak / MIB:.1f}), {self.tickets} tickets",
        ]
        if self.plan:
            lines += ["", self.plan]
        return "\n".join(lines)


class Tally:
    """The counters behind a report. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._classes: dict[_Class, TensorClass] = {}
        self._kept: defaultdict[str, Count] = defaultdict(Count)
        self._counts: defaultdict[str, Count] = defaultdict(Count)

    def encoded(self, kind: Kind, packet: Packet) -> None:
        key: _Class = kind.shape, packet.lane, packet.bits
        with self._lock:
            known = self._classes.get(key)
            if known is None:
                if len(self._classes) >= MAX_CLASSES:
                    key = None, packet.lane, packet.bits
                dtype, shape = key[0] or (None, None)
                known = self._classes.setdefault(key, TensorClass(dtype, shape, packet.lane, packet.bits))
            known.add(packet)

    def kept(self, reason: str, nbytes: int) -> None:
        with self._lock:
            self._kept[reason].add(nbytes)

    def add(self, name: str, nbytes: int = 0) -> None:
        """Count one of "deduplicated", "over_budget", "spilled", "unpacks", "checked" or "decodes"."""
        with self._lock:
            self._counts[name].add(nbytes)

    def classes(self) -> tuple[TensorClass, ...]:
        with self._lock:
            rows = [TensorClass(**vars(row)) for row in self._classes.values()]
        return tuple(sorted(rows, key=lambda row: -row.bytes_in))

    def reasons(self) -> dict[str, Count]:
        with self._lock:
            return {name: Count(c.count, c.nbytes) for name, c in self._kept.items()}

    def count(self, name: str) -> Count:
        with self._lock:
            c = self._counts[name]
            return Count(c.count, c.nbytes)


def _cells(row: TensorClass) -> tuple[str, ...]:
    if row.dtype is None or row.shape is None:
        name = "total" if row.lane == "all" else "other shapes"
    else:
        name = f"{str(row.dtype).removeprefix('torch.')} {list(row.shape)}"
    error = "not measured" if isnan(row.worst_error) else f"{row.worst_error:.2e}" if row.worst_error else "0"
    ratio = "-" if isnan(row.ratio) else f"{row.ratio:.2f}"
    sizes = (f"{row.bytes_in / MIB:.1f}", f"{row.bytes_wire / MIB:.1f}")
    lane = f"{row.lane}, {row.bits} bits" if row.bits else row.lane
    return name, lane, str(row.count), *sizes, ratio, error


def _align(line: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        cell.ljust(w) if i < 2 else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(line, widths, strict=True))
    ]
