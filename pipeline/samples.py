"""What lanes make of tensors: a sample is encoded once, and remembered for tensors of its kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from statistics import median
from threading import RLock
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sidelane.codec.lane import Lane
from sidelane.codec.packet import Packet, flatten
from sidelane.errors import LaneError
from sidelane.pipeline.compress import relative_error
from sidelane.pipeline.decision import RAW
from sidelane.pipeline.lanes import decode_packet, open_lane, plain, undisturbed
from sidelane.pipeline.sampling import seconds_in_use
from sidelane.pipeline.streams import current_stream, on, side_stream
from sidelane.pipeline.tiers import PacketLayout

LANES = (RAW, "exact", "packed:8", "packed:4", "packed:2", "video")
EXACT = (RAW, "exact")
SAMPLE = 1 << 20  # bytes of a tensor that are probed, as so many pieces:
PIECES = 16
TRIALS = 7  # of a sample that is timed
MAX_SAMPLES = 4096

Kind = tuple[Any, ...]


@dataclass(frozen=True)
class Sample:
    """What a lane makes of tensors of a kind.

    Attributes:
        share: bytes on the wire per raw byte.
        header: bytes on the wire besides.
        rel_error: relative Frobenius error, 0 for what comes back bit for bit.
        nbytes: of the sample, raw; 0 where it was not timed.
        encode, decode: seconds.
    """

    share: float
    header: int = 0
    rel_error: float = 0.0
    nbytes: int = 0
    encode: float = 0.0
    decode: float = 0.0


@lru_cache(16)
def lane_named(name: str) -> Lane:
    """The lane of a name in `LANES`. Raises LaneError for another, LaneUnavailable as `open_lane`."""
    if name not in LANES:
        raise LaneError(f"unknown lane {name!r}: a planner knows {', '.join(LANES)}")
    kind, _, bits = name.partition(":")
    return open_lane(kind, **({"bits": int(bits)} if bits else {}))


def name_of(packet: Packet) -> str:
    """The name in `LANES` of the lane that decodes `packet`."""
    return f"packed:{packet.bits}" if packet.lane == "packed" else packet.lane


class Probes:
    """Samples by kind of tensor and lane, at most `MAX_SAMPLES` of them. Thread-safe."""

    def __init__(self) -> None:
        self.seconds = 0.0  # spent on encoding samples
        self._samples: dict[tuple[Kind, str], Sample] = {}
        self._checks: dict[tuple[str, torch.dtype], float] = {}
        self._lock = RLock()

    def sample(self, kind: Kind, lane: str, tensor: Tensor) -> Sample:
        """Of `lane` for tensors of `kind`, from `tensor` if there is none. Raises LaneUnavailable."""
        with self._lock:
            if (kind, lane) not in self._samples:
                begin = perf_counter()
                found = probe(lane, tensor)
                self.seconds += perf_counter() - begin
                if len(self._samples) >= MAX_SAMPLES:
                    self._samples.clear()
                self._samples[kind, lane] = found
            return self._samples[kind, lane]

    def check_seconds(self, tensor: Tensor) -> float:
        """Of measuring the error of `compress.CHUNK` elements on the device of `tensor`."""
        key = tensor.device.type, tensor.dtype
        with self._lock:
            if key not in self._checks:
                with undisturbed(tensor.device):
                    flat = flatten(sample_of(plain(tensor)))
                    relative_error(flat, flat)
                    begin = perf_counter()
                    relative_error(flat, flat)
                    self._checks[key] = perf_counter() - begin
                self.seconds += 2 * self._checks[key]
            return self._checks[key]

    def forget(self, kind: Kind) -> None:
        """Probe the next tensor of `kind` anew."""
        with self._lock:
            for key in [key for key in self._samples if key[0] == kind]:
                del self._samples[key]


SHARED = Probes()


def kind_of(tensor: Tensor, name: str = "") -> Kind:
    """What tensors share that are taken to code alike: name, dtype, dimensions, length of rows if there
    are any, device."""
    last = tensor.shape[-1] if tensor.ndim > 1 else 1
    return name, tensor.dtype, tensor.ndim, last, tensor.device.type


def sample_of(tensor: Tensor) -> Tensor:
    """About `SAMPLE` bytes of `tensor` in `PIECES` pieces of neighbouring rows, [rows, row length]."""
    flat = flatten(tensor)
    width = tensor.shape[-1] if tensor.ndim > 1 and tensor.numel() and tensor.is_contiguous() else 1
    piece = max(SAMPLE // PIECES // flat.itemsize // width, 1) * width
    if flat.nbytes > SAMPLE and piece * PIECES < flat.numel():
        rows = flat.numel() // width
        starts = [i * (rows - piece // width) // (PIECES - 1) * width for i in range(PIECES)]
        flat = torch.cat([flat[start : start + piece] for start in starts])
    return flat.view(-1, width) if width > 1 else flat


def probe(lane: str, tensor: Tensor) -> Sample:
    """What `lane` makes of a sample of `tensor`; waits for the device. Raises LaneUnavailable."""
    opened = lane_named(lane)
    on_gpu = tensor.device.type == "cuda"
    if lane == RAW and not on_gpu:
        return Sample(1.0)
    with undisturbed(tensor.device):
        some = sample_of(plain(tensor))
        found = Sample(1.0)
        if lane != RAW:
            packet = opened.encode(some)
            payload = sum(section.numel() for section in packet.sections.values())
            error = 0.0
            if packet.lane not in EXACT:
                error = relative_error(flatten(some), flatten(opened.decode(packet)))
            found = Sample(payload / packet.raw_nbytes, packet.nbytes - payload, error)
        if not on_gpu or lane == "video" or not some.numel():
            return found
        encode, decode = _seconds(opened, some)
        return replace(found, nbytes=some.nbytes, encode=encode, decode=decode)


def _seconds(lane: Lane, some: Tensor) -> tuple[float, float]:
    """Of encode and of decode of what has just arrived, as tables of a profile hold them: medians of
    `TRIALS` after one, on a stream of its own."""
    stream = side_stream(some.device, "samples", -1)
    stream.wait_event(current_stream(some.device).record_event())
    with on(stream):
        packet = lane.encode(some)
        layout = PacketLayout(packet)
        memory = torch.empty(layout.nbytes, dtype=torch.uint8, device=some.device)
        layout.write(packet, memory)
    stream.synchronize()
    times = [
        (
            seconds_in_use(stream, partial(lane.encode, some)),
            seconds_in_use(stream, lambda: decode_packet(layout.over(memory))),
        )
        for _ in range(TRIALS + 1)
    ]
    encode, decode = zip(*times[1:], strict=True)
    return median(encode), median(decode)
