"""Rows of the benchmarks of codes: times beside a copy that moves as many bytes, and their gates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import append_rows, environment, microseconds, timing_event
from torch import Tensor

TOKENS, DEPTHS = 16384, (2048, 5632)
GATED = 1 << 18  # elements that are compared with the reference
PROGRAMS = (132, 264, 528, 1056, 2112)


class Rows:
    """Rows that share the environment, each beside a copy that moves as many bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: list[dict[str, Any]] = []
        self._environment = environment()
        self._copies: dict[int, float] = {}

    def copy(self, moved: int) -> float:
        """Bytes per microsecond of a copy that reads and writes `moved` bytes, in whole MiB each."""
        mib = max(moved >> 21, 1)
        if mib not in self._copies:
            self._copies[mib] = copy_bandwidth(mib << 20)
            print(f"copy of {mib} MiB {self._copies[mib] / 1e6:.3f} TB/s", flush=True)
        return self._copies[mib]

    def add(
        self,
        columns: Mapping[str, Any],
        direction: str,
        method: str,
        times: tuple[float, float, float],
        moved: int,
        raw: int,
        ratio: float | str = "",
    ) -> None:
        q1, middle, q3 = times
        copy = self.copy(moved)
        row = {
            **self._environment,
            **columns,
            "direction": direction,
            "method": method,
            "us": round(middle, 2),
            "us_q1": round(q1, 2),
            "us_q3": round(q3, 2),
            "moved_gb_s": round(moved / middle / 1e3, 1),
            "copy_gb_s": round(copy / 1e3, 1),
            "of_copy": round(moved / middle / copy, 3),
            "raw_gb_s": round(raw / middle / 1e3, 1),
            "ratio": ratio,
        }
        append_rows(self.path, [row])
        self.kept.append(row)
        names = (*columns, "direction", "method", "us", "moved_gb_s", "of_copy", "raw_gb_s", "ratio")
        print(*(row[name] for name in names), flush=True)


def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written per microsecond by the best of three copies of `nbytes`: in a graph, called, and
    by a kernel.

    A copy in a graph has been seen at two thirds of the others, which made kernels look faster than memory.
    """
    source = torch.randn(nbytes // 2, device="cuda").bfloat16()
    target = torch.empty_like(source)
    in_graph = microseconds(lambda: target.copy_(source))[1]
    by_kernel = microseconds(lambda: torch.neg(source, out=target))[1]
    called: list[float] = []
    for _ in range(20):
        begin, end = (timing_event() for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        called.append(begin.elapsed_time(end) * 1e3)
    return 2 * source.nbytes / min(in_graph, by_kernel, median(called))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def require(holds: bool, what: str) -> None:
    """Raises RuntimeError unless a gate holds."""
    if not holds:
        raise RuntimeError(f"the gate fails: {what}")
