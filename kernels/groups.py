"""Group quantization to 2, 4 or 8 bits and back, one launch each way. Format and arithmetic: reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidelane.errors import LaneError
from sidelane.kernels import reference
from sidelane.kernels._launch import carve, cdiv, device_of, use_triton
from sidelane.kernels.reference import (
    GROUP_BITS,
    GROUP_SIZES,
    GroupCodes,
    group_quantize_pack_ref,
    group_unpack_dequantize_ref,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_LIMITS = {  # largest number, words of Inf and NaN
    torch.bfloat16: (torch.finfo(torch.bfloat16).max, 0x7F80, 0x7FC0),
    torch.float16: (torch.finfo(torch.float16).max, 0x7C00, 0x7E00),
    torch.float32: (torch.finfo(torch.float32).max, 0x7F800000, 0x7FC00000),
}
TILE = 2048  # elements per program, a power of two
WIDE = tl.constexpr(reference.WIDE)
WIDE_NONFINITE = tl.constexpr(reference.WIDE_NONFINITE)
NOISE_BITS = tl.constexpr(reference.NOISE_BITS)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by NumPy, for the tests


@triton.jit  # type: ignore[untyped-decorator]
def _to_words(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of finite float32 v rounded to nearest even in `dtype`."""
    if dtype == tl.float32:
        return v.to(tl.int32, bitcast=True)
    elif dtype == tl.float16:
        return v.to(tl.float16).to(tl.int16, bitcast=True)
    elif INTERPRETED:  # it truncates
        word = v.to(tl.int32, bitcast=True)
        return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).to(tl.int16)
    else:
        return v.to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def _hash32(seed, base, local):  # type: ignore[no-untyped-def]
    """`hash32` of the indices base + local, none of which differs from `base` in its high word."""
    low = base.to(tl.uint32) + local.to(tl.uint32)
    h = low ^ ((base >> 32).to(tl.uint32) * 0x85EBCA6B)
    h = h * 0x9E3779B1 + seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit  # type: ignore[untyped-decorator]
def _half_step(e):  # type: ignore[no-untyped-def]
    """2^(e - 128) of e in 1..255."""
    return tl.maximum((e - 1) << 23, 0x400000).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _extremes(v, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Least and largest of v [G, P, C] by group, or the largest magnitude twice; NaN counts as missing."""
    if SYMMETRIC:
        high = tl.max(tl.max(tl.abs(v), axis=1), axis=1)
        low = high
    else:
        low = tl.min(tl.min(v, axis=1), axis=1) + 0.0  # -0 becomes +0
        high = tl.max(tl.max(v, axis=1), axis=1)
    return low, high


@triton.jit(do_not_specialize=["numel", "seed"])  # type: ignore[untyped-decorator]
def _group_quantize_pack_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scale_ptr, offset_ptr, numel, seed,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, STOCHASTIC: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Codes, scales and offsets, BLOCK_GROUPS groups at a time. Tiles are [groups, P, C], P * C = GROUP."""
    tiles = (numel - 1) // (BLOCK_GROUPS * GROUP) + 1
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _quantize_tile(
            x_ptr, codes_ptr, scale_ptr, offset_ptr, numel, seed, tl.cast(tile, tl.int64) * BLOCK_GROUPS,
            BITS, GROUP, SYMMETRIC, STOCHASTIC, RAGGED, BLOCK_GROUPS,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_tile(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scale_ptr, offset_ptr, numel, seed, first,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, STOCHASTIC: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = 2**BITS - 1
    MIDDLE: tl.constexpr = 2 ** (BITS - 1) - 1
    P: tl.constexpr = 8 // BITS
    C: tl.constexpr = GROUP // P
    base = first * GROUP
    g = tl.arange(0, BLOCK_GROUPS)
    p = tl.arange(0, P)[None, :, None]
    c = tl.arange(0, C)[None, None, :]
    local = g[:, None, None] * GROUP + p * C + c
    exists = g < (numel - 1) // GROUP + 1 - first

    v = _load_tile(x_ptr, local, base, numel, exists, RAGGED)
    low, high = _extremes(v, SYMMETRIC)
    if SYMMETRIC:
        absmax = high
        zero = tl.zeros_like(high)
        offset = zero.to(tl.float16)
        span = absmax * (1.0 / MIDDLE)
    else:
        absmax = tl.maximum(tl.abs(low), tl.abs(high))
        offset = low.to(tl.float16)
        below = (low - tl.maximum(tl.abs(low) * 2.0**-11, 0.75 * 2.0**-24)).to(tl.float16)
        offset = tl.where(offset.to(tl.float32) > low, below, offset)
        zero = offset.to(tl.float32)
        span = (high - zero) * (1.0 / TOP)
    scale = tl.where(span > 0, span * (1 + 2.0**-10) + 0.75 * 2.0**-24, 0.0).to(tl.float16)
    step = scale.to(tl.float32)
    wide = (absmax + step + tl.abs(zero) >= float("inf")) | (step * TOP > 4 * absmax)
    inv = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
    at = tl.full(step.shape, MIDDLE if SYMMETRIC else 0, tl.float32)
    scale_word = scale.to(tl.int16, bitcast=True)

    # NaN in v or a wide group make the sum NaN; an infinity makes its group wide.
    check = tl.sum(v, axis=1) + tl.where(wide, float("nan"), 0.0)[:, None]
    total = tl.sum(check)
    unusual = (tl.abs(total) < float("inf")) == 0
    if unusual:
        finite = (v.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
        nonfinite = 1 - tl.min(tl.min(finite.to(tl.int32), axis=1), axis=1)
        v = tl.where(finite, v, 0.0)
        wide = wide | (nonfinite > 0)
        low, high = _extremes(v, SYMMETRIC)
        levels = MIDDLE - nonfinite
        gap = tl.maximum(tl.abs(low), tl.abs(high)).to(tl.int32, bitcast=True)
        gap -= tl.maximum(levels, 1).to(tl.float32).to(tl.int32, bitcast=True)
        e = tl.minimum(tl.maximum(((gap + (2**23 - 1)) >> 23) + 127, 1), 255)
        inv = tl.where(wide, tl.where(levels > 0, tl.div_rn(0.5, _half_step(e)), 0.0), inv)
        at = tl.where(wide, levels.to(tl.float32), at)
        zero = tl.where(wide, 0.0, zero)
        offset = tl.where(wide, tl.zeros_like(offset), offset)
        scale_word = tl.where(wide, (e | nonfinite * WIDE_NONFINITE | WIDE).to(tl.int16), scale_word)

    t = (v - zero[:, None, None]) * inv[:, None, None]
    q = t + (at + (2.0**8 if STOCHASTIC else 2.0**23))[:, None, None]
    codes = q.to(tl.int32, bitcast=True)
    if STOCHASTIC:
        i = p * C + c
        h = _hash32(seed, first * (GROUP // 2), g[:, None, None] * (GROUP // 2) + i % (GROUP // 2))
        noise = tl.where(i < GROUP // 2, h & (2**NOISE_BITS - 1), h >> (32 - NOISE_BITS)).to(tl.int32)
        codes = (codes + noise) >> NOISE_BITS
    codes &= TOP
    if unusual:
        x = _load_tile(x_ptr, local, base, numel, exists, RAGGED)
        special = tl.where(x > 0, TOP, tl.where(x < 0, TOP - 1, TOP - 2))
        codes = tl.where(tl.abs(x) < float("inf"), codes, special)

    if BITS == 8:
        tl.store(codes_ptr + base + local, codes.to(tl.uint8), mask=exists[:, None, None])
    else:
        byte = g[:, None] * C + tl.arange(0, C)[None, :]
        packed = tl.sum(codes << (p * BITS), axis=1).to(tl.uint8)
        tl.store(codes_ptr + first * C + byte, packed, mask=exists[:, None])
    tl.store(scale_ptr.to(tl.pointer_type(tl.int16)) + first + g, scale_word, mask=exists)
    if not SYMMETRIC:
        word = offset.to(tl.int16, bitcast=True)
        tl.store(offset_ptr.to(tl.pointer_type(tl.int16)) + first + g, word, mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def _load_tile(x_ptr, local, base, numel, exists, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements base + local as float32, those beyond the end of a RAGGED tensor copies of the last one."""
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    if BF16:
        x_ptr = x_ptr.to(tl.pointer_type(tl.int16))
    if RAGGED:
        inside = local < numel - base
        x = tl.load(x_ptr + base + local, mask=inside, other=0)
        x = tl.where(inside, x, tl.load(x_ptr + numel - 1))
    else:
        x = tl.load(x_ptr + base + local, mask=exists[:, None, None], other=0)
    v = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True) if BF16 else x.to(tl.float32)
    return v


@triton.jit(do_not_specialize=["numel"])  # type: ignore[untyped-decorator]
def _group_unpack_dequantize_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, scale_ptr, offset_ptr, out_ptr, numel,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, LIMIT: tl.constexpr, INF: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """x = (code - bias) * scale + offset of groups, BLOCK_GROUPS at a time. Tiles are [groups, P, C],
    P * C = GROUP.

    LIMIT, INF and NAN are the largest number of the output dtype and the words of what lies beyond it.
    """
    tiles = (numel - 1) // (BLOCK_GROUPS * GROUP) + 1
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _dequantize_tile(
            codes_ptr, scale_ptr, offset_ptr, out_ptr, numel, tl.cast(tile, tl.int64) * BLOCK_GROUPS,
            BITS, GROUP, SYMMETRIC, RAGGED, BLOCK_GROUPS, LIMIT, INF, NAN,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_tile(  # type: ignore[no-untyped-def]
    codes_ptr, scale_ptr, offset_ptr, out_ptr, numel, first,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, LIMIT: tl.constexpr, INF: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = 2**BITS - 1
    MIDDLE: tl.constexpr = 2 ** (BITS - 1) - 1
    P: tl.constexpr = 8 // BITS
    C: tl.constexpr = GROUP // P
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    WORD: tl.constexpr = tl.int32 if dtype == tl.float32 else tl.int16
    base = first * GROUP
    g = tl.arange(0, BLOCK_GROUPS)
    p = tl.arange(0, P)[None, :, None]
    c = tl.arange(0, C)[None, None, :]
    local = g[:, None, None] * GROUP + p * C + c
    exists = g < (numel - 1) // GROUP + 1 - first

    codes = _load_codes(codes_ptr, g, p, c, first, exists, BITS, GROUP)
    scale_word = tl.load(scale_ptr.to(tl.pointer_type(tl.int16)) + first + g, mask=exists, other=0)
    scale = scale_word.to(tl.float16, bitcast=True).to(tl.float32)
    number = (codes | 0x4B000000).to(tl.float32, bitcast=True)  # 2^23 + code
    if SYMMETRIC:
        v = (number - (2.0**23 + MIDDLE)) * scale[:, None, None]
    else:
        offset_word = tl.load(offset_ptr.to(tl.pointer_type(tl.int16)) + first + g, mask=exists, other=0)
        offset = offset_word.to(tl.float16, bitcast=True).to(tl.float32)
        v = (number - 2.0**23) * scale[:, None, None] + offset[:, None, None]
    if dtype == tl.float16:
        v = tl.minimum(tl.maximum(v, -LIMIT), LIMIT)
    out = _to_words(v, dtype)

    wide = (scale_word & 0x7C00) == 0x7C00
    if tl.max(wide.to(tl.int32), axis=0) > 0:
        again = _load_codes(codes_ptr, g, p, c, first, exists, BITS, GROUP)
        nonfinite = (wide & ((scale_word & WIDE_NONFINITE) > 0))[:, None, None]
        levels = tl.where(nonfinite, MIDDLE - 1, MIDDLE)
        w = (again - levels).to(tl.float32) * _half_step(scale_word.to(tl.int32) & 255)[:, None, None] * 2.0
        words = _to_words(tl.minimum(tl.maximum(w, -LIMIT), LIMIT), dtype)
        beyond = tl.where(again == TOP - 1, INF - 2 ** (WORD.primitive_bitwidth - 1), NAN)
        beyond = tl.where(again == TOP, INF, beyond).to(WORD)
        words = tl.where(nonfinite & (again >= TOP - 2), beyond, words)
        out = tl.where(wide[:, None, None], words, out)

    out_ptr = out_ptr.to(tl.pointer_type(WORD)) + base
    if RAGGED:
        tl.store(out_ptr + local, out, mask=local < numel - base)
    else:
        tl.store(out_ptr + local, out, mask=exists[:, None, None])


@triton.jit  # type: ignore[untyped-decorator]
def _load_codes(  # type: ignore[no-untyped-def]
    codes_ptr, g, p, c, first, exists, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """int32 codes [G, P, C] of the groups from `first` on."""
    if BITS == 8:
        at = g[:, None, None] * GROUP + c
        return tl.load(codes_ptr + first * GROUP + at, mask=exists[:, None, None], other=0).to(tl.int32)
    else:
        BYTES: tl.constexpr = GROUP * BITS // 8
        at = g[:, None, None] * BYTES + c
        byte = tl.load(codes_ptr + first * BYTES + at, mask=exists[:, None, None], other=0).to(tl.int32)
        return (byte >> (p * BITS)) & (2**BITS - 1)


def group_sizes(numel: int, bits: int, group: int, symmetric: bool) -> tuple[int, ...]:
    """Bytes of the parts of `GroupCodes` in order."""
    groups = cdiv(numel, group)
    scales = (2 * groups,) if symmetric else (2 * groups, 2 * groups)
    return (groups * group * bits // 8, *scales)


def group_quantize_pack(
    x: Tensor, bits: int, group: int, *, symmetric: bool = False, seed: int | None = None
) -> GroupCodes:
    """Quantize flat floats [n], n >= 1, in groups of `group` in a row; see `group_quantize_pack_ref`.

    The parts are made by `carve`. On a GPU this is one launch and the host never waits for the device.

    Args:
        x: [n] bfloat16, float16 or float32, contiguous.
        bits, group: one of GROUP_BITS and GROUP_SIZES.
        symmetric: no offsets; codes are centred on zero.
        seed: None rounds to nearest; a number rounds stochastically, the same way for the same seed.

    The codes are not differentiable. Raises LaneError for any other input.
    """
    if x.dtype not in FLOATS:
        raise LaneError(f"groups of {x.dtype} are not supported: convert to bfloat16, float16 or float32")
    numel = x.numel()
    if x.ndim != 1 or not x.is_contiguous() or numel == 0:
        raise LaneError(f"shape {tuple(x.shape)}: flatten to one dimension of at least one element")
    if bits not in GROUP_BITS or group not in GROUP_SIZES:
        raise LaneError(
            f"no {bits}-bit groups of {group}: use bits of {GROUP_BITS} and groups of {GROUP_SIZES}"
        )
    parts = carve(group_sizes(numel, bits, group, symmetric), x.device)
    codes = GroupCodes(parts[0], parts[1], None if symmetric else parts[2], bits, group, numel)
    if use_triton(x):
        group_quantize_pack_into(x, codes, seed=seed)
    else:
        want = group_quantize_pack_ref(x.detach(), bits, group, symmetric=symmetric, seed=seed)
        for name, part in want.sections.items():
            codes.sections[name].copy_(part)
    return codes


def group_quantize_pack_into(x: Tensor, codes: GroupCodes, *, seed: int | None = None) -> None:
    """The launch of `group_quantize_pack`: fills the parts of `codes`, which begin at multiples of 16."""
    block = TILE // codes.group
    with device_of(x):
        _group_quantize_pack_kernel[(cdiv(codes.numel, TILE),)](
            x,
            codes.codes,
            codes.scale,
            codes.offset,
            codes.numel,
            0 if seed is None else _as_int32(seed),
            BITS=codes.bits,
            GROUP=codes.group,
            SYMMETRIC=codes.offset is None,
            STOCHASTIC=seed is not None,
            RAGGED=codes.numel % codes.group > 0,
            BLOCK_GROUPS=block,
            enable_fp_fusion=False,
        )


def group_unpack_dequantize(codes: GroupCodes, dtype: torch.dtype) -> Tensor:
    """The flat tensor [numel] of `dtype` that `codes` stand for; never waits for the device.

    Raises LaneError if `dtype` is not one of FLOATS or the parts of `codes` do not fit each other.
    """
    _check_codes(codes, dtype)
    if not use_triton(codes.codes):
        return group_unpack_dequantize_ref(codes, dtype)
    out = torch.empty(codes.numel, dtype=dtype, device=codes.codes.device)
    group_unpack_dequantize_into(codes, out)
    return out


def group_unpack_dequantize_into(codes: GroupCodes, out: Tensor) -> None:
    """The launch of `group_unpack_dequantize` into `out` [numel]."""
    block = TILE // codes.group
    limit, infinity, nan = _LIMITS[out.dtype]
    with device_of(out):
        _group_unpack_dequantize_kernel[(cdiv(codes.numel, TILE),)](
            codes.codes,
            codes.scale,
            codes.offset,
            out,
            codes.numel,
            BITS=codes.bits,
            GROUP=codes.group,
            SYMMETRIC=codes.offset is None,
            RAGGED=codes.numel % codes.group > 0,
            BLOCK_GROUPS=block,
            LIMIT=limit,
            INF=infinity,
            NAN=nan,
            enable_fp_fusion=False,
        )


def _as_int32(seed: int) -> int:
    """The number in the range of int32 with the low 32 bits of `seed`."""
    return ((seed + 2**31) & 0xFFFFFFFF) - 2**31


def _check_codes(codes: GroupCodes, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise LaneError(f"groups do not decode to {dtype}: ask for bfloat16, float16 or float32")
    if codes.bits not in GROUP_BITS or codes.group not in GROUP_SIZES or codes.numel < 1:
        raise LaneError(f"no {codes.bits}-bit groups of {codes.group} for {codes.numel} elements")
    sizes = group_sizes(codes.numel, codes.bits, codes.group, codes.offset is None)
    device = codes.codes.device
    for (name, part), size in zip(codes.sections.items(), sizes, strict=True):
        if part.dtype != torch.uint8 or part.shape != (size,) or not part.is_contiguous():
            raise LaneError(f"{name} is {part.dtype} {tuple(part.shape)}, not contiguous uint8 [{size}]")
        if part.device != device:
            raise LaneError(f"{name} is on {part.device}, codes on {device}: move them together")
        if part.data_ptr() % 16:
            raise LaneError(f"{name} does not begin at a multiple of 16 bytes: pass a copy")
