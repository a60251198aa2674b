"""Lossless bf16, fp16 and fp32: exponents in 4-bit codes, the rest raw. Format: `ExactCodes`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidelane.errors import LaneError
from sidelane.kernels import reference
from sidelane.kernels._launch import (
    ALIGNMENT,
    carve,
    cdiv,
    check_parts,
    cut,
    device_of,
    programs,
    span,
    use_triton,
)
from sidelane.kernels.reference import (
    EXACT_BLOCK,
    EXACT_FIELDS,
    ExactCodes,
    exact_decode_ref,
    exact_encode_ref,
    exact_sizes,
)

SURVEY_TILE = 4096  # elements per step of a surveying program
SURVEY_PROGRAMS = 2048  # at most
ENCODE_REGISTERS = 96  # of a thread
LIST_PROGRAMS = 8192  # at most
ROOM = 32  # elements per escape that is expected at most
MOST = 2**30 - 1  # elements, each of which may have two escapes
BLOCK = tl.constexpr(EXACT_BLOCK)
SLACK = tl.constexpr(reference.EXACT_SLACK)
ZERO = tl.constexpr(reference.EXACT_ZERO)


@triton.jit
def _elements():  # type: ignore[no-untyped-def]
    """Numbers [2, BLOCK / 2] of the elements of a block; the columns share the bytes of the codes."""
    return tl.arange(0, 2)[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _rest_of(word, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """sign << MANTISSA | mantissa"""
    return ((word >> EXPONENT) & (1 << MANTISSA)) | (word & ((1 << MANTISSA) - 1))


@triton.jit  # type: ignore[untyped-decorator]
def _exact_survey_kernel(  # type: ignore[no-untyped-def]
    word_ptr, info_ptr, numel,
    MANTISSA: tl.constexpr, EXPONENT: tl.constexpr, PLANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sets bit p of info[1] where byte plane p is not zero everywhere."""
    at = tl.arange(0, TILE)
    seen = tl.zeros((TILE,), dtype=tl.int32)
    for tile in range(tl.program_id(0), (numel - 1) // TILE + 1, tl.num_programs(0)):
        base = tl.cast(tile, tl.int64) * TILE
        seen |= tl.load(word_ptr + base + at, mask=at < numel - base, other=0)
    rest = _rest_of(seen, MANTISSA, EXPONENT)
    used = 0
    for plane in tl.static_range(PLANES):
        used |= (tl.max((rest >> (8 * plane)) & 255, axis=0) > 0).to(tl.int32) << plane
    tl.atomic_or(info_ptr + 1, used)


@triton.jit
def _ones(x):  # type: ignore[no-untyped-def]
    """Number of bits that are set in uint32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _is_far(exponent, base):  # type: ignore[no-untyped-def]
    """Whether an exponent beyond the codes is too far from the base for one escape."""
    return (base - ZERO - exponent).to(tl.uint32, bitcast=True) >= 32


@triton.jit
def _largest_of_parts(exponent):  # type: ignore[no-untyped-def]
    """[BLOCK / 16], see `exact_base`."""
    return tl.max(tl.max(tl.reshape(exponent, (2, BLOCK // 16, 8)), axis=2), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _exact_encode_kernel(  # type: ignore[no-untyped-def]
    word_ptr, info_ptr, base_ptr, codes_ptr, counts_ptr, marks_ptr, planes_ptr, odd_ptr, numel,
    MANTISSA: tl.constexpr, EXPONENT: tl.constexpr, PLANES: tl.constexpr, ODD_BITS: tl.constexpr,
):  # fmt: skip
    """Base, codes, planes, odd bits; counts int32 [blocks] of escapes and, where there are any, marks uint32
    [blocks, 32] of the elements that have them (see `_exact_list_kernel`). One block at a time.

    Of several planes only those in info[1] are stored.
    """
    HALF: tl.constexpr = BLOCK // 2
    SPECIAL: tl.constexpr = 2**EXPONENT - 1
    blocks = (numel - 1) // BLOCK + 1
    used = 1
    if PLANES > 1:
        used = tl.load(info_ptr + 1)
    local = _elements()
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        block = tl.cast(number, tl.int64)
        at = block * BLOCK
        word = tl.load(word_ptr + at + local, mask=local < numel - at, other=0).to(tl.int32)
        exponent = (word >> MANTISSA) & SPECIAL
        part = _largest_of_parts(exponent)
        if tl.max(part, axis=0) == SPECIAL:
            part = _largest_of_parts(tl.where(exponent == SPECIAL, 0, exponent))
        floor = tl.min(tl.where(part > 0, part, SPECIAL), axis=0)
        base = tl.minimum(tl.max(part, axis=0), floor + SLACK)
        distance = base - exponent
        code = tl.where(distance.to(tl.uint32, bitcast=True) < ZERO, distance, ZERO)
        tl.store(base_ptr + block, base.to(tl.uint8))
        largest = tl.max(tl.max(code, axis=0), axis=0)
        byte = tl.sum(code << (4 * tl.arange(0, 2)[:, None]), axis=0).to(tl.uint8)
        tl.store(codes_ptr + block * HALF + tl.arange(0, HALF), byte)
        rest = _rest_of(word, MANTISSA, EXPONENT)
        plane_ptr = planes_ptr + at
        for plane in tl.static_range(PLANES):
            if (used >> plane) & 1 != 0:
                tl.store(plane_ptr + local, ((rest >> (8 * plane)) & 255).to(tl.uint8))
                plane_ptr += tl.cast(blocks, tl.int64) * BLOCK
        if ODD_BITS > 0:
            top = tl.reshape(rest >> (8 * PLANES), (BLOCK // 8, 8))
            for j in tl.static_range(ODD_BITS):
                odd = tl.sum(((top >> j) & 1) << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)
                at_odd = (block + tl.cast(blocks, tl.int64) * j) * (BLOCK // 8)
                tl.store(odd_ptr + at_odd + tl.arange(0, BLOCK // 8), odd)
        count = 0
        if largest == ZERO:
            again = tl.load(word_ptr + at + local, mask=local < numel - at, other=0).to(tl.int32)
            exponent = (again >> MANTISSA) & SPECIAL  # not kept until here, to save registers
            escaped = (exponent > 0) & ((base - exponent).to(tl.uint32, bitcast=True) >= ZERO)
            far = escaped & _is_far(exponent, base)
            count = tl.sum(tl.sum(escaped.to(tl.int32) + far.to(tl.int32), axis=0), axis=0)
            bit = tl.arange(0, 4)[:, None, None] * 8 + tl.arange(0, 8)[None, None, :]
            marks = tl.reshape(escaped.to(tl.int32), (4, 32, 8)) << bit
            marks = tl.sum(tl.sum(marks, axis=2), axis=0)
            tl.store(marks_ptr + block * 32 + tl.arange(0, 32), marks)
        tl.store(counts_ptr + block, count)


@triton.jit(do_not_specialize=["room"])  # type: ignore[untyped-decorator]
def _exact_list_kernel(  # type: ignore[no-untyped-def]
    word_ptr, info_ptr, base_ptr, marks_ptr, ends_ptr, escapes_ptr, numel, room,
    MANTISSA: tl.constexpr, EXPONENT: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """The list of escapes as far as there is room, and their number: info[0]. Blocks with escapes one by one.

    Bit 8 q + i of mark r of a block is for element 256 q + 8 r + i. `escapes` is where they begin when all
    planes are stored; each plane that is not gives room.
    """
    SPECIAL: tl.constexpr = 2**EXPONENT - 1
    blocks = (numel - 1) // BLOCK + 1
    escapes_ptr = escapes_ptr.to(tl.pointer_type(tl.int16))
    ends_ptr = ends_ptr.to(tl.pointer_type(tl.int32))
    if PLANES > 1:
        used = tl.load(info_ptr + 1)
        for plane in tl.static_range(PLANES):
            if (used >> plane) & 1 == 0:
                escapes_ptr -= tl.cast(blocks, tl.int64) * (BLOCK // 2)
                room += blocks * (BLOCK // 2)
    run = tl.arange(0, 32)
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        block = tl.cast(number, tl.int64)
        end = tl.load(ends_ptr + block)
        start = tl.load(ends_ptr + block - 1, mask=block > 0, other=0)
        if block == blocks - 1:
            tl.store(info_ptr, end)
        if end > start:
            base = tl.load(base_ptr + block).to(tl.int32)
            marks = tl.load(marks_ptr + block * 32 + run).to(tl.uint32, bitcast=True)
            both = tl.zeros_like(marks)
            ones = _ones(marks)
            rank = start + tl.cumsum(ones, axis=0) - ones
            start += tl.sum(ones, axis=0)
            most = tl.max(ones, axis=0)
            while most > 0:
                lowest, place = _lowest(marks, run)
                word = tl.load(word_ptr + block * BLOCK + place, mask=lowest > 0, other=0).to(tl.int32)
                exponent = (word >> MANTISSA) & SPECIAL
                far = _is_far(exponent, base)
                what = tl.where(far, 32 + (exponent & 15), base - ZERO - exponent)
                mask = (lowest > 0) & (rank < room)
                tl.store(escapes_ptr + rank, (place | what << 10).to(tl.int16), mask=mask)
                both |= tl.where(far, lowest, 0)
                rank += 1
                marks ^= lowest
                most -= 1
            ones = _ones(both)
            rank = start + tl.cumsum(ones, axis=0) - ones
            most = tl.max(ones, axis=0)
            while most > 0:
                lowest, place = _lowest(both, run)
                word = tl.load(word_ptr + block * BLOCK + place, mask=lowest > 0, other=0).to(tl.int32)
                what = 48 + (((word >> MANTISSA) & SPECIAL) >> 4)
                mask = (lowest > 0) & (rank < room)
                tl.store(escapes_ptr + rank, (place | what << 10).to(tl.int16), mask=mask)
                rank += 1
                both ^= lowest
                most -= 1


@triton.jit
def _lowest(marks, run):  # type: ignore[no-untyped-def]
    """The lowest bit that is set, as a mask, and the number of its element."""
    lowest = marks & (0 - marks)
    bit = _ones(lowest - 1) & 31
    return lowest, (bit >> 3) * 256 + run * 8 + (bit & 7)


@triton.jit(do_not_specialize=["escapes"])  # type: ignore[untyped-decorator]
def _exact_decode_kernel(  # type: ignore[no-untyped-def]
    base_ptr, codes_ptr, ends_ptr, planes_ptr, odd_ptr, escapes_ptr, word_ptr, numel, escapes,
    MANTISSA: tl.constexpr, EXPONENT: tl.constexpr, PLANES: tl.constexpr, ODD_BITS: tl.constexpr,
    ZERO_PLANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """word = sign << (MANTISSA + EXPONENT) | exponent << MANTISSA | mantissa, one block at a time; then the
    escapes of the block, STEP at a time.

    Ends that belong to other codes name other escapes, none outside the list.
    """
    HALF: tl.constexpr = BLOCK // 2
    SPECIAL: tl.constexpr = 2**EXPONENT - 1
    blocks = (numel - 1) // BLOCK + 1
    ends_ptr = ends_ptr.to(tl.pointer_type(tl.int32))
    escapes_ptr = escapes_ptr.to(tl.pointer_type(tl.int16))
    local = _elements()
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        block = tl.cast(number, tl.int64)
        at = block * BLOCK
        base = tl.load(base_ptr + block).to(tl.int32)
        end = tl.minimum(tl.load(ends_ptr + block), escapes)
        start = tl.maximum(tl.load(ends_ptr + block - 1, mask=block > 0, other=0), 0)
        byte = tl.load(codes_ptr + block * HALF + tl.arange(0, HALF)[None, :]).to(tl.int32)
        code = (byte >> (4 * tl.arange(0, 2)[:, None])) & 15
        word = tl.where(code == ZERO, 0, (base - code) & SPECIAL) << MANTISSA
        plane_ptr = planes_ptr + at
        rest = tl.zeros((2, HALF), dtype=tl.int32)
        for plane in tl.static_range(PLANES):
            if (ZERO_PLANES >> plane) & 1 == 0:
                rest |= tl.load(plane_ptr + local).to(tl.int32) << (8 * plane)
                plane_ptr += tl.cast(blocks, tl.int64) * BLOCK
        if ODD_BITS > 0:
            for j in tl.static_range(ODD_BITS):
                at_odd = (block + tl.cast(blocks, tl.int64) * j) * (BLOCK // 8)
                odd = tl.load(odd_ptr + at_odd + tl.arange(0, BLOCK // 8)).to(tl.int32)
                bits = (odd[:, None] >> tl.arange(0, 8)[None, :]) & 1
                rest |= tl.reshape(bits, (2, HALF)) << (8 * PLANES + j)
        word |= (rest >> MANTISSA) << (MANTISSA + EXPONENT) | rest & ((1 << MANTISSA) - 1)
        tl.store(word_ptr + at + local, word.to(word_ptr.dtype.element_ty), mask=local < numel - at)
        if end > start:
            for step in range(start, tl.minimum(end, start + 2 * BLOCK), STEP):
                k = step + tl.arange(0, STEP)
                escape = tl.load(escapes_ptr + k, mask=k < end, other=0).to(tl.int32)
                place = escape & (BLOCK - 1)
                what = (escape >> 10) & 63
                written = (k < end) & (place < numel - at)
                added = tl.where(what < 32, (base - ZERO - what) & SPECIAL, what & 15) << MANTISSA
                tl.debug_barrier()
                _add_bits(word_ptr + at + place, added, written & (what < 48))
                tl.debug_barrier()
                _add_bits(word_ptr + at + place, (what & 15) << (MANTISSA + 4), written & (what >= 48))


@triton.jit
def _add_bits(word_ptr, bits, mask):  # type: ignore[no-untyped-def]
    word = tl.load(word_ptr, mask=mask, other=0)
    tl.store(word_ptr, word | bits.to(word.dtype), mask=mask)


def exact_encode(x: Tensor, *, max_programs: int | None = None) -> ExactCodes | None:
    """Code the exponents of flat bf16, fp16 or fp32 [n], n >= 1; None when that would not make `x` smaller,
    and for n > MOST, where int32 might not count the escapes.

    The parts are made by `carve`. On a GPU the host waits once, at the end, for the number of escapes; where
    they are more than n / ROOM their section is written again behind a copy of the others. One pass over bf16
    and fp16, two over fp32. The result does not depend on the order of execution. `max_programs` is the most
    programs to launch at once, a warp each (the survey of fp32 has four); None for as many as there is work.

    Raises LaneError for any other input.
    """
    f = EXACT_FIELDS.get(x.dtype)
    if f is None:
        raise LaneError(f"{x.dtype} has no exact code: use bfloat16, float16 or float32")
    numel = x.numel()
    if x.ndim != 1 or not x.is_contiguous() or numel == 0:
        raise LaneError(f"shape {tuple(x.shape)}: flatten to one dimension of at least one element")
    raw = numel * x.element_size()
    if numel > MOST or sum(exact_sizes(x.dtype, numel, 2**f.droppable - 1, 0)) >= raw:
        return None
    if not use_triton(x):
        codes = exact_encode_ref(x.detach())
        return None if codes is None else _together(codes, x.dtype)
    room = cdiv(2 * numel, ROOM * ALIGNMENT) * ALIGNMENT // 2
    buffer = torch.empty(span(exact_sizes(x.dtype, numel, 0, room)), dtype=torch.uint8, device=x.device)
    info, marks = exact_encode_into(x, buffer, room, max_programs=max_programs)
    escapes, used = info.tolist()  # the one wait
    zero_planes = ~used & (1 << f.droppable) - 1
    sizes = exact_sizes(x.dtype, numel, zero_planes, escapes)
    if sum(sizes) >= raw:
        return None
    if span(sizes) <= buffer.numel():
        return ExactCodes.of(cut(buffer, sizes), zero_planes, numel)
    parts = carve(sizes, x.device)
    for part, written in zip(parts[:5], cut(buffer, (*sizes[:5], 0)), strict=False):
        part.copy_(written)
    _list_escapes(x, parts, info, marks, escapes, 1, max_programs)
    return ExactCodes.of(parts, zero_planes, numel)


def _together(codes: ExactCodes, dtype: torch.dtype) -> ExactCodes:
    """`codes` with its parts in one allocation."""
    sizes = exact_sizes(dtype, codes.numel, codes.zero_planes, codes.escapes.numel() // 2)
    parts = carve(sizes, codes.codes.device)
    for part, written in zip(parts, codes.sections.values(), strict=True):
        part.copy_(written)
    return ExactCodes.of(parts, codes.zero_planes, codes.numel)


def exact_encode_into(
    x: Tensor, buffer: Tensor, room: int, *, max_programs: int | None = None
) -> tuple[Tensor, Tensor]:
    """The launches of `exact_encode`.

    Args:
        buffer: uint8 for the parts, at least `span` of their sizes with all planes and `room` escapes.
        room: escapes beyond this number are not written.

    Returns:
        int32 [2], the number of escapes and, of float32, a bit per plane that is stored; and what
        `_exact_list_kernel` calls marks.
    """
    f, numel = EXACT_FIELDS[x.dtype], x.numel()
    blocks = cdiv(numel, EXACT_BLOCK)
    parts = cut(buffer, exact_sizes(x.dtype, numel, 0, room))
    base, codes, ends, planes, odd, _ = parts
    info = torch.zeros(2, dtype=torch.int32, device=x.device)
    counts = torch.empty(blocks, dtype=torch.int32, device=x.device)
    marks = torch.empty(blocks * 32, dtype=torch.int32, device=x.device)
    word = x.view(f.word)
    with device_of(x):
        if f.planes > 1:
            _exact_survey_kernel[(programs(min(cdiv(numel, SURVEY_TILE), SURVEY_PROGRAMS), max_programs),)](
                word, info, numel, f.mantissa, f.exponent, f.planes, SURVEY_TILE
            )
        _exact_encode_kernel[(programs(blocks, max_programs),)](
            word, info, base, codes, counts, marks, planes, odd, numel,
            f.mantissa, f.exponent, f.planes, f.odd_bits, num_warps=1, maxnreg=ENCODE_REGISTERS,
        )  # fmt: skip
        torch.cumsum(counts, 0, dtype=torch.int32, out=ends.view(torch.int32))
    _list_escapes(x, parts, info, marks, room, f.planes, max_programs)
    return info, marks


def _list_escapes(
    x: Tensor,
    parts: tuple[Tensor, ...],
    info: Tensor,
    marks: Tensor,
    room: int,
    planes: int,
    max_programs: int | None,
) -> None:
    """The launch of `_exact_list_kernel`; `planes` is 1 where the escapes are where they stay."""
    f, (base, _, ends, _, _, escapes) = EXACT_FIELDS[x.dtype], parts
    with device_of(x):
        _exact_list_kernel[(programs(min(base.numel(), LIST_PROGRAMS), max_programs),)](
            x.view(f.word), info, base, marks, ends, escapes, x.numel(), room,
            f.mantissa, f.exponent, planes, num_warps=1,
        )  # fmt: skip


def exact_decode(codes: ExactCodes, dtype: torch.dtype, *, max_programs: int | None = None) -> Tensor:
    """The flat tensor [numel] of `dtype` that was encoded, bit for bit; never waits for the device.

    `max_programs` as in `exact_encode`. Raises LaneError if `dtype` has no exact code or the sizes of the
    parts do not fit each other; on a CPU also where the codes mark other escapes than are listed.
    """
    _check_codes(codes, dtype)
    if not use_triton(codes.codes):
        return exact_decode_ref(codes, dtype)
    out = torch.empty(codes.numel, dtype=dtype, device=codes.codes.device)
    exact_decode_into(codes, out, max_programs=max_programs)
    return out


def exact_decode_into(codes: ExactCodes, out: Tensor, *, max_programs: int | None = None) -> None:
    """The launch of `exact_decode` into `out` [numel]."""
    f = EXACT_FIELDS[out.dtype]
    with device_of(out):
        _exact_decode_kernel[(programs(codes.base.numel(), max_programs),)](
            codes.base, codes.codes, codes.ends, codes.planes, codes.odd, codes.escapes, out.view(f.word),
            codes.numel, codes.escapes.numel() // 2,
            f.mantissa, f.exponent, f.planes, f.odd_bits, codes.zero_planes, 32, num_warps=1,
        )  # fmt: skip


def _check_codes(codes: ExactCodes, dtype: torch.dtype) -> None:
    f = EXACT_FIELDS.get(dtype)
    if f is None:
        raise LaneError(f"exact codes do not decode to {dtype}: ask for bfloat16, float16 or float32")
    if codes.numel < 1 or not 0 <= codes.zero_planes < 1 << f.droppable:
        raise LaneError(
            f"exact codes of {codes.numel} elements with zero planes {codes.zero_planes:#b} are not possible"
        )
    sizes = exact_sizes(dtype, codes.numel, codes.zero_planes, codes.escapes.numel() // 2)
    check_parts(codes.sections, sizes)
