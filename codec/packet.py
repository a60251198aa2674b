"""The packet: one encoded tensor, in memory and as bytes.

Bytes are little-endian and have one form per packet: prefix, fields, shape, strides, section table, header
checksum, then the sections, each at the next multiple of 64 with zeros before it. The table is in DESIGN.md,
section "Packet".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import copysign, inf, isnan, prod
from typing import TypeVar

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

LANES = {"raw": 0, "exact": 1, "packed": 2, "video": 3, "dual": 4}
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
    torch.float8_e8m0fnu: 20,
    torch.float4_e2m1fn_x2: 21,
}
CONTIGUOUS, PERMUTED, BROADCAST = 0, 1, 2  # stride classes

SECTION_NAME = 12  # bytes
_SURFACE_NUMBERS = {f.name: f.code for f in FORMATS.values()} | {"": 0}
_MAPPING_NUMBERS = MAPPINGS | {"": 0}

_PREFIX = struct.Struct("<8sHHIQ")  # magic, version, reserved, header bytes, packet bytes
_FIELDS = struct.Struct(f"<8Bd{PARAMS}I32s")
_SECTION = struct.Struct(f"<{SECTION_NAME}sIQQ")  # name, CRC-32C, offset, length
_HEADER_CRC = struct.Struct("<II")  # CRC-32C of all header bytes before it, zero
_FIXED_SIZE = _PREFIX.size + _FIELDS.size + _HEADER_CRC.size  # of a header
MAX_NDIM = 64
MAX_SECTIONS = 16

Key = TypeVar("Key")


def compact_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of `tensor` without gaps: the memory order of dimensions is kept, expanded ones stay at 0."""
    return compact(tuple(tensor.shape), tensor.stride())


@lru_cache(4096)
def compact(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """`compact_strides` of numbers. Compact strides are its fixed points."""
    out, step = [0] * len(shape), 1
    # Of equal strides the dimensions of size 1 come first, so that contiguous strides are left as they are.
    for d in sorted(range(len(shape)), key=lambda d: (strides[d], shape[d] > 1, -d)):
        if strides[d] == 0 and shape[d] > 1:
            continue
        out[d] = step
        step *= max(shape[d], 1)
    return tuple(out)


@lru_cache(4096)
def _compact_numel(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements a compact tensor occupies in memory."""
    if 0 in shape:
        return 0
    return prod(n for n, s in zip(shape, strides, strict=True) if s or n == 1)


@lru_cache(4096)
def _end(header: int, sizes: tuple[int, ...]) -> int:
    """Bytes of a packet whose header and sections have so many."""
    end = header
    for size in sizes:
        end = _align(end) + size
    return end


def flatten(tensor: Tensor) -> Tensor:
    """The distinct elements of `tensor` in memory order, 1-D and contiguous; a view of a compact tensor."""
    if tensor.is_contiguous():
        return tensor.as_strided((tensor.numel(),), (1,))
    shape = tuple(tensor.shape)
    strides = compact(shape, tensor.stride())
    dense = tensor
    if tensor.numel() and strides != tensor.stride():
        for d in range(tensor.ndim):
            if strides[d] == 0:
                dense = dense.narrow(d, 0, 1)
        order = sorted(range(tensor.ndim), key=lambda d: (-strides[d], d))
        dense = dense.permute(order).contiguous()
    return dense.as_strided((_compact_numel(shape, strides),), (1,))


class Sections(Mapping[str, Tensor]):
    """Parts of one uint8 vector, cut out of it when one is first asked for.

    Attributes:
        names, starts, sizes: of the parts, in bytes.
        buffer: [*] contiguous; nothing in it is in two parts.
    """

    __slots__ = ("_parts", "buffer", "names", "sizes", "starts")

    def __init__(
        self, names: tuple[str, ...], starts: tuple[int, ...], sizes: tuple[int, ...], buffer: Tensor
    ) -> None:
        self.names = names
        self.starts = starts
        self.sizes = sizes
        self.buffer = buffer
        self._parts: dict[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._parts is None:
            places = zip(self.names, self.starts, self.sizes, strict=True)
            self._parts = {name: self.buffer[start : start + size] for name, start, size in places}
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Packet:
    """One encoded tensor.

    Attributes:
        lane: name of the lane that decodes it ("raw", "exact", "packed", "video", "dual").
        dtype, shape, strides: of the decoded tensor; strides in elements, compact (see `compact_strides`).
        sections: named payload parts, each a contiguous uint8 [bytes] tensor; all on one device.
        params: up to 8 numbers below 2^32 whose meaning the lane defines; the missing ones are 0.
        bits, surface, mapping: code width, names of surface format and pixel mapping; 0 and "" when not used.
        digest: SHA-256 of the basis needed to decode, zeros when none is.
        rel_error: relative Frobenius error measured while encoding; 0 for exact, NaN when not measured.
    """

    lane: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    sections: Mapping[str, Tensor] = field(default_factory=dict)
    params: tuple[int, ...] = ()
    bits: int = 0
    surface: str = ""
    mapping: str = ""
    digest: bytes = NO_DIGEST
    rel_error: float = 0.0

    @classmethod
    def like(cls, lane: str, tensor: Tensor) -> Packet:
        """An empty packet of `lane` that decodes to the shape, dtype and compact strides of `tensor`."""
        shape = tuple(tensor.shape)
        return _EMPTY.with_(
            lane=lane, dtype=tensor.dtype, shape=shape, strides=compact(shape, tensor.stride()), sections={}
        )

    def __repr__(self) -> str:
        """Without the payload, and without what is not used."""
        used = {
            "params": self.params if any(self.params) else (),
            "bits": self.bits,
            "surface": self.surface,
            "mapping": self.mapping,
        }
        parts = [f"{name}={getattr(self, name)!r}" for name in ("lane", "dtype", "shape", "strides")]
        parts += [f"{name}={value!r}" for name, value in used.items() if value]
        if self.digest != NO_DIGEST:
            parts.append(f"digest={self.digest[:8].hex()}")
        parts += [f"rel_error={self.rel_error!r}", f"nbytes={self.nbytes}"]
        return f"Packet({', '.join(parts)})"

    def with_(self, **changes: object) -> Packet:
        """A packet with other values in these attributes."""
        other = object.__new__(Packet)
        other.__dict__.update(self.__dict__)
        other.__dict__.update(changes)
        return other

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
        parts = self.sections
        if isinstance(parts, Sections):
            return self.wire_nbytes(parts.sizes)
        return self.wire_nbytes(tuple(part.numel() for part in parts.values()))

    def wire_nbytes(self, sizes: tuple[int, ...]) -> int:
        """`nbytes` if the sections had these sizes."""
        return _end(self._header_size(len(sizes)), sizes)

    @property
    def stored_nbytes(self) -> int:
        """Bytes on the wire of a packet of lane "raw" with the same elements."""
        return _align(self._header_size(1)) + self.raw_nbytes

    @property
    def ratio(self) -> float:
        return self.raw_nbytes / self.nbytes

    @property
    def device(self) -> torch.device:
        if isinstance(self.sections, Sections):
            return self.sections.buffer.device
        for section in self.sections.values():
            return section.device
        return torch.device("cpu")

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Packet:
        return self.with_(
            sections={k: s.to(device, non_blocking=non_blocking) for k, s in self.sections.items()}
        )

    def section(self, name: str, dtype: torch.dtype = torch.uint8, numel: int | None = None) -> Tensor:
        """Payload part `name` as `dtype` [numel]. Raises PacketError if it is missing or of another size."""
        data = self.sections.get(name)
        if data is None:
            raise PacketError(name, "section is missing")
        if data.numel() % dtype.itemsize or (numel is not None and data.numel() != numel * dtype.itemsize):
            want = f"whole {dtype}" if numel is None else f"{numel * dtype.itemsize}"
            raise PacketError(name, f"section has {data.numel()} bytes, expected {want}")
        if data.storage_offset() % dtype.itemsize:
            data = data.clone()
        return data if dtype == torch.uint8 else data.view(dtype)

    def check_sections(self, *names: str) -> None:
        """Raise PacketError unless the sections are exactly `names`."""
        if set(self.sections) != set(names):
            raise PacketError("sections", f"found {sorted(self.sections)}, expected {sorted(names)}")

    def numbers(self, count: int) -> tuple[int, ...]:
        """The first `count` params. Raises PacketError when another one is set."""
        if any(self.params[count:]):
            raise PacketError("params", f"the {self.lane} code has {count}, found {list(self.params)}")
        return (self.params + (0,) * count)[:count]

    def unflatten(self, flat: Tensor) -> Tensor:
        """A view of decoded elements [flat_numel] with this packet's shape and strides."""
        if flat.numel() != self.flat_numel:
            raise PacketError("shape", f"{self.flat_numel} elements expected, {flat.numel()} decoded")
        return flat.as_strided(self.shape, self.strides)

    def to_bytes(self) -> bytes:
        """The packet as it travels. Raises PacketError naming the field that does not fit the format."""
        self._check()
        ndim, header_size = len(self.shape), self._header_size(len(self.sections))
        header = bytearray(header_size)
        _FIELDS.pack_into(
            header,
            _PREFIX.size,
            _number("lane", LANES, self.lane),
            _number("dtype", DTYPES, self.dtype),
            _stride_class(self.shape, self.strides),
            _number("mapping", _MAPPING_NUMBERS, self.mapping),
            self.bits,
            _number("surface", _SURFACE_NUMBERS, self.surface),
            ndim,
            len(self.sections),
            self.rel_error,
            *self.params,
            *(0,) * (PARAMS - len(self.params)),
            self.digest,
        )
        at = _PREFIX.size + _FIELDS.size
        struct.pack_into(f"<{2 * ndim}q", header, at, *self.shape, *self.strides)
        at += 16 * ndim
        parts: list[bytearray | bytes | memoryview] = [header]
        end = header_size
        for name, section in self.sections.items():
            data = section.cpu().numpy().data
            start = _align(end)
            parts += [bytes(start - end), data]
            end = start + len(data)
            _SECTION.pack_into(header, at, name.encode("ascii"), crc32c(data), start, len(data))
            at += _SECTION.size
        _PREFIX.pack_into(header, 0, MAGIC, VERSION, 0, header_size, end)
        _HEADER_CRC.pack_into(header, at, crc32c(memoryview(header)[:at]), 0)
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Packet:
        """Parse a packet and check every byte of it: sizes, enumerations, checksums. Sections are CPU copies.

        Raises PacketError naming the field that is wrong. Lengths are checked before anything is allocated.
        """
        try:
            view = memoryview(data).cast("B")
        except TypeError as error:
            raise PacketError("bytes", f"{type(data).__name__} cannot be read as contiguous bytes") from error
        header = _parse_prefix(view)
        values = _FIELDS.unpack_from(header, _PREFIX.size)
        lane, dtype, stride_class, mapping, bits, surface, ndim, count = values[:8]
        at = _PREFIX.size + _FIELDS.size
        if len(header) != at + 16 * ndim + count * _SECTION.size + _HEADER_CRC.size:
            raise PacketError(
                "header length", f"{len(header)} does not fit {ndim} dimensions, {count} sections"
            )
        dims = struct.unpack_from(f"<{2 * ndim}q", header, at)
        packet = cls(
            lane=_name("lane", LANES, lane),
            dtype=_name("dtype", DTYPES, dtype),
            shape=dims[:ndim],
            strides=dims[ndim:],
            params=values[9 : 9 + PARAMS],
            bits=bits,
            surface=_name("surface", _SURFACE_NUMBERS, surface),
            mapping=_name("mapping", _MAPPING_NUMBERS, mapping),
            digest=values[9 + PARAMS],
            rel_error=values[8],
        )
        packet._check()
        if stride_class != _stride_class(packet.shape, packet.strides):
            raise PacketError("stride class", f"{stride_class} does not match the strides")
        if count > MAX_SECTIONS:
            raise PacketError("sections", f"{count} are more than {MAX_SECTIONS}")
        table = list(_parse_sections(header, at + 16 * ndim, count, view))
        return packet.with_(sections={name: _copy(view[start:stop]) for name, start, stop in table})

    def _header_size(self, sections: int) -> int:
        return _FIXED_SIZE + 16 * len(self.shape) + _SECTION.size * sections

    def _check(self) -> None:
        """Raise PacketError for a field that the format cannot hold or that is not in its one form."""
        shape, strides = self.shape, self.strides
        if not isinstance(self.dtype, torch.dtype):
            raise PacketError("dtype", f"{self.dtype!r} is no torch.dtype")
        if len(shape) > MAX_NDIM or len(strides) != len(shape):
            raise PacketError(
                "ndim", f"{len(shape)} sizes and {len(strides)} strides; at most {MAX_NDIM} and equal"
            )
        if any(n < 0 for n in shape) or prod(max(n, 1) for n in shape) * self.dtype.itemsize >= 2**63:
            raise PacketError("shape", f"{list(shape)[:8]} is not a shape")
        if any(s < 0 for s in strides) or strides != compact(shape, strides):
            raise PacketError("strides", f"{list(strides)[:8]} are not compact for {list(shape)[:8]}")
        if not (isnan(self.rel_error) or (copysign(1, self.rel_error) > 0 and self.rel_error < inf)):
            raise PacketError("rel_error", f"{self.rel_error} is neither NaN nor finite and positive")
        if not 0 <= self.bits <= 255:
            raise PacketError("bits", f"{self.bits} is outside 0..255")
        if len(self.params) > PARAMS or not all(0 <= p < 2**32 for p in self.params):
            raise PacketError("params", f"{list(self.params)[:9]}: at most {PARAMS} numbers below 2^32")
        if len(self.digest) != len(NO_DIGEST):
            raise PacketError("digest", f"{len(self.digest)} bytes, expected {len(NO_DIGEST)}")
        if len(self.sections) > MAX_SECTIONS:
            raise PacketError("sections", f"{len(self.sections)} are more than {MAX_SECTIONS}")
        for name, section in self.sections.items():
            _check_section_name(name)
            if section.dtype != torch.uint8 or section.ndim != 1 or not section.is_contiguous():
                raise PacketError(name, "section is not a contiguous uint8 vector")


_EMPTY = Packet("raw", torch.uint8, (0,), (1,))


def _stride_class(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    if any(s == 0 and n > 1 for n, s in zip(shape, strides, strict=True)):
        return BROADCAST
    step = 1
    for n, s in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and s != step:
            return PERMUTED
        step *= max(n, 1)
    return CONTIGUOUS


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _number(field: str, table: Mapping[Key, int], name: Key) -> int:
    if name not in table:
        raise PacketError(field, f"{name!r} has no number in version {VERSION}")
    return table[name]


def _name(field: str, table: Mapping[Key, int], number: int) -> Key:
    for name, code in table.items():
        if code == number:
            return name
    raise PacketError(field, f"{number} is unknown to version {VERSION}")


def _check_section_name(name: str) -> None:
    if not (name.isascii() and name.isidentifier() and len(name) <= SECTION_NAME):
        raise PacketError("section name", f"{name!r} is not an ASCII identifier of 1..{SECTION_NAME} letters")


def _parse_prefix(view: memoryview) -> memoryview:
    """The checked header bytes of the packet in `view`."""
    if len(view) < _FIXED_SIZE:
        raise PacketError("length", f"{len(view)} bytes are fewer than the smallest header, {_FIXED_SIZE}")
    magic, version, reserved, header, total = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise PacketError("magic", "this is not a sidelane packet")
    if version != VERSION or reserved:
        raise PacketError("version", f"{version}.{reserved}; this library reads version {VERSION}")
    if total != len(view):
        raise PacketError("length", f"the header says {total} bytes, {len(view)} are present")
    if not _FIXED_SIZE <= header <= total:
        raise PacketError("header length", f"{header} is outside {_FIXED_SIZE}..{total}")
    crc, zero = _HEADER_CRC.unpack_from(view, header - _HEADER_CRC.size)
    if zero or crc32c(view[: header - _HEADER_CRC.size]) != crc:
        raise PacketError("header checksum", "does not match: the header is corrupted")
    return view[:header]


def _parse_sections(
    header: memoryview, at: int, count: int, view: memoryview
) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of every section, checked: in order, aligned, dense, intact."""
    end, seen = len(header), set[str]()
    for i in range(count):
        raw, crc, start, length = _SECTION.unpack_from(header, at + i * _SECTION.size)
        name = raw.rstrip(b"\0").decode("ascii", "replace")
        _check_section_name(name)
        if name in seen:
            raise PacketError("section name", f"{name!r} is repeated")
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
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(view), dtype=torch.uint8)
