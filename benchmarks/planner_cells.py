"""Cells of the benchmark of the planner: every lane for a tensor over a path, in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isfinite
from random import Random
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from common import timing_event
from planner_paths import Path, Setting, round_trip
from planner_summary import ratio_of
from torch import Tensor

from sidelane.codec.lane import Lane
from sidelane.pipeline.chain import AUTO_WIRES, Chain
from sidelane.pipeline.choice import Decision, choose
from sidelane.pipeline.lanes import decode_packet
from sidelane.pipeline.samples import Probes, lane_named
from sidelane.pipeline.tensor_auto import AutoLane

Row = dict[str, Any]

LANES = ("raw", "exact", "packed:8", "packed:4", "packed:2")
LEAST, MOST = 5, 61  # rounds of a cell
STAGED = 7  # round trips whose stages are shown
DEPTH, IN_CHAIN, WARM = 8, 32, 2  # of chains; tensors of a round; rounds that do not count
LINE = (
    "{path:14} {tensor:7} {load:5} {lane:9} predicted {predicted_ms:>8} measured {measured_ms:>8} ms, "
    "{over_raw:.3f} of raw {marks}"
)


@dataclass
class Rounds:
    """Rounds that fit in a time: from `LEAST` to `MOST`."""

    seconds: float
    most: int = MOST

    def __iter__(self) -> Iterator[int]:
        end = perf_counter() + self.seconds
        i = 0
        while i < LEAST or (i < self.most and perf_counter() < end):
            yield i
            i += 1


def gate(path: Path, x: Tensor) -> dict[str, str]:
    """The lane in which each one stores `x`. Raises RuntimeError unless every lane brings back over `path`
    what it encodes."""
    stored = {}
    for name in LANES:
        lane = lane_named(name)
        packet = lane.encode(x)
        stored[name] = packet.lane
        expected = lane.decode(packet)
        for back in round_trip(path, name, x):
            if not torch.equal(back, expected) or (lane.exact and not torch.equal(back, x)):
                raise RuntimeError(f"lane '{name}' over {path.name} gives wrong results: no times")
    return stored


def cell(
    setting: Setting, path: Path, kind: str, x: Tensor, load: str, probes: Probes, seconds: float
) -> list[Row]:
    """Rows of all lanes for `x` over `path`."""
    stored = setting.apart(lambda: gate(path, x))
    pick = partial(choose, x, path.wires, setting.machine, load, name=kind, probes=probes)
    any_lane, exact = (pick(exact=exact, together=path.together) for exact in (False, True))
    auto = AutoLane(path.wires, setting.machine, load, together=path.together, probes=probes)
    lanes: dict[str, str | AutoLane] = {name: name for name in LANES} | {"auto": auto}
    times: dict[str, list[float]] = {name: [] for name in lanes}
    guess = dict.fromkeys(lanes, 2e-3)
    order = Random(0)
    for i in Rounds(seconds):
        for name in order.sample(list(lanes), len(lanes)):
            once = partial(round_trip, path, lanes[name], x)
            setting.apart(once)  # memory and code as this lane leaves them
            taken = setting.timed(once, load, guess[name])
            guess[name] = taken / 2  # it is of the time beside the load
            if i:
                times[name].append(taken / path.together)
    took = setting.apart(lambda: auto.decide(x)).lane
    if path.together == 1:
        for name in ("raw", "exact"):
            show_stages(setting, path, name, x, load, any_lane, guess[name])
    about = {"path": path.name, "group": path.group, "simulated": int(path.simulated), "tensor": kind}
    return rows_of(about, x, load, any_lane, exact, stored | {"auto": ""}, took, times)


def show_stages(
    setting: Setting, path: Path, lane: str, x: Tensor, load: str, decision: Decision, guess: float
) -> None:
    """Print medians of what the stages of a round trip take, each with its prediction in brackets."""
    found = [_staged(setting, path, lane, x, load, guess) for _ in range(STAGED)]
    stages = decision.candidates[lane].stages
    encode, decode = (stages.get(f"{way} {lane}", 0.0) for way in ("encode", "decode"))
    told = encode, sum(stages.values()) - encode - decode, decode
    measured = (median(times) for times in zip(*found, strict=True))
    columns = zip(("encode", "way", "decode"), measured, told, strict=True)
    text = ", ".join(f"{name} {1e6 * a:.0f} ({1e6 * b:.0f})" for name, a, b in columns)
    print(f"stages of {lane}, {load}, us: {text}", flush=True)


def _staged(setting: Setting, path: Path, lane: str, x: Tensor, load: str, guess: float) -> list[float]:
    """Seconds of encode, of the way out and back and of decode in one round trip, on the device's clock."""
    stamps: list[Any] = []

    def stamp() -> None:
        if setting.stream is None:
            stamps.append(perf_counter())
        else:
            stamps.append(timing_event())
            stamps[-1].record()

    def work() -> None:
        stamp()
        packets = [lane_named(lane).encode(x)]
        stamp()
        back = path.carry(packets)
        stamp()
        for packet in back:
            decode_packet(packet)
        stamp()

    setting.timed(work, load, guess)
    if setting.stream is None:
        return [b - a for a, b in pairwise(stamps)]
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(stamps)]


def chain_cell(setting: Setting, kind: str, x: Tensor, load: str, seconds: float) -> list[Row]:
    """Rows of all lanes for many of `x` out and then back through a chain, lanes in turns. Each round has new
    chains, as it depends on the CPUs that threads of a chain woke on how fast it is."""
    pick = partial(choose, x, AUTO_WIRES, setting.machine, load, name=kind, together=DEPTH)
    any_lane, exact = (pick(exact=exact) for exact in (False, True))
    stored = setting.apart(lambda: {name: lane_named(name).encode(x).lane for name in LANES})
    auto = AutoLane(AUTO_WIRES, setting.machine, load, together=DEPTH)
    lanes: dict[str, Lane] = {name: lane_named(name) for name in LANES} | {"auto": auto}
    times: dict[str, list[float]] = {name: [] for name in lanes}
    out: dict[str, list[float]] = {name: [] for name in lanes}
    guess: dict[str, float] = {}
    order = Random(0)

    def work(chain: Chain, name: str) -> None:
        begin = perf_counter()
        tickets = [chain.send(x) for _ in range(IN_CHAIN)]
        chain.flush()
        out[name].append((perf_counter() - begin) / IN_CHAIN)
        for _ in chain.receive_all(tickets):
            pass

    for i in Rounds(seconds):
        for name in order.sample(list(lanes), len(lanes)):
            with Chain(lanes[name], depth=DEPTH) as chain:
                once = partial(work, chain, name)
                if name not in guess:
                    guess[name] = setting.timed(once)
                for _ in chain.stream([x] * DEPTH):
                    pass
                taken = setting.timed(once, load, guess[name])
            guess[name] = taken / 2
            if i >= WARM:
                times[name].append(taken / IN_CHAIN)
    took = setting.apart(lambda: auto.decide(x)).lane
    ways = ", ".join(f"{name} {median(found[1 + WARM :]) * 1e3:.3f}" for name, found in out.items())
    print(f"of these on the way out: {ways}\n{auto.explain()}", flush=True)
    about = {"path": "chain", "group": "chain", "simulated": 0, "tensor": kind}
    return rows_of(about, x, load, any_lane, exact, stored | {"auto": ""}, took, times)


def rows_of(
    about: Row,
    x: Tensor,
    load: str,
    any_lane: Decision,
    exact: Decision,
    stored: dict[str, str],
    took: str,
    times: dict[str, list[float]],
) -> list[Row]:
    rows = []
    for lane, found in times.items():
        each = any_lane.candidates.get(lane)
        low, middle, high = quantiles(found, n=4)
        over, error = ratio_of(found, times["raw"])
        predicted = each.seconds if each else exact.candidates[took].seconds
        sample = each.sample if each else None
        rows.append(
            about
            | {
                "dtype": str(x.dtype).removeprefix("torch."),
                "bytes": x.nbytes,
                "load": load,
                "lane": lane,
                "stored": stored[lane],
                "took": took if lane == "auto" else lane,
                "ratio": round(1 / sample.share, 3) if sample else "",
                "rel_error": f"{sample.rel_error:.3g}" if sample else "",
                "predicted_ms": round(predicted * 1e3, 4) if isfinite(predicted) else "",
                "measured_ms": round(middle * 1e3, 4),
                "measured_p25": round(low * 1e3, 4),
                "measured_p75": round(high * 1e3, 4),
                "over_raw": round(over, 4),
                "over_raw_se": round(error, 4),
                "rounds": len(found),
                "any": int(lane == any_lane.lane),
                "exact": int(lane == exact.lane),
            }
        )
    for row in rows:
        marks = [policy for policy in ("any", "exact") if row[policy]]
        marks += [f"took {took}"] if row["lane"] == "auto" else []
        print(LINE.format(marks=" ".join(marks), **row), flush=True)
    return rows
