"""The cost model: what a transfer takes, serially, in chunks and over several lanes at once. Pure functions.

Times are seconds, sizes bytes, rates bytes or FLOP per second; "raw" bytes are those of the tensor before any
lane. A stage or wire is given as a function from bytes to seconds, such as a `Curve` of a measured machine.
Nothing here touches torch or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, sqrt

import numpy as np

from sidelane.errors import LaneError
from sidelane.pipeline.linear import minimise

Seconds = Callable[[float], float]  # of so many bytes

MAX_CHUNKS = 256
SCATTER = 8.0  # order of the norm of stages that overlap: their times scatter, so the busiest is not all


@dataclass(frozen=True)
class Stage:
    """One step of a transfer.

    Attributes:
        seconds: of the bytes that enter it.
        share: these bytes per raw byte: 1 for kernels, 1 / ratio for the wire of a lane.
        resource: stages of one resource never run at the same time; default: the stage has its own.
    """

    name: str
    seconds: Seconds
    share: float = 1.0
    resource: str = ""

    def __call__(self, nbytes: float) -> float:
        """Seconds of so many raw bytes."""
        return self.seconds(nbytes * self.share)


def transfer_time(wire: Seconds, nbytes: float, pieces: int = 1) -> float:
    """A transfer in equal pieces one after the other, each of which costs what `wire` says."""
    return pieces * wire(nbytes / pieces)


def serial_time(stages: Iterable[Stage], nbytes: float) -> float:
    """One stage after the other."""
    return sum(stage(nbytes) for stage in stages)


def busiest(stages: Iterable[Stage], nbytes: float) -> tuple[str, float]:
    """The resource that works longest for so many raw bytes, and how long."""
    return max(_loads(stages, nbytes).items(), key=lambda item: item[1])


def overlapped_time(stages: Iterable[Stage], nbytes: float) -> float:
    """One of many transfers whose stages overlap: somewhat more than what the busiest resource takes, since
    times scatter and at some moments another one is behind; the norm of order `SCATTER` of them all."""
    load = _loads(stages, nbytes).values()
    most = max(load)
    return most * sum((seconds / most) ** SCATTER for seconds in load) ** (1 / SCATTER) if most else 0.0


def _loads(stages: Iterable[Stage], nbytes: float) -> dict[str, float]:
    """Seconds by resource."""
    load: dict[str, float] = {}
    for stage in stages:
        resource = stage.resource or stage.name
        load[resource] = load.get(resource, 0.0) + stage(nbytes)
    return load


def pipelined_time(stages: Sequence[Stage], nbytes: float, chunks: int) -> float:
    """Equal chunks through overlapping stages: sum_s t_s(V/c) + (c - 1) max_s t_s(V/c).

    Stages of one resource count as one in the maximum. With one chunk this is `serial_time`.
    """
    return serial_time(stages, nbytes / chunks) + (chunks - 1) * busiest(stages, nbytes / chunks)[1]


def best_chunks(
    stages: Sequence[Stage], nbytes: float, *, least: int = 1, most: int = MAX_CHUNKS
) -> tuple[int, float]:
    """The power of two from `least` to `most` chunks that is fastest, and its time."""
    counts = [1 << k for k in range(most.bit_length()) if least <= 1 << k <= most] or [least]
    times = [pipelined_time(stages, nbytes, count) for count in counts]
    best = min(range(len(counts)), key=times.__getitem__)
    return counts[best], times[best]


def chunks_estimate(nbytes: float, latency: float, rates: Sequence[float]) -> float:
    """sqrt(V sum_{s not slowest} 1/rate_s / latency): where `best_chunks` lies for stages latency + V/rate
    of one latency, as a real number."""
    return sqrt(nbytes * sum(1 / rate for rate in sorted(rates)[1:]) / latency)


def peak_bytes(nbytes: float, chunks: int, ring: int, ratio: float) -> float:
    """Device memory of `ring` chunks on their way, each decoded and encoded: ring V/c (1 + 1/r)."""
    return ring * nbytes / chunks * (1 + 1 / ratio)


def fewest_chunks(nbytes: float, ring: int, ratio: float, memory: float) -> int:
    """The fewest chunks with which `peak_bytes` keeps to `memory` bytes (memory guard).

    Raises LaneError when `memory` is not above 0.
    """
    if memory <= 0:
        raise LaneError(f"memory={memory!r} leaves no room for a chunk: give bytes above 0")
    return max(ceil(peak_bytes(nbytes, 1, ring, ratio) / memory), 1)


def break_even_rate(ratio: float, encode_rate: float, decode_rate: float, pipelined: bool = False) -> float:
    """The wire rate below which a lane of this ratio beats raw: (1 - 1/r) / (1/enc + 1/dec) serially, the
    slower of the two rates with many chunks. 0 for a lane that makes nothing smaller."""
    if ratio <= 1:
        return 0.0
    if pipelined:
        return min(encode_rate, decode_rate)
    return (1 - 1 / ratio) / (1 / encode_rate + 1 / decode_rate)


def crossover(
    lane: Callable[[float], float], raw: Callable[[float], float], low: float, high: float, steps: int = 50
) -> float | None:
    """The wire rate in [low, high] at which the times `lane(rate)` and `raw(rate)` are equal, by bisection of
    its logarithm; None when the same one is faster at both ends."""

    def wins(rate: float) -> bool:
        return lane(rate) < raw(rate)

    at_low = wins(low)
    if at_low == wins(high):
        return None
    for _ in range(steps):
        middle = sqrt(low * high)
        low, high = (middle, high) if wins(middle) == at_low else (low, middle)
    return sqrt(low * high)


def step_time(compute: float, stolen: float, wire: float) -> float:
    """A step of a program whose kernels lose `stolen` seconds to a lane: max(compute + stolen, wire)."""
    return max(compute + stolen, wire)


# Recomputing instead of loading


@dataclass(frozen=True)
class Split:
    """`tokens` in front are recomputed, and of the piece behind them the first `layers` layers; all else is
    loaded, in `seconds`."""

    tokens: int
    seconds: float
    layers: int = 0


def kv_split_time(
    recomputed: float,
    tokens: int,
    activation_bytes_per_token: float,
    kv_bytes_per_token: float,
    flops_per_token: float,
    wire_rate: float,
    compute_rate: float,
    pieces: int = 1,
) -> float:
    """T(l) = l a / beta + max(l f / v, (s - l) k / beta): inputs of l tokens arrive, then keys and values of
    these are computed while those of the others arrive (KVPR, arXiv 2411.17089).

    Inputs in several equal pieces, each computed when it has arrived, are two stages that overlap.
    """
    arrive = recomputed * activation_bytes_per_token / wire_rate
    compute = recomputed * flops_per_token / compute_rate
    rest = (tokens - recomputed) * kv_bytes_per_token / wire_rate
    computed = (arrive + compute + (pieces - 1) * max(arrive, compute)) / pieces
    return max(computed, arrive + rest)


def kv_split(
    tokens: int,
    activation_bytes_per_token: float,
    kv_bytes_per_token: float,
    flops_per_token: float,
    wire_rate: float,
    compute_rate: float,
    limit: int | None = None,
    multiple: int = 1,
    pieces: int = 1,
) -> Split:
    """The l in 0..limit, a multiple of `multiple` or the limit itself, with the least `kv_split_time`.

    T is the maximum of two lines: the one of compute rises, the one of the wire falls with l only if inputs
    are smaller than keys and values, so where a >= k nothing is recomputed, else as much as takes the
    time of the rest.
    """
    most = tokens if limit is None else max(min(limit, tokens), 0)

    def at(count: int) -> Split:
        seconds = kv_split_time(
            count,
            tokens,
            activation_bytes_per_token,
            kv_bytes_per_token,
            flops_per_token,
            wire_rate,
            compute_rate,
            pieces,
        )
        return Split(count, seconds)

    if activation_bytes_per_token >= kv_bytes_per_token:
        return at(0)
    load, compute = kv_bytes_per_token / wire_rate, flops_per_token / compute_rate
    arrive = activation_bytes_per_token / wire_rate
    computed = (arrive + compute + (pieces - 1) * max(arrive, compute)) / pieces
    exact = min(tokens * load / (computed + load - arrive), most)
    lower = floor(exact / multiple) * multiple
    return min((at(lower), at(min(lower + multiple, most))), key=lambda split: split.seconds)


def prefill_flops(tokens: float, flops_per_token: float, attention_flops: float) -> float:
    """FLOP of the first `tokens` tokens of a prompt: linear in their number by the weights (2 N), quadratic
    by attention (2 n_layer d_attn, causal)."""
    return flops_per_token * tokens + attention_flops * tokens**2


def meeting_point(
    tokens: int,
    kv_bytes_per_token: float,
    flops_per_token: float,
    attention_flops: float,
    wire_rate: float,
    compute_rate: float,
    multiple: int = 512,
    layers: int = 1,
) -> Split:
    """How many tokens in front to recompute while those behind are loaded, both at the same time (Cake).

    Attention makes each token dearer than the one before, so the front is the cheap end. The time
    max(F(m) / v, (n - m) k / beta) is least where both are equal: bisected over multiples of `multiple`,
    with `tokens` as the last. With `layers`, all alike, the piece in which they meet is divided by layers
    (HCache): the first ones of a token follow from those before it, the keys and values of the others are
    loaded.
    """

    def compute(m: int) -> float:
        return prefill_flops(m, flops_per_token, attention_flops) / compute_rate

    def load(m: int) -> float:
        return (tokens - m) * kv_bytes_per_token / wire_rate

    def place(step: int) -> int:
        return min(step * multiple, tokens)

    low, high = 0, ceil(tokens / multiple)  # compute <= load holds at `low`
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if compute(place(middle)) <= load(place(middle)) else (low, middle - 1)
    m, end = place(low), place(low + 1)
    if m == end:
        return Split(m, compute(m))
    more, less = (compute(end) - compute(m)) / layers, (load(m) - load(end)) / layers  # a layer of the piece
    level = min(int((load(m) - compute(m)) / (more + less)), layers - 1)
    seconds = {j: max(compute(m) + j * more, load(m) - j * less) for j in (level, level + 1)}
    best = min(seconds, key=lambda j: (seconds[j], j))
    return Split(end, seconds[best]) if best == layers else Split(m, seconds[best], best)


# Several lanes at once


@dataclass(frozen=True)
class LaneLoad:
    """What a lane takes of each resource.

    Attributes:
        seconds: by resource ("sm", "hbm", "nvenc", "nvdec", "d2h", "h2d", "disk", "nic"), per raw byte.
        rel_error: of what it carries.
        memory: device bytes per raw byte that it carries.
    """

    seconds: Mapping[str, float]
    rel_error: float = 0.0
    memory: float = 0.0


@dataclass(frozen=True)
class Shares:
    """The fraction of the bytes for each lane, the time of all, the resources that are busy throughout."""

    fractions: dict[str, float]
    seconds: float
    binding: tuple[str, ...]


def split_lanes(
    lanes: Mapping[str, LaneLoad],
    nbytes: float,
    *,
    busy: Mapping[str, float] | None = None,
    ahead: Mapping[str, float] | None = None,
    max_rel_error: float = inf,
    memory: float = inf,
) -> Shares:
    """Fractions x of `nbytes` over lanes that run at the same time, with the least time T:

        ahead_p + V sum_l c_pl x_l <= (1 - busy_p) T for each resource p,
        sum_l error_l x_l <= max_rel_error, V sum_l memory_l x_l <= memory, sum_l x_l = 1, x >= 0.

    Args:
        busy: the part of a resource, below 1, that other work takes.
        ahead: seconds of work that a resource has to do first.

    Raises LaneError when no split keeps to the limits, or without lanes.
    """
    if not lanes:
        raise LaneError("there are no lanes to split over: give at least raw")
    busy, ahead = busy or {}, ahead or {}
    loads = list(lanes.values())
    resources = sorted({resource for load in loads for resource in load.seconds} | set(ahead))
    per_byte = np.array([[load.seconds.get(p, 0.0) for load in loads] for p in resources])
    free = np.array([1 - busy.get(p, 0.0) for p in resources])
    if (free <= 0).any():
        raise LaneError("a resource is busy all the time: leave out the lanes that need it")
    work = nbytes * per_byte
    busiest_work = work.max(0, initial=0.0)
    busiest_work[busiest_work == 0] = 1.0
    # T in units of the fastest lane alone, fractions in units of the time they keep a resource busy: all
    # numbers are about 1.
    unit = busiest_work.min() + max(ahead.values(), default=0.0)
    scale = unit / busiest_work
    rows = [np.append(work * scale / unit, -free[:, None], axis=1)]
    bounds = [np.array([-ahead.get(p, 0.0) / unit for p in resources])]
    for values, limit in (
        ([load.rel_error for load in loads], max_rel_error),
        ([nbytes * load.memory for load in loads], memory),
    ):
        if limit < inf:
            rows.append(np.append(np.array(values) * scale, 0.0)[None])
            bounds.append(np.array([limit]))
    found = minimise(
        np.append(np.zeros(len(loads)), 1.0),
        np.concatenate(rows),
        np.concatenate(bounds),
        np.append(scale, 0.0)[None],
        np.ones(1),
    )
    if found is None:
        raise LaneError("no split of the lanes keeps the limits of error and memory: add raw or raise them")
    fractions = found[:-1] * scale
    seconds = found[-1] * unit
    used = np.array([ahead.get(p, 0.0) for p in resources]) + work @ fractions
    binding = tuple(p for p, t, f in zip(resources, used, free, strict=True) if t >= f * seconds * (1 - 1e-6))
    return Shares(dict(zip(lanes, fractions.tolist(), strict=True)), float(seconds), binding)
