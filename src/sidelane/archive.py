"""A compressed safetensors file: its header as it was, then one packet for each tensor.

Bytes, little-endian:

    8   magic 89 "SLARC" 0D 0A
    2   version, 1
    2   zero
    4   CRC-32C of the header
    8   length of the header
    *   the JSON header of the safetensors file, unchanged
    then for each tensor, in the order of its data:
    8   length of the packet
    *   the packet (checks itself)

Tensors pass one at a time, so memory holds the largest one and not the file. With exact lanes the restored
file equals the original byte for byte.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EEXIST
from math import isnan, nan, prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from crc32c import crc32c
from torch import Tensor

from sidelane.codec.packet import MAX_NDIM, Packet, flatten
from sidelane.errors import PacketError, SidelaneError
from sidelane.pipeline.compress import choose_lane, compress, decompress, relative_error

Progress = Callable[[int, int], None]  # bytes of tensors done, bytes of all tensors

MAGIC = b"\x89SLARC\r\n"
VERSION = 1
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors

DAMAGED = "the file is damaged or cut, copy it again"

_PREFIX = struct.Struct("<8sHHIQ")
_LENGTH = struct.Struct("<Q")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class ArchiveError(SidelaneError, ValueError):
    """A file that is not what it should be: safetensors to compress, or an archive to restore."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the safetensors header; its data fills `nbytes` bytes right after the entry before it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class Summary:
    """What one run moved. `worst_error`: largest relative Frobenius error of a tensor, 0 for exact lanes, NaN
    where an archive does not say."""

    tensors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    worst_error: float = 0.0


def compress_file(
    source: Path,
    target: Path,
    *,
    lane: str | None = None,
    max_rel_error: float | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> Summary:
    """Compress the safetensors file `source` into `target` with the arguments of `sidelane.compress`.

    `progress` is called after every tensor. Raises LaneError for a lane or option that does not exist,
    ArchiveError and OSError for files; `target` is written whole or not at all, replaced only with `force`.
    """
    opened = choose_lane(lane, max_rel_error, None, options)
    with open(source, "rb") as file, _whole(target, force, source) as out:
        header, entries = _read_safetensors_header(file)
        size, total = os.fstat(file.fileno()).st_size, sum(e.nbytes for e in entries)
        out.write(_PREFIX.pack(MAGIC, VERSION, 0, crc32c(header), len(header)))
        out.write(header)
        summary, done = Summary(tensors=len(entries), bytes_in=size), 0
        for entry in entries:
            with _naming(source, entry):
                tensor = _read_tensor(file, entry)
                packet = compress(tensor, lane=opened, max_rel_error=max_rel_error)
                error = _relative_error(tensor, packet)
                packet = packet.with_(rel_error=error)  # for those who decompress
            data = packet.to_bytes()
            out.write(_LENGTH.pack(len(data)))
            out.write(data)
            summary.worst_error = max(summary.worst_error, error)
            done += entry.nbytes
            progress(done, total)
        summary.bytes_out = out.tell()
    return summary


def decompress_file(
    source: Path,
    target: Path,
    *,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Summary:
    """Restore the safetensors file from the archive `source`.

    `progress` is called after every tensor. Raises ArchiveError and OSError; `target` is written whole or not
    at all and replaced only with `force`.
    """
    with open(source, "rb") as file, _whole(target, force, source) as out:
        size = os.fstat(file.fileno()).st_size
        header = _read_archive_header(file, size)
        entries = _parse_header(header, source)
        total = sum(e.nbytes for e in entries)
        out.write(_LENGTH.pack(len(header)))
        out.write(header)
        summary, done = Summary(tensors=len(entries), bytes_in=size), 0
        for entry in entries:
            with _naming(source, entry):
                packet = _read_packet(file, size)
                if (packet.dtype, packet.shape, packet.raw_nbytes) != (
                    entry.dtype,
                    entry.shape,
                    entry.nbytes,
                ):
                    raise PacketError("shape", "differs from the header of the file")
                tensor = decompress(packet).contiguous()
            out.write(tensor.view(-1).view(torch.uint8).numpy().data)
            worst = summary.worst_error
            summary.worst_error = nan if isnan(packet.rel_error + worst) else max(worst, packet.rel_error)
            done += entry.nbytes
            progress(done, total)
        if file.tell() != size:
            raise ArchiveError(f"{source}: {size - file.tell()} bytes follow the last tensor: copy it again")
        summary.bytes_out = out.tell()
    return summary


def entries_of(source: Path) -> list[Entry]:
    """The tensors of the safetensors file `source`. Raises ArchiveError and OSError for what is none."""
    with open(source, "rb") as file:
        return _read_safetensors_header(file)[1]


def read_tensors(source: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the safetensors file `source`, one at a time. Raises as `entries_of`."""
    with open(source, "rb") as file:
        for entry in _read_safetensors_header(file)[1]:
            with _naming(source, entry):
                tensor = _read_tensor(file, entry)
            yield entry.name, tensor


def _read_safetensors_header(file: BinaryIO) -> tuple[bytes, list[Entry]]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(_LENGTH.size)
    length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
    if not 2 <= length <= min(size - _LENGTH.size, MAX_HEADER):
        raise ArchiveError(f"{file.name}: not a safetensors file, its header length is out of range")
    header = file.read(length)
    entries = _parse_header(header, file.name)
    if _LENGTH.size + length + sum(e.nbytes for e in entries) != size:
        raise ArchiveError(f"{file.name}: not a safetensors file, its data has not the size its header says")
    return header, entries


def _read_archive_header(file: BinaryIO, size: int) -> bytes:
    prefix = file.read(_PREFIX.size)
    if prefix[: len(MAGIC)] != MAGIC or len(prefix) != _PREFIX.size:
        raise ArchiveError(f"{file.name}: not written by `sidelane compress`")
    _, version, reserved, crc, length = _PREFIX.unpack(prefix)
    if version != VERSION or reserved:
        raise ArchiveError(f"{file.name}: version {version}.{reserved}; this library reads {VERSION}.0")
    if not 2 <= length <= min(size - _PREFIX.size, MAX_HEADER):
        raise ArchiveError(f"{file.name}: its header length is out of range: {DAMAGED}")
    header = file.read(length)
    if crc32c(header) != crc:
        raise ArchiveError(f"{file.name}: the checksum of its header does not match: {DAMAGED}")
    return header


def _parse_header(header: bytes, source: Path | str) -> list[Entry]:
    """The tensors of `source` in the order of their data. Raises ArchiveError if a field is wrong or data has
    gaps."""
    try:
        table = json.loads(header)
        if not isinstance(table, dict):
            raise ValueError("it is no table")
        table.pop("__metadata__", None)
        rows = sorted(
            (*map(_natural, row["data_offsets"]), name, row["dtype"], tuple(map(_natural, row["shape"])))
            for name, row in table.items()
        )
        at, entries = 0, []
        for start, end, name, dtype, shape in rows:
            if dtype not in DTYPES:
                known = ", ".join(DTYPES)
                what = f"tensor '{name}' has the dtype {str(dtype)[:20]}"
                raise ArchiveError(f"{source}: {what}: convert it to one of {known}")
            if len(shape) > MAX_NDIM or prod(max(n, 1) for n in shape) >= 2**62:
                raise ValueError(f"the shape of '{name}' is too large")
            entries.append(Entry(name, DTYPES[dtype], shape))
            if start != at or end != at + entries[-1].nbytes:
                raise ValueError("data has gaps or overlaps")
            at = end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ArchiveError):
            raise
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ArchiveError(f"{source}: not a safetensors file, its header is damaged: {what:.100}") from None
    return entries


def _natural(number: object) -> int:
    if type(number) is not int or not 0 <= number < 2**62:
        raise ValueError(f"{number!r} is no size")
    return number


def _read_tensor(file: BinaryIO, entry: Entry) -> Tensor:
    data = bytearray(entry.nbytes)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise ArchiveError(f"{file.name}: the file became shorter while it was read")
    if not data:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    octets = torch.frombuffer(data, dtype=torch.uint8)
    if entry.dtype == torch.bool and int(octets.max()) > 1:
        raise ArchiveError("has bytes that are no BOOL, which is 0 or 1: store it as U8")
    return octets.view(entry.dtype).view(entry.shape)


def _read_packet(file: BinaryIO, size: int) -> Packet:
    prefix = file.read(_LENGTH.size)
    length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
    if length > size - file.tell():
        raise PacketError("length", f"{length} bytes announced, {size - file.tell()} are left in the file")
    return Packet.from_bytes(file.read(length))


def _relative_error(tensor: Tensor, packet: Packet) -> float:
    """The error the lane measured, or measured here where it did not."""
    if not isnan(packet.rel_error):
        return packet.rel_error
    return relative_error(flatten(tensor), flatten(decompress(packet)))


@contextmanager
def _naming(source: Path, entry: Entry) -> Iterator[None]:
    """Says in every error which tensor of which file it is about."""
    try:
        yield
    except SidelaneError as error:
        advice = f": {DAMAGED}" if isinstance(error, PacketError) else ""
        raise ArchiveError(f"{source}: tensor '{entry.name}': {error}{advice}") from error


@contextmanager
def _whole(target: Path, force: bool, source: Path) -> Iterator[BinaryIO]:
    """A file that becomes `target` when the block succeeds and disappears when it does not."""
    if target.exists():
        if target.samefile(source):
            raise FileExistsError(EEXIST, "is the input; give the output another name", str(target))
        if not target.is_file():
            raise FileExistsError(EEXIST, "exists and is not a file", str(target))
        if not force:
            raise FileExistsError(EEXIST, "exists; --force replaces it", str(target))
    if not target.parent.is_dir():
        raise ArchiveError(f"{target}: {target.parent} is no folder: make it first")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    temporary = Path(name)
    try:
        with open(descriptor, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write: disk full, quota
            error.filename = str(target)
        raise
