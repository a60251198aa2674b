"""Lossless bf16, fp16 and fp32: exponents in 4-bit codes, the rest raw. Format: `ExactCodes`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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
    launch,
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
ENCODE_PROGRAMS = 16384  # at most
LIST_BLOCKS = 4  # at a time in a program that lists escapes
LIST_PROGRAMS = 8192  # at most
FINISH_TILE = 2048  # elements per step of a finishing program
FINISH_PROGRAMS = 1024  # at most
ROOM = 32  # elements per escape that is expected at most
MOST = 2**30 - 1  # elements, each of which may have two escapes
_sizes = lru_cache(maxsize=4096)(exact_sizes)
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
    MANTISSA: tl.constexpr, EXPONENT: tl.constexpr, PLANES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The list of escapes as far as there is room, and their number: info[0]. TOGETHER blocks at a time, if
    one of them has escapes; in each block the second ones of elements that have two come last.

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
    run = tl.arange(0, 32)[None, :]
    for step in range(tl.program_id(0), (blocks - 1) // TOGETHER + 1, tl.num_programs(0)):
        block = step * TOGETHER + tl.arange(0, TOGETHER)[:, None]
        end = tl.load(ends_ptr + block, mask=block < blocks, other=0)
        start = tl.load(ends_ptr + block - 1, mask=(block > 0) & (block < blocks), other=0)
        tl.store(info_ptr + tl.zeros_like(block), end, mask=block == blocks - 1)
        if _largest(end - start) > 0:
            listed = end > start
            base = tl.load(base_ptr + block, mask=listed, other=0).to(tl.int32)
            marks = tl.load(marks_ptr + block * 32 + run, mask=listed, other=0).to(tl.uint32, bitcast=True)
            for half in tl.static_range(2):
                both = tl.zeros_like(marks)
                ones = _ones(marks)
                at = start + tl.cumsum(ones, axis=1) - ones
                start += tl.sum(ones, axis=1)[:, None]
                most = _largest(ones)
                while most > 0:
                    lowest, place = _lowest(marks, run)
                    word = tl.load(word_ptr + block * BLOCK + place, mask=lowest > 0, other=0).to(tl.int32)
                    exponent = (word >> MANTISSA) & SPECIAL
                    what = 48 + (exponent >> 4)
                    if half == 0:
                        far = _is_far(exponent, base)
                        what = tl.where(far, 32 + (exponent & 15), base - ZERO - exponent)
                        both |= tl.where(far, lowest, 0)
                    mask = (lowest > 0) & (at < room)
                    tl.store(escapes_ptr + at, (place | what << 10).to(tl.int16), mask=mask)
                    at += 1
                    marks ^= lowest
                    most -= 1
                marks = both


@triton.jit
def _largest(x):  # type: ignore[no-untyped-def]
    """Of a matrix."""
    return tl.max(tl.max(x, axis=1), axis=0)


@triton.jit
def _lowest(marks, run):  # type: ignore[no-untyped-def]
    """The lowest bit that is set, as a mask, and the number of its element."""
    lowest = marks & (0 - marks)
    bit = _ones(lowest - 1) & 31
    return lowest, (bit >> 3) * 256 + run * 8 + (bit & 7)


@triton.jit(do_not_specialize=["room"])  # type: ignore[untyped-decorator]
def _exact_finish_kernel(  # type: ignore[no-untyped-def]
    word_ptr, info_ptr, notice_ptr, front_ptr, back_ptr, numel, split, room, TILE: tl.constexpr,
):  # fmt: skip
    """Copies `info` to `notice`. Where it says more escapes than `room`, writes the words over the codes:
    those before `split` to `front`, the others to `back`."""
    front_ptr = front_ptr.to(tl.pointer_type(word_ptr.dtype.element_ty))
    back_ptr = back_ptr.to(tl.pointer_type(word_ptr.dtype.element_ty))
    escapes = tl.load(info_ptr)
    if tl.program_id(0) == 0:
        tl.store(notice_ptr, escapes)
        tl.store(notice_ptr + 1, tl.load(info_ptr + 1))
    if escapes > room:
        for tile in range(tl.program_id(0), (numel - 1) // TILE + 1, tl.num_programs(0)):
            at = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
            word = tl.load(word_ptr + at, mask=at < numel, other=0)
            tl.store(front_ptr + at, word, mask=(at < numel) & (at < split))
            tl.store(back_ptr + (at - split), word, mask=(at < numel) & (at >= split))


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
    programs to launch at once, a warp each (the survey of fp32 has four); None for what is fastest by itself.

    Raises LaneError for any other input.
    """
    if not _may_shrink(x):
        return None
    if not use_triton(x):
        codes = exact_encode_ref(x.detach())
        return None if codes is None else _together(codes, x.dtype)
    numel = x.numel()
    room = cdiv(2 * numel, ROOM * ALIGNMENT) * ALIGNMENT // 2
    buffer = torch.empty(span(_sizes(x.dtype, numel, 0, room)), dtype=torch.uint8, device=x.device)
    info, marks = exact_encode_into(x, buffer, room, max_programs=max_programs)
    escapes, used = info.tolist()  # the one wait
    zero_planes = _zero_planes(x.dtype, used)
    sizes = _sizes(x.dtype, numel, zero_planes, escapes)
    if sum(sizes) >= x.nbytes:
        return None
    if span(sizes) <= buffer.numel():
        return ExactCodes.of(cut(buffer, sizes), zero_planes, numel)
    parts = carve(sizes, x.device)
    for part, written in zip(parts[:5], cut(buffer, (*sizes[:5], 0)), strict=False):
        part.copy_(written)
    _list_escapes(x, parts, info, marks, escapes, 1, max_programs)
    return ExactCodes.of(parts, zero_planes, numel)


@dataclass(frozen=True)
class LateCodes:
    """What `exact_encode_late` has told the device to write; the host does not know the size yet.

    Attributes:
        parts: uint8; those of `ExactCodes` with all planes and, in an allocation of its own, room for as many
            escapes as make the code as large as the tensor. The bytes of the tensor itself, one allocation
            after the other, if there are more.
        front: the allocation of all parts but the escapes.
        notice: int32 [2], as `exact_encode_into` returns it.
    """

    parts: tuple[Tensor, ...]
    front: Tensor
    notice: Tensor
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, in whole ALIGNMENTs."""
        return span((self.front.numel(), self.parts[5].numel()))

    def settle(self) -> ExactCodes | Tensor:
        """The codes, or the bytes of the tensor; no longer than they need to be. To be called when the device
        has written the notice, on the stream that encoded: what is too long is copied."""
        escapes, used = self.notice.tolist()
        back = self.parts[5]
        if 2 * escapes > back.numel():
            return torch.cat((self.front, back))[: self.numel * self.dtype.itemsize]
        zero_planes = _zero_planes(self.dtype, used)
        sizes = _sizes(self.dtype, self.numel, zero_planes, escapes)
        if not zero_planes:
            return ExactCodes.of((*self.parts[:5], back[: sizes[5]].clone()), 0, self.numel)
        buffer, front = torch.empty(span(sizes), dtype=torch.uint8, device=back.device), span(sizes[:5])
        buffer[:front].copy_(self.front[:front])
        buffer[front : front + sizes[5]].copy_(back[: sizes[5]])
        return ExactCodes.of(cut(buffer, sizes), zero_planes, self.numel)


def exact_encode_late(x: Tensor, notice: Tensor) -> LateCodes | None:
    """As `exact_encode`, without the wait. None where the tensor is not one for the kernels, or may become
    smaller only if the encoder waits.

    `x` may be changed or freed in stream order at once. `notice`: int32 [2] that the device can write and the
    host can read, such as pinned memory. What does not become smaller is given back as its bytes, also where
    more than a quarter of the elements escape from a float32 tensor with zero planes.
    """
    if not use_triton(x) or not _may_shrink(x):
        return None
    f, numel = EXACT_FIELDS[x.dtype], x.numel()
    sizes = _sizes(x.dtype, numel, 0, 0)
    if sum(sizes) >= x.nbytes:  # unless planes of few float32 turn out to be zero
        return None
    front = torch.empty(span(sizes), dtype=torch.uint8, device=x.device)
    rest = cdiv(max(x.nbytes - front.numel(), 0), 16) * 16
    back = torch.empty(rest, dtype=torch.uint8, device=x.device)
    parts, room, split = (*cut(front, sizes)[:5], back), rest // 2, front.numel() // x.element_size()
    info, _ = _encode(x, parts, room, 1, None)
    count = min(cdiv(numel, FINISH_TILE), FINISH_PROGRAMS)
    where = (x.view(f.word), info, notice, front, back)
    launch(_exact_finish_kernel, count, where, (numel, split, room), (FINISH_TILE,))
    return LateCodes(parts, front, notice, x.dtype, numel)


def _may_shrink(x: Tensor) -> bool:
    """Whether the code of flat floats can be smaller than they are. Raises LaneError for any other input."""
    f = EXACT_FIELDS.get(x.dtype)
    if f is None:
        raise LaneError(f"{x.dtype} has no exact code: use bfloat16, float16 or float32")
    numel = x.numel()
    if x.ndim != 1 or not x.is_contiguous() or numel == 0:
        raise LaneError(
            f"shape {tuple(x.shape)}, strides {x.stride()}: flatten at least one element, as by "
            "x.contiguous().view(-1)"
        )
    return numel <= MOST and sum(_sizes(x.dtype, numel, 2**f.droppable - 1, 0)) < x.nbytes


def _zero_planes(dtype: torch.dtype, used: int) -> int:
    """Bits of the planes that are not stored, from info[1]."""
    return ~used & (1 << EXACT_FIELDS[dtype].droppable) - 1


def _together(codes: ExactCodes, dtype: torch.dtype) -> ExactCodes:
    """`codes` with its parts in one allocation."""
    sizes = _sizes(dtype, codes.numel, codes.zero_planes, codes.escapes.numel() // 2)
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
    planes = EXACT_FIELDS[x.dtype].planes
    return _encode(x, cut(buffer, _sizes(x.dtype, x.numel(), 0, room)), room, planes, max_programs)


def _encode(
    x: Tensor, parts: tuple[Tensor, ...], room: int, planes: int, max_programs: int | None
) -> tuple[Tensor, Tensor]:
    """`exact_encode_into` to `parts`; `planes` as in `_list_escapes`."""
    f, numel = EXACT_FIELDS[x.dtype], x.numel()
    blocks = cdiv(numel, EXACT_BLOCK)
    scratch = torch.empty(33 * blocks + 4, dtype=torch.int32, device=x.device)
    info, _, marks, counts = scratch.split_with_sizes((2, 2, 32 * blocks, blocks))
    base, codes, ends, kept, odd, _ = parts
    word = x.view(f.word)
    if f.planes > 1:
        count = programs(min(cdiv(numel, SURVEY_TILE), SURVEY_PROGRAMS), max_programs)
        constants = f.mantissa, f.exponent, f.planes, SURVEY_TILE
        launch(_exact_survey_kernel, count, (word, info.zero_()), (numel,), constants)
    launch(
        _exact_encode_kernel,
        programs(min(blocks, ENCODE_PROGRAMS), max_programs),
        (word, info, base, codes, counts, marks, kept, odd),
        (numel,),
        (f.mantissa, f.exponent, f.planes, f.odd_bits),
        num_warps=1,
        maxnreg=ENCODE_REGISTERS,
    )
    with device_of(x):
        torch.cumsum(counts, 0, dtype=torch.int32, out=ends.view(torch.int32))
    _list_escapes(x, parts, info, marks, room, planes, max_programs)
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
    launch(
        _exact_list_kernel,
        programs(min(cdiv(base.numel(), LIST_BLOCKS), LIST_PROGRAMS), max_programs),
        (x.view(f.word), info, base, marks, ends, escapes),
        (x.numel(), room),
        (f.mantissa, f.exponent, planes, LIST_BLOCKS),
        num_warps=1,
    )


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
    launch(
        _exact_decode_kernel,
        programs(codes.base.numel(), max_programs),
        (codes.base, codes.codes, codes.ends, codes.planes, codes.odd, codes.escapes, out.view(f.word)),
        (codes.numel, codes.escapes.numel() // 2),
        (f.mantissa, f.exponent, f.planes, f.odd_bits, codes.zero_planes, 32),
        num_warps=1,
    )


def _check_codes(codes: ExactCodes, dtype: torch.dtype) -> None:
    f = EXACT_FIELDS.get(dtype)
    if f is None:
        raise LaneError(f"exact codes do not decode to {dtype}: ask for bfloat16, float16 or float32")
    if codes.numel < 1 or not 0 <= codes.zero_planes < 1 << f.droppable:
        raise LaneError(
            f"exact codes of {codes.numel} elements with zero planes {codes.zero_planes:#b} are not possible"
        )
    sizes = _sizes(dtype, codes.numel, codes.zero_planes, codes.escapes.numel() // 2)
    check_parts(codes.sections, sizes)
