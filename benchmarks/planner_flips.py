"""Flips of the benchmark of the planner: the rate of a wire at which a lane and raw take the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log, nan
from operator import attrgetter
from random import Random
from statistics import median
from typing import Any

from common import Turn
from planner_paths import Path, Setting, Simulated, round_trip
from planner_summary import crossing, flip_of, ratio_of
from torch import Tensor

from sidelane.codec.packet import Packet
from sidelane.pipeline.choice import choose
from sidelane.pipeline.decision import Residuals
from sidelane.pipeline.lanes import decode_packet
from sidelane.pipeline.machine import MAX_SIZE, Curve, Machine
from sidelane.pipeline.planner import crossover
from sidelane.pipeline.prediction import speed_of
from sidelane.pipeline.samples import Kind, Probes, Sample, kind_of, lane_named

Row = dict[str, Any]
Stages = dict[str, tuple[float, float, float]]  # seconds of encode, carry and decode, by lane

FLIP_LANES = ("exact", "packed:8", "packed:4")
FLIP_RATES = tuple(0.15e9 * 1.5**i for i in range(13))  # bytes/s, to 19.5e9
SLOWEST = 0.02  # seconds that a tensor takes raw
FINE = tuple(1.12**i for i in range(-4, 5))  # of a rate around which a flip is sought
COARSE_ROUNDS, FINE_ROUNDS = 5, 11
FAST = 25e9  # bytes/s at which overheads are timed
MOST = 3  # times as many, at most, to find undisturbed ones


class Untimed(Probes):
    """As if samples had not been timed."""

    def sample(self, kind: Kind, lane: str, tensor: Tensor) -> Sample:
        return replace(super().sample(kind, lane, tensor), nbytes=0)


def flips(setting: Setting, path: Simulated, kind: str, x: Tensor) -> list[Row]:
    """The rate of a wire out at which each lane and raw take the same time: by the tables alone ("tables"),
    as a first decision predicts it, with a sample that is timed ("predicted"), and with what both sweeps
    taught about encode and decode ("learned"). Samples, overheads and sweeps are of an undisturbed host."""
    lanes = ("raw", *FLIP_LANES)
    overheads = _overheads(setting, path, x, lanes)
    probes = setting.quiet.undisturbed(partial(_probes, x, kind))
    rows, residuals, untimed = [], Residuals(), Untimed()
    swept = [rate for rate in FLIP_RATES if x.nbytes <= SLOWEST * rate]
    coarse = sweep(setting, path, x, swept, lanes, COARSE_ROUNDS, residuals)
    for lane in FLIP_LANES:

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
        near = crossing(swept, coarse.gaps[lane])
        measured, last = nan, coarse
        if near is not None:
            rates = [near * part for part in FINE]
            last = sweep(setting, path, x, rates, ("raw", lane), FINE_ROUNDS, residuals)
            measured = flip_of(rates, last.gaps[lane], near) / 1e9
        row |= {"learned": predicted(residuals, probes), "measured": measured}
        row |= {"slowed": round(last.slowed, 2), "left_out": last.left_out}
        for name in ("raw", lane):
            show(setting, x, name, probes.sample(kind_of(x, kind), name, x), residuals)
        print(f"flip of {lane}, {kind}, GB/s: {row}", flush=True)
        rows.append({"tensor": kind, "bytes": x.nbytes, "lane": lane} | row)
    return rows


def _overheads(setting: Setting, path: Simulated, x: Tensor, lanes: Sequence[str]) -> dict[str, Curve]:
    """Seconds that a packet of each lane takes besides both wires, which is the host's time."""
    packets = setting.apart(lambda: {lane: lane_named(lane).encode(x) for lane in lanes})
    turns = least_disturbed(taken(setting, path, x, [FAST], lanes, FINE_ROUNDS)[FAST], FINE_ROUNDS)
    other = setting.machine.wires[path.other]
    found = {}
    for lane, packet in packets.items():
        carry = median(turn.value[lane][1] for turn in turns)
        seconds = max(carry - packet.nbytes / FAST - other(packet.nbytes), 1e-9)
        found[lane] = Curve((1, MAX_SIZE), (seconds,) * 2)
    return found


def _probes(x: Tensor, kind: str) -> Probes:
    probes = Probes()
    for lane in ("raw", *FLIP_LANES):
        probes.sample(kind_of(x, kind), lane, x)
    return probes


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


@dataclass(frozen=True)
class Sweep:
    """Of turns in which a tensor crosses in each lane.

    Attributes:
        gaps: for each rate log(lane / raw), the median over turns.
        slowed: the worst turn that counts, by the loop of Python. left_out: turns that were more disturbed.
    """

    gaps: dict[str, list[float]]
    slowed: float
    left_out: int


def sweep(
    setting: Setting,
    path: Simulated,
    x: Tensor,
    rates: Sequence[float],
    lanes: Sequence[str],
    rounds: int,
    residuals: Residuals,
) -> Sweep:
    """`rounds` turns at each rate in which others did not disturb the host, or the least disturbed of `MOST`
    times as many, rates and lanes in random order. `residuals` learns encode and decode of these turns."""
    turns = taken(setting, path, x, rates, lanes, rounds)
    chosen = {rate: least_disturbed(found, rounds) for rate, found in turns.items()}
    for turn in sorted((turn for found in chosen.values() for turn in found), key=attrgetter("begin")):
        learn(setting.machine, x, turn.value, residuals)
    gaps = {
        lane: [log(ratio_of(_totals(found, lane), _totals(found, "raw"))[0]) for found in chosen.values()]
        for lane in lanes
    }
    slowed = max(turn.loop for found in chosen.values() for turn in found) / setting.quiet.least
    return Sweep(gaps, slowed, sum(len(turns[rate]) - len(chosen[rate]) for rate in rates))


def taken(
    setting: Setting, path: Simulated, x: Tensor, rates: Sequence[float], lanes: Sequence[str], rounds: int
) -> dict[float, list[Turn[Stages]]]:
    """Turns at each rate, `rounds` of which others did not disturb, or `MOST` times as many."""
    turns: dict[float, list[Turn[Stages]]] = {rate: [] for rate in rates}
    order, missing = Random(0), list(rates)
    for _ in range(MOST * rounds):
        for rate in order.sample(missing, len(missing)):
            path.pace(rate)
            work = partial(in_turn, setting, path, x, order.sample(list(lanes), len(lanes)))
            turns[rate].append(setting.quiet.run(work))
        missing = [rate for rate in rates if sum(map(setting.quiet.is_quiet, turns[rate])) < rounds]
        if not missing:
            break
    return turns


def least_disturbed(turns: Sequence[Turn[Stages]], count: int) -> list[Turn[Stages]]:
    return sorted(turns, key=attrgetter("loop"))[:count]


def in_turn(setting: Setting, path: Simulated, x: Tensor, lanes: Sequence[str]) -> Stages:
    """Seconds of the stages of each lane, each after a round trip that is not timed."""
    found = {}
    for lane in lanes:
        setting.apart(partial(round_trip, path, lane, x))
        found[lane] = stages(setting, path, lane, x)
    return found


def _totals(turns: Sequence[Turn[Stages]], lane: str) -> list[float]:
    return [sum(turn.value[lane]) for turn in turns]


def learn(machine: Machine, x: Tensor, found: Stages, residuals: Residuals) -> None:
    """Observe encode and decode of each lane beside what the tables of the profile say."""
    for lane, (encode, _, decode) in found.items():
        speed = speed_of(machine, lane, x.dtype, "idle")
        if speed is not None:
            residuals.observe(f"encode {lane}", x.nbytes, speed.encode(x.nbytes), encode)
            residuals.observe(f"decode {lane}", x.nbytes, speed.decode(x.nbytes), decode)


def stages(setting: Setting, path: Path, lane: str, x: Tensor) -> tuple[float, float, float]:
    """Seconds of encode, of the way out and back and of decode, one after the other."""
    packets: list[Packet] = []
    encode = setting.timed(lambda: packets.append(lane_named(lane).encode(x)))
    carry = setting.timed(lambda: packets.extend(path.carry(packets)))
    return encode, carry, setting.timed(lambda: decode_packet(packets[-1]))
