"""How good the planner's predictions and choices are: predicted beside measured time of every lane.

A tensor is encoded, crosses a path and is decoded, one stage after the other. Paths: out to pinned memory
and back; the same over a simulated wire (`TokenBucket`) of a lower rate on the way out; over the disk tier,
several tensors at once; and a `Chain`, many tensors in a row. Tensors are activations of a small GPT that is
trained for seconds on Python's standard library, and int8 codes of them. Loads: idle, and beside bf16 matrix
products.

Rows: each lane in each cell, with what the planner would take among all lanes ("any") and among exact ones;
lane "auto" is `AutoLane` itself, its decision included. The summary has the median error of the predictions,
the regret T_chosen / T_best - 1, what auto loses to raw, the wire rate at which raw and a lane are equal, and
what a decision costs. Without a GPU the same runs on made-up wires, to see that it runs; nothing is written.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, log, nan
from pathlib import Path
from statistics import mean, median, quantiles
from time import perf_counter, sleep
from typing import Any, TypeVar

import torch
from common import RESULTS, append_rows, environment
from torch import Tensor, nn

from sidelane.codec.packet import Packet
from sidelane.demo_model import GPT, Corpus, Shape
from sidelane.pipeline.chain import AUTO_WIRES, Chain
from sidelane.pipeline.choice import Decision, Wire, choose, speed_of
from sidelane.pipeline.disk import Disk
from sidelane.pipeline.lanes import decode_packet
from sidelane.pipeline.machine import MAX_SIZE, Curve, Machine
from sidelane.pipeline.planner import crossover
from sidelane.pipeline.probe import LOAD_SIDE, measure
from sidelane.pipeline.samples import Probes, lane_named
from sidelane.pipeline.sampling import Load
from sidelane.pipeline.tensor_auto import AutoLane
from sidelane.pipeline.throttle import TokenBucket
from sidelane.pipeline.tiers import HostCopy

MIB = 1 << 20
LANES = ("raw", "exact", "packed:8", "packed:4", "packed:2")
EXACT = ("raw", "exact")
RATES = {25.0: 32, 12.5: 32, 7.0: 16, 3.0: 8, 1.25: 4, 0.125: 1}  # GB/s: MiB of a tensor
FLIP_RATES = (25.0, 12.5, 7.0, 4.0, 2.0, 1.0, 0.5)
FLIP_BYTES = 512 << 10
DEPTH = 8  # of chains
SHAPE = Shape(layers=4, width=512, heads=8, kv_heads=2, hidden=1536, context=512, batch=16)
TINY = Shape(layers=2, width=64, heads=4, kv_heads=2, hidden=128, context=64, batch=2)
T = TypeVar("T")
LINE = "{path:12} {tensor:7} {load:5} {lane:9} predicted {predicted_ms:>8} measured {measured_ms:>8} {marks}"


@dataclass
class Setting:
    """What everything here runs on."""

    device: torch.device
    machine: Machine
    scale: int  # sizes are divided by it
    rounds: int
    stream: Any = None
    loads: dict[str, Load | None] = field(default_factory=dict)

    def apart(self, work: Callable[[], T]) -> T:
        """What `work` returns, on the stream of the tensors."""
        if self.stream is None:
            return work()
        with torch.cuda.stream(self.stream):
            value = work()
        self.stream.synchronize()
        return value

    def timed(self, work: Callable[[], object], load: str, guess: float) -> float:
        """Seconds of work until the stream that it runs on is done."""

        def once() -> float:
            if self.stream is None:
                begin = perf_counter()
                work()
                return perf_counter() - begin
            self.stream.synchronize()
            with torch.cuda.stream(self.stream):
                begin = perf_counter()
                work()
                self.stream.synchronize()
            return perf_counter() - begin

        beside = self.loads[load]
        return once() if beside is None else beside.beside(once, guess)

    def join(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


class Route:
    """Encoded tensors out and back. `wires`, `together`: for `choose`; `carry` takes so many tensors."""

    together = 1

    def __init__(self, name: str, wires: Sequence[Wire], simulated: bool, mib: float) -> None:
        self.name, self.wires, self.simulated, self.mib = name, tuple(wires), simulated, mib

    def carry(self, packets: list[Packet]) -> list[Packet]:
        raise NotImplementedError


class Host(Route):
    """Pinned memory."""

    def __init__(self, setting: Setting) -> None:
        super().__init__("host", ("d2h", "h2d"), False, 32)
        self._memory = pinned(setting, 40 * MIB)
        self._device = setting.device

    def carry(self, packets: list[Packet]) -> list[Packet]:
        back = []
        for packet in packets:
            layout = HostCopy(packet)
            layout.write(packet, self._memory[: layout.nbytes])
            back.append(layout.read(self._memory[: layout.nbytes], self._device))
        return back


class Throttled(Route):
    """A simulated wire out to pinned memory, and the real one back."""

    def __init__(self, setting: Setting, rate: float, mib: float) -> None:
        super().__init__(f"{rate:g} GB/s", (rate * 1e9, "h2d"), True, mib)
        self._bucket = TokenBucket(rate * 1e9, burst=0)
        self._memory = pinned(setting, 40 * MIB)
        self._setting = setting

    def carry(self, packets: list[Packet]) -> list[Packet]:
        back = []
        for packet in packets:
            layout = HostCopy(packet)
            memory = self._memory[: layout.nbytes]
            self._setting.join()  # the bytes are there only from here on
            parts = list(packet.sections.values())
            for first, start, size in layout.runs:
                if size:
                    run = parts[first].as_strided((size,), (1,))
                    arrived = self._bucket.copy(run, memory[start : start + size])
                    if self._setting.stream is not None:
                        self._setting.stream.wait_event(arrived)
            back.append(layout.read(memory, self._setting.device))
        return back


class OnDisk(Route):
    """Pinned memory, the file of a disk tier, and back. Tensors cross together, as the tier works."""

    together = 4

    def __init__(self, setting: Setting, folder: str) -> None:
        super().__init__("disk", ("d2h", "disk write", "disk read", "h2d"), False, 16)
        self._tier = Disk(folder, limit=1 << 30, in_flight=256 * MIB)
        self._setting = setting

    def carry(self, packets: list[Packet]) -> list[Packet]:
        layouts = [HostCopy(packet) for packet in packets]
        spills = []
        for layout, packet in zip(layouts, packets, strict=True):
            spill = self._tier.place(layout.nbytes)
            if spill is None or spill.slot is None:
                raise RuntimeError(f"the disk took no tensor: {self._tier.error}")
            layout.write(packet, spill.slot.tensor[: layout.nbytes])
            spills.append(spill)
        self._setting.join()
        for spill in spills:
            spill.write()
        while any(spill.slot is not None and spill.error is None for spill in spills):
            sleep(20e-6)
        for spill in spills:
            spill.fetch()
        slots = [spill.load() for spill in spills]
        back = [
            layout.read(slot.tensor[: layout.nbytes], self._setting.device)
            for layout, slot in zip(layouts, slots, strict=True)
        ]
        self._setting.join()
        return back


def pinned(setting: Setting, nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=setting.stream is not None)


def trained(shape: Shape, device: torch.device, seconds: float) -> tuple[GPT, Corpus]:
    """A GPT after so many seconds of training under bf16 autocast."""
    model, corpus = GPT(shape, seed=0).to(device), Corpus()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    end, step, loss = perf_counter() + seconds, 0, torch.zeros(())
    while perf_counter() < end:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(corpus.batch(shape, 0, step).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 8 == 0:
            loss.item()  # the host does not run ahead
    print(f"trained {step} steps, loss {loss.item():.3f}", flush=True)
    return model, corpus


def activations(shape: Shape, device: torch.device, seconds: float, nbytes: int) -> dict[str, Tensor]:
    """Of each kind [T, width] with about `nbytes`, from batches that were not trained on."""
    model, corpus = trained(shape, device, seconds)
    found: dict[str, list[Tensor]] = {kind: [] for kind in ("hidden", "mlp", "norm", "kv")}

    def keep(kind: str, dtype: torch.dtype) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0] if kind == "mlp" else output
            found[kind].append(x.detach().flatten(0, 1).to(dtype))

        return hook

    for layer in model.layers:
        layer.register_forward_hook(keep("hidden", torch.bfloat16))
        layer.down.register_forward_hook(keep("mlp", torch.bfloat16))
        layer.norm_feed.register_forward_hook(keep("norm", torch.float32))
        layer.attention.key_value.register_forward_hook(keep("kv", torch.bfloat16))
    step = 0
    while min(sum(x.nbytes for x in parts) for parts in found.values()) < nbytes:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            model(corpus.batch(shape, 1, step).to(device))
        step += 1
    kinds = {kind: torch.cat(parts) for kind, parts in found.items()}
    hidden = kinds["hidden"].float()
    scale = 127 / hidden.abs().amax(1, keepdim=True)
    kinds["codes"] = (hidden * scale).round().to(torch.int8).repeat(2, 1)
    return kinds


def head(x: Tensor, nbytes: int) -> Tensor:
    """The first rows of `x`, about `nbytes` of them, on their own."""
    return x[: max(nbytes // (x.shape[1] * x.itemsize), 1)].clone()


def round_trip(path: Route, lane: str | AutoLane, x: Tensor) -> list[Tensor]:
    packets = []
    for _ in range(path.together):
        chosen = lane_named(lane) if isinstance(lane, str) else lane
        packets.append(chosen.encode(x))
    return [decode_packet(packet) for packet in path.carry(packets)]


def gate(path: Route, x: Tensor) -> None:
    """Raise RuntimeError unless every lane brings back over `path` what it encodes."""
    for name in LANES:
        lane = lane_named(name)
        expected = lane.decode(lane.encode(x))
        for back in round_trip(path, name, x):
            if not torch.equal(back, expected) or (lane.exact and not torch.equal(back, x)):
                raise RuntimeError(f"lane '{name}' over {path.name} gives wrong results: no times")


def measured(setting: Setting, path: Route, x: Tensor, load: str, auto: AutoLane) -> dict[str, list[float]]:
    """Seconds of each lane for one tensor, the lanes in turn."""
    lanes: list[str | AutoLane] = [*LANES, auto]
    times: dict[str, list[float]] = {name: [] for name in (*LANES, "auto")}
    last = dict.fromkeys(times, 0.0)
    for i in range(setting.rounds + 1):
        for lane in lanes[i % len(lanes) :] + lanes[: i % len(lanes)]:
            name = lane if isinstance(lane, str) else lane.name
            guess = last[name] or 2e-3
            last[name] = setting.timed(lambda lane=lane: round_trip(path, lane, x), load, guess)
            if i:
                times[name].append(last[name] / path.together)
    return times


def chain_times(setting: Setting, x: Tensor, load: str, lane: str, count: int = 32) -> list[float]:
    """Seconds for each of `count` tensors out and then back through a chain."""
    kind, _, bits = lane.partition(":")
    options: dict[str, Any] = {"bits": int(bits)} if bits else {}
    if lane == "auto":
        options = {"machine": setting.machine, "load": load}
    out = []
    with Chain(kind, depth=DEPTH, **options) as chain:

        def work() -> None:
            begin = perf_counter()
            tickets = [chain.send(x) for _ in range(count)]
            chain.flush()
            out.append((perf_counter() - begin) / count)
            for _ in chain.receive_all(tickets):
                pass

        guess = min(setting.timed(work, "idle", 0.0) for _ in range(2))
        times = [setting.timed(work, load, guess) / count for _ in range(setting.rounds + 2)]
        print(
            f"{lane}: {median(out[4:]) * 1e3:.3f} ms of {median(times[2:]) * 1e3:.3f} are the way out",
            flush=True,
        )
        if lane == "auto":
            print(chain.explain(), flush=True)
    return times[2:]


def rows_of(
    path: str,
    simulated: bool,
    tensor: str,
    x: Tensor,
    load: str,
    decision: Decision,
    exact: Decision,
    times: dict[str, list[float]],
) -> Iterator[dict[str, Any]]:
    for lane, found in times.items():
        each = decision.candidates.get(lane)
        low, middle, high = quantiles(found, n=4) if len(found) > 1 else found * 3
        predicted = each.seconds if each else exact.seconds
        sample = each.sample if each else None
        yield {
            "path": path,
            "simulated": int(simulated),
            "tensor": tensor,
            "dtype": str(x.dtype).removeprefix("torch."),
            "bytes": x.nbytes,
            "load": load,
            "lane": lane,
            "ratio": round(1 / sample.share, 3) if sample else "",
            "rel_error": f"{sample.rel_error:.3g}" if sample else "",
            "predicted_ms": round(predicted * 1e3, 4) if isfinite(predicted) else "",
            "measured_ms": round(middle * 1e3, 4),
            "measured_p25": round(low * 1e3, 4),
            "measured_p75": round(high * 1e3, 4),
            "rounds": len(found),
            "any": int(lane == decision.lane),
            "exact": int(lane == exact.lane),
        }


def cells(
    setting: Setting, paths: Sequence[Route], kinds: dict[str, Tensor]
) -> Iterator[list[dict[str, Any]]]:
    probes = Probes()
    for path in paths:
        for kind, all_of in kinds.items():
            x = head(all_of, int(path.mib * MIB) // setting.scale)
            setting.apart(lambda path=path, x=x: gate(path, x))
            for load in setting.loads:
                pick = {"machine": setting.machine, "load": load, "name": kind, "probes": probes}
                pick["together"] = path.together
                decision = choose(x, path.wires, exact=False, **pick)
                exact = choose(x, path.wires, exact=True, **pick)
                auto = AutoLane(path.wires, setting.machine, load, together=path.together, probes=probes)
                times = measured(setting, path, x, load, auto)
                yield list(rows_of(path.name, path.simulated, kind, x, load, decision, exact, times))


def chain_cells(setting: Setting, kinds: dict[str, Tensor]) -> Iterator[list[dict[str, Any]]]:
    for kind in ("hidden", "norm"):
        x = head(kinds[kind], 32 * MIB // setting.scale)
        for load in setting.loads:
            pick = {"machine": setting.machine, "load": load, "name": kind, "together": DEPTH}
            decision = choose(x, AUTO_WIRES, exact=False, **pick)
            exact = choose(x, AUTO_WIRES, exact=True, **pick)
            times = {lane: chain_times(setting, x, load, lane) for lane in (*LANES, "auto")}
            yield list(rows_of("chain", False, kind, x, load, decision, exact, times))


def path_overhead(setting: Setting, lane: str) -> Curve:
    """Host time of a packet of `lane` over a simulated wire and back, more for those of several parts: what a
    small one takes besides both wires."""
    path = Throttled(setting, 25.0, 1)
    x = torch.randn(64, 512, device=setting.device).bfloat16()
    packet = setting.apart(lambda: lane_named(lane).encode(x))
    setting.timed(lambda: path.carry([packet]), "idle", 0)
    seconds = median(setting.timed(lambda: path.carry([packet]), "idle", 0) for _ in range(25))
    wires = packet.nbytes / 25e9 + setting.machine.wires["h2d"](packet.nbytes)
    print(f"host time of a simulated wire, {lane}: {(seconds - wires) * 1e6:.0f} us", flush=True)
    return Curve((1, MAX_SIZE), (max(seconds - wires, 1e-9),) * 2)


def calibrated(setting: Setting, path: Throttled) -> Curve:
    """A simulated wire with its way back as it is measured, since a profile measures its wires too."""
    sizes = sorted({64 << 10, 512 << 10, int(path.mib * MIB) // setting.scale})
    times = []
    for size in sizes:
        x = torch.zeros(size, dtype=torch.uint8, device=setting.device)
        packet = setting.apart(lambda x=x: lane_named("raw").encode(x))
        found = [setting.timed(lambda p=packet: path.carry([p]), "idle", 0) for _ in range(6)]
        times.append(median(found[1:]))
    return Curve.fit(sizes, times)


def kernel_walls(setting: Setting, x: Tensor) -> None:
    """Print what encode and decode take until the stream is done, beside the tables."""
    for name in LANES:
        lane, speed = lane_named(name), speed_of(setting.machine, name, x.dtype, "idle")
        if speed is None:
            continue
        packet = setting.apart(lambda lane=lane: lane.encode(x))
        setting.apart(lambda lane=lane, packet=packet: lane.decode(packet))
        walls = [
            median(setting.timed(work, "idle", 0) for _ in range(25)) * 1e6
            for work in (lambda lane=lane: lane.encode(x), lambda lane=lane, p=packet: lane.decode(p))
        ]
        tables = [curve(x.nbytes) * 1e6 for curve in (speed.encode, speed.decode)]
        print(
            f"{name} of {x.nbytes >> 10} KiB, us: encode {walls[0]:.0f}, table {tables[0]:.0f}; "
            f"decode {walls[1]:.0f}, table {tables[1]:.0f}",
            flush=True,
        )


def flips(setting: Setting, kinds: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Wire rates at which a lane and raw take the same time: predicted, and measured on simulated wires."""
    overheads = {lane: path_overhead(setting, lane) for lane in ("raw", "exact", "packed:4")}
    for kind in ("hidden", "mlp", "norm", "kv"):
        x = head(kinds[kind], FLIP_BYTES)
        times: dict[str, list[float]] = {lane: [] for lane in ("raw", "exact", "packed:4")}
        for rate in FLIP_RATES:
            path = Throttled(setting, rate, 1)
            for lane, found in times.items():
                setting.apart(lambda p=path, lane=lane, x=x: round_trip(p, lane, x))
                work = [
                    setting.timed(lambda p=path, lane=lane, x=x: round_trip(p, lane, x), "idle", 0)
                    for _ in range(9)
                ]
                found.append(median(work))
        for lane in ("exact", "packed:4"):

            def seconds(rate: float, lane: str = lane, x: Tensor = x, kind: str = kind) -> float:
                wires = rate, "h2d", overheads[lane]
                decision = choose(x, wires, setting.machine, exact=False, name=kind)
                candidate = decision.candidates[lane]
                if isfinite(candidate.seconds):
                    return candidate.seconds
                return 2 * decision.candidates["raw"].seconds  # its kernels alone take as long

            raw = [seconds(rate * 1e9, "raw") for rate in FLIP_RATES]
            predicted = crossover(seconds, lambda rate: seconds(rate, "raw"), 1e7, 1e12, 30)
            actual = flip_between(FLIP_RATES, times[lane], times["raw"])
            yield {
                "tensor": kind,
                "lane": lane,
                "predicted": nan if predicted is None else predicted / 1e9,
                "measured": actual,
                "raw_error": median(abs(p / m - 1) for p, m in zip(raw, times["raw"], strict=True)),
            }


def flip_between(rates: Sequence[float], lane: Sequence[float], raw: Sequence[float]) -> float:
    """Where log(lane / raw) crosses zero, straight in log rate between the measured rates; NaN if nowhere."""
    gaps = [log(a / b) for a, b in zip(lane, raw, strict=True)]
    for i in range(len(rates) - 1):
        a, b = gaps[i], gaps[i + 1]
        if a * b <= 0 and a != b:
            part = a / (a - b)
            return rates[i] ** (1 - part) * rates[i + 1] ** part
    return nan


def decision_cost(setting: Setting, x: Tensor) -> dict[str, float]:
    """Microseconds of a decision that is remembered, of one that is made, and of the probes before it."""
    probes = Probes()
    begin = perf_counter()
    first = choose(x, "d2h", setting.machine, exact=False, probes=probes)
    total = perf_counter() - begin
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
        "decision cached, us": cost(lambda: auto.decide(x), 1000),
        "decision cold, us": cost(lambda: choose(x, "d2h", setting.machine, exact=False, probes=probes), 200),
        "probe of all lanes once, us": first.probe_seconds * 1e6,
        "first decision with its probe, us": total * 1e6,
    }


def summary(rows: list[dict[str, Any]], flip: list[dict[str, Any]]) -> dict[str, float]:
    out: dict[str, float] = {}
    for part, chosen in (("all", rows), ("serial", [r for r in rows if r["path"] != "chain"])):
        errors = [
            abs(r["predicted_ms"] / r["measured_ms"] - 1)
            for r in chosen
            if r["predicted_ms"] != "" and r["lane"] != "auto"
        ]
        if errors:
            out[f"median error of prediction, {part}"] = median(errors)
            out[f"p90 error of prediction, {part}"] = sorted(errors)[int(0.9 * len(errors))]
    for path in dict.fromkeys(r["path"] for r in rows):
        errors = [
            r["predicted_ms"] / r["measured_ms"] - 1
            for r in rows
            if r["path"] == path and r["predicted_ms"] != "" and r["lane"] != "auto"
        ]
        out[f"median signed error, {path}"] = median(errors)
    grouped: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for r in rows:
        grouped.setdefault((r["path"], r["tensor"], r["load"]), {})[r["lane"]] = r
    for policy, lanes in (("any", LANES), ("exact", EXACT)):
        regrets, losses = {}, {}
        for key, cell in grouped.items():
            taken = next(cell[lane] for lane in LANES if cell[lane][policy])["measured_ms"]
            regrets[key] = taken / min(cell[lane]["measured_ms"] for lane in lanes) - 1
            losses[key] = taken / cell["raw"]["measured_ms"] - 1
        worst = max(regrets, key=regrets.__getitem__)
        print(f"worst regret, {policy}: {worst} {regrets[worst]:.3f}")
        out[f"mean regret, {policy}"] = mean(regrets.values())
        out[f"worst regret, {policy}"] = regrets[worst]
        out[f"most that the choice loses to raw, {policy}"] = max(losses.values())
    auto = {
        key: cell["auto"]["measured_ms"] / cell["raw"]["measured_ms"] - 1 for key, cell in grouped.items()
    }
    worst = max(auto, key=auto.__getitem__)
    print(f"auto against raw, worst: {worst} {auto[worst]:.3f}")
    out["most that auto loses to raw, as measured"] = auto[worst]
    both = [f for f in flip if f["predicted"] == f["predicted"] and f["measured"] == f["measured"]]
    if both:
        off = [max(f["predicted"] / f["measured"], f["measured"] / f["predicted"]) - 1 for f in both]
        out["flip rates found"] = len(both)
        out["median error of flip rates"] = median(off)
        out["worst error of flip rates"] = max(off)
    return out


def with_made_up_wires(machine: Machine) -> Machine:
    """For a run without a GPU."""
    return replace(machine, wires=machine.wires | {name: Curve.line(1e-5, 5e9) for name in ("d2h", "h2d")})


def setting_of(arguments: argparse.Namespace) -> Setting:
    if not torch.cuda.is_available():
        machine = with_made_up_wires(measure(budget=6.0))
        return Setting(torch.device("cpu"), machine, 64, 2, loads={"idle": None})
    device = torch.device("cuda", torch.cuda.current_device())
    begin = perf_counter()
    machine = Machine.cached() if arguments.cached else None
    machine = machine or measure(budget=arguments.profile)
    print(f"profile: {perf_counter() - begin:.1f} s, left out {machine.left_out}", flush=True)
    a, b, out = (torch.randn(LOAD_SIDE, LOAD_SIDE, device=device).bfloat16() for _ in range(3))
    torch.cuda.synchronize()
    load = Load(device, lambda: torch.mm(a, b, out=out), 2 * LOAD_SIDE**3 / machine.gemm)
    stream = torch.cuda.Stream(device, priority=-1)
    loads: dict[str, Load | None] = {"idle": None, "busy": load}
    return Setting(device, machine, 1, arguments.rounds, stream, loads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=80.0, help="start no cell after so long")
    parser.add_argument("--rounds", type=int, default=5, help="of every lane in a cell")
    parser.add_argument("--profile", type=float, default=20.0, help="seconds for the profile")
    parser.add_argument("--train", type=float, default=6.0, help="seconds of training")
    parser.add_argument(
        "--cached", action="store_true", help="take the profile of this machine if there is one"
    )
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="of the disk tier")
    arguments = parser.parse_args()
    deadline = perf_counter() + arguments.seconds
    setting = setting_of(arguments)
    gpu = setting.stream is not None
    env = environment()
    shape, train = (SHAPE, arguments.train) if gpu else (TINY, 2.0)
    kinds = activations(shape, setting.device, train, 32 * MIB // setting.scale)
    if gpu:
        arguments.out.mkdir(parents=True, exist_ok=True)
        setting.machine.save(arguments.out / "planner_machine.json")
    cost = decision_cost(setting, head(kinds["hidden"], 32 * MIB // setting.scale))
    print(cost, flush=True)
    for nbytes in (FLIP_BYTES, 32 * MIB // setting.scale):
        kernel_walls(setting, head(kinds["hidden"], nbytes))
    flip = list(flips(setting, kinds))
    for each in flip:
        print(each, flush=True)
    paths: list[Route] = [Host(setting), OnDisk(setting, arguments.folder)]
    for rate, mib in RATES.items():
        path = Throttled(setting, rate, mib)
        path.wires = (calibrated(setting, path),)
        paths.append(path)
    rows: list[dict[str, Any]] = []
    sources = (
        cells(setting, paths[:1], kinds),
        chain_cells(setting, kinds),
        cells(setting, paths[1:], kinds),
    )
    for source in sources:
        for found in source:
            rows += found
            for each in found:
                marks = " ".join(policy for policy in ("any", "exact") if each[policy])
                print(LINE.format(marks=marks, **each), flush=True)
            if gpu:
                append_rows(arguments.out / "planner.csv", [each | env for each in found])
            if perf_counter() > deadline:
                print("out of time", flush=True)
                break
    facts = summary(rows, flip) | cost
    for name, value in facts.items():
        print(f"{name}: {value:.4g}")
    if gpu:
        lines = [{"fact": name, "value": f"{value:.4g}"} | env for name, value in facts.items()]
        append_rows(arguments.out / "planner_summary.csv", lines)
        append_rows(arguments.out / "planner_flips.csv", [each | env for each in flip])


if __name__ == "__main__":
    main()
