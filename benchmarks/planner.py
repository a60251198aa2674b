"""How good predictions and choices of a lane are: predicted beside measured time of every lane.

    python benchmarks/planner.py [--seconds N] [--only PATHS] [--gpus N] [--out DIR]

A tensor is encoded, crosses a path and is decoded, one stage after the other. Paths: out to pinned memory and
back; the same with one of both ways throttled to a lower rate (`TokenBucket`; simulated); over the disk tier,
several tensors at once; and a `Chain`, many tensors in a row. Tensors are activations of a small GPT that is
trained for seconds on Python's standard library, and int8 codes of them. Loads: idle, and beside bf16 matrix
products.

Rows: each lane in each cell, with what is taken among all lanes ("any") and among exact ones; lane "auto" is
`AutoLane` itself, its decision included. Lanes take turns in random order, each once untimed before it is
timed; `over_raw` is the median ratio of times of the same round. Flips: the rate of a simulated wire at
which raw and a lane take the same time, predicted, and measured by two sweeps. Files: planner.csv,
planner_flips.csv, planner_summary.csv (see `planner_summary.figures`).

With several GPUs each has a process and a part of the work; the disk belongs to the first, which begins
alone, so that its profile of the disk is not disturbed. Without a GPU the same runs on made-up wires, to see
that it runs; nothing is written.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, log, nan
from pathlib import Path as FilePath
from random import Random
from statistics import median, quantiles
from subprocess import Popen
from time import perf_counter, sleep
from typing import Any

import torch
from common import RESULTS, append_rows, environment
from planner_paths import MIB, Host, OnDisk, Path, Setting, Simulated, round_trip
from planner_summary import crossing, flip_of, ratio_of, summary, verdicts
from planner_tensors import FULL, TINY, activations, head
from torch import Tensor

from sidelane.codec.packet import Packet
from sidelane.pipeline.chain import AUTO_WIRES, Chain
from sidelane.pipeline.choice import Decision, choose, speed_of
from sidelane.pipeline.lanes import decode_packet
from sidelane.pipeline.machine import LOAD_SIDE, MAX_SIZE, Curve, Machine
from sidelane.pipeline.planner import Residuals, crossover
from sidelane.pipeline.probe import measure
from sidelane.pipeline.samples import Probes, lane_named
from sidelane.pipeline.sampling import Load
from sidelane.pipeline.tensor_auto import AutoLane

Row = dict[str, Any]

KINDS = ("hidden", "mlp", "norm", "kv", "codes")
CHAIN_KINDS = ("hidden", "norm", "codes")
LANES = ("raw", "exact", "packed:8", "packed:4", "packed:2")
RATES = {25.0: 32, 12.5: 16, 7.0: 16, 3.0: 8, 1.25: 2, 0.125: 0.5}  # GB/s: MiB of a tensor
LEAST, MOST = 5, 61  # rounds of a cell
DEPTH, IN_CHAIN, WARM = 8, 32, 2  # of chains; tensors of a round; rounds that do not count
FLIP_KINDS, FLIP_LANES = ("hidden", "mlp", "norm", "kv"), ("exact", "packed:8", "packed:4")
FLIP_MIB = 1
FLIP_RATES = tuple(0.15e9 * 1.5**i for i in range(13))  # bytes/s, to 19.5e9
FINE = tuple(1.12**i for i in range(-4, 5))  # of a rate around which a flip is sought
COARSE_ROUNDS, FINE_ROUNDS = 5, 11
LINE = (
    "{path:14} {tensor:7} {load:5} {lane:9} predicted {predicted_ms:>8} measured {measured_ms:>8} ms, "
    "{over_raw:.3f} of raw {marks}"
)
WEIGHTS = {"host": 2.5, "chain": 8.0, "disk": 4.0, "flips": 2.5}  # of the time; others 1


@dataclass
class Unit:
    """A piece of the work: rows or flips, within about so many seconds."""

    name: str
    weight: float
    work: Callable[[float], list[Row]]
    flips: bool = False


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
    pick = {"machine": setting.machine, "load": load, "name": kind, "probes": probes}
    pick["together"] = path.together
    any_lane, exact = (choose(x, path.wires, exact=exact, **pick) for exact in (False, True))
    auto = AutoLane(path.wires, setting.machine, load, together=path.together, probes=probes)
    lanes: dict[str, str | AutoLane] = {name: name for name in LANES} | {"auto": auto}
    times: dict[str, list[float]] = {name: [] for name in lanes}
    guess = dict.fromkeys(lanes, 2e-3)
    order = Random(0)
    for i in Rounds(seconds):
        for name in order.sample(list(lanes), len(lanes)):
            setting.apart(
                lambda n=name: round_trip(path, lanes[n], x)
            )  # memory and code as this lane leaves them
            taken = setting.timed(lambda n=name: round_trip(path, lanes[n], x), load, guess[name])
            guess[name] = taken / 2  # it is of the time beside the load
            if i:
                times[name].append(taken / path.together)
    took = setting.apart(lambda: auto.decide(x)).lane
    about = {"path": path.name, "group": path.group, "simulated": int(path.simulated), "tensor": kind}
    return rows_of(about, x, load, any_lane, exact, stored | {"auto": ""}, took, times)


def chain_cell(setting: Setting, kind: str, x: Tensor, load: str, seconds: float) -> list[Row]:
    """Rows of all lanes for many of `x` out and then back through a chain, all chains in turns."""
    pick = {"machine": setting.machine, "load": load, "name": kind, "together": DEPTH}
    any_lane, exact = (choose(x, AUTO_WIRES, exact=exact, **pick) for exact in (False, True))
    stored = {name: setting.apart(lambda n=name: lane_named(n).encode(x)).lane for name in LANES}
    times: dict[str, list[float]] = {name: [] for name in (*LANES, "auto")}
    out: dict[str, list[float]] = {name: [] for name in times}
    with ExitStack() as open_chains:
        chains = {}
        for name in times:
            lane, _, bits = name.partition(":")
            options: Row = {"bits": int(bits)} if bits else {}
            if lane == "auto":
                options = {"machine": setting.machine, "load": load}
            chains[name] = open_chains.enter_context(Chain(lane, depth=DEPTH, **options))

        def work(name: str) -> None:
            begin = perf_counter()
            tickets = [chains[name].send(x) for _ in range(IN_CHAIN)]
            chains[name].flush()
            out[name].append((perf_counter() - begin) / IN_CHAIN)
            for _ in chains[name].receive_all(tickets):
                pass

        guess = {name: setting.timed(lambda n=name: work(n)) for name in times}
        order = Random(0)
        for i in Rounds(seconds):
            for name in order.sample(list(times), len(times)):
                taken = setting.timed(lambda n=name: work(n), load, guess[name])
                guess[name] = taken / 2
                if i >= WARM:
                    times[name].append(taken / IN_CHAIN)
        text = chains["auto"].explain()
    took = text.splitlines()[0].rpartition(": ")[2]
    ways = ", ".join(f"{name} {median(found[1 + WARM :]) * 1e3:.3f}" for name, found in out.items())
    print(f"of these on the way out: {ways}\n{text}", flush=True)
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


def flips(setting: Setting, path: Simulated, kind: str, x: Tensor) -> list[Row]:
    """The rate of a wire out at which each lane and raw take the same time, by the tables and with what the
    first sweep taught about encode and decode ("learned")."""
    path.pace(25e9)
    overheads = {}
    for lane in ("raw", *FLIP_LANES):
        packet = setting.apart(lambda lane=lane: lane_named(lane).encode(x))
        overheads[lane] = Curve((1, MAX_SIZE), (path.overhead(packet),) * 2)
    rows, residuals = [], Residuals()
    coarse = sweep(setting, path, x, FLIP_RATES, ("raw", *FLIP_LANES), COARSE_ROUNDS, residuals)
    for lane in FLIP_LANES:

        def predicted(learned: Residuals, lane: str = lane) -> float:
            def seconds(rate: float, lane: str) -> float:
                wires = rate, path.other, overheads[lane]
                pick = {"exact": False, "name": kind, "residuals": learned}
                return choose(x, wires, setting.machine, **pick).candidates[lane].seconds

            rate = crossover(partial(seconds, lane=lane), partial(seconds, lane="raw"), 1e7, 1e12, 30)
            return (rate or nan) / 1e9

        near = crossing(FLIP_RATES, coarse[lane])
        measured = nan
        if near is not None:
            rates = [near * part for part in FINE]
            fine = sweep(setting, path, x, rates, ("raw", lane), FINE_ROUNDS)[lane]
            measured = flip_of([*FLIP_RATES, *rates], [*coarse[lane], *fine], near) / 1e9
        found = {"predicted": predicted(Residuals()), "learned": predicted(residuals), "measured": measured}
        print(f"flip of {lane}, {kind}, GB/s: {found}", flush=True)
        rows.append({"tensor": kind, "bytes": x.nbytes, "lane": lane} | found)
    return rows


def sweep(
    setting: Setting,
    path: Simulated,
    x: Tensor,
    rates: Sequence[float],
    lanes: Sequence[str],
    rounds: int,
    residuals: Residuals | None = None,
) -> dict[str, list[float]]:
    """For each rate log(lane / raw), the median over rounds. `residuals` learns from encode and decode."""
    gaps: dict[str, list[float]] = {lane: [] for lane in lanes}
    order = Random(0)
    for rate in rates:
        path.pace(rate)
        times: dict[str, list[float]] = {lane: [] for lane in lanes}
        for _ in range(rounds):
            for lane in order.sample(list(lanes), len(lanes)):
                setting.apart(lambda lane=lane: round_trip(path, lane, x))
                encode, carry, decode = stages(setting, path, lane, x)
                times[lane].append(encode + carry + decode)
                speed = speed_of(setting.machine, lane, x.dtype, "idle")
                if residuals is not None and speed is not None:
                    residuals.observe(f"encode {lane}", x.nbytes, speed.encode(x.nbytes), encode)
                    residuals.observe(f"decode {lane}", x.nbytes, speed.decode(x.nbytes), decode)
        for lane, found in times.items():
            gaps[lane].append(log(ratio_of(found, times["raw"])[0]))
    return gaps


def stages(setting: Setting, path: Path, lane: str, x: Tensor) -> tuple[float, float, float]:
    """Seconds of encode, of the way out and back and of decode, one after the other."""
    packets: list[Packet] = []
    encode = setting.timed(lambda: packets.append(lane_named(lane).encode(x)))
    carry = setting.timed(lambda: packets.extend(path.carry(packets)))
    return encode, carry, setting.timed(lambda: decode_packet(packets[-1]))


def decision_costs(setting: Setting, x: Tensor) -> Row:
    """Microseconds of a decision that is remembered, of one that is made, and of the probes before it."""
    probes = Probes()
    begin = perf_counter()
    choose(x, "d2h", setting.machine, exact=False, probes=probes)
    first = perf_counter() - begin
    auto = AutoLane("d2h", setting.machine, probes=probes)
    auto.decide(x)

    def cost(work: Callable[[], object], count: int) -> float:
        times = []
        for _ in range(count):
            begin = perf_counter()
            work()
            times.append(perf_counter() - begin)
        return median(times) * 1e6

    return {
        "cached_us": cost(lambda: auto.decide(x), 1000),
        "cold_us": cost(lambda: choose(x, "d2h", setting.machine, exact=False, probes=probes), 200),
        "first_with_probes_us": first * 1e6,
    }


def units(setting: Setting, kinds: dict[str, Tensor], folder: str) -> list[Unit]:
    """All the work: real wires before simulated ones, the disk last."""
    probes = Probes()

    def of(path: Path, kind: str) -> Unit:
        x = head(kinds[kind], int(path.mib * MIB) // setting.scale)

        def work(seconds: float) -> list[Row]:
            if isinstance(path, Simulated) and not isinstance(path.wires[0], Curve):
                path.calibrate()
            each = seconds / len(setting.loads)
            return [row for load in setting.loads for row in cell(setting, path, kind, x, load, probes, each)]

        return Unit(f"{path.name} {kind}", WEIGHTS.get(path.name, 1.0), work)

    def chain(kind: str) -> Unit:
        x = head(kinds[kind], 32 * MIB // setting.scale)

        def work(seconds: float) -> list[Row]:
            each = seconds / len(setting.loads)
            return [row for load in setting.loads for row in chain_cell(setting, kind, x, load, each)]

        return Unit(f"chain {kind}", WEIGHTS["chain"], work)

    wire = Simulated(setting, "d2h", 25e9, FLIP_MIB)

    def flip(kind: str) -> Unit:
        x = head(kinds[kind], FLIP_MIB * MIB // setting.scale)
        return Unit(f"flips {kind}", WEIGHTS["flips"], lambda _: flips(setting, wire, kind, x), flips=True)

    host, disk = Host(setting), OnDisk(setting, folder)
    found = [of(host, kind) for kind in KINDS] + [chain(kind) for kind in CHAIN_KINDS]
    found += [flip(kind) for kind in FLIP_KINDS]
    for rate, mib in RATES.items():
        for way in ("d2h", "h2d"):
            path = Simulated(setting, way, rate * 1e9, mib)
            found += [of(path, kind) for kind in KINDS]
    return found + [of(disk, kind) for kind in KINDS]


def setting_of(arguments: Namespace) -> Setting:
    if not torch.cuda.is_available():
        machine = measure(budget=6.0)
        made_up = {name: Curve.line(1e-5, 5e9) for name in ("d2h", "h2d")}
        return Setting(torch.device("cpu"), replace(machine, wires=machine.wires | made_up), 64)
    device = torch.device("cuda", torch.cuda.current_device())
    begin = perf_counter()
    machine = (Machine.cached() if arguments.cached else None) or measure(budget=arguments.profile)
    print(f"profile: {perf_counter() - begin:.1f} s, left out {machine.left_out}", flush=True)
    a, b, out = (torch.randn(LOAD_SIDE, LOAD_SIDE, device=device).bfloat16() for _ in range(3))
    torch.cuda.synchronize()
    load = Load(device, lambda: torch.mm(a, b, out=out), machine.product)
    stream = torch.cuda.Stream(device, priority=-1)
    return Setting(device, machine, 1, stream, {"idle": None, "busy": load})


def part_of(arguments: Namespace, deadline: float) -> Row:
    """This process's part of the work; what is done is in --out after each unit."""
    number, count = arguments.part
    setting = setting_of(arguments)
    gpu = setting.stream is not None
    keep = gpu or count > 1
    if keep:
        arguments.out.mkdir(parents=True, exist_ok=True)
        setting.machine.save(machine_file(arguments.out, number))
    shape, seconds = (FULL, arguments.train) if gpu else (TINY, 2.0)
    kinds = activations(shape, setting.device, seconds, 32 * MIB // setting.scale)
    done: Row = {"rows": [], "flips": [], "costs": {}, "missing": []}
    done["costs"] = decision_costs(setting, head(kinds["hidden"], 32 * MIB // setting.scale))
    wanted = arguments.only.split(",")
    work = [unit for unit in units(setting, kinds, arguments.folder) if _is_in(unit.name, wanted)]
    mine = [unit for i, unit in enumerate(work) if number == (0 if "disk" in unit.name else i % count)]
    left = sum(unit.weight for unit in mine)
    for unit in mine:
        now = perf_counter()
        if now > deadline:
            done["missing"].append(unit.name)
            continue
        done["flips" if unit.flips else "rows"] += unit.work((deadline - now) * unit.weight / left)
        left -= unit.weight
        if keep:
            part_file(arguments.out, number).write_text(json.dumps(done))
    return done


def parts_of(arguments: Namespace, gpus: Sequence[str], deadline: float) -> Row:
    """All parts, each in a process with a GPU of its own. Raises RuntimeError when one of them fails."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        out = FilePath(folder)
        processes = []
        for i, gpu in enumerate(gpus):
            more = [
                "--part",
                f"{i}/{len(gpus)}",
                "--out",
                folder,
                "--seconds",
                f"{deadline - perf_counter()}",
            ]
            processes.append(Popen([*command, *more], env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}))
            while not i and not machine_file(out, 0).exists() and processes[0].poll() is None:
                sleep(0.1)  # it measures the disk
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError("a part of the benchmark failed: see what it printed")
        found = [json.loads(part_file(out, i).read_text()) for i in range(len(gpus))]
        arguments.out.mkdir(parents=True, exist_ok=True)
        Machine.load(machine_file(out, 0), foreign=True).save(arguments.out / "planner_machine.json")
    merged = {name: [each for part in found for each in part[name]] for name in ("rows", "flips", "missing")}
    return merged | {"costs": found[0]["costs"]}


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one by one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def machine_file(folder: FilePath, part: int) -> FilePath:
    return folder / ("planner_machine.json" if not part else f"planner_machine_{part}.json")


def part_file(folder: FilePath, part: int) -> FilePath:
    return folder / f"planner_part_{part}.json"


def _is_in(name: str, wanted: Sequence[str]) -> bool:
    return wanted == [""] or any(name.startswith(each) for each in wanted)


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    return int(number), int(count)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=FilePath, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=190.0, help="for everything")
    parser.add_argument("--profile", type=float, default=20.0, help="seconds for the profile")
    parser.add_argument("--train", type=float, default=5.0, help="seconds of training")
    parser.add_argument("--only", default="", help="beginnings of 'PATH TENSOR', by commas")
    parser.add_argument(
        "--cached", action="store_true", help="take the profile of this machine if it has one"
    )
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="of the disk tier")
    parser.add_argument("--gpus", type=int, default=0, help="at most; default: all that are visible")
    parser.add_argument("--part", type=_part, help="I/N: only this part, into a file")
    arguments = parser.parse_args()
    begin = perf_counter()
    deadline = begin + arguments.seconds
    if arguments.part:
        part_of(arguments, deadline)
        return
    gpus = visible_gpus()[: arguments.gpus or None]
    arguments.part = 0, 1
    done = parts_of(arguments, gpus, deadline) if len(gpus) > 1 else part_of(arguments, deadline)
    lines = summary(done["rows"], done["flips"], done["costs"])
    for line in lines:
        print(", ".join(f"{name} {value}" for name, value in line.items() if value != ""))
    print("\n".join(verdicts(lines[-1]) if lines else []))
    print(f"{perf_counter() - begin:.0f} s; not reached: {', '.join(done['missing']) or 'nothing'}")
    if not gpus:
        return
    env = environment()
    for name, rows in (
        ("planner", done["rows"]),
        ("planner_flips", done["flips"]),
        ("planner_summary", lines),
    ):
        if rows:
            append_rows(arguments.out / f"{name}.csv", [row | env for row in rows])
    part_file(arguments.out, 0).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
