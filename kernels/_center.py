"""The pass before the GEMM of _restore.py: codes and components as its operands."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from sidelane.kernels._surface import load_codes
from sidelane.kernels._tiles import load_channels


@triton.jit  # type: ignore[untyped-decorator]
def middle_of(levels_ptr, k, channels, MIDDLE: tl.constexpr, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Float32 that codes of channels `k` are taken less: MIDDLE, or half of their levels if that is 0."""
    if MIDDLE:
        middle = tl.full((1, 1), MIDDLE, tl.float32)
    else:
        middle = tl.floor((load_channels(levels_ptr, k, channels, AXIS) + 1) * 0.5)
    return middle


@triton.jit
def _load_weights(  # type: ignore[no-untyped-def]
    rows, scale_ptr, in_d, k, channels, stride
):
    """components * scale, float32 [rows, channels `k`], 0 outside."""
    mask = in_d[:, None] & (k < channels)[None, :]
    w = tl.load(rows + k.to(tl.int64)[None, :] * stride, mask=mask, other=0.0).to(tl.float32)
    return w * load_channels(scale_ptr, k, channels, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _store_weights(rows, w, k, channels, part, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """w in float16 at channels `k`; with PARTS = 2, `part` elements on, what its rounding dropped."""
    mask = (k < channels)[None, :]
    high = w.to(tl.float16)
    tl.store(rows + k[None, :], high, mask=mask)
    if PARTS == 2:
        tl.store(rows + part + k[None, :], (w - high.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _weigh_components(  # type: ignore[no-untyped-def]
    components_ptr,
    scale_ptr,
    bias_ptr,
    levels_ptr,
    weights_ptr,
    unit_ptr,
    constant_ptr,
    first,
    depth,
    channels,
    rows_of_part,
    strides,
    pitch,
    MIDDLE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows d = first.. of what `restore_kernel` multiplies and adds, from w = components * scale:

    unit[d] = the power of two with max |w[d]| / unit[d] in [2^13, 2^14), not below 2^-126,
    weights[d] = w[d] / unit[d] in float16 and, with PARTS = 2, what its rounding dropped; 0 from `depth` on,
    constant[d] = bias[d] + sum of w[d, k] * middle[k].

    The first BLOCK_K channels stay in registers; the others are read twice.
    """
    d = first + tl.arange(0, BLOCK_D)
    in_d = d < depth
    rows = components_ptr + d.to(tl.int64)[:, None] * strides[0]
    bias = tl.load(bias_ptr + d, mask=in_d, other=0.0)
    k = tl.arange(0, BLOCK_K)
    w = _load_weights(rows, scale_ptr, in_d, k, channels, strides[1])
    largest = tl.max(tl.abs(w), 1)
    total = tl.sum(w * middle_of(levels_ptr, k, channels, MIDDLE, 1), 1)
    for k0 in range(BLOCK_K, channels, BLOCK_K):
        more = _load_weights(rows, scale_ptr, in_d, k0 + k, channels, strides[1])
        largest = tl.maximum(largest, tl.max(tl.abs(more), 1))
        total += tl.sum(more * middle_of(levels_ptr, k0 + k, channels, MIDDLE, 1), 1)
    # Biased exponents of float32; 2^13 <= |w| / unit < 2^14 leaves float16 its 11 bits for 27 octaves below.
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 13, 1)
    per_unit = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    tl.store(unit_ptr + d, (exponent << 23).to(tl.float32, bitcast=True), mask=in_d)
    tl.store(constant_ptr + d, bias + total, mask=in_d)
    out = weights_ptr + d.to(tl.int64)[:, None] * pitch
    part = tl.cast(rows_of_part, tl.int64) * pitch
    _store_weights(out, w * per_unit, k, channels, part, PARTS)
    for k0 in range(BLOCK_K, channels, BLOCK_K):
        more = _load_weights(rows, scale_ptr, in_d, k0 + k, channels, strides[1])
        _store_weights(out, more * per_unit, k0 + k, channels, part, PARTS)


@triton.jit  # type: ignore[untyped-decorator]
def weigh_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    scale_ptr,
    bias_ptr,
    levels_ptr,
    weights_ptr,
    unit_ptr,
    constant_ptr,
    depth,
    channels,
    rows_of_part,
    weights_pitch,
    strides,
    MIDDLE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`_weigh_components` of all rows, BLOCK_D for each program."""
    _weigh_components(
        components_ptr,
        scale_ptr,
        bias_ptr,
        levels_ptr,
        weights_ptr,
        unit_ptr,
        constant_ptr,
        tl.program_id(0) * BLOCK_D,
        depth,
        channels,
        rows_of_part,
        strides,
        weights_pitch,
        MIDDLE,
        PARTS,
        BLOCK_D,
        BLOCK_K,
    )


@triton.jit  # type: ignore[untyped-decorator]
def center_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,
    centered_ptr,
    components_ptr,
    scale_ptr,
    bias_ptr,
    levels_ptr,
    weights_ptr,
    unit_ptr,
    constant_ptr,
    lines,
    length,
    depth,
    channels,
    rows_of_part,
    centered_pitch,
    weights_pitch,
    strides,
    g,
    CHANNEL_LINES: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Operands of `restore_kernel`: code - middle, float16 [lines, length], and `_weigh_components`, which is
    left out where `rows_of_part` is 0.

    EARLY: the next kernel may take its place as soon as there is room, and waits itself.
    """
    if EARLY:
        cuda.gdc_launch_dependents()
    tiles_n = tl.cdiv(length, BLOCK_N)
    bands = rows_of_part // BLOCK_D
    for tile in range(tl.program_id(0), bands + tl.cdiv(lines, BLOCK_M) * tiles_n, tl.num_programs(0)):
        if tile < bands:
            _weigh_components(
                components_ptr,
                scale_ptr,
                bias_ptr,
                levels_ptr,
                weights_ptr,
                unit_ptr,
                constant_ptr,
                tile * BLOCK_D,
                depth,
                channels,
                rows_of_part,
                strides,
                weights_pitch,
                MIDDLE,
                PARTS,
                BLOCK_D,
                BLOCK_K,
            )
        else:
            first = (tile - bands) % tiles_n * BLOCK_N
            line = (tile - bands) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
            codes = load_codes(codes_ptr, line, first, g, TILES, SPLIT, SHIFT, WIDE, BLOCK_N, PIECE, VECTOR)
            along = first + tl.arange(0, BLOCK_N)
            if CHANNEL_LINES:
                middle = middle_of(levels_ptr, line, channels, MIDDLE, 0)
            else:
                middle = middle_of(levels_ptr, along, channels, MIDDLE, 1)
            at = centered_ptr + line.to(tl.int64)[:, None] * centered_pitch + along[None, :]
            mask = (line < lines)[:, None] & (along < length)[None, :]
            tl.store(at, (codes.to(tl.float32) - middle).to(tl.float16), mask=mask)
