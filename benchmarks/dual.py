"""What two lanes on one wire carry: measured beside min(B + R(1 - 1/r), rB), with B, R and r of the same run.

    python benchmarks/dual.py --make FOLDER              (packets, where PyAV and MiniLM are)
    python benchmarks/dual.py --inputs FOLDER [--out FILE] [--repeat N] [--seconds S]

B is the rate of the raw lane alone on that wire; R that of the other lane alone without a wire, on as many
threads; r its ratio. They and both lanes at once are measured in turns. Wires with a number of GB/s are
simulated by a token bucket; "pcie" is the real one. Tensors are activations of MiniLM, layer 3, repeated to a
size that takes `--seconds`. Video is loaded only: its packets are made beforehand in software.

No row is written before what crossed that wire was compared with what the lanes give one after the other: raw
and exact rows with the tensor, video surfaces with the digests of a software decoder.
"""

from __future__ import annotations

import hashlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, append_rows, environment
from torch import Tensor

from sidelane.codec.engines import decode_surface, decoding_engine, gpu_index
from sidelane.codec.lane import Lane
from sidelane.codec.packet import Packet
from sidelane.errors import LaneUnavailable
from sidelane.layout import FORMATS, plan_surface
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.compress import relative_error
from sidelane.pipeline.dual import DualLane, dual_rate, dual_share
from sidelane.pipeline.dual_wire import DualWire, Parcel
from sidelane.pipeline.lanes import decode_packet, open_lane
from sidelane.pipeline.throttle import TokenBucket

ROWS = 24576  # of the tensor whose video packet is made beforehand
VIDEO_PARTS = 12  # times that one run loads it
ACTIVATIONS = 2048  # rows of another tensor, for raw parts and for the other lanes
LARGEST = 1 << 30  # bytes of a tensor
WIRES = (1.25, 3.0, 7.0, 12.5, 25.0, None)  # GB/s; None is the real one
PCIE = 50.0  # GB/s of the real one, to choose sizes
WORKERS = 4
LINE = (
    "{lane:8} {direction:5} {wire:14} share {share:.3f} B {wire_gb_s:7.3f} R {lane_gb_s:8.3f} r {ratio:.3f}  "
    "formula {formula_gb_s:7.3f}  got {gb_s_median:7.3f} ({gb_s_low:.3f}..{gb_s_high:.3f})  {fraction:.1%}"
)

Row = dict[str, Any]
Runs = dict[str, tuple[Callable[[], object], int]]  # what to time, and its raw bytes


class NoWire(TokenBucket):
    """Nothing crosses it, and that takes no time: what is left is the lane."""

    def __init__(self) -> None:
        super().__init__(1e15)

    def take(self, nbytes: int, ready: float | None = None) -> float:
        return perf_counter()

    def copy(self, *_: Any, **__: Any) -> Any:
        return None


@dataclass(frozen=True)
class MadeBefore:
    """A lane that only decodes, so that the machine with the GPU needs no software encoder."""

    basis: Basis

    name = "video"
    exact = False

    def encode(self, tensor: Tensor) -> Packet:
        raise LaneUnavailable("video packets are made beforehand: use --make")

    def decode(self, packet: Packet) -> Tensor:
        return decode_packet(packet, self.basis)

    def finer(self) -> Lane | None:
        return None


@dataclass(frozen=True)
class Inputs:
    """Activations [*, D] bfloat16, the video packet of others, the digest of its surface, its basis."""

    activations: Tensor
    packet: Packet
    digest: str
    basis: Basis

    @classmethod
    def load(cls, folder: Path) -> Inputs:
        return cls(
            decode_packet(Packet.from_bytes((folder / "activations.lane").read_bytes())),
            Packet.from_bytes((folder / "video.lane").read_bytes()),
            (folder / "digest.txt").read_text().strip(),
            Basis.load(folder / "basis.safetensors"),
        )


def make(folder: Path) -> None:
    """Write inputs to `folder`."""
    from minilm import MiniLM, standard_library

    from sidelane.pipeline.calibrate import calibrate

    def rows(files: list[Path], tokens: int) -> Tensor:
        return torch.cat([out["layer3"] for out in model.activations(model.windows(files, tokens))])

    folder.mkdir(parents=True, exist_ok=True)
    model = MiniLM()
    calibration, text = standard_library()
    basis = calibrate([rows(calibration, ROWS // 2)], bits=3.0)
    basis.save(folder / "basis.safetensors")
    lane = open_lane("video-cpu", basis=basis, max_side=512)
    coded, other = torch.split(rows(text, ROWS + ACTIVATIONS), [ROWS, ACTIVATIONS])
    (folder / "activations.lane").write_bytes(open_lane("exact").encode(other).to_bytes())
    packet = lane.encode(coded)
    (folder / "video.lane").write_bytes(packet.to_bytes())
    (folder / "digest.txt").write_text(surface_digest(packet, basis, torch.device("cpu")) + "\n")
    print(
        f"ratio {packet.ratio:.3f}, error {relative_error(coded.view(-1), lane.decode(packet).view(-1)):.4f}"
    )


def surface_digest(packet: Packet, basis: Basis, device: torch.device) -> str:
    """SHA-256 of the samples of a packet, as `device` decodes them."""
    side = packet.numbers(4)[3]
    fmt = FORMATS[packet.surface]
    layout = plan_surface(fmt, packet.mapping, packet.shape[0], basis.rank, max_side=side)
    surface = decode_surface(packet.section("bitstream").numpy().tobytes(), layout, device)
    return hashlib.sha256(surface[:, : layout.width * fmt.itemsize].cpu().numpy().tobytes()).hexdigest()


class Bench:
    """Rows of the GPU where there is one; on the CPU they prove that the benchmark runs, and nothing else."""

    def __init__(self, inputs: Inputs, repeat: int, seconds: float, largest: int = LARGEST) -> None:
        self.inputs, self.repeat, self.seconds, self.largest = inputs, repeat, seconds, largest
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.x = self.pinned(inputs.activations.repeat(largest // inputs.activations.nbytes, 1))

    def video(self) -> Iterator[Row]:
        """Video beside raw, loaded. Coded rows follow raw ones, VIDEO_PARTS times."""
        packet, basis = self.inputs.packet, self.inputs.basis
        if surface_digest(packet, basis, self.device) != self.inputs.digest:
            raise SystemExit("video: the surface is not that of the software decoder")
        engine = decoding_engine(gpu_index(self.device), FORMATS[packet.surface])
        lane = MadeBefore(basis)
        expected = lane.decode(packet.to(self.device))
        coded = packet.with_(sections={name: self.pinned(part) for name, part in packet.sections.items()})
        alone = self.parcel(VIDEO_PARTS, coded, 0)
        with self.wire(lane, 1.0) as no_wire:
            for gb_s in WIRES:
                with self.wire(lane, 1.0, gb_s) as wire:
                    raw = self.parcel(1, None, self.rows(gb_s))
                    runs: Runs = {
                        "wire": (partial(wire.receive, raw, self.empty(raw)), raw.like.raw_nbytes),
                        "lane": (partial(no_wire.receive, alone, self.empty(alone)), alone.like.raw_nbytes),
                    }
                    found = rates(runs, 3)
                    share = dual_share(median(found["wire"]), median(found["lane"]), alone.ratio)
                    rows = min(round(packet.shape[0] * (1 - share) / share), len(self.x))
                    both = self.parcel(VIDEO_PARTS, coded, rows)
                    out, source = wire.receive(both), self.x[:rows].to(self.device)
                    for i, part in enumerate(torch.split(out, rows + packet.shape[0])):
                        same = torch.equal(part[rows:], expected)
                        if not same or not torch.equal(part[:rows], source):
                            raise SystemExit(
                                f"video: part {i} is not what the lanes give one after the other"
                            )
                    runs["both"] = partial(wire.receive, both, out), both.like.raw_nbytes
                    yield row("video", "load", gb_s, share, alone.ratio, both, rates(runs, self.repeat)) | {
                        "note": f"{engine.name}: {engine.reason}"
                    }

    def on_gpu(self, name: str, options: Mapping[str, Any]) -> Iterator[Row]:
        """A lane that encodes on the GPU beside raw, both ways."""
        lane = open_lane(name, **options)
        for gb_s in WIRES:
            x = self.x[: self.rows(gb_s)].to(self.device)
            with (
                self.wire(lane, 0.0, gb_s) as wire,
                DualWire(DualLane(lane, 1.0), self.device, wire=NoWire(), workers=WORKERS) as no_wire,
                self.wire(lane, 1.0) as fast,
            ):
                raw, alone = wire.send(x), fast.send(x)
                on_device = Parcel(alone.like, tuple(packet.to(self.device) for packet in alone.packets))
                out = torch.empty_like(x)
                stores: Runs = {
                    "wire": (partial(wire.send, x), x.nbytes),
                    "lane": (partial(no_wire.send, x), x.nbytes),
                }
                loads: Runs = {
                    "wire": (partial(wire.receive, raw, out), x.nbytes),
                    "lane": (partial(fast.receive, on_device, out), x.nbytes),
                }
                for direction, runs in (("store", stores), ("load", loads)):
                    found = rates(runs, 3)
                    share = dual_share(median(found["wire"]), median(found["lane"]), alone.ratio)
                    with self.wire(lane, share, gb_s) as dual:
                        both = dual.send(x)
                        self.check(lane, x, both, dual.receive(both, out))
                        work = (
                            partial(dual.send, x)
                            if direction == "store"
                            else partial(dual.receive, both, out)
                        )
                        runs["both"] = work, x.nbytes
                        measured = rates(runs, self.repeat)
                    setting = " ".join([name, *map(str, options.values())])
                    yield row(setting, direction, gb_s, share, alone.ratio, both, measured) | {"note": ""}

    def check(self, lane: Lane, x: Tensor, sent: Parcel, got: Tensor) -> None:
        """Raise SystemExit unless `got` is x where it is raw or exact, and else what the lane decodes to."""
        first = 0
        for packet in sent.packets:
            rows = slice(first, first + packet.flat_numel)
            first += packet.flat_numel
            want = x.view(-1)[rows]
            if packet.lane == "packed":
                want = lane.decode(lane.encode(want.view(packet.shape))).view(-1)
            if not torch.equal(got.view(-1)[rows], want):
                raise SystemExit(
                    f"{lane.name}: what came back is not what the lanes give one after the other"
                )

    def parcel(self, count: int, coded: Packet | None, rows: int) -> Parcel:
        """`count` times `rows` raw rows of `x` and the `coded` packet."""
        x = self.x[:rows]
        raw = Packet.like("raw", x).with_(sections={"data": x.view(-1).view(torch.uint8)})
        packets = [raw] if rows else []
        if coded is not None:
            packets.append(coded)
        shape = (count * sum(packet.shape[0] for packet in packets), x.shape[1])
        return Parcel(raw.with_(shape=shape, sections={}), tuple(packets * count))

    def wire(self, lane: Lane, share: float, gb_s: float | None = None) -> DualWire:
        bucket = None if gb_s is None else TokenBucket(gb_s * 1e9)
        return DualWire(DualLane(lane, share), self.device, wire=bucket, workers=WORKERS)

    def rows(self, gb_s: float | None) -> int:
        """Of `x`, that take `seconds` raw on the wire."""
        return min(int((gb_s or PCIE) * 1e9 * self.seconds) // self.x[0].nbytes, len(self.x))

    def empty(self, parcel: Parcel) -> Tensor:
        return torch.empty(parcel.like.shape, dtype=parcel.like.dtype, device=self.device)

    def pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def rates(runs: Runs, repeat: int) -> dict[str, list[float]]:
    """Raw bytes per second of all runs in turns, after one turn that is not measured."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, (run, nbytes) in runs.items():
            start = perf_counter()
            run()
            seconds = perf_counter() - start
            if turn:
                found[name].append(nbytes / seconds)
    return found


def row(
    lane: str,
    direction: str,
    gb_s: float | None,
    share: float,
    ratio: float,
    sent: Parcel,
    found: dict[str, list[float]],
) -> Row:
    wire, alone = median(found["wire"]), median(found["lane"])
    low, middle, high = quantiles(found["both"], n=4)
    formula = dual_rate(wire, alone, ratio)
    return {
        "lane": lane,
        "direction": direction,
        "wire": "pcie" if gb_s is None else f"{gb_s} simulated",
        "raw_bytes": sent.like.raw_nbytes,
        "share": round(share, 4),
        "wire_gb_s": round(wire / 1e9, 4),
        "lane_gb_s": round(alone / 1e9, 4),
        "ratio": round(ratio, 4),
        "formula_gb_s": round(formula / 1e9, 4),
        "gb_s_low": round(low / 1e9, 4),
        "gb_s_median": round(middle / 1e9, 4),
        "gb_s_high": round(high / 1e9, 4),
        "fraction": round(middle / formula, 4),
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--make", type=Path, metavar="FOLDER")
    parser.add_argument("--inputs", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS / "dual.csv")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.06)
    parser.add_argument("--largest", type=int, default=LARGEST, help="bytes of a tensor")
    options = parser.parse_args()
    if options.make:
        make(options.make)
    if options.inputs:
        bench = Bench(Inputs.load(options.inputs), options.repeat, options.seconds, options.largest)
        for rows in (bench.video(), bench.on_gpu("exact", {}), bench.on_gpu("packed", {"bits": 8})):
            for each in rows:
                print(LINE.format(**each), flush=True)
                append_rows(options.out, [environment() | each])


if __name__ == "__main__":
    main()
