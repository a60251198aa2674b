"""Measure a machine in seconds: wires, lanes, matrix products, engines; what is missing is named.

Every step has a limit and is watched, so that a wire that stalls costs its own curves only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from sidelane.codec.nvenc import encoder_caps
from sidelane.codec.probe import probe_nvdec
from sidelane.errors import DriverError, LaneUnavailable, ProfileError
from sidelane.pipeline import probe_chain, probe_lanes, probe_wires
from sidelane.pipeline.machine import DISK_FOLDER, LOAD_SIDE, Curve, Machine, current_key
from sidelane.pipeline.sampling import (
    FAILURES,
    Load,
    host_seconds,
    sample,
    stream_seconds,
    watched,
)
from sidelane.pipeline.streams import side_stream

KIB, MIB = 1 << 10, 1 << 20
SIZES = (8 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
DISK = tuple(64 * KIB << i for i in range(9))  # sizes for the disk, to 16 MiB
VIDEO = 64 * KIB, 16 * MIB  # the smallest and the largest for the video lane
SIDE, SIDE_CPU = 8192, 512  # of the matrices whose products are timed
BUDGET = 27.0  # seconds for everything
OVER = 2.5  # at most beyond it
GRACE = 3.0  # seconds beyond its limit after which a step counts as stalled
COMPILE = 6.0  # the same where kernels are compiled or libraries loaded

Progress = Callable[[str, int, int], None]


@dataclass
class Tables:
    """What was found so far beside the lanes; see `Machine`."""

    wires: dict[str, Curve] = field(default_factory=dict)
    gemm: float = 0.0
    engines: dict[str, int] = field(default_factory=lambda: {"nvenc": 0, "nvdec": 0})


@dataclass(frozen=True)
class Step:
    """A part of the measurement: `work` takes the seconds that it may use. `slack`: beyond them, at most.
    `again`: what an earlier step has measured; it may fail."""

    name: str
    seconds: float
    work: Callable[[float], None]
    slack: float = GRACE
    again: bool = False


def measure(
    spill_dir: str | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    budget: float = BUDGET,
    progress: Progress = lambda name, i, n: None,
) -> Machine:
    """Measure this machine on the current GPU, or without one its disk, its network stack and its CPU lanes.

    Args:
        spill_dir: folder of the disk wire; default: the system's for temporary files.
        sizes: bytes, ascending, multiples of 8 KiB; each curve has those that it has time and room for.
        budget: seconds; steps that do not fit are left out.
        progress: called before each step with its name, its number and how many there are.

    Raises ProfileError when not even a matrix product runs.
    """
    end = perf_counter() + budget
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    tables, lanes = Tables(), probe_lanes.Lanes(device)
    left_out: dict[str, str] = {}
    folder = tempfile.gettempdir() if spill_dir is None else spill_dir
    steps = list(_steps(tables, lanes, device, tuple(sizes), folder))
    for i, step in enumerate(steps):
        progress(step.name, i, len(steps))
        limit = min(step.seconds, end - perf_counter())
        try:
            if limit <= 0:
                raise ProfileError(f"no time left in {budget:.0f} s: run again, kernels stay compiled")
            watched(partial(step.work, limit), min(limit + step.slack, end - perf_counter() + OVER))
        except FAILURES as error:
            if not step.again:
                left_out[step.name] = " ".join(str(error).split())[:300] or type(error).__name__
        else:
            left_out.pop(step.name, None)
    if device is None:
        left_out["busy"] = "no GPU whose matrix products could be a load"
    if not tables.gemm:
        raise ProfileError(f"no matrix product runs here ({left_out['products']}): see sidelane doctor")
    # Copies, as a step that stalled may go on and add to its tables.
    found = dict(tables.wires), dict(lanes.curves), tables.gemm, dict(tables.engines)
    disk = {DISK_FOLDER: str(Path(folder).resolve())} if "disk write" in found[0] else {}
    return Machine(current_key() | disk, *found, left_out=left_out)


def _steps(
    tables: Tables, lanes: probe_lanes.Lanes, device: torch.device | None, sizes: tuple[int, ...], folder: str
) -> Iterator[Step]:
    """Those without which planning makes no sense come first."""
    yield Step("products", 0.8, partial(_gemm, tables, device), slack=COMPILE)
    if device is not None:
        yield Step("d2h, h2d", 2.4, lambda limit: tables.wires.update(probe_wires.pcie(device, sizes, limit)))
        yield Step("kernels", 8.0, lanes.compile)
    some = tuple(size for size in DISK if sizes[0] <= size <= sizes[-1]) or sizes[-1:]
    yield Step("disk", 2.5, lambda limit: tables.wires.update(probe_wires.disk(folder, some, limit, device)))
    yield Step("tcp", 1.0, lambda limit: tables.wires.update(probe_wires.tcp(sizes, limit)))
    if device is not None:
        yield Step("engines", 1.0, lambda limit: tables.engines.update(_engines(device)))
    if device is not None and torch.cuda.device_count() > 1:
        yield Step("peer", 1.0, lambda limit: tables.wires.update(probe_wires.peer(device, sizes, limit)))
    load = partial(_load, tables, device)
    each = [
        (f"{name} {dtype}", partial(lanes.measure, name, dtype, sizes, load))
        for name, dtype in probe_lanes.pairs()
    ]
    for name, work in each:
        yield Step(name, 0.65, work, COMPILE)
    turns: list[Step] = []
    if device is not None:
        turns = [
            Step("lanes in turns", 0.5, lanes.in_turns, again=True),
            Step("lanes beside products", 1.3, partial(lanes.in_turns_beside, load), again=True),
        ]
        # Turns come three times, as the host may be slow for seconds; the last ones where time is left.
        yield Step("chain", 2.0, lambda limit: tables.wires.update(probe_chain.chains(device, limit)))
        yield from turns
        yield from turns
    few = tuple(size for size in sizes if VIDEO[0] <= size <= VIDEO[1])
    for dtype in probe_lanes.DTYPES:
        yield Step(f"video {dtype}", 4.0, partial(lanes.measure, "video", dtype, few, load), COMPILE)
    if device is None:
        for name, work in each:
            yield Step(name, 0.3, work, COMPILE, again=True)
    yield from turns


def _gemm(tables: Tables, device: torch.device | None, limit: float) -> None:
    """After a quarter of the limit, so that clocks are those of a busy device."""
    side = SIDE_CPU if device is None else SIDE
    product = _product(device, side)
    stream = None if device is None else side_stream(device, "products of a profile")

    def once(side: int) -> float:
        return host_seconds(product) if stream is None else stream_seconds(stream, product)

    once(side)
    warm = perf_counter() + limit / 4
    while perf_counter() < warm:
        once(side)
    tables.gemm = 2 * side**3 / sample((side,), once, limit / 2)(side)


def _product(device: torch.device | None, side: int) -> Callable[[], object]:
    a, b, out = (torch.randn(side, side, device=device).bfloat16() for _ in range(3))
    probe_lanes.synchronize(device)
    return partial(torch.mm, a, b, out=out)


def _engines(device: torch.device) -> dict[str, int]:
    """Raises LaneUnavailable or DriverError when the driver's decoder library does not answer."""
    try:
        nvenc = encoder_caps(device).engines
    except (LaneUnavailable, DriverError):
        nvenc = 0
    return {"nvenc": nvenc, "nvdec": max((c.engines for c in probe_nvdec(device) if c.supported), default=0)}


def _load(tables: Tables, device: torch.device | None) -> Load:
    """Raises ProfileError where no product was measured."""
    if device is None or not tables.gemm:
        raise ProfileError("no matrix product was measured that could be a load")
    return Load(device, _product(device, LOAD_SIDE), 2 * LOAD_SIDE**3 / tables.gemm)
