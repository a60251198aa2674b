"""Codes to x: a pass that prepares a float16 GEMM and the GEMM, and the pass without components."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidelane.kernels._center import center_kernel, middle_of
from sidelane.kernels._launch import cdiv, device_of
from sidelane.kernels._surface import Geometry, load_codes
from sidelane.kernels._tiles import (
    PASS_PER_SM,
    Tiles,
    access,
    by_line,
    load_channels,
    load_tile,
    pass_blocks,
    piece,
    programs,
    side,
    slices,
    store_tile,
    tile_of,
)

WEIGHT_ROWS = 8  # rows of the components that a program weighs at a time
NARROW = 64  # channels that fit one step of the product


@triton.jit  # type: ignore[untyped-decorator]
def restore_kernel(  # type: ignore[no-untyped-def]
    centered,
    weights,
    unit_ptr,
    constant_ptr,
    out,
    tokens,
    depth,
    channels,
    rows_of_part,
    CENTERED: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out = (centered @ weights^T) * unit + constant, [tokens, depth], of the operands of `center_kernel`.

    Products of float16 are exact in float32: 12 bits of code times 11 of weight.
    """
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(depth, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N
        x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, channels, BLOCK_K):
            a = load_tile(centered, m0, k0, 0, 0, (0, 0), CENTERED, BLOCK_M, BLOCK_K)
            x = tl.dot(a, weights.load([n0, k0]).T, x)
            if PARTS == 2:
                x = tl.dot(a, weights.load([rows_of_part + n0, k0]).T, x)
        parts = slices(x, SLICES)
        WIDTH: tl.constexpr = BLOCK_N // SLICES
        for s in tl.static_range(SLICES):
            d = n0 + s * WIDTH + tl.arange(0, WIDTH)
            unit = load_channels(unit_ptr, d, depth, 1)
            restored = parts[s] * unit + load_channels(constant_ptr, d, depth, 1)
            store_tile(out, restored, m0, n0 + s * WIDTH, tokens, depth, OUT)


@triton.jit  # type: ignore[untyped-decorator]
def restore_narrow_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,
    levels_ptr,
    weights,
    unit_ptr,
    constant_ptr,
    out,
    tokens,
    depth,
    channels,
    rows_of_part,
    span,
    g,
    CHANNEL_LINES: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`restore_kernel` from codes of BLOCK_K channels at most; a program restores `span` features."""
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), tiles_t * tl.cdiv(depth, span), tl.num_programs(0)):
        first = item % tiles_t * BLOCK_T
        start = item // tiles_t * span
        t = first + tl.arange(0, BLOCK_T)
        if CHANNEL_LINES:
            codes = load_codes(codes_ptr, k, first, g, TILES, SPLIT, SHIFT, WIDE, BLOCK_T, PIECE, VECTOR)
            codes = tl.trans(codes)
        else:
            codes = load_codes(codes_ptr, t, 0, g, TILES, SPLIT, SHIFT, WIDE, BLOCK_K, PIECE, VECTOR)
        a = (codes.to(tl.float32) - middle_of(levels_ptr, k, channels, MIDDLE, 1)).to(tl.float16)
        for d0 in range(start, tl.minimum(start + span, depth), BLOCK_D):
            x = tl.dot(a, weights.load([d0, 0]).T)
            if PARTS == 2:
                x = tl.dot(a, weights.load([rows_of_part + d0, 0]).T, x)
            d = d0 + tl.arange(0, BLOCK_D)
            restored = x * load_channels(unit_ptr, d, depth, 1) + load_channels(constant_ptr, d, depth, 1)
            store_tile(out, restored, first, d0, tokens, depth, OUT)


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    lines,
    length,
    channels,
    out_strides,
    g,
    CHANNEL_LINES: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = code * scale + bias, [lines, length] with `out_strides`."""
    tiles_n = tl.cdiv(length, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(lines, BLOCK_M) * tiles_n, tl.num_programs(0)):
        first = tile % tiles_n * BLOCK_N
        line = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        along = first + tl.arange(0, BLOCK_N)
        codes = load_codes(codes_ptr, line, first, g, TILES, SPLIT, SHIFT, WIDE, BLOCK_N, PIECE, VECTOR)
        if CHANNEL_LINES:
            scale = load_channels(scale_ptr, line, channels, 0)
            bias = load_channels(bias_ptr, line, channels, 0)
        else:
            scale = load_channels(scale_ptr, along, channels, 1)
            bias = load_channels(bias_ptr, along, channels, 1)
        x = codes.to(tl.float32) * scale + bias
        row, column = line.to(tl.int64)[:, None], along.to(tl.int64)[None, :]
        at = out_ptr + row * out_strides[0] + column * out_strides[1]
        mask = (row < lines) & (column < length)
        tl.store(at, x.to(out_ptr.dtype.element_ty), mask=mask)


def restore(
    codes: Tensor,
    tokens: int,
    components: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    g: Geometry,
    flags: dict[str, Any],
    levels: Tensor | None,
    middle: int,
    parts: int,
    sms: int | None,
) -> Tensor:
    """Launch the inverse kernels; returns [tokens, D].

    `middle` is that of the codes where `levels` are not given, `parts` the float16 numbers for each weight.
    """
    out = torch.empty((tokens, bias.numel()), dtype=dtype, device=codes.device)
    flags = {"VECTOR": g.alignment, "WIDE": g.wide, **flags}
    lines, length = by_line((tokens, scale.numel()), flags)
    block_m, block_n = pass_blocks(lines, length, flags)
    blocks = {"PIECE": piece(g, block_n), "BLOCK_M": block_m, "BLOCK_N": block_n}
    tiles = cdiv(lines, block_m) * cdiv(length, block_n)
    with device_of(codes):
        if components is None:
            dequantize_kernel[(programs(tiles, PASS_PER_SM, sms, codes.device),)](
                codes,
                scale,
                bias,
                out,
                lines,
                length,
                scale.numel(),
                by_line(out.stride(), flags),
                g,
                enable_fp_fusion=False,  # a fused multiply-add would round otherwise than the reference
                **blocks,
                **flags,
            )
            return out
        narrow = scale.numel() <= NARROW and min(out.shape) >= NARROW
        lines, tiles = (0, 0) if narrow else (lines, tiles)
        centered = torch.empty((lines, cdiv(length, 8) * 8), dtype=torch.float16, device=codes.device)
        if levels is None:
            levels = scale  # not read
        else:
            middle = 0
        depth, channels = components.shape
        rows_of_part = cdiv(depth, 16) * 16
        shape = (parts * rows_of_part, cdiv(channels, 8) * 8)
        weights = torch.empty(shape, dtype=torch.float16, device=codes.device)
        unit, constant = torch.empty_like(bias), torch.empty_like(bias)
        tiles += rows_of_part // WEIGHT_ROWS
        center_kernel[(programs(tiles, PASS_PER_SM, sms, codes.device),)](
            codes,
            centered,
            components,
            scale,
            bias,
            levels,
            weights,
            unit,
            constant,
            lines,
            length,
            depth,
            channels,
            rows_of_part,
            centered.stride(0),
            weights.stride(0),
            components.stride(),
            g,
            MIDDLE=middle,
            PARTS=parts,
            BLOCK_D=WEIGHT_ROWS,
            BLOCK_K=side(channels, 256),
            enable_fp_fusion=False,
            **blocks,
            **flags,
        )
        product = (weights[:, :channels], unit, constant, out, parts, sms)
        if narrow:
            _restore_narrow(codes, levels, middle, g, flags, *product)
        else:
            a = centered[:, :length]
            _restore(a.t() if flags["CHANNEL_LINES"] else a, *product)
    return out


def _restore(
    centered: Tensor,
    weights: Tensor,
    unit: Tensor,
    constant: Tensor,
    out: Tensor,
    parts: int,
    sms: int | None,
) -> None:
    tokens, depth = out.shape
    t = _restore_tiles(tokens, depth, weights.shape[1], parts)
    a_tiles, a_access = access(centered, t.m, t.step)
    b_tiles, _ = access(weights, t.n, t.step)
    out_tiles, out_access = access(out, t.m, t.n // t.slices)
    tiles = cdiv(tokens, t.m) * cdiv(depth, t.n)
    restore_kernel[(programs(tiles, t.per_sm, sms, out.device),)](
        a_tiles,
        b_tiles,
        unit,
        constant,
        out_tiles,
        tokens,
        depth,
        weights.shape[1],
        len(weights) // parts,
        CENTERED=a_access,
        OUT=out_access,
        PARTS=parts,
        BLOCK_M=t.m,
        BLOCK_N=t.n,
        BLOCK_K=t.step,
        GROUP=t.group,
        SLICES=t.slices,
        FLATTEN=t.flatten,
        num_warps=t.warps,
        num_stages=t.stages,
        enable_fp_fusion=False,
    )


def _restore_narrow(
    codes: Tensor,
    levels: Tensor,
    middle: int,
    g: Geometry,
    flags: dict[str, Any],
    weights: Tensor,
    unit: Tensor,
    constant: Tensor,
    out: Tensor,
    parts: int,
    sms: int | None,
) -> None:
    tokens, depth = out.shape
    t = _narrow_tiles(tokens, depth)
    step = side(weights.shape[1], NARROW)
    b_tiles, _ = access(weights, t.n, step)
    out_tiles, out_access = access(out, t.m, t.n)
    span = cdiv(depth, t.n * t.group) * t.n
    tiles = cdiv(tokens, t.m) * cdiv(depth, span)
    restore_narrow_kernel[(programs(tiles, t.per_sm, sms, out.device),)](
        codes,
        levels,
        b_tiles,
        unit,
        constant,
        out_tiles,
        tokens,
        depth,
        weights.shape[1],
        len(weights) // parts,
        span,
        g,
        MIDDLE=middle,
        PIECE=piece(g, t.m if flags["CHANNEL_LINES"] else step),
        OUT=out_access,
        PARTS=parts,
        BLOCK_T=t.m,
        BLOCK_D=t.n,
        BLOCK_K=step,
        num_warps=t.warps,
        num_stages=t.stages,
        enable_fp_fusion=False,
        **flags,
    )


def _restore_tiles(tokens: int, depth: int, channels: int, parts: int) -> Tiles:
    """Tiles of a product [tokens, channels] x [channels, depth]."""
    if parts == 2:
        return Tiles(side(tokens, 128), side(depth, 128), 64, stages=3, warps=8)
    if tokens * depth >= 128 * 256 * 500 and channels > 768:
        return Tiles(128, 256, 64, stages=3, warps=8)
    # Two programs on a multiprocessor: one stores while the other multiplies.
    n = side(depth, 128)
    return Tiles(side(tokens, 128), n, 64, stages=3, warps=4, slices=4 if n == 128 else 1, group=16, per_sm=2)


def _narrow_tiles(tokens: int, depth: int) -> Tiles:
    """Tiles of a product of few channels; `group` programs share the features of their tokens."""
    return Tiles(64, 64, 0, stages=3, warps=4, group=2 if tokens >= 8192 else 4, per_sm=4)
