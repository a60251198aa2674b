"""The video lanes, in software and on NVENC: quantized rows as the samples of an HEVC stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, nan
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sidelane.codec.engines import EncodingSlot, decode_surface, encoding_slot
from sidelane.codec.hevc import check_qp, decode_hevc, hevc_support
from sidelane.codec.lane import Lane
from sidelane.codec.packet import NO_DIGEST, Packet, flatten
from sidelane.errors import LaneError, PacketError
from sidelane.kernels._launch import cdiv
from sidelane.kernels.surface import (
    Weights,
    project_quantize_pack,
    unpack_dequantize_project,
    weigh_components,
)
from sidelane.layout import (
    CHANNEL_ROWS,
    FORMATS,
    MAPPINGS,
    MAX_SIDE,
    MIN_SIDE,
    SurfaceFormat,
    SurfaceLayout,
    plan_surface,
)
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.lanes import ExactLane, RawLane, decode_packet, packet_basis, plain
from sidelane.pipeline.octets import as_bytes
from sidelane.pipeline.packed import LOSSY_DTYPES, check_lossy_dtype, escaped_rows, fits
from sidelane.pipeline.streams import settle

QP_STEP = 6  # halves the quantizer step of HEVC
FINER_FORMAT = {
    "nv12": "p010",
    "yuv444": "yuv444_10",
    "p010": "nv12_split12",
    "yuv444_10": "nv12_split12",
}
MIN_CHANNELS = 32  # rows shorter than this are no channels worth their own scales
MAX_CHANNELS = 2**20  # nor rows longer than this: operands of the kernels have numbers for every channel
FLAT_ROW = 256  # row length for tensors without channels
MIN_TOKENS = 256  # with fewer, two floats per channel would cost more than a quarter bit per element
TINY = torch.finfo(torch.float32).tiny  # steps below it have no inverse: such numbers come back as their mean
LARGEST = 2.0**100  # rows with larger magnitudes could overflow float32 in a projection
FRAMES_AHEAD = 8  # under way in encode_many: enough for every engine of a GPU


@dataclass(frozen=True, eq=False)
class SurfaceQuantizer:
    """Operands of the surface kernels for x [T, D] and codes [T, K] of one width, mid-grey at the mean.

    `components` [D, K] or None for the identity; `scale` and `offset` [K], `bias` [D], all float32.
    """

    components: Tensor | None
    scale: Tensor
    offset: Tensor
    bias: Tensor

    @property
    def inv_scale(self) -> Tensor:
        return torch.where(self.scale > 0, 1 / self.scale, 0.0)

    def weights(self, fmt: SurfaceFormat, dtype: torch.dtype) -> Weights | None:
        """Of `unpack_dequantize_project`, made once."""
        key = fmt.fill, dtype.itemsize
        if key not in self._weights:
            made = weigh_components(self.components, self.scale, self.bias, fmt, dtype)
            settle(self.scale.device)
            self._weights[key] = made
        return self._weights[key]

    @cached_property
    def _weights(self) -> dict[tuple[int, int], Weights | None]:
        return {}


_QUANTIZERS: WeakKeyDictionary[Basis, dict[int, SurfaceQuantizer]] = WeakKeyDictionary()  # by bits


@dataclass(frozen=True)
class VideoLane:
    """Codes bf16, fp16 and fp32 with loss as HEVC; NaN and Inf, and every other dtype, exactly.

    Rows [T, D] in memory order are projected on `basis` where they are rows of it; else they are coded as
    they are, with a scale per channel where there are enough rows. Rows with NaN, Inf or magnitudes near the
    end of the range are stored raw beside the stream. What does not become smaller is stored raw as a whole.

    Args:
        basis: principal components of the rows, or None.
        format: name of a `SurfaceFormat`; its bits are the width of every code.
        mapping: name of a pixel mapping.
        qp: None codes the integers losslessly; 0..51 is the constant QP of HEVC, larger is coarser.
        max_side: largest side of a frame, 144..8192.

    Raises LaneError for an option outside these, LaneUnavailable when PyAV is missing.
    """

    basis: Basis | None = None
    format: str = "nv12"
    mapping: str = CHANNEL_ROWS
    qp: int | None = None
    max_side: int = 4096

    name = "video-cpu"
    exact = False

    def __post_init__(self) -> None:
        if self.basis is not None and not isinstance(self.basis, Basis):
            raise LaneError(f"basis is a {type(self.basis).__name__}: pass a Basis")
        if self.format not in FORMATS:
            raise LaneError(f"format={self.format!r} is not one of {', '.join(FORMATS)}")
        if self.mapping not in MAPPINGS:
            raise LaneError(f"mapping={self.mapping!r} is not one of {', '.join(MAPPINGS)}")
        check_qp(self.qp, FORMATS[self.format])
        if type(self.max_side) is not int or not MIN_SIDE <= self.max_side <= MAX_SIDE:
            raise LaneError(f"max_side={self.max_side!r} is outside {MIN_SIDE}..{MAX_SIDE}")
        hevc_support()

    @property
    def bits(self) -> int:
        """Width of every code."""
        return FORMATS[self.format].bits

    def encode(self, tensor: Tensor) -> Packet:
        """A packet of lane "video", or a raw or exact one (see the class).

        Sections: bitstream; rows int32 [E] in rising order and escapes [E, D] of the dtype of the tensor, the
        rows stored raw; without a basis scale and bias, float32 [D] or [1]. Params: width, height, frames,
        max_side.
        """
        return self._begin(tensor).finish()

    def encode_many(self, tensors: Iterable[Tensor]) -> Iterator[Packet]:
        """The packets of `encode`, in order; engines work on the next ones, `FRAMES_AHEAD` frames in all.

        Tensors are taken from `tensors` ahead of the packets and must stay unchanged until theirs is out. The
        error of a tensor is raised at its place and ends the iteration.
        """
        running: deque[_Encoding] = deque()
        try:
            for tensor in tensors:
                try:
                    running.append(self._begin(tensor))
                except LaneError:
                    while running:
                        yield running.popleft().finish()
                    raise
                while sum(one.frames for one in running) > FRAMES_AHEAD:
                    yield running.popleft().finish()
            while running:
                yield running.popleft().finish()
        finally:
            for one in running:
                one.discard()

    def _begin(self, tensor: Tensor) -> _Encoding:
        """Write the surface of `tensor` and start to encode it."""
        tensor = plain(tensor)
        packet, flat = Packet.like("video", tensor), flatten(tensor)
        if packet.dtype not in LOSSY_DTYPES or not packet.flat_numel:
            return _Encoding(tensor, ExactLane().encode(tensor))
        basis = self.basis if self.basis is not None and fits(self.basis, packet) else None
        x = _as_rows(flat, _row_length(packet, basis))
        usual = torch.linalg.vector_norm(x, inf, dim=1) <= min(torch.finfo(x.dtype).max / 4, LARGEST)
        rows = (~usual).nonzero()[:, 0]
        sections = {"rows": rows.to(torch.int32), "escapes": x[rows]}
        if len(rows):
            x = torch.where(usual[:, None], x, 0)
        if basis is None:
            scale, bias = channel_scales(x, self.bits)
            sections |= {"scale": scale, "bias": bias}
            q = channel_quantizer(scale, bias, x.shape[1])
        else:
            q = basis_quantizer(basis.to(x.device), self.bits)
        fmt = FORMATS[self.format]
        layout = plan_surface(fmt, self.mapping, len(x), len(q.scale), max_side=self.max_side)
        packet = packet.with_(
            sections={name: as_bytes(part) for name, part in sections.items()},
            params=(layout.width, layout.height, layout.frames, self.max_side),
            bits=self.bits,
            surface=self.format,
            mapping=self.mapping,
            digest=NO_DIGEST if basis is None else basis.digest,
            rel_error=nan,
        )
        if packet.nbytes >= packet.raw_nbytes:
            return _Encoding(tensor, RawLane().encode(tensor))
        levels = torch.full_like(q.scale, 2**self.bits - 1)
        slot = self._open_slot(layout, x.device)
        try:
            project_quantize_pack(x, q.components, q.offset, q.inv_scale, levels, slot.tensor, layout)
            slot.submit()
        except BaseException:
            slot.discard()
            raise
        return _Encoding(tensor, packet, slot)

    def decode(self, packet: Packet) -> Tensor:
        """The tensor of a packet of `encode`, on the packet's device, whatever the options of this lane are.

        Raises PacketError when the parts of the packet do not fit together, BasisError when it needs another
        basis than that of this lane.
        """
        if packet.lane in ("raw", "exact"):
            return decode_packet(packet)
        if packet.lane != "video":
            raise PacketError("lane", f"'{packet.lane}' is not of this lane: use decode_packet")
        return decode_video(packet, packet_basis(packet, self.basis), self._decode_surface)

    def finer(self) -> Lane | None:
        """Half the QP step, at its end lossless; then formats of 10 and 12 bits; then `ExactLane`."""
        if self.qp is not None:
            return replace(self, qp=self.qp - QP_STEP if self.qp > QP_STEP else None)
        if self.format in FINER_FORMAT:
            return replace(self, format=FINER_FORMAT[self.format])
        return ExactLane()

    def _open_slot(self, layout: SurfaceLayout, device: torch.device) -> EncodingSlot:
        return EncodingSlot(layout, self.qp, device)

    def _decode_surface(self, stream: bytes, layout: SurfaceLayout, device: torch.device) -> Tensor:
        return decode_hevc(stream, layout).to(device)


@dataclass(frozen=True)
class EngineVideoLane(VideoLane):
    """`VideoLane` on the video engines of the GPU that holds the tensor, in software where they cannot.

    Packets are of the same kind, with smaller frames by default, so that large tensors keep several engines
    busy; `sidelane.codec.engines.capabilities` tells which engines work and why.

    NVENC has not been run on hardware yet, only against an emulated driver.
    """

    max_side: int = 2048

    name = "video"

    def _open_slot(self, layout: SurfaceLayout, device: torch.device) -> EncodingSlot:
        return encoding_slot(layout, device, qp=self.qp)

    def _decode_surface(self, stream: bytes, layout: SurfaceLayout, device: torch.device) -> Tensor:
        return decode_surface(stream, layout, device)


@dataclass(frozen=True)
class _Encoding:
    """A tensor on its way into a packet, which lacks its bitstream as long as there is a slot."""

    tensor: Tensor
    packet: Packet
    slot: EncodingSlot | None = None

    @property
    def frames(self) -> int:
        return self.slot.layout.frames if self.slot is not None else 1

    def finish(self) -> Packet:
        if self.slot is None:
            return self.packet
        stream = torch.frombuffer(bytearray(self.slot.stream()), dtype=torch.uint8)
        sections = {**self.packet.sections, "bitstream": stream.to(self.packet.device)}
        packet = self.packet.with_(sections=sections)
        return packet if packet.nbytes < packet.raw_nbytes else RawLane().encode(self.tensor)

    def discard(self) -> None:
        if self.slot is not None:
            self.slot.discard()


def decode_video(
    packet: Packet,
    basis: Basis | None,
    decode: Callable[[bytes, SurfaceLayout, torch.device], Tensor],
) -> Tensor:
    """The tensor of a video packet that was coded with `basis`; `decode` makes a surface of its stream.

    Raises PacketError when the fields do not fit together or the stream does not hold the frames they need.
    """
    check_lossy_dtype(packet)
    packet.check_sections("bitstream", "rows", "escapes", *(("scale", "bias") if basis is None else ()))
    if not packet.flat_numel or (basis is not None and not fits(basis, packet)):
        dim = "" if basis is None else f" of length {basis.dim}"
        raise PacketError("shape", f"{list(packet.shape)[:8]} is not made of rows{dim}")
    length = _row_length(packet, basis)
    tokens = cdiv(packet.flat_numel, length)
    layout = _packet_layout(packet, tokens, length if basis is None else basis.rank)
    escapes = escaped_rows(packet, length)
    rows = packet.section("rows", torch.int32, len(escapes)).long()
    if len(rows) and not (rows[0] >= 0 and rows[-1] < tokens and (rows.diff() > 0).all()):
        raise PacketError("rows", f"the indices do not rise within 0..{tokens - 1}")
    # Decode first: what follows allocates what the header says, so the frames must really be there.
    stream = packet.section("bitstream").cpu().numpy().tobytes()
    surface = decode(stream, layout, packet.device)
    if basis is None:
        q = channel_quantizer(*_packet_scales(packet, length), length)
    else:
        q = basis_quantizer(basis.to(packet.device), packet.bits)
    weights = q.weights(layout.format, packet.dtype)
    x = unpack_dequantize_project(
        surface, layout, q.components, q.scale, q.bias, packet.dtype, weights=weights
    )
    if len(rows):
        x[rows] = escapes
    return packet.unflatten(x.view(-1)[: packet.flat_numel])


def basis_quantizer(basis: Basis, bits: int) -> SurfaceQuantizer:
    """One step for all coefficients, such that the widest of them fills the codes; made once.

    Equal noise in all coefficients costs least for its squared error (reverse water-filling: T. Cover and
    J. Thomas, Elements of Information Theory, section 10.3); the entropy coder collects the gain.
    """
    made = _QUANTIZERS.setdefault(basis, {})
    if bits not in made:
        quantizer = _made_quantizer(basis, bits)
        settle(basis.device)
        made[bits] = quantizer
    return made[bits]


def _made_quantizer(basis: Basis, bits: int) -> SurfaceQuantizer:
    q = basis.quantizer(bits)
    middle = 2 ** (bits - 1)
    limit = q.scale * q.levels / 2
    scale = _usable(limit.amax() / (middle - 1)).expand_as(limit).contiguous()
    offset = q.offset + limit - scale * middle
    bias = basis.mean - scale[0] * middle * q.components.sum(1)
    return SurfaceQuantizer(q.components, scale, offset, bias)


def channel_scales(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and bias of the channels of finite x [T, D], float32 [D], or [1] for fewer than MIN_TOKENS rows.

    A step is the geometric mean of the channel's own range and the widest one, over the levels: half-way
    between equal steps, which cost least for their squared error, and equal relative precision.
    """
    if len(x) < MIN_TOKENS:
        x = x.reshape(-1, 1)
    low, high = x.aminmax(dim=0)
    mean = x.mean(0, dtype=torch.float32)
    reach = torch.maximum(high - mean, mean - low)
    middle = 2 ** (bits - 1)
    scale = _usable(reach.sqrt() * reach.amax().sqrt() / (middle - 1))
    return scale, mean - scale * middle


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale >= TINY, scale, 0.0)


def channel_quantizer(scale: Tensor, bias: Tensor, channels: int) -> SurfaceQuantizer:
    """Operands without a projection: `scale` and `bias` of `channel_scales` for every channel."""
    scale, bias = scale.expand(channels).contiguous(), bias.expand(channels).contiguous()
    return SurfaceQuantizer(None, scale, bias, bias)


def _row_length(packet: Packet, basis: Basis | None) -> int:
    """D: of the basis, or of the innermost dimension in memory, or FLAT_ROW where that is a poor choice."""
    if basis is not None:
        return basis.dim
    dims = zip(packet.shape, packet.strides, strict=True)
    innermost = next((n for n, stride in dims if stride == 1 and n > 1), 1)
    longest = min(packet.flat_numel - 1, MAX_CHANNELS)
    return innermost if MIN_CHANNELS <= innermost <= longest else FLAT_ROW


def _as_rows(flat: Tensor, length: int) -> Tensor:
    """[T, length], the last row filled up with the last element."""
    missing = -len(flat) % length
    return (torch.cat((flat, flat[-1:].expand(missing))) if missing else flat).view(-1, length)


def _packet_layout(packet: Packet, tokens: int, channels: int) -> SurfaceLayout:
    """The layout of codes [tokens, channels], which the fields of the packet must agree with."""
    if packet.surface not in FORMATS:
        raise PacketError("surface", f"'{packet.surface}' is not one of {', '.join(FORMATS)}")
    if packet.mapping not in MAPPINGS:
        raise PacketError("mapping", f"'{packet.mapping}' is not one of {', '.join(MAPPINGS)}")
    fmt = FORMATS[packet.surface]
    if packet.bits != fmt.bits:
        raise PacketError("bits", f"{packet.bits}, but surface '{fmt.name}' holds {fmt.bits}")
    width, height, frames, max_side = packet.numbers(4)
    if not MIN_SIDE <= max_side <= MAX_SIDE:
        raise PacketError("params", f"max_side {max_side} is outside {MIN_SIDE}..{MAX_SIDE}")
    try:
        layout = plan_surface(fmt, packet.mapping, tokens, channels, max_side=max_side)
    except ValueError as error:
        raise PacketError("shape", f"no frames hold it: {error}") from error
    plan = (layout.width, layout.height, layout.frames)
    if (width, height, frames) != plan:
        found = f"{frames} frames of {width}x{height}"
        raise PacketError("params", f"{found} found, {plan[2]} of {plan[0]}x{plan[1]} expected")
    return layout


def _packet_scales(packet: Packet, channels: int) -> tuple[Tensor, Tensor]:
    """Sections scale and bias, float32 [channels] or [1], finite."""
    scale = packet.section("scale", torch.float32)
    if scale.numel() not in (1, channels):
        raise PacketError("scale", f"section has {scale.numel()} numbers, expected 1 or {channels}")
    bias = packet.section("bias", torch.float32, scale.numel())
    for name, values in (("scale", scale), ("bias", bias)):
        if not values.isfinite().all():
            raise PacketError(name, "section holds NaN or Inf")
    return scale, bias
