"""The dual lane: the first rows of a tensor raw, the others through another lane, in one packet.

What is limited by an engine or a kernel then does not hold up a wire that has room to spare: while the lane
works on its part, the wire carries the raw part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isfinite, nan
from typing import NamedTuple

from torch import Tensor

from sidelane.codec.lane import Lane
from sidelane.codec.packet import LANES, Packet, flatten
from sidelane.errors import LaneError, PacketError
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.lanes import ExactLane, RawLane, decode_packet, plain
from sidelane.pipeline.octets import as_bytes, copied
from sidelane.pipeline.planner import LaneLoad, split_lanes

CODED = {LANES[name]: name for name in ("exact", "packed", "video")}
CODED_PARAMS = 4  # of the coded part; then its lane, the raw elements (low, high), the row length
MIN_ROWS = 64  # tensors of fewer rows are split between any two blocks
BLOCK = 1024  # elements


@dataclass(frozen=True)
class DualLane:
    """Stores the first rows of a tensor raw and `share` of them, the last ones, in the code of `lane`.

    Rows are those of the innermost dimension in memory; tensors of few rows are split anywhere. A part that
    `lane` cannot make smaller makes the whole tensor raw; with a share of 0 or 1 packets are those of the raw
    lane or of `lane`. The round trip is exact where that of `lane` is, and an error bound on the tensor holds
    when it holds on the coded part.

    Args:
        lane: of the coded part: exact, packed or video.
        share: of the elements that are coded, 0..1; see `dual_share`.

    Raises LaneError for an option outside these.
    """

    lane: Lane = field(default_factory=ExactLane)
    share: float = 0.5

    name = "dual"
    exact = False  # of the class; instances are as exact as their lane

    def __post_init__(self) -> None:
        if isinstance(self.lane, (str, type, DualLane)) or not hasattr(self.lane, "encode"):
            raise LaneError(f"lane={self.lane!r} is no lane: pass one, such as ExactLane()")
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)):
            raise LaneError(f"share={self.share!r} is not a number from 0 to 1")
        if not 0 <= self.share <= 1:
            raise LaneError(f"share={self.share!r} is outside 0..1")
        object.__setattr__(self, "exact", self.lane.exact or not self.share)

    def encode(self, tensor: Tensor) -> Packet:
        """A packet of lane "dual", or of the lane that took the whole tensor.

        Sections: raw, the bytes of the first elements in memory order, and those of the coded part. Other
        fields are those of the coded part; params: its own 4, its lane, the number of raw elements (low and
        high word), the length of its rows, 0 for a coded part of one dimension.
        """
        tensor = plain(tensor)
        like, flat = Packet.like("dual", tensor), flatten(tensor)
        split = split_rows(like, self.share)
        if split.raw == like.flat_numel:
            return RawLane().encode(tensor)
        if not split.raw:
            return self.lane.encode(tensor)
        coded = self.lane.encode(split.rows(flat[split.raw :]))
        if coded.lane == "raw":
            return RawLane().encode(tensor)
        sections = {"raw": copied(as_bytes(flat[: split.raw])), **coded.sections}
        return coded.with_(
            lane="dual",
            shape=like.shape,
            strides=like.strides,
            sections=sections,
            params=_params(coded, split),
            rel_error=0.0 if coded.rel_error == 0 else nan,
        )

    def decode(self, packet: Packet) -> Tensor:
        """The tensor of a packet of `encode`. Raises PacketError, BasisError."""
        if packet.lane != "dual":
            return (RawLane() if packet.lane == "raw" else self.lane).decode(packet)
        return decode_packet(packet, getattr(self.lane, "basis", None))

    def finer(self) -> Lane | None:
        finer = self.lane.finer()
        return None if finer is None else replace(self, lane=finer)


class Split(NamedTuple):
    """Where a tensor is cut: `raw` elements, then rows of `length` elements, or no rows if that is 0."""

    raw: int
    length: int

    def rows(self, flat: Tensor) -> Tensor:
        return flat.view(-1, self.length) if self.length else flat


def row_length(packet: Packet) -> int:
    """Length of the innermost dimension in memory of a tensor that has enough rows of it to be cut there, 0
    for others."""
    dims = zip(packet.shape, packet.strides, strict=True)
    length = next((size for size, stride in dims if stride == 1 and size > 1), 0)
    return length if MIN_ROWS * length <= packet.flat_numel and length < 1 << 32 else 0


def split_rows(packet: Packet, share: float) -> Split:
    """The cut nearest to a coded `share` of the tensor of `packet`."""
    n, length = packet.flat_numel, row_length(packet)
    unit = length or BLOCK
    if share == 1:
        return Split(0, length)
    return Split(n - min(n, round(share * n / unit) * unit), length)


def parts_of(packet: Packet) -> tuple[Tensor, Packet]:
    """The bytes of the raw part of a dual packet, and the packet of its coded part.

    Raises PacketError when the fields do not fit each other.
    """
    number, low, high, length = (packet.params + (0,) * 8)[CODED_PARAMS : CODED_PARAMS + 4]
    if number not in CODED:
        raise PacketError("params", f"lane {number} of the coded part is not one of {sorted(CODED)}")
    raw = high << 32 | low
    coded = packet.flat_numel - raw
    if raw < 1 or coded < 1 or (length and coded % length):
        raise PacketError("params", f"{raw} raw elements of {packet.flat_numel}, rows of {length}: no split")
    data = packet.section("raw", numel=raw * packet.dtype.itemsize)
    shape, strides = ((coded // length, length), (length, 1)) if length else ((coded,), (1,))
    sections = {name: section for name, section in packet.sections.items() if name != "raw"}
    part = packet.with_(
        lane=CODED[number],
        shape=shape,
        strides=strides,
        sections=sections,
        params=packet.params[:CODED_PARAMS],
    )
    return data, part


def decode_dual(packet: Packet, basis: Basis | None) -> Tensor:
    """The flat elements of a dual packet, which needs `basis`."""
    data, part = parts_of(packet)
    decoded = decode_packet(part, basis)  # before the rest is allocated: it checks what the header claims
    out = decoded.new_empty(packet.flat_numel)
    as_bytes(out[: -decoded.numel()]).copy_(data)
    out[-decoded.numel() :].copy_(decoded.view(-1))
    return out


def dual_rate(wire: float, lane: float, ratio: float) -> float:
    """Raw bytes per second of a wire with a lane beside it: min(wire + lane (1 - 1/ratio), ratio wire).

    Args:
        wire: bytes per second that the wire carries.
        lane: raw bytes per second of the lane alone, on a wire that is no limit.
        ratio: raw bytes over bytes on the wire, of the lane.

    Raises LaneError for rates that are not positive and finite, and a ratio below 1.
    """
    _check_rates(wire, lane, ratio)
    return min(wire + lane * (1 - 1 / ratio), ratio * wire)


def dual_share(wire: float, lane: float, ratio: float) -> float:
    """The part of the bytes that the lane should take, by `split_lanes`; arguments as for `dual_rate`."""
    _check_rates(wire, lane, ratio)
    loads = {
        "raw": LaneLoad({"wire": 1 / wire}),
        "coded": LaneLoad({"wire": 1 / (ratio * wire), "lane": 1 / lane}),
    }
    return min(max(split_lanes(loads, 1.0).fractions["coded"], 0.0), 1.0)


def _check_rates(wire: float, lane: float, ratio: float) -> None:
    for name, value, least in (("wire", wire, 0.0), ("lane", lane, 0.0), ("ratio", ratio, 1.0)):
        number = isinstance(value, (int, float)) and isfinite(value)
        if not (number and value >= least and value > 0):
            raise LaneError(f"{name}={value!r} is not a finite number {'from 1 up' if least else 'above 0'}")


def _params(coded: Packet, split: Split) -> tuple[int, ...]:
    if any(coded.params[CODED_PARAMS:]) or LANES.get(coded.lane) not in CODED:
        raise LaneError(f"lane '{coded.lane}' has no place in a dual packet: use exact, packed or video")
    own = (coded.params + (0,) * CODED_PARAMS)[:CODED_PARAMS]
    return (*own, LANES[coded.lane], split.raw & 0xFFFFFFFF, split.raw >> 32, split.length)
