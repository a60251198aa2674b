"""Flips of the benchmark of the planner: the rate of a wire at which a lane and raw take the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import log, nan
from random import Random
from typing import Any

from planner_paths import Path, Setting, Simulated, round_trip
from planner_summary import crossing, flip_of, ratio_of
from torch import Tensor

from sidelane.codec.packet import Packet
from sidelane.pipeline.choice import choose
from sidelane.pipeline.decision import Residuals
from sidelane.pipeline.lanes import decode_packet
from sidelane.pipeline.machine import MAX_SIZE, Curve
from sidelane.pipeline.planner import crossover
from sidelane.pipeline.prediction import speed_of
from sidelane.pipeline.samples import Kind, Probes, Sample, kind_of, lane_named

Row = dict[str, Any]

FLIP_LANES = ("exact", "packed:8", "packed:4")
FLIP_RATES = tuple(0.15e9 * 1.5**i for i in range(13))  # bytes/s, to 19.5e9
SLOWEST = 0.02  # seconds that a tensor takes raw
FINE = tuple(1.12**i for i in range(-4, 5))  # of a rate around which a flip is sought
COARSE_ROUNDS, FINE_ROUNDS = 5, 11


class Untimed(Probes):
    """As if samples had not been timed."""

    def sample(self, kind: Kind, lane: str, tensor: Tensor) -> Sample:
        return replace(super().sample(kind, lane, tensor), nbytes=0)


def flips(setting: Setting, path: Simulated, kind: str, x: Tensor) -> list[Row]:
    """The rate of a wire out at which each lane and raw take the same time: by the tables alone ("tables"),
    as a first decision predicts it, with a sample that is timed ("predicted"), and with what both sweeps
    taught about encode and decode ("learned")."""
    path.pace(25e9)
    lanes = ("raw", *FLIP_LANES)
    packets = setting.apart(lambda: [lane_named(lane).encode(x) for lane in lanes])
    found = zip(lanes, path.overheads(packets), strict=True)
    overheads = {lane: Curve((1, MAX_SIZE), (seconds,) * 2) for lane, seconds in found}
    rows, residuals, untimed = [], Residuals(), Untimed()
    swept = [rate for rate in FLIP_RATES if x.nbytes <= SLOWEST * rate]
    coarse = sweep(setting, path, x, swept, lanes, COARSE_ROUNDS, residuals)
    for lane in FLIP_LANES:
        probes = Probes()

        def predicted(learned: Residuals, samples: Probes, lane: str = lane) -> float:
            def seconds(rate: float, lane: str) -> float:
                wires = rate, path.other, overheads[lane]
                decision = choose(
                    x, wires, setting.machine, exact=False, name=kind, residuals=learned, probes=samples
                )
                return decision.candidates[lane].seconds

            rate = crossover(partial(seconds, lane=lane), partial(seconds, lane="raw"), 1e7, 1e12, 30)
            return (rate or nan) / 1e9

        row = {"tables": predicted(Residuals(), untimed), "predicted": predicted(Residuals(), probes)}
        near = crossing(swept, coarse[lane])
        measured = nan
        if near is not None:
            rates = [near * part for part in FINE]
            fine = sweep(setting, path, x, rates, ("raw", lane), FINE_ROUNDS, residuals)[lane]
            measured = flip_of(rates, fine, near) / 1e9
        row |= {"learned": predicted(residuals, probes), "measured": measured}
        for name in ("raw", lane):
            show(setting, x, name, probes.sample(kind_of(x, kind), name, x), residuals)
        print(f"flip of {lane}, {kind}, GB/s: {row}", flush=True)
        rows.append({"tensor": kind, "bytes": x.nbytes, "lane": lane} | row)
    return rows


def show(setting: Setting, x: Tensor, lane: str, sample: Sample, residuals: Residuals) -> None:
    """Print what kernels take by the tables, in the sample, and in the sweeps."""
    speed = speed_of(setting.machine, lane, x.dtype, "idle")
    if speed is None:
        return
    for stage, curve, seconds in (
        ("encode", speed.encode, sample.encode),
        ("decode", speed.decode, sample.decode),
    ):
        table = curve(x.nbytes)
        seen = table * residuals.factor(f"{stage} {lane}", x.nbytes)
        times = f"tables {table * 1e6:.1f}, sample {seconds * 1e6:.1f}, sweeps {seen * 1e6:.1f}"
        print(f"{stage} {lane}, us: {times}", flush=True)


def sweep(
    setting: Setting,
    path: Simulated,
    x: Tensor,
    rates: Sequence[float],
    lanes: Sequence[str],
    rounds: int,
    residuals: Residuals,
) -> dict[str, list[float]]:
    """For each rate log(lane / raw), the median over rounds. In each round rates and lanes are in random
    order, as the speed of the host drifts. `residuals` learns from encode and decode."""
    times: dict[float, dict[str, list[float]]] = {rate: {lane: [] for lane in lanes} for rate in rates}
    order = Random(0)
    for _ in range(rounds):
        for rate in order.sample(list(rates), len(rates)):
            path.pace(rate)
            for lane in order.sample(list(lanes), len(lanes)):
                setting.apart(partial(round_trip, path, lane, x))
                encode, carry, decode = stages(setting, path, lane, x)
                times[rate][lane].append(encode + carry + decode)
                speed = speed_of(setting.machine, lane, x.dtype, "idle")
                if speed is not None:
                    residuals.observe(f"encode {lane}", x.nbytes, speed.encode(x.nbytes), encode)
                    residuals.observe(f"decode {lane}", x.nbytes, speed.decode(x.nbytes), decode)
    return {lane: [log(ratio_of(found[lane], found["raw"])[0]) for found in times.values()] for lane in lanes}


def stages(setting: Setting, path: Path, lane: str, x: Tensor) -> tuple[float, float, float]:
    """Seconds of encode, of the way out and back and of decode, one after the other."""
    packets: list[Packet] = []
    encode = setting.timed(lambda: packets.append(lane_named(lane).encode(x)))
    carry = setting.timed(lambda: packets.extend(path.carry(packets)))
    return encode, carry, setting.timed(lambda: decode_packet(packets[-1]))
