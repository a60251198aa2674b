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
planner_flips.csv, planner_summary.csv (see `planner_summary.figures`), and the profile, planner_machine.json.

The process has the CPUs that are quietest before each piece of the work (see `quiet_cpus`). At sizes at which
lanes flip launches decide, which a disturbed host makes two to three times as slow for a second: flips are
made of the turns beside which a loop of Python ran fastest (`common.Quiet`), and one counts if others did not
disturb the sample and the median turn at any rate. With several GPUs each has a process, on any CPUs, and a
part of the work; the disk belongs to the first, which begins alone, so that its profile of the disk is not
disturbed. Without a GPU the same runs on made-up wires, to see that it runs; nothing is written.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from statistics import median
from subprocess import Popen
from time import perf_counter, sleep
from typing import Any

import torch
from common import CPUS, RESULTS, Quiet, append_rows, environment, quiet_cpus
from planner_cells import cell, chain_cell
from planner_flips import flips
from planner_paths import MIB, Host, OnDisk, Path, Setting, Simulated
from planner_summary import summary, verdicts
from planner_tensors import FULL, TINY, activations, head
from torch import Tensor

from sidelane.pipeline.choice import choose
from sidelane.pipeline.machine import LOAD_SIDE, Curve, Machine
from sidelane.pipeline.probe import BUDGET, measure
from sidelane.pipeline.samples import Probes
from sidelane.pipeline.sampling import Load
from sidelane.pipeline.tensor_auto import AutoLane

Row = dict[str, Any]

KINDS = ("hidden", "mlp", "norm", "kv", "codes")
CHAIN_KINDS = ("hidden", "norm", "codes")
RATES = {25.0: 32, 12.5: 16, 7.0: 16, 3.0: 8, 1.25: 2, 0.125: 0.5}  # GB/s: MiB of a tensor
FLIP_KINDS = ("hidden", "mlp", "norm", "kv")
FLIP_MIBS = 1, 8  # launches decide for the first, kernels for the second
QUIET = 4  # CPUs, chosen anew for each piece of the work: a disk keeps several busy
WEIGHTS = {"host": 2.5, "chain": 8.0, "disk": 4.0, "flips": 4.0}  # of the time; others 1


@dataclass
class Unit:
    """A piece of the work: rows or flips, within about so many seconds."""

    name: str
    weight: float
    work: Callable[[float], list[Row]]
    flips: bool = False


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
    """All the work: real wires before simulated ones."""
    probes = Probes()

    def of(path: Path, kind: str) -> Unit:
        x = head(kinds[kind], int(path.mib * MIB) // setting.scale)

        def work(seconds: float) -> list[Row]:
            if isinstance(path, Simulated):
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

    def flip(mib: int, kind: str) -> Unit:
        wire, x = Simulated(setting, "d2h", 25e9, mib), head(kinds[kind], mib * MIB // setting.scale)
        name, weight = f"flips {kind}, {mib} MiB", WEIGHTS["flips"]
        return Unit(name, weight, partial(flips, setting, wire, kind, x), flips=True)

    host, disk = Host(setting), OnDisk(setting, folder)
    found = [of(path, kind) for path in (host, disk) for kind in KINDS]
    found += [chain(kind) for kind in CHAIN_KINDS]
    found += [flip(mib, kind) for mib in FLIP_MIBS for kind in FLIP_KINDS]
    for rate, mib in RATES.items():
        for way in ("d2h", "h2d"):
            path = Simulated(setting, way, rate * 1e9, mib)
            found += [of(path, kind) for kind in KINDS]
    return found


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
    stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    return Setting(device, machine, 1, stream, {"idle": None, "busy": load})


def part_of(arguments: Namespace, deadline: float) -> Row:
    """This process's part of the work; what is done is in --out after each unit."""
    alone = arguments.part[1] == 1  # several would choose the same CPUs
    with quiet_cpus(QUIET if alone else len(CPUS)) as move:
        return _worked(arguments, deadline, Quiet(move if alone else lambda: None))


def _worked(arguments: Namespace, deadline: float, quiet: Quiet) -> Row:
    number, count = arguments.part
    quiet.look_around()
    setting = replace(setting_of(arguments), quiet=quiet)
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
        quiet.move()
        done["flips" if unit.flips else "rows"] += unit.work((deadline - now) * unit.weight / left)
        for row in done["flips"]:
            row["slowed"] = round(row["loop_us"] / quiet.least, 3)
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
    parser.add_argument("--profile", type=float, default=BUDGET, help="seconds for the profile")
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
