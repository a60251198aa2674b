"""The two codes of the packed lane as packets: groups with a scale each, and coefficients of a basis."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from sidelane.codec.packet import Packet, Sections, compact
from sidelane.errors import PacketError
from sidelane.kernels._launch import aligned, cdiv, span, starts
from sidelane.kernels.bits import pack_bits, unpack_bits
from sidelane.kernels.groups import group_packer, group_sizes, group_unpack_dequantize
from sidelane.kernels.reference import GROUP_BITS, GROUP_SIZES, MAX_CODE_BITS, GroupCodes, packed_bits_size
from sidelane.kernels.surface import MAX_SIZE, dequantize_project, project_quantize
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.octets import as_bytes

LOSSY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_GROUP_SECTIONS = ("codes", "scale", "offset")


class GroupPlan(NamedTuple):
    """What a group code of a tensor is, whatever its elements.

    Attributes:
        packet: without sections.
        names, starts, sizes: of the sections.
        nbytes: of all sections in memory.
        pack: writes them, of contiguous floats, to a vector of so many bytes.
        smaller: than a raw packet.
    """

    packet: Packet
    names: tuple[str, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int
    pack: Callable[[Tensor, Tensor], None]
    smaller: bool


@lru_cache(4096)
def plan_groups(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    bits: int,
    group: int,
    symmetric: bool,
    seed: int | None,
) -> GroupPlan:
    """For a tensor of at least one element and these strides."""
    packet = Packet(
        lane="packed",
        dtype=dtype,
        shape=shape,
        strides=compact(shape, strides),
        params=(group, int(symmetric)),
        bits=bits,
        rel_error=nan,
    )
    numel = packet.flat_numel
    sizes = group_sizes(numel, bits, group, symmetric)
    smaller = packet.wire_nbytes(sizes) < packet.stored_nbytes
    names, pack = _GROUP_SECTIONS[: len(sizes)], group_packer(numel, dtype, bits, group, symmetric, seed)
    return GroupPlan(packet, names, starts(sizes), sizes, span(sizes), pack, smaller)


def encode_groups(plan: GroupPlan, flat: Tensor) -> Packet:
    """The group code of contiguous floats.

    Sections: codes, scale and, unless symmetric, offset of `GroupCodes`; params: group, symmetric.
    """
    packet, names, begins, sizes, nbytes, pack, _ = plan
    buffer = torch.empty(nbytes, dtype=torch.uint8, device=flat.device)
    pack(flat, buffer)
    return packet.with_(sections=Sections(names, begins, sizes, buffer))


def decode_groups(packet: Packet) -> Tensor:
    """The flat floats of `encode_groups`. Raises PacketError when the fields do not fit each other."""
    group, symmetric = packet.numbers(2)
    if packet.bits not in GROUP_BITS:
        raise PacketError("bits", f"{packet.bits} is not one of {GROUP_BITS}")
    if group not in GROUP_SIZES or symmetric not in (0, 1):
        raise PacketError("params", f"group {group}, symmetric {symmetric}: not a group code")
    check_lossy_dtype(packet)
    numel = packet.flat_numel
    if not numel:
        raise PacketError("shape", "empty tensors have no group code")
    packet.check_sections(*_GROUP_SECTIONS[: 3 - symmetric])
    sizes = group_sizes(numel, packet.bits, group, bool(symmetric))
    codes = GroupCodes(
        aligned(packet.section("codes", numel=sizes[0])),
        aligned(packet.section("scale", numel=sizes[1])),
        None if symmetric else aligned(packet.section("offset", numel=sizes[2])),
        packet.bits,
        group,
        numel,
    )
    return group_unpack_dequantize(codes, packet.dtype)


def fits(basis: Basis, packet: Packet) -> bool:
    """Whether the elements of `packet`, in memory order, are rows of the length of `basis`."""
    return (
        len(packet.shape) > 0
        and packet.shape[-1] == basis.dim
        and packet.strides[-1] == 1
        and packet.dtype in LOSSY_DTYPES
        and 0 < packet.flat_numel // basis.dim < MAX_SIZE
    )


def encode_basis(packet: Packet, flat: Tensor, basis: Basis, width: int | None) -> Packet:
    """`packet` with the coefficients of rows [T, D] in `basis`, `width` bits each or as the basis allocates.

    Sections: codes (bit planes), rows int32 [E] in rising order and escapes [E, D] of the dtype of the tensor
    for rows that hold NaN or Inf; bits: `width`, 0 for those of the basis.
    """
    q = basis.to(flat.device).quantizer(width)
    x = flat.view(-1, basis.dim)
    finite = x.isfinite().all(1)
    rows = (~finite).nonzero()[:, 0]
    escapes = x[rows]
    if len(rows):
        x = torch.where(finite[:, None], x, 0)
    codes, _ = project_quantize(x, q.components, q.offset, q.inv_scale, q.levels)
    sections = {"codes": pack_bits(codes, q.widths), "rows": rows.to(torch.int32), "escapes": escapes}
    return packet.with_(
        sections={name: as_bytes(part) for name, part in sections.items()},
        bits=width or 0,
        digest=basis.digest,
        rel_error=nan,
    )


def decode_basis(packet: Packet, basis: Basis) -> Tensor:
    """The flat floats of `encode_basis`. Raises PacketError when the fields do not fit together."""
    packet.numbers(0)
    packet.check_sections("codes", "rows", "escapes")
    check_lossy_dtype(packet)
    if not fits(basis, packet):
        raise PacketError("shape", f"{list(packet.shape)[:8]} is not made of rows [{basis.dim}] of the basis")
    if packet.bits > MAX_CODE_BITS:
        raise PacketError("bits", f"{packet.bits} is above {MAX_CODE_BITS}")
    q = basis.to(packet.device).quantizer(packet.bits or None)
    tokens = packet.flat_numel // basis.dim
    packed = packet.section("codes", numel=packed_bits_size(tokens, q.widths))
    escapes = escaped_rows(packet, basis.dim)
    rows = packet.section("rows", torch.int32, len(escapes)).long()
    if len(rows) and not (rows[0] >= 0 and rows[-1] < tokens and (rows.diff() > 0).all()):
        raise PacketError("rows", f"the indices do not rise within 0..{tokens - 1}")
    codes = unpack_bits(packed, q.widths, tokens)
    x = dequantize_project(codes, q.components, q.scale, q.bias, packet.dtype, levels=q.levels)
    if len(rows):
        x[rows] = escapes
    return x.view(-1)


def check_lossy_dtype(packet: Packet) -> None:
    if packet.dtype not in LOSSY_DTYPES:
        raise PacketError("dtype", f"{packet.dtype} is never coded with loss")


def escaped_rows(packet: Packet, length: int) -> Tensor:
    """Section `escapes` as rows [*, length], no more of them than the tensor has."""
    escapes = packet.section("escapes", packet.dtype)
    if escapes.numel() % length or escapes.numel() > cdiv(packet.flat_numel, length) * length:
        raise PacketError("escapes", f"{escapes.numel()} elements are not rows of {length}")
    return escapes.view(-1, length)
