"""Lossless bf16, fp16 and fp32: exponents in 4-bit codes, the rest raw. Format: `ExactCodes`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidelane.errors import LaneError
from sidelane.kernels._launch import carve, cdiv, device_of, use_triton
from sidelane.kernels.reference import (
    EXACT_BLOCK,
    EXACT_ESCAPE,
    EXACT_FIELDS,
    ExactCodes,
    FloatFields,
    exact_book,
    exact_decode_ref,
    exact_encode_ref,
)

EXACT_PARTS = ("book", "codes", "counts", "escapes", "planes", "odd")
SURVEY_TILE = 2048  # elements per step of a surveying program
SURVEY_PROGRAMS = 1024  # at most


@triton.jit  # type: ignore[untyped-decorator]
def _exponent_of(word, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    return (word >> MANTISSA) & (2**EXPONENT - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _rest_of(word, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """sign << MANTISSA | mantissa"""
    return ((word >> (MANTISSA + EXPONENT)) & 1) << MANTISSA | word & (2**MANTISSA - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _load_codes(codes_ptr, block, numel, pairs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 4-bit codes of one block as int32 [BLOCK], zero from `numel` on; `pairs` = ceil(numel / 2)."""
    pair = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    byte = tl.load(codes_ptr + pair, mask=pair < pairs, other=0).to(tl.int32)
    codes = tl.interleave(byte & 15, byte >> 4)
    return tl.where(block * BLOCK + tl.arange(0, BLOCK) < numel, codes, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _escape_rank(codes, counts_ptr, ends_ptr, block, ESCAPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Position of each escaped element of `block` in the list of escapes, int64 [BLOCK].

    `ends` int64 [blocks] is the inclusive sum of `counts`.
    """
    start = tl.load(ends_ptr + block) - tl.load(counts_ptr + block)
    return start + tl.cumsum((codes == ESCAPE).to(tl.int32), axis=0) - 1


@triton.jit  # type: ignore[untyped-decorator]
def _exact_survey_kernel(  # type: ignore[no-untyped-def]
    word_ptr, table_ptr, numel,
    MANTISSA: tl.constexpr, EXPONENT: tl.constexpr, PLANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Row `program` of `table` int32 [programs, 256 + PLANES], about tiles program, program + programs, ...

    How often each exponent occurs, then for each byte plane a number that is zero if the plane is.
    """
    program = tl.program_id(0).to(tl.int64)
    bins = tl.zeros((256,), dtype=tl.int32)
    any_bits = tl.zeros((TILE,), dtype=tl.int32)
    for start in range(program * TILE, numel, tl.num_programs(0) * TILE):
        at = start + tl.arange(0, TILE)
        word = tl.load(word_ptr + at, mask=at < numel, other=0).to(tl.int32)
        bins += tl.histogram(_exponent_of(word, MANTISSA, EXPONENT), 256, mask=at < numel)
        any_bits |= word
    row = table_ptr + program * (256 + PLANES)
    tl.store(row + tl.arange(0, 256), bins)
    rest = _rest_of(any_bits, MANTISSA, EXPONENT)
    for plane in tl.static_range(PLANES):
        tl.store(row + 256 + plane, tl.max((rest >> (8 * plane)) & 255, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _exact_encode_kernel(  # type: ignore[no-untyped-def]
    word_ptr, index_ptr, codes_ptr, counts_ptr, planes_ptr, odd_ptr, numel, pairs,
    MANTISSA: tl.constexpr, EXPONENT: tl.constexpr, PLANES: tl.constexpr, ODD_BITS: tl.constexpr,
    ZERO_PLANES: tl.constexpr, ESCAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """codes, counts, planes and odd bits of one block of BLOCK elements; code = index[exponent]."""
    block = tl.program_id(0).to(tl.int64)
    base = block * BLOCK
    at = base + tl.arange(0, BLOCK)
    word = tl.load(word_ptr + at, mask=at < numel, other=0).to(tl.int32)
    exponent = _exponent_of(word, MANTISSA, EXPONENT)
    code = tl.load(index_ptr + exponent, mask=at < numel, other=0).to(tl.int32)
    escapes = tl.sum((code == ESCAPE).to(tl.int32), axis=0)
    tl.store(counts_ptr + block, escapes.to(tl.int16))
    low, high = tl.split(tl.reshape(code, (BLOCK // 2, 2)))
    pair = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    tl.store(codes_ptr + pair, (low | high << 4).to(tl.uint8), mask=pair < pairs)
    rest = _rest_of(word, MANTISSA, EXPONENT)
    for plane in tl.static_range(PLANES):
        if (ZERO_PLANES >> plane) & 1 == 0:
            tl.store(planes_ptr + at, ((rest >> (8 * plane)) & 255).to(tl.uint8), mask=at < numel)
            planes_ptr += numel
    if ODD_BITS > 0:
        octet = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        i = tl.arange(0, 8)[None, :]
        top = tl.reshape(rest >> (8 * PLANES), (BLOCK // 8, 8))
        for j in tl.static_range(ODD_BITS):
            byte = tl.sum(((top >> j) & 1) << i, axis=1).to(tl.uint8)
            tl.store(odd_ptr + octet, byte, mask=8 * octet < numel)
            odd_ptr += (numel - 1) // 8 + 1


@triton.jit  # type: ignore[untyped-decorator]
def _exact_escapes_kernel(  # type: ignore[no-untyped-def]
    word_ptr, codes_ptr, counts_ptr, ends_ptr, escapes_ptr, numel, pairs,
    MANTISSA: tl.constexpr, EXPONENT: tl.constexpr, ESCAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """escapes[rank] = exponent of each element of one block whose code is ESCAPE."""
    block = tl.program_id(0).to(tl.int64)
    base = block * BLOCK
    codes = _load_codes(codes_ptr, block, numel, pairs, BLOCK)
    escaped = codes == ESCAPE
    word = tl.load(word_ptr + base + tl.arange(0, BLOCK), mask=escaped, other=0).to(tl.int32)
    exponent = _exponent_of(word, MANTISSA, EXPONENT).to(tl.uint8)
    tl.store(escapes_ptr + _escape_rank(codes, counts_ptr, ends_ptr, block, ESCAPE), exponent, mask=escaped)


@triton.jit  # type: ignore[untyped-decorator]
def _exact_decode_kernel(  # type: ignore[no-untyped-def]
    book_ptr, codes_ptr, counts_ptr, ends_ptr, escapes_ptr, planes_ptr, odd_ptr, word_ptr, numel, pairs,
    escapes, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr, PLANES: tl.constexpr, ODD_BITS: tl.constexpr,
    ZERO_PLANES: tl.constexpr, ESCAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """word = sign << (MANTISSA + EXPONENT) | exponent << MANTISSA | mantissa for one block of BLOCK elements.

    A rank outside the list of escapes, which only counts that belong to other codes give, reads as exponent
    0.
    """
    block = tl.program_id(0).to(tl.int64)
    base = block * BLOCK
    at = base + tl.arange(0, BLOCK)
    codes = _load_codes(codes_ptr, block, numel, pairs, BLOCK)
    rank = _escape_rank(codes, counts_ptr, ends_ptr, block, ESCAPE)
    listed = (codes == ESCAPE) & (rank >= 0) & (rank < escapes)
    exponent = tl.load(book_ptr + codes, mask=codes != ESCAPE, other=0).to(tl.int32)
    exponent += tl.load(escapes_ptr + rank, mask=listed, other=0).to(tl.int32)
    rest = tl.zeros((BLOCK,), dtype=tl.int32)
    for plane in tl.static_range(PLANES):
        if (ZERO_PLANES >> plane) & 1 == 0:
            rest |= tl.load(planes_ptr + at, mask=at < numel, other=0).to(tl.int32) << (8 * plane)
            planes_ptr += numel
    if ODD_BITS > 0:
        octet = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        i = tl.arange(0, 8)[None, :]
        for j in tl.static_range(ODD_BITS):
            byte = tl.load(odd_ptr + octet, mask=8 * octet < numel, other=0).to(tl.int32)
            rest |= tl.reshape((byte[:, None] >> i) & 1, (BLOCK,)) << (8 * PLANES + j)
            odd_ptr += (numel - 1) // 8 + 1
    sign = (rest >> MANTISSA) << (MANTISSA + EXPONENT)
    word = sign | exponent << MANTISSA | rest & (2**MANTISSA - 1)
    tl.store(word_ptr + at, word.to(word_ptr.dtype.element_ty), mask=at < numel)


def exact_encode(x: Tensor) -> ExactCodes | None:
    """Code the exponents of flat bf16, fp16 or fp32 [n], n >= 1; None when that would not make `x` smaller.

    Three passes over `x`: survey, encode, gather escapes (this one reads the codes and the escaped elements
    only). On a GPU the host waits once, after the survey, since the sizes of the parts depend on the data;
    nothing is allocated where the answer is None. The result does not depend on the order of execution.

    Raises LaneError for any other input.
    """
    f = EXACT_FIELDS.get(x.dtype)
    if f is None:
        raise LaneError(f"{x.dtype} has no exact code: use bfloat16, float16 or float32")
    if x.ndim != 1 or not x.is_contiguous() or x.numel() == 0:
        raise LaneError(f"shape {tuple(x.shape)}: flatten to one dimension of at least one element")
    if not use_triton(x):
        return _together(exact_encode_ref(x), f)
    programs = min(cdiv(x.numel(), SURVEY_TILE), SURVEY_PROGRAMS)
    table = torch.empty((programs, 256 + f.planes), dtype=torch.int32, device=x.device)
    survey_into(x, table)
    totals = table.sum(0).cpu()  # the one wait
    book, index = exact_book(totals[:256])
    escapes = int(totals[:256][index == EXACT_ESCAPE].sum())
    zero_planes = sum(1 << p for p in range(f.planes) if totals[256 + p] == 0)
    codes = empty_exact_codes(f, x.numel(), escapes, zero_planes, torch.device("meta"))
    if codes.nbytes >= x.numel() * x.element_size():
        return None
    codes = empty_exact_codes(f, x.numel(), escapes, zero_planes, x.device)
    codes.book.copy_(book)
    exact_encode_into(x, index.to(x.device), codes)
    return codes


def _together(codes: ExactCodes | None, f: FloatFields) -> ExactCodes | None:
    """`codes` with its parts in one allocation."""
    if codes is None:
        return None
    out = empty_exact_codes(f, codes.numel, codes.escapes.numel(), codes.zero_planes, codes.codes.device)
    for name in EXACT_PARTS:
        getattr(out, name).copy_(getattr(codes, name))
    return out


def empty_exact_codes(
    f: FloatFields, numel: int, escapes: int, zero_planes: int, device: torch.device
) -> ExactCodes:
    """Uninitialized codes of the sizes that the numbers imply, made by `carve`."""
    stored = f.planes - zero_planes.bit_count()
    sizes = (
        EXACT_ESCAPE,
        cdiv(numel, 2),
        2 * cdiv(numel, EXACT_BLOCK),
        escapes,
        stored * numel,
        f.odd_bits * cdiv(numel, 8),
    )
    book, codes, counts, listed, planes, odd = carve(sizes, device)
    return ExactCodes(
        book, codes, counts.view(torch.int16), listed, planes.view(stored, numel), odd, zero_planes, numel
    )


def survey_into(x: Tensor, table: Tensor) -> None:
    """The launch of `_exact_survey_kernel` on `x` with one program per row of `table`."""
    f = EXACT_FIELDS[x.dtype]
    with device_of(x):
        _exact_survey_kernel[(table.shape[0],)](
            x.view(f.word),
            table,
            x.numel(),
            MANTISSA=f.mantissa,
            EXPONENT=f.exponent,
            PLANES=f.planes,
            TILE=SURVEY_TILE,
        )


def exact_encode_into(x: Tensor, index: Tensor, codes: ExactCodes) -> None:
    """Fill all of `codes` but its book; `index` is the inverse of the book, uint8 [256]."""
    f = EXACT_FIELDS[x.dtype]
    word, grid = x.view(f.word), (codes.counts.numel(),)
    fields = {"MANTISSA": f.mantissa, "EXPONENT": f.exponent, "ESCAPE": EXACT_ESCAPE, "BLOCK": EXACT_BLOCK}
    with device_of(x):
        _exact_encode_kernel[grid](
            word,
            index,
            codes.codes,
            codes.counts,
            codes.planes,
            codes.odd,
            codes.numel,
            codes.codes.numel(),
            PLANES=f.planes,
            ODD_BITS=f.odd_bits,
            ZERO_PLANES=codes.zero_planes,
            **fields,
        )
        if codes.escapes.numel():
            ends = codes.counts.cumsum(0)
            _exact_escapes_kernel[grid](
                word,
                codes.codes,
                codes.counts,
                ends,
                codes.escapes,
                codes.numel,
                codes.codes.numel(),
                **fields,
            )


def exact_decode(codes: ExactCodes, dtype: torch.dtype) -> Tensor:
    """The flat tensor [numel] of `dtype` that was encoded, bit for bit; never waits for the device.

    Raises LaneError if `dtype` has no exact code or the sizes of the parts do not fit each other; on a CPU
    also where the codes mark another number of escapes than are listed.
    """
    _check_codes(codes, dtype)
    if not use_triton(codes.codes):
        return exact_decode_ref(codes, dtype)
    out = torch.empty(codes.numel, dtype=dtype, device=codes.codes.device)
    exact_decode_into(codes, out)
    return out


def exact_decode_into(codes: ExactCodes, out: Tensor) -> None:
    """The launch of `exact_decode` into `out` [numel]."""
    f = EXACT_FIELDS[out.dtype]
    with device_of(out):
        _exact_decode_kernel[(codes.counts.numel(),)](
            codes.book,
            codes.codes,
            codes.counts,
            codes.counts.cumsum(0),
            codes.escapes,
            codes.planes,
            codes.odd,
            out.view(f.word),
            codes.numel,
            codes.codes.numel(),
            codes.escapes.numel(),
            MANTISSA=f.mantissa,
            EXPONENT=f.exponent,
            PLANES=f.planes,
            ODD_BITS=f.odd_bits,
            ZERO_PLANES=codes.zero_planes,
            ESCAPE=EXACT_ESCAPE,
            BLOCK=EXACT_BLOCK,
        )


def _check_codes(codes: ExactCodes, dtype: torch.dtype) -> None:
    f = EXACT_FIELDS.get(dtype)
    if f is None:
        raise LaneError(f"exact codes do not decode to {dtype}: ask for bfloat16, float16 or float32")
    if codes.numel < 1 or not 0 <= codes.zero_planes < 1 << f.planes:
        raise LaneError(
            f"exact codes of {codes.numel} elements with zero planes {codes.zero_planes:#b} are not possible"
        )
    like = empty_exact_codes(f, codes.numel, codes.escapes.numel(), codes.zero_planes, torch.device("meta"))
    for name in EXACT_PARTS:
        part, want = getattr(codes, name), getattr(like, name)
        if part.shape != want.shape or part.dtype != want.dtype or not part.is_contiguous():
            raise LaneError(
                f"{name} is {part.dtype} {tuple(part.shape)}, not contiguous {want.dtype} {tuple(want.shape)}"
            )
        if part.device != codes.codes.device:
            raise LaneError(f"{name} is on {part.device}, codes on {codes.codes.device}: move them together")
