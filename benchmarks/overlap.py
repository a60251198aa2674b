"""How much of a chain is hidden behind a stream of matrix products, and what that costs the products.

Rows: for each lane, direction and setting the time of the products alone, of the chain alone, of both at
once, and from those the hidden fraction h = (t_products + t_chain - t_both) / min(t_products, t_chain). The
tensors exist beforehand and are sent from a stream of their own. Every measured run follows products that
are not measured, so that clocks and power are those of a busy device. Rounds count beside which a loop of
Python ran undisturbed (`common.Quiet`), or the least disturbed of `MOST` times as many: `slowed` is the worst
of them. Tensors are normal random numbers: they time kernels and say nothing about ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import nan
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, Quiet, Turn, append_rows, environment, figure, quiet_cpus, timing_event
from torch import Tensor

from sidelane.codec.lane import Lane
from sidelane.pipeline.chain import Chain
from sidelane.pipeline.lanes import open_lane

SIDE = 8192  # of the matrices
ROWS, COLUMNS = 8192, 4096  # of a tensor that is sent, bfloat16
KINDS = 6  # different tensors
WIRE = 5 << 30  # bytes that one run moves over the wire
WARM = 0.15  # seconds of products before each measured run
TRIES = 3  # of the chain alone, whose median says how many products take as long
QUIET = 4  # CPUs: a chain has threads
MOST = 2  # times as many rounds, at most, to find undisturbed ones
LANES: dict[str, dict[str, Any]] = {
    "raw": {},
    "packed 4": {"bits": 4},
    "packed 8": {"bits": 8},
    "exact": {},
}
TRACED: dict[str, dict[str, Any]] = {
    "packed 4": {"workers": 1, "streams": 4, "depth": 12},
    "exact": {"workers": 1, "streams": 4, "depth": 12},
}
DIRECTIONS = ("store", "load", "both")
LINE = (
    "{lane:9} {direction:5} {setting:26} h {hidden:.3f} ({hidden_p20:.3f}..{hidden_p80:.3f})  "
    "products {products_slowed:+.1%}  ms {ms_products} {ms_chain} {ms_both}  "
    "wire {wire_gb_s_alone} {wire_gb_s_beside} GB/s  {tflops_alone} TFLOP/s"
)


@dataclass(frozen=True)
class Setting:
    """How a chain is made, and how many multiprocessors the products beside it leave alone."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    carveout: int = 0

    @contextmanager
    def apply(self) -> Iterator[None]:
        """The products inside leave `carveout` multiprocessors alone."""
        if not self.carveout:
            yield
            return
        library = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library("cublaslt")
        torch._C._set_sm_carveout_experimental(self.carveout)
        try:
            yield
        finally:
            torch._C._set_sm_carveout_experimental(None)
            torch.backends.cuda.preferred_blas_library(library)


SETTINGS = {
    each.name: each
    for each in (
        Setting("inline, 4 streams", {"workers": 0, "streams": 4, "depth": 12}),
        Setting("1 worker, 1 stream", {"workers": 1, "streams": 1, "depth": 12}),
        Setting("1 worker, 4 streams", {"workers": 1, "streams": 4, "depth": 12}),
        Setting("1 worker, 8 streams", {"workers": 1, "streams": 8, "depth": 16}),
        Setting("4 workers", {"workers": 4, "streams": 1, "depth": 12}),
        Setting("1 worker, 8 SMs free", {"workers": 1, "streams": 4, "depth": 12, "priority": 0}, 8),
        Setting("1 worker, 8 SMs free, first", {"workers": 1, "streams": 4, "depth": 12}, 8),
        Setting("1 worker, 12 SMs free", {"workers": 1, "streams": 4, "depth": 12, "priority": 0}, 12),
        Setting("1 worker, 12 SMs free, deep", {"workers": 1, "streams": 4, "depth": 24, "priority": 0}, 12),
    )
}


class Products:
    """bf16 [SIDE, SIDE] products in a row on the current stream."""

    def __init__(self, side: int) -> None:
        a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self._a, self._b = a, b
        self.out = torch.empty_like(a)
        self.flop = 2 * side**3
        self.count = 4
        self.enqueue(4)
        self.seconds = self.enqueue(8) / 8  # of one

    def enqueue(self, count: int) -> float:
        """Do `count` products; seconds."""
        begin = _mark()
        self._multiply(count)
        end = _mark()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def start(self, warm: bool) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue products that warm up, then `count` more; events before and after those."""
        if warm:
            self._multiply(round(WARM / self.seconds))
        begin = _mark()
        self._multiply(self.count)
        return begin, _mark()

    def _multiply(self, count: int) -> None:
        for _ in range(count):
            torch.mm(self._a, self._b, out=self.out)


def _mark() -> torch.cuda.Event:
    event = timing_event()
    event.record()
    return event


@dataclass
class Times:
    """Seconds: of the whole, and of the products inside it."""

    total: float
    products: float = nan


def measure(products: Products, work: Callable[[], None] | None, setting: Setting | None) -> Times:
    """Products, beside them `work`; without `setting`, one of them alone."""
    torch.cuda.synchronize()
    count = products.count
    if setting is None:
        products.count = 0 if work else count
        begin, end = products.start(warm=True)
        products.count = count
    else:
        with setting.apply():
            begin, end = products.start(warm=True)
    begin.synchronize()
    start = perf_counter()
    if work:
        work()
    torch.cuda.synchronize()
    return Times(perf_counter() - start, begin.elapsed_time(end) / 1e3)


class Transfer:
    """`count` tensors through a chain, on a stream of their own."""

    def __init__(self, chain: Chain, tensors: list[Tensor], direction: str, wire: int) -> None:
        self.chain = chain
        self._tensors = tensors
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            tickets = [chain.send(x) for x in tensors]
            chain.flush()
        report = chain.report()
        self.packet = report.bytes_wire // report.sent
        self.raw = report.bytes_in // report.sent
        self.count = max(wire // self.packet, 2)
        self._order = [i % len(tensors) for i in range(self.count)]
        self._tickets = [tickets[i] for i in self._order]
        self.run = {"store": self._store, "load": self._load, "both": self._both}[direction]
        self.ways = 2 if direction == "both" else 1

    def _store(self) -> None:
        with torch.cuda.stream(self._stream):
            for i in self._order:
                self.chain.send(self._tensors[i])
            self.chain.flush()

    def _load(self) -> None:
        with torch.cuda.stream(self._stream):
            for _ in self.chain.receive_all(self._tickets):
                pass

    def _both(self) -> None:
        with torch.cuda.stream(self._stream):
            for _ in self.chain.stream(self._tensors[i] for i in self._order):
                pass


def gate(lane: Lane, tensors: list[Tensor], products: Products) -> None:
    """Raise RuntimeError unless tensors and products come out right while both run."""
    products.enqueue(1)
    alone = products.out.clone()
    products.out.zero_()
    with Chain(lane) as chain:
        products.start(warm=False)
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            received = list(chain.stream(tensors))
        torch.cuda.synchronize()
    expected = tensors if lane.exact else [lane.decode(lane.encode(x)) for x in tensors]
    right = all(torch.equal(a, b) for a, b in zip(expected, received, strict=True))
    if not right or not torch.equal(alone, products.out):
        raise RuntimeError(f"lane '{lane.name}' beside products gives wrong results: no times")


def undisturbed_rounds(
    quiet: Quiet, works: Sequence[Callable[[], Times]], repeats: int
) -> list[list[Turn[Times]]]:
    """`repeats` rounds of all `works` in which others did not disturb the host, or the least disturbed of
    `MOST` times as many; then those that were left out."""
    rounds: list[list[Turn[Times]]] = []
    missing = repeats
    while missing and len(rounds) < MOST * repeats:
        rounds.append([quiet.run(work) for work in works])
        missing = repeats - sum(all(map(quiet.is_quiet, each)) for each in rounds)
    return sorted(rounds, key=_loop)


def _loop(turns: Sequence[Turn[Times]]) -> float:
    return max(turn.loop for turn in turns)


def row(
    name: str,
    direction: str,
    setting: Setting,
    transfer: Transfer,
    products: Products,
    repeats: int,
    quiet: Quiet,
) -> dict[str, Any]:
    """Medians over `repeats` rounds of: products alone, chain alone, both. The products are as many as take
    the time of the chain."""
    work = transfer.run
    products.count = 16
    measure(products, work, setting)
    seconds = measure(products, None, None).products / products.count
    alone = median(measure(products, work, None).total for _ in range(TRIES))
    products.count = max(round(alone / seconds), 1)
    works = (
        partial(measure, products, None, None),
        partial(measure, products, work, None),
        partial(measure, products, work, setting),
    )
    taken = undisturbed_rounds(quiet, works, repeats)
    rounds = [[turn.value for turn in turns] for turns in taken[:repeats]]
    a, b, both = (median(each[i].total for each in rounds) for i in range(3))
    hidden = [(x.total + y.total - z.total) / min(x.total, y.total) for x, y, z in rounds]
    quick, beside = (median(each[i].products for each in rounds) for i in (0, 2))
    low, *_, high = quantiles(hidden, n=5)
    wire = transfer.count * transfer.packet * transfer.ways
    return {
        "lane": name,
        "direction": direction,
        "setting": setting.name,
        "tensors": transfer.count,
        "raw_mib": transfer.raw >> 20,
        "wire_bytes": wire,
        "products": products.count,
        "ms_products": round(a * 1e3, 3),
        "ms_chain": round(b * 1e3, 3),
        "ms_both": round(both * 1e3, 3),
        "hidden": round((a + b - both) / min(a, b), 4),
        "hidden_p20": round(low, 4),
        "hidden_p80": round(high, 4),
        "products_slowed": round(beside / quick - 1, 4),
        "wire_gb_s_alone": round(wire / b / 1e9, 1),
        "wire_gb_s_beside": round(wire / both / 1e9, 1),
        "tflops_alone": round(products.flop * products.count / quick / 1e12, 1),
        "repeats": repeats,
        "slowed": round(_loop(taken[repeats - 1]) / quiet.least, 3),
        "left_out": len(taken) - repeats,
    }


def run(arguments: argparse.Namespace, quiet: Quiet) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    quiet.look_around()
    env = environment()
    deadline = perf_counter() + arguments.seconds
    products = Products(arguments.side)
    tensors = [
        torch.randn(arguments.rows, COLUMNS, device="cuda", dtype=torch.bfloat16) for _ in range(KINDS)
    ]
    for name in arguments.lanes.split(","):
        kind, options = name.split()[0], LANES[name]
        products.count = 4
        gate(open_lane(kind, **options), tensors, products)
        for direction in arguments.directions.split(","):
            for chosen in arguments.settings.split(";"):
                if perf_counter() > deadline:
                    print("out of time", flush=True)
                    return rows
                setting = SETTINGS[chosen]
                with Chain(kind, **setting.options, **options) as chain:
                    transfer = Transfer(chain, tensors, direction, arguments.wire)
                    found = row(name, direction, setting, transfer, products, arguments.repeats, quiet)
                    del transfer
                rows.append(found | env)
                print(LINE.format(**found), flush=True)
    return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    with figure(path, 2) as (hidden, slowed):
        names = list(dict.fromkeys((r["lane"], r["direction"]) for r in rows))
        kinds = list(dict.fromkeys(r["setting"] for r in rows))
        for k, setting in enumerate(kinds):
            chosen = [r for r in rows if r["setting"] == setting]
            shift = (k + 0.5) / len(kinds) * 0.8 - 0.4
            at = [names.index((r["lane"], r["direction"])) + shift for r in chosen]
            hidden.bar(at, [r["hidden"] for r in chosen], 0.8 / len(kinds), label=setting)
            slowed.bar(at, [100 * r["products_slowed"] for r in chosen], 0.8 / len(kinds))
        for axes, title in ((hidden, "hidden fraction"), (slowed, "products slower by, %")):
            axes.set_xticks(range(len(names)), [f"{a}\n{b}" for a, b in names], fontsize=7)
            axes.set_title(title)
        hidden.axhline(0.95, color="k", lw=0.8, ls="--")
        slowed.axhline(5, color="k", lw=0.8, ls="--")
        hidden.set_ylim(0, 1.05)
        hidden.legend(fontsize=7)


def timeline(out: Path, name: str, products: Products, rows: int) -> None:
    """The trace of a short run, both directions beside products."""
    xs = [torch.randn(rows, COLUMNS, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
    products.count = 1
    for _ in range(2):  # first, kernels are compiled and memory is pinned
        with Chain(name.split()[0], trace=True, **TRACED[name], **LANES[name]) as chain:
            for _ in range(8):
                with chain.span("product"):
                    products.start(warm=False)
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                for _ in chain.stream(xs):
                    pass
            trace = chain.trace()
    stem = f"overlap_trace_{name.replace(' ', '')}"
    trace.save(out / f"{stem}.json")
    trace.save(out / f"{stem}.png")
    busy = {
        stage: f"{trace.busy(stage) * 1e3:.2f} ms"
        for stage in ("product", "encode", "store", "load", "decode")
    }
    print(stem, busy, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--lanes", default=",".join(LANES))
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--settings", default=";".join(SETTINGS), help="names, separated by semicolons")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=600.0, help="start nothing after so long")
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--wire", type=int, default=WIRE)
    parser.add_argument("--trace", action=argparse.BooleanOptionalAction, default=True, help="draw timelines")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with quiet_cpus(QUIET) as move:
        rows = run(arguments, Quiet(move))
    if rows:
        append_rows(arguments.out / "overlap.csv", rows)
        draw(arguments.out / "overlap.png", rows)
    for name in TRACED if arguments.trace else ():
        timeline(arguments.out, name, Products(arguments.side), arguments.rows)


if __name__ == "__main__":
    main()
