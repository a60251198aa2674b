"""The packet: one encoded tensor, in memory and as bytes. The byte layout is in DESIGN.md, section "Packet"."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import isnan, prod

import torch
from crc32c import crc32c
from torch import Tensor

from sidelane.errors import PacketError
from sidelane.layout import FORMATS, MAPPINGS

MAGIC = b"\x89SLANE\r\n"
VERSION = 1
ALIGNMENT = 64  # of every section, from the start of the packet
PARAMS = 8
NO_DIGEST = bytes(32)

LANES = {"raw": 0, "exact": 1, "packed": 2, "video": 3}
DTYPES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.uint8: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
    torch.bool: 9,
    torch.complex64: 10,
    torch.complex128: 11,
    torch.float8_e4m3fn: 12,
    torch.float8_e5m2: 13,
    torch.float8_e4m3fnuz: 14,
    torch.float8_e5m2fnuz: 15,
    torch.uint16: 16,
    torch.uint32: 17,
    torch.uint64: 18,
    torch.complex32: 19,
}
CONTIGUOUS, PERMUTED, BROADCAST = 0, 1, 2  # stride classes

_PREFIX = struct.Struct("<8sHHIQ")  # magic, version, reserved, header bytes, packet bytes
_FIELDS = struct.Struct(f"<8Bd{PARAMS}I32s")
_SECTION = struct.Struct("<12sIQQ")  # name, CRC-32C, offset, length
_HEADER_CRC = struct.Struct("<II")  # CRC-32C of all header bytes before it, zero
MAX_NDIM = 64
MAX_SECTIONS = 16


def compact_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of `tensor` without gaps: the memory order of its dimensions is kept, expanded ones stay at stride 0."""
    out, step = [0] * tensor.ndim, 1
    order = sorted(range(tensor.ndim), key=lambda d: (tensor.stride(d), -d))
    for d in order:
        if tensor.stride(d) == 0 and tensor.shape[d] > 1:
            continue
        out[d] = step
        step *= max(tensor.shape[d], 1)
    return tuple(out)


def _compact_numel(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements a compact tensor occupies in memory."""
    if 0 in shape:
        return 0
    return prod(n for n, s in zip(shape, strides, strict=True) if s or n == 1)


def flatten(tensor: Tensor) -> Tensor:
    """The distinct elements of `tensor` in memory order, 1-D and contiguous; a view where the tensor is compact."""
    strides = compact_strides(tensor)
    if tensor.numel() == 0:
        return tensor.reshape(-1)
    if strides == tensor.stride():
        return tensor.as_strided((_compact_numel(tuple(tensor.shape), strides),), (1,))
    narrow = tensor
    for d in range(tensor.ndim):
        if strides[d] == 0:
            narrow = narrow.narrow(d, 0, 1)
    order = sorted(range(tensor.ndim), key=lambda d: (-strides[d], d))
    return narrow.permute(order).reshape(-1)


@dataclass(frozen=True)
class Packet:
    """One encoded tensor.

    Attributes:
        lane: name of the lane that decodes it ("raw", "exact", "packed", "video").
        dtype, shape, strides: of the decoded tensor; strides in elements, compact (see `compact_strides`).
        sections: named payload parts, each a contiguous uint8 [bytes] tensor; all on one device.
        params: up to 8 numbers whose meaning the lane defines.
        bits, surface, mapping: code width, surface format and pixel mapping names ("" where they do not apply).
        digest: SHA-256 of the basis needed to decode, zeros when none is.
        rel_error: relative Frobenius error measured while encoding; 0 for exact, NaN when not measured.
    """

    lane: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    sections: dict[str, Tensor] = field(default_factory=dict)
    params: tuple[int, ...] = ()
    bits: int = 0
    surface: str = ""
    mapping: str = ""
    digest: bytes = NO_DIGEST
    rel_error: float = 0.0

    @classmethod
    def like(cls, lane: str, tensor: Tensor) -> Packet:
        """An empty packet of `lane` that decodes to the shape, dtype and compact strides of `tensor`."""
        return cls(lane, tensor.dtype, tuple(tensor.shape), compact_strides(tensor))

    def with_(self, **changes: object) -> Packet:
        return replace(self, **changes)  # type: ignore[arg-type]

    @property
    def flat_numel(self) -> int:
        """Elements that are coded: those of the tensor, expanded dimensions counted once."""
        return _compact_numel(self.shape, self.strides)

    @property
    def raw_nbytes(self) -> int:
        """Bytes of the coded elements without compression."""
        return self.flat_numel * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: header, sections and padding."""
        end = self._header_size()
        for section in self.sections.values():
            end = _align(end) + section.numel()
        return end

    @property
    def ratio(self) -> float:
        return self.raw_nbytes / self.nbytes

    @property
    def device(self) -> torch.device:
        return next((s.device for s in self.sections.values()), torch.device("cpu"))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Packet:
        return self.with_(
            sections={k: s.to(device, non_blocking=non_blocking) for k, s in self.sections.items()}
        )

    def section(self, name: str, dtype: torch.dtype = torch.uint8, numel: int | None = None) -> Tensor:
        """Payload part `name` viewed as `dtype` [numel]. Raises PacketError if it is missing or of another size."""
        data = self.sections.get(name)
        if data is None:
            raise PacketError(name, "section is missing")
        if data.numel() % dtype.itemsize or (numel is not None and data.numel() != numel * dtype.itemsize):
            want = "" if numel is None else f", expected {numel * dtype.itemsize}"
            raise PacketError(name, f"section has {data.numel()} bytes{want}")
        return data if dtype == torch.uint8 else data.view(dtype)

    def unflatten(self, flat: Tensor) -> Tensor:
        """The tensor of this packet's shape and strides over decoded elements [flat_numel]."""
        if flat.numel() != self.flat_numel:
            raise PacketError("shape", f"{self.flat_numel} elements expected, {flat.numel()} decoded")
        return flat.as_strided(self.shape, self.strides)

    def to_bytes(self) -> bytes:
        """The packet as it travels. Raises ValueError when a field does not fit the format."""
        packet = self.to("cpu")
        out = bytearray(self.nbytes)
        ndim = len(self.shape)
        _FIELDS.pack_into(
            out,
            _PREFIX.size,
            LANES[self.lane],
            DTYPES[self.dtype],
            self._stride_class(),
            MAPPINGS[self.mapping] if self.mapping else 0,
            self.bits,
            FORMATS[self.surface].code if self.surface else 0,
            ndim,
            len(self.sections),
            self.rel_error,
            *self.params,
            *(0,) * (PARAMS - len(self.params)),
            self.digest,
        )
        at = _PREFIX.size + _FIELDS.size
        struct.pack_into(f"<{2 * ndim}q", out, at, *self.shape, *self.strides)
        at += 16 * ndim
        end = self._header_size()
        for name, section in packet.sections.items():
            data = memoryview(section.numpy())
            start = _align(end)
            end = start + len(data)
            out[start:end] = data
            _SECTION.pack_into(out, at, name.encode("ascii"), crc32c(data), start, len(data))
            at += _SECTION.size
        _PREFIX.pack_into(out, 0, MAGIC, VERSION, 0, self._header_size(), len(out))
        _HEADER_CRC.pack_into(out, at, crc32c(memoryview(out)[:at]), 0)
        return bytes(out)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Packet:
        """Parse a packet and check every byte of it: sizes, enumerations, checksums. Sections are copies on the CPU.

        Raises PacketError naming the field that is wrong; nothing is allocated before all lengths are checked.
        """
        view = memoryview(data).cast("B")
        header = _parse_prefix(view)
        values = _FIELDS.unpack_from(header, _PREFIX.size)
        lane, dtype, stride_class, mapping, bits, surface, ndim, count = values[:8]
        if ndim > MAX_NDIM:
            raise PacketError("ndim", f"{ndim} is above {MAX_NDIM}")
        if count > MAX_SECTIONS:
            raise PacketError("sections", f"{count} is above {MAX_SECTIONS}")
        at = _PREFIX.size + _FIELDS.size
        if len(header) != at + 16 * ndim + count * _SECTION.size + _HEADER_CRC.size:
            raise PacketError("header length", f"{len(header)} does not fit {ndim} dimensions, {count} sections")
        dims = struct.unpack_from(f"<{2 * ndim}q", header, at)
        packet = cls(
            lane=_name("lane", LANES, lane),
            dtype=_name("dtype", DTYPES, dtype),
            shape=dims[:ndim],
            strides=dims[ndim:],
            params=values[9 : 9 + PARAMS],
            bits=bits,
            surface=_name("surface", {n: f.code for n, f in FORMATS.items()} | {"": 0}, surface),
            mapping=_name("mapping", MAPPINGS | {"": 0}, mapping),
            digest=values[9 + PARAMS],
            rel_error=values[8],
        )
        packet._check_dims(stride_class)
        table = list(_parse_sections(header, at + 16 * ndim, count, view))
        return packet.with_(sections={name: _copy(view[start:stop]) for name, start, stop in table})

    def _header_size(self) -> int:
        fixed = _PREFIX.size + _FIELDS.size + _HEADER_CRC.size
        return fixed + 16 * len(self.shape) + _SECTION.size * len(self.sections)

    def _stride_class(self) -> int:
        if any(s == 0 and n > 1 for n, s in zip(self.shape, self.strides, strict=True)):
            return BROADCAST
        step = 1
        for n, s in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and s != step:
                return PERMUTED
            step *= max(n, 1)
        return CONTIGUOUS

    def _check_dims(self, stride_class: int) -> None:
        if any(n < 0 for n in self.shape) or prod(max(n, 1) for n in self.shape) >= 2**62:
            raise PacketError("shape", f"{list(self.shape)[:8]} is not a shape")
        if not self.rel_error >= 0 and not isnan(self.rel_error):
            raise PacketError("rel_error", f"{self.rel_error} is negative")
        step = 1
        for s, n in sorted(zip(self.strides, self.shape, strict=True), key=lambda p: (p[0], p[1])):
            if s == 0 and n != 1 and n != 0:
                continue
            if n != 1 and n != 0 and s != step:
                raise PacketError("strides", f"{list(self.strides)[:8]} are not compact for {list(self.shape)[:8]}")
            if s < 0:
                raise PacketError("strides", f"{s} is negative")
            step *= max(n, 1)
        if stride_class != self._stride_class():
            raise PacketError("stride class", f"{stride_class} does not match the strides")


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _name(field: str, table: dict, number: int):  # type: ignore[type-arg,no-untyped-def]
    for name, code in table.items():
        if code == number:
            return name
    raise PacketError(field, f"{number} is unknown to version {VERSION}")


def _parse_prefix(view: memoryview) -> memoryview:
    """The checked header bytes of the packet in `view`."""
    fixed = _PREFIX.size + _FIELDS.size + _HEADER_CRC.size
    if len(view) < fixed:
        raise PacketError("length", f"{len(view)} bytes are fewer than the smallest header, {fixed}")
    magic, version, reserved, header, total = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise PacketError("magic", "this is not a sidelane packet")
    if version != VERSION or reserved:
        raise PacketError("version", f"{version}.{reserved}; this library reads version {VERSION}")
    if total != len(view):
        raise PacketError("length", f"the header says {total} bytes, {len(view)} are present")
    if not fixed <= header <= total:
        raise PacketError("header length", f"{header} is outside {fixed}..{total}")
    crc, zero = _HEADER_CRC.unpack_from(view, header - _HEADER_CRC.size)
    if zero or crc32c(view[: header - _HEADER_CRC.size]) != crc:
        raise PacketError("header checksum", "does not match: the header is corrupted")
    return view[:header]


def _parse_sections(
    header: memoryview, at: int, count: int, view: memoryview
) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of every section, checked: in order, aligned, dense, intact."""
    end, seen = len(header), set()
    for i in range(count):
        raw, crc, start, length = _SECTION.unpack_from(header, at + i * _SECTION.size)
        name = raw.rstrip(b"\0").decode("ascii", "replace")
        if not name.isidentifier() or name in seen:
            raise PacketError("section name", f"{name!r} is empty, not a name or repeated")
        seen.add(name)
        if start != _align(end) or start + length > len(view):
            raise PacketError(name, f"section at {start}..{start + length} is out of place")
        if any(view[end:start]):
            raise PacketError(name, "padding before the section is not zero")
        end = start + length
        if crc32c(view[start:end]) != crc:
            raise PacketError(name, "section checksum does not match: the payload is corrupted")
        yield name, start, end
    if end != len(view):
        raise PacketError("length", f"{len(view) - end} bytes after the last section")


def _copy(view: memoryview) -> Tensor:
    if not len(view):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(view), dtype=torch.uint8)
