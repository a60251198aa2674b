"""The lanes that need no codec: raw, exact and packed; the table that opens a lane and decodes any packet."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sidelane.codec.lane import Lane
from sidelane.codec.packet import DTYPES, MAX_NDIM, NO_DIGEST, Packet, flatten
from sidelane.errors import BasisError, LaneError, PacketError
from sidelane.kernels._launch import aligned
from sidelane.kernels.exact import exact_decode, exact_encode
from sidelane.kernels.reference import (
    EXACT_FIELDS,
    EXACT_SECTIONS,
    GROUP_BITS,
    GROUP_SIZES,
    MAX_CODE_BITS,
    ExactCodes,
    exact_sizes,
)
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.octets import as_bytes, copied
from sidelane.pipeline.packed import (
    LOSSY_DTYPES,
    GroupPlan,
    decode_basis,
    decode_groups,
    encode_basis,
    encode_groups,
    fits,
    plan_groups,
)

# Names of this module are found faster than attributes of others; these are asked for every saved tensor.
_is_inference, _is_autocast, _is_grad = (
    torch.is_inference_mode_enabled,
    torch.is_autocast_enabled,
    torch.is_grad_enabled,
)
_modes, _set_grad = torch._C._len_torch_dispatch_stack, torch._C._set_grad_enabled
_REAL = {torch.complex64: torch.float32, torch.complex32: torch.float16}  # coded as pairs of floats


@dataclass(frozen=True)
class RawLane:
    """Stores the distinct elements as they are: any dtype, every bit."""

    name = "raw"
    exact = True

    def encode(self, tensor: Tensor) -> Packet:
        tensor = plain(tensor)
        return _encode_raw(Packet.like("raw", tensor), flatten(tensor))

    def decode(self, packet: Packet) -> Tensor:
        return _decode_own(packet, "raw")

    def finer(self) -> Lane | None:
        return None


@dataclass(frozen=True)
class ExactLane:
    """Codes the exponents of bf16, fp16, fp32, complex32 and complex64 without loss (see `ExactCodes`).

    Other dtypes, and tensors that this does not make smaller, are stored raw.
    """

    name = "exact"
    exact = True

    def encode(self, tensor: Tensor) -> Packet:
        tensor = plain(tensor)
        return _encode_exact(Packet.like("exact", tensor), flatten(tensor))

    def decode(self, packet: Packet) -> Tensor:
        return _decode_own(packet, "raw", "exact")

    def finer(self) -> Lane | None:
        return None


@dataclass(frozen=True)
class PackedLane:
    """Codes bf16, fp16 and fp32 with loss, every other dtype bit for bit; Inf and NaN stay what they are.

    Without a basis, groups of `group` neighbours in memory share a scale (see `GroupCodes`). With one, rows
    [T, D] in memory order are projected and each coefficient takes `width` bits, or what the basis allocates;
    tensors that are not rows of the basis take the group code. What does not become smaller is stored raw.

    Args:
        bits: 2, 4 or 8 per element of the group code.
        group: elements that share a scale, 32, 64, 128 or 256.
        symmetric: no offset; for data centred on zero.
        seed: None rounds groups to nearest; a number rounds them stochastically.
        basis: principal components of the rows, or None.
        width: 1..12 bits for every coefficient of the basis.

    Raises LaneError for an option outside these.
    """

    bits: int = 8
    group: int = 64
    symmetric: bool = False
    seed: int | None = None
    basis: Basis | None = None
    width: int | None = None

    name = "packed"
    exact = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in GROUP_BITS:
            raise LaneError(f"bits={self.bits!r} is not one of {GROUP_BITS}")
        if type(self.group) is not int or self.group not in GROUP_SIZES:
            raise LaneError(f"group={self.group!r} is not one of {GROUP_SIZES}")
        if not isinstance(self.symmetric, bool):
            raise LaneError(f"symmetric={self.symmetric!r} is neither True nor False")
        if self.seed is not None and not isinstance(self.seed, int):
            raise LaneError(f"seed={self.seed!r} is neither None nor an integer")
        if self.basis is not None and not isinstance(self.basis, Basis):
            raise LaneError(f"basis is a {type(self.basis).__name__}: pass a Basis")
        if self.basis is None and self.width is not None:
            raise LaneError(f"width={self.width!r} needs a basis; for groups use bits")
        if self.width is not None and (type(self.width) is not int or not 1 <= self.width <= MAX_CODE_BITS):
            raise LaneError(f"width={self.width!r} is no integer of 1..{MAX_CODE_BITS}")

    def encode(self, tensor: Tensor) -> Packet:
        tensor = plain(tensor)
        if tensor.dtype not in LOSSY_DTYPES or not tensor.numel():
            return _encode_exact(Packet.like("packed", tensor), flatten(tensor))
        flat = tensor if self.basis is None and tensor.is_contiguous() else flatten(tensor)
        if self.basis is not None and fits(self.basis, packet := Packet.like("packed", tensor)):
            return _or_raw(encode_basis(packet, flat, self.basis, self.width), flat)
        plan = self._group_plan(tensor)
        if not plan.smaller:
            return _encode_raw(Packet.like("raw", tensor), flatten(tensor))
        return encode_groups(plan, flat)

    def plan(self, tensor: Tensor) -> GroupPlan | None:
        """What `encode` does with every plain, contiguous tensor of this dtype and these sizes; None where
        that depends on its elements."""
        if self.basis is not None or tensor.dtype not in LOSSY_DTYPES or not tensor.numel():
            return None
        plan = self._group_plan(tensor)
        return plan if plan.smaller else None

    def _group_plan(self, tensor: Tensor) -> GroupPlan:
        kind = tensor.dtype, tuple(tensor.shape), tensor.stride()
        return plan_groups(*kind, self.bits, self.group, self.symmetric, self.seed)

    def decode(self, packet: Packet) -> Tensor:
        return _decode_own(packet, "raw", "exact", "packed", basis=self.basis)

    def finer(self) -> Lane | None:
        """Wider coefficients up to 12 bits, then groups of more bits per element, then `ExactLane`."""
        rate = self.bits
        if self.basis is not None:
            width = self.width or max(self.basis.widths)
            wider = min(width + 2, MAX_CODE_BITS)
            if width < wider and self.basis.rank * wider < max(GROUP_BITS) * self.basis.dim:
                return replace(self, width=wider)
            rate = self.basis.rank * width // self.basis.dim
        for bits in GROUP_BITS:
            if bits > rate:
                return replace(self, bits=bits, basis=None, width=None)
        return ExactLane()

    def for_tensor(self, tensor: Tensor) -> PackedLane:
        """This lane without its basis when `tensor` is not made of its rows: what `encode` does with it."""
        if self.basis is None or fits(self.basis, Packet.like("packed", tensor)):
            return self
        return replace(self, basis=None, width=None)


def _video_lane() -> type[Lane]:
    from sidelane.pipeline.video import VideoLane  # PyAV is loaded by those who use it

    return VideoLane


def _engine_video_lane() -> type[Lane]:
    from sidelane.pipeline.video import EngineVideoLane

    return EngineVideoLane


def _dual_lane() -> type[Lane]:
    from sidelane.pipeline.dual import DualLane

    return DualLane


OWNERS = dict.fromkeys(inspect.signature(PackedLane).parameters, "packed")  # of options, by name
OWNERS |= {"format": "video-cpu", "qp": "video-cpu", "wire": "auto"}
LANE_CLASSES: dict[str, Callable[[], type[Lane]]] = {
    "raw": lambda: RawLane,
    "exact": lambda: ExactLane,
    "packed": lambda: PackedLane,
    "video-cpu": _video_lane,
    "video": _engine_video_lane,
    "dual": _dual_lane,
}


def open_lane(name: str, **options: Any) -> Lane:
    """The lane `name` with the options of its class: "raw", "exact", "packed", "video-cpu", "video", "dual".

    Raises LaneError for an unknown name or option, LaneUnavailable when this machine cannot run the lane.
    """
    if name not in LANE_CLASSES:
        raise unknown_lane(name, *LANE_CLASSES)
    factory = LANE_CLASSES[name]()
    known = list(inspect.signature(factory).parameters)
    for option in options:
        if option not in known:
            other = f"; lane '{OWNERS[option]}' has it" if option in OWNERS else ""
            has = ", ".join(known) or "no options"
            raise LaneError(f"lane '{name}' has no option '{option}': it has {has}{other}")
    return factory(**options)


def unknown_lane(name: str, *known: str) -> LaneError:
    return LaneError(f"unknown lane {name!r}: use one of {', '.join(known)}")


def decode_packet(packet: Packet, basis: Basis | None = None) -> Tensor:
    """The tensor of a packet of any lane, on the packet's device.

    Raises PacketError when the parts of the packet do not fit together, BasisError when it needs a basis.
    """
    basis = packet_basis(packet, basis)
    if packet.lane == "raw":
        flat = _decode_raw(packet)
    elif packet.lane == "exact":
        flat = _decode_exact(packet)
    elif packet.lane == "packed":
        flat = decode_groups(packet) if basis is None else decode_basis(packet, basis)
    elif packet.lane == "video":
        from sidelane.codec.engines import decode_surface  # loaded by those who use it
        from sidelane.pipeline.video import decode_video

        return decode_video(packet, basis, decode_surface)
    elif packet.lane == "dual":
        from sidelane.pipeline.dual import decode_dual

        flat = decode_dual(packet, basis)
    else:
        raise PacketError("lane", f"{packet.lane!r} is unknown")
    return packet.unflatten(flat)


def packet_basis(packet: Packet, basis: Basis | None) -> Basis | None:
    """`basis` if the packet needs it, None if it needs none. Raises BasisError when it needs another one."""
    if packet.digest == NO_DIGEST:
        return None
    if basis is None or basis.digest != packet.digest:
        got = "none was given" if basis is None else f"got {basis.digest.hex()[:16]}"
        raise BasisError(f"packet needs the basis with digest {packet.digest.hex()}, {got}: pass basis=")
    return basis


class undisturbed:
    """Context for work of our own: not recorded by autograd, not cast by autocast, unseen by dispatch modes.

    What is off already is not switched off again: this is entered for every saved tensor.
    """

    __slots__ = ("_device", "_grad", "_outer")

    def __init__(self, device: torch.device) -> None:
        self._device = device.type

    def __enter__(self) -> None:
        self._outer: ExitStack | None = None
        if _is_inference() or _is_autocast(self._device) or _modes():
            self._outer = ExitStack()
            self._outer.enter_context(torch.inference_mode(False))
            self._outer.enter_context(torch.autocast(self._device, enabled=False))
            self._outer.enter_context(_disable_current_modes())
        self._grad = _is_grad()
        _set_grad(False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set_grad(self._grad)
        if self._outer is not None:
            self._outer.close()


def check_plain(tensor: Tensor) -> None:
    """Raise LaneError for what no lane stores."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_nested:
        raise LaneError(f"{type(tensor).__name__} is not a plain tensor: pass the dense tensors inside it")
    if tensor.is_meta:
        raise LaneError("a tensor on the meta device has no elements: move the model to a real device")
    if tensor.layout != torch.strided:
        raise LaneError(f"a tensor of {tensor.layout} has no dense elements: use to_dense()")
    if tensor.ndim > MAX_NDIM:
        raise LaneError(f"{tensor.ndim} dimensions are more than {MAX_NDIM}: reshape the tensor")
    if tensor.dtype not in DTYPES:
        raise LaneError(f"dtype {tensor.dtype} has no place in a packet: convert it first")


def plain(tensor: Tensor) -> Tensor:
    """`tensor` detached, conjugate and negative bits resolved. Raises LaneError for a kind no lane stores."""
    check_plain(tensor)
    tensor = tensor.detach()
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _decode_own(packet: Packet, *lanes: str, basis: Basis | None = None) -> Tensor:
    if packet.lane not in lanes:
        raise PacketError("lane", f"'{packet.lane}' is not of this lane: use decode_packet")
    return decode_packet(packet, basis)


def _encode_raw(packet: Packet, flat: Tensor) -> Packet:
    """`packet` with a copy of `flat`: the caller may change its tensor afterwards."""
    return packet.with_(lane="raw", sections={"data": copied(as_bytes(flat))})


def _decode_raw(packet: Packet) -> Tensor:
    packet.numbers(0)
    packet.check_sections("data")
    data = packet.section("data", packet.dtype, packet.flat_numel)
    # A byte of a bool that is neither 0 nor 1 would be undefined.
    return as_bytes(data).ne(0) if packet.dtype == torch.bool else copied(as_bytes(data)).view(packet.dtype)


def _or_raw(packet: Packet, flat: Tensor) -> Packet:
    """`packet` where it is smaller than a raw one."""
    if packet.nbytes < packet.stored_nbytes:
        return packet
    return _encode_raw(packet.with_(params=(), bits=0, digest=NO_DIGEST, rel_error=0.0), flat)


def _encode_exact(packet: Packet, flat: Tensor) -> Packet:
    real = flat.view(_REAL.get(packet.dtype, packet.dtype))
    codes = exact_encode(real) if real.dtype in EXACT_FIELDS and real.numel() else None
    if codes is None:
        return _encode_raw(packet, flat)
    return _or_raw(packet.with_(lane="exact", sections=codes.sections, params=(codes.zero_planes,)), flat)


def _decode_exact(packet: Packet) -> Tensor:
    """The flat elements of `_encode_exact`; params: zero_planes."""
    dtype = _REAL.get(packet.dtype, packet.dtype)
    if dtype not in EXACT_FIELDS:
        raise PacketError("dtype", f"{packet.dtype} has no exact code")
    n = packet.raw_nbytes // dtype.itemsize
    if not n:
        raise PacketError("shape", "empty tensors have no exact code")
    (zero_planes,) = packet.numbers(1)
    if zero_planes >= 1 << EXACT_FIELDS[dtype].droppable:
        raise PacketError("params", f"zero planes {zero_planes:#x}, but {dtype} has no such planes")
    packet.check_sections(*EXACT_SECTIONS)
    escapes = packet.section("escapes", torch.int16).numel()
    sizes = exact_sizes(dtype, n, zero_planes, escapes)
    parts = (
        aligned(packet.section(name, numel=size)) for name, size in zip(EXACT_SECTIONS, sizes, strict=True)
    )
    codes = ExactCodes.of(parts, zero_planes, n)
    try:
        return exact_decode(codes, dtype).view(packet.dtype)
    except LaneError as error:
        raise PacketError("escapes", str(error)) from error
