"""Flips of the benchmark of the planner: the rate of a wire at which a lane and raw take the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log, nan
from operator import attrgetter
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

from common import Turn
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
Stages = dict[str, tuple[float, float, float]]  # seconds of encode, carry and decode, by lane

FLIP_LANES = ("exact", "packed:8", "packed:4")
FLIP_RATES = tuple(0.15e9 * 1.5**i for i in range(13))  # bytes/s, to 19.5e9
SLOWEST = 0.02  # seconds that a tensor takes raw
FINE = tuple(1.12**i for i in range(-4, 5))  # of a rate around which a flip is sought
COARSE_ROUNDS, FINE_ROUNDS = 5, 11
FAST = 25e9  # bytes/s at which overheads are timed
MOST = 3  # times as many, at most, to find undisturbed ones


@dataclass(frozen=True)
class Sweep:
    """Turns by rate in which a tensor crosses in each lane, and how many were left out."""

    turns: dict[float, list[Turn[Stages]]]
    left_out: int

    def gaps(self, lane: str) -> list[float]:
        """For each rate log(lane / raw), the median over turns."""
        return [
            log(ratio_of(*([sum(turn.value[name]) for turn in turns] for name in (lane, "raw")))[0])
            for turns in self.turns.values()
        ]


class Untimed(Probes):
    """As if samples had not been timed."""

    def sample(self, kind: Kind, lane: str, tensor: Tensor) -> Sample:
        return replace(super().sample(kind, lane, tensor), nbytes=0)


def flips(setting: Setting, path: Simulated, kind: str, x: Tensor, seconds: float) -> list[Row]:
    """The rate of a wire out at which each lane and raw take the same time: by the tables alone ("tables"),
    as a first decision predicts it, with a sample that is timed ("predicted"), and with what both sweeps
    taught about encode and decode ("learned").

    After `seconds` nothing is repeated because others disturbed it. loop_us: of the sample or the median turn
    of a rate, whichever was disturbed most; left_out: turns that were more disturbed.
    """
    lanes = ("raw", *FLIP_LANES)
    take = partial(taken, setting, path, x, until=perf_counter() + seconds)
    begun = take([FAST], lanes, FINE_ROUNDS)
    overheads = _overheads(setting, path, x, begun)
    sampled = setting.quiet.undisturbed(partial(_probes, x, kind))
    probes, rows, residuals, untimed = sampled.value, [], Residuals(), Untimed()
    coarse = take([rate for rate in FLIP_RATES if x.nbytes <= SLOWEST * rate], lanes, COARSE_ROUNDS)
    learn(setting, x, coarse, residuals)
    for lane in FLIP_LANES:

        def predicted(learned: Residuals, samples: Probes, lane: str = lane) -> float:
            def time_of(rate: float, lane: str) -> float:
                wires = rate, path.other, overheads[lane]
                decision = choose(
                    x, wires, setting.machine, exact=False, name=kind, residuals=learned, probes=samples
                )
                return decision.candidates[lane].seconds

            rate = crossover(partial(time_of, lane=lane), partial(time_of, lane="raw"), 1e7, 1e12, 30)
            return (rate or nan) / 1e9

        row = {"tables": predicted(Residuals(), untimed), "predicted": predicted(Residuals(), probes)}
        near = crossing(list(coarse.turns), coarse.gaps(lane))
        measured, fine = nan, coarse
        if near is not None:
            fine = take([near * part for part in FINE], ("raw", lane), FINE_ROUNDS)
            learn(setting, x, fine, residuals)
            measured = flip_of(list(fine.turns), fine.gaps(lane), near) / 1e9
        used: list[Sequence[Turn[Any]]] = [[sampled], *begun.turns.values(), *fine.turns.values()]
        loop = max(median(turn.loop for turn in turns) for turns in used)
        row |= {"learned": predicted(residuals, probes), "measured": measured}
        row |= {"loop_us": loop, "left_out": fine.left_out}
        for name in ("raw", lane):
            show(setting, x, name, probes.sample(kind_of(x, kind), name, x), residuals)
        print(f"flip of {lane}, {kind}, GB/s: {row}", flush=True)
        rows.append({"tensor": kind, "bytes": x.nbytes, "lane": lane} | row)
    return rows


def _overheads(setting: Setting, path: Simulated, x: Tensor, sweep: Sweep) -> dict[str, Curve]:
    """Seconds that a packet of each lane takes besides both wires, which is the host's time."""
    other = setting.machine.wires[path.other]
    found = {}
    for lane in sweep.turns[FAST][0].value:
        packet = setting.apart(partial(lane_named(lane).encode, x))
        carry = median(turn.value[lane][1] for turn in sweep.turns[FAST])
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


def taken(
    setting: Setting,
    path: Simulated,
    x: Tensor,
    rates: Sequence[float],
    lanes: Sequence[str],
    rounds: int,
    until: float,
) -> Sweep:
    """`rounds` turns at each rate in which others did not disturb the host, or the least disturbed of `MOST`
    times as many, or of those begun by `until`. Rates and lanes are in random order."""
    turns: dict[float, list[Turn[Stages]]] = {rate: [] for rate in rates}
    order, missing = Random(0), list(rates)
    for done in range(MOST * rounds):
        if not missing or (done >= rounds and perf_counter() > until):
            break
        for rate in order.sample(missing, len(missing)):
            path.pace(rate)
            work = partial(in_turn, setting, path, x, order.sample(list(lanes), len(lanes)))
            turns[rate].append(setting.quiet.run(work))
        missing = [rate for rate in rates if sum(map(setting.quiet.is_quiet, turns[rate])) < rounds]
    chosen = {rate: sorted(found, key=attrgetter("loop"))[:rounds] for rate, found in turns.items()}
    return Sweep(chosen, sum(map(len, turns.values())) - sum(map(len, chosen.values())))


def in_turn(setting: Setting, path: Simulated, x: Tensor, lanes: Sequence[str]) -> Stages:
    """Seconds of the stages of each lane, each after a round trip that is not timed."""
    found = {}
    for lane in lanes:
        setting.apart(partial(round_trip, path, lane, x))
        found[lane] = stages(setting, path, lane, x)
    return found


def learn(setting: Setting, x: Tensor, sweep: Sweep, residuals: Residuals) -> None:
    """Observe encode and decode of each lane in undisturbed turns, in the order of time, beside what the
    profile says."""
    turns = [turn for turns in sweep.turns.values() for turn in turns if setting.quiet.is_quiet(turn)]
    for turn in sorted(turns, key=attrgetter("begin")):
        for lane, (encode, _, decode) in turn.value.items():
            speed = speed_of(setting.machine, lane, x.dtype, "idle")
            if speed is not None:
                residuals.observe(f"encode {lane}", x.nbytes, speed.encode(x.nbytes), encode)
                residuals.observe(f"decode {lane}", x.nbytes, speed.decode(x.nbytes), decode)


def stages(setting: Setting, path: Path, lane: str, x: Tensor) -> tuple[float, float, float]:
    """Seconds of encode, of the way out and back and of decode, one after the other."""
    packets: list[Packet] = []
    encode = setting.timed(lambda: packets.append(lane_named(lane).encode(x)))
    carry = setting.timed(lambda: packets.extend(path.carry(packets)))
    return encode, carry, setting.timed(lambda: decode_packet(packets[-1]))
