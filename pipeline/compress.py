"""One call each way: a tensor into a packet under a bound on the error, and back."""

from __future__ import annotations

from math import inf, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from sidelane.codec.lane import Lane
from sidelane.codec.packet import Packet, flatten
from sidelane.errors import LaneError, PacketError
from sidelane.kernels.reference import GROUP_BITS
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.lanes import (
    LANE_CLASSES,
    check_plain,
    decode_packet,
    open_lane,
    plain,
    undisturbed,
    unknown_lane,
)

CHUNK = 1 << 20  # elements measured at a time, in float64
EXAMPLE = "sidelane.PackedLane(bits=4)"


def compress(
    tensor: Tensor,
    lane: str | Lane | None = None,
    *,
    max_rel_error: float | None = None,
    basis: Basis | None = None,
    **options: Any,
) -> Packet:
    """Encode a strided tensor of any dtype and layout.

    Args:
        lane: "raw", "exact", "packed", "video-cpu", "video", "dual", or a lane such as
            `sidelane.PackedLane(bits=4)`. Default: "exact", or "packed" when `max_rel_error`
            is given. "auto" takes the lane that is predicted to be fastest over `wire=`; its options are
            those of `AutoLane`.
        max_rel_error: bound on ||decoded - tensor|| / ||tensor|| over the finite elements; NaN and Inf are
            restored bit for bit. Every attempt is decoded and measured, and finer lanes are tried until the
            bound holds, so it holds for every input. Without `bits` the packed lane starts at 2 bits.
        basis, options: of the lane that is named.

    Raises LaneError for an unknown lane or option, a bound below 0, and tensors without dense elements.
    """
    lane = choose_lane(lane, max_rel_error, basis, options)
    check_plain(tensor)
    with undisturbed(tensor.device):
        # "auto" keeps its bound itself, and learns from packets that broke it.
        keeps = getattr(lane, "keeps_bound", False) and getattr(lane, "max_rel_error", None) == max_rel_error
        if max_rel_error is None or keeps:
            return lane.encode(tensor)
        return _encode_within(tensor, lane, max_rel_error)


def _encode_within(tensor: Tensor, lane: Lane, max_rel_error: float) -> Packet:
    tensor = plain(tensor)
    flat = flatten(tensor)
    tensor = Packet.like("raw", tensor).unflatten(flat)
    attempt: Lane | None = lane.for_tensor(tensor) if hasattr(lane, "for_tensor") else lane
    while attempt is not None:
        packet = attempt.encode(tensor)
        if packet.lane in ("raw", "exact"):
            return packet
        error = relative_error(flat, flatten(attempt.decode(packet)))
        if error <= max_rel_error:
            return packet.with_(rel_error=error)
        attempt = attempt.finer()
    raise LaneError(f"{lane.name} has no exact lane behind it: no code keeps {max_rel_error}")


def choose_lane(
    lane: str | Lane | None, max_rel_error: float | None, basis: Basis | None, options: dict[str, Any]
) -> Lane:
    """The lane that the arguments of `compress` ask for. Raises LaneError when they do not fit each other."""
    check_bound(max_rel_error)
    if basis is not None:
        options = options | {"basis": basis}
    if lane is None:
        lane = "exact" if max_rel_error is None else "packed"
    if lane == "auto":
        from sidelane.pipeline.tensor_auto import shared_auto_lane  # it calls `compress`

        return shared_auto_lane(max_rel_error=max_rel_error, **options)
    if isinstance(lane, str):
        if lane not in LANE_CLASSES:
            raise unknown_lane(lane, *LANE_CLASSES, "auto")
        if lane == "packed" and max_rel_error is not None:
            options = {"bits": min(GROUP_BITS)} | options
        return open_lane(lane, **options)
    if isinstance(lane, type) or not (hasattr(lane, "encode") and hasattr(lane, "decode")):
        raise LaneError(f"lane={lane!r} is neither the name of a lane nor a lane such as {EXAMPLE}")
    if options:
        raise LaneError(f"{', '.join(options)} cannot be set on a lane that is open: pass its name instead")
    return lane


def check_bound(max_rel_error: float | None) -> None:
    """Raise LaneError unless `max_rel_error` is None or a number from 0 up."""
    if max_rel_error is None:
        return
    number = isinstance(max_rel_error, (int, float)) and not isinstance(max_rel_error, bool)
    if not (number and 0 <= max_rel_error < inf):
        raise LaneError(f"max_rel_error={max_rel_error!r} is not a number from 0 up")


def decompress(
    packet: Packet, *, basis: Basis | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The tensor of a packet with its shape and dtype, strides compact, on `device` or that of the packet.

    Raises PacketError for a packet whose parts do not fit together, BasisError when it needs another basis,
    LaneError for a device that is not here.
    """
    if not isinstance(packet, Packet):
        raise PacketError(
            "packet", f"{type(packet).__name__} is no Packet: parse bytes with Packet.from_bytes"
        )
    if device is not None:
        packet = packet.to(present_device(device))
    with undisturbed(packet.device):
        return decode_packet(packet, basis)


def present_device(device: torch.device | str) -> torch.device:
    """`device`, if this machine has it. Raises LaneError."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LaneError(f"device={device!r} is no device: use 'cpu' or 'cuda'") from error
    if found.type == "cpu" or (found.type == "cuda" and (found.index or 0) < torch.cuda.device_count()):
        return found
    raise LaneError(f"device '{found}' is not here: use 'cpu' or a CUDA device that torch sees")


def relative_error(reference: Tensor, decoded: Tensor) -> float:
    """||decoded - reference|| / ||reference|| of flat floats, in float64 over finite elements of `reference`.

    Infinite when another element differs in any bit, when `decoded` is not finite where `reference` is, or
    when only `reference` is all zero.
    """
    word = {2: torch.int16, 4: torch.int32}[reference.element_size()]
    noise, signal = (torch.zeros((), dtype=torch.float64, device=reference.device) for _ in range(2))
    for x, y in zip(torch.split(reference, CHUNK), torch.split(decoded, CHUNK), strict=True):
        finite = x.isfinite()
        wide = torch.where(finite, x, 0).double()
        signal += wide.square().sum()
        noise += (torch.where(finite, y, 0).double() - wide).square().sum()
        noise += torch.where(~finite & (x.view(word) != y.view(word)), inf, 0.0).sum()
    total, lost = float(signal), float(noise)
    if lost == 0:
        return 0.0
    return sqrt(lost / total) if total > 0 and isfinite(lost) else inf
