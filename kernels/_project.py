"""x to codes: a GEMM with quantization and surface access fused to it, and the pass without components."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidelane.kernels._launch import cdiv, device_of
from sidelane.kernels._surface import Geometry, store_codes, store_fill
from sidelane.kernels._tiles import (
    PASS_PER_SM,
    Tiles,
    access,
    by_line,
    interpreted,
    load_channels,
    load_tile,
    pass_blocks,
    piece,
    programs,
    side,
    slices,
    tile_of,
)

FILL_BLOCK = 1024  # positions that a program fills at a time


@triton.jit  # type: ignore[untyped-decorator]
def _load_quantizer(  # type: ignore[no-untyped-def]
    offset_ptr, inv_scale_ptr, levels_ptr, k, channels, AXIS: tl.constexpr
):
    """Offset, inverse scale and the largest float32 that is floored to the levels of channels `k`."""
    offset = load_channels(offset_ptr, k, channels, AXIS)
    inv_scale = load_channels(inv_scale_ptr, k, channels, AXIS)
    beyond = load_channels(levels_ptr, k, channels, AXIS) + 1  # levels are whole
    return (
        offset,
        inv_scale,
        (beyond.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True),
    )


@triton.jit
def _quantize(z, quantizer):  # type: ignore[no-untyped-def]
    """Codes int32 of z, and which of them the clamp changed."""
    offset, inv_scale, top = quantizer
    q = (z - offset) * inv_scale + 0.5
    clamped = tl.minimum(tl.maximum(q, 0.0), top)
    return clamped.to(tl.int32), clamped != q


@triton.jit  # type: ignore[untyped-decorator]
def project_quantize_kernel(  # type: ignore[no-untyped-def]
    a,
    b,
    offset_ptr,
    inv_scale_ptr,
    levels_ptr,
    out_ptr,
    clamped_ptr,
    tokens,
    depth,
    channels,
    rows_of_components,
    a_strides,
    b_strides,
    g,
    A: tl.constexpr,
    B: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNEL_LINES: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    FILL: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_FILL: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
    FLATTEN: tl.constexpr,
    EDGES: tl.constexpr,
):
    """code = clamp(floor((z - offset) * inv_scale + 0.5), 0, levels) of z = a @ b, lines along the rows of z.

    `a` is x [tokens, depth] and `b` the components [depth, channels], or with CHANNEL_LINES their transposes
    in the other order. PARTS = 2: the components are those of `split_kernel` [rows_of_components, channels].
    The programs share the tiles [BLOCK_M, BLOCK_N] of all lines with their padding, which gets FILL, and the
    unused positions. Adds the number of codes clamped to clamped[0]. PRECISION "native" multiplies in the
    16-bit dtype that both operands share, else it is that of `tl.dot` on float32. EDGES: some tiles reach
    beyond the codes.
    """
    rows = channels if CHANNEL_LINES else tokens
    columns = tokens if CHANNEL_LINES else channels
    a_columns = rows_of_components if CHANNEL_LINES else depth
    b_rows = depth if CHANNEL_LINES else rows_of_components
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(g.length, BLOCK_N)
    steps = tl.cdiv(depth, BLOCK_D)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, PARTS * steps):
            d_components = step * BLOCK_D
            d_x = d_components
            if PARTS == 2:
                d_x = tl.where(step < steps, step, step - steps) * BLOCK_D
            a_tile = load_tile(
                a, m0, d_components if CHANNEL_LINES else d_x, rows, a_columns, a_strides, A, BLOCK_M, BLOCK_D
            )
            b_tile = load_tile(
                b, d_x if CHANNEL_LINES else d_components, n0, b_rows, columns, b_strides, B, BLOCK_D, BLOCK_N
            )
            if PRECISION == "native":
                z = tl.dot(a_tile, b_tile, z)
            else:
                z = tl.dot(a_tile.to(tl.float32), b_tile.to(tl.float32), z, input_precision=PRECISION)
        line = m0 + tl.arange(0, BLOCK_M)
        in_line = line < rows
        if CHANNEL_LINES:
            quantizer = _load_quantizer(offset_ptr, inv_scale_ptr, levels_ptr, line, channels, 0)
        parts = slices(z, SLICES)
        LENGTH: tl.constexpr = BLOCK_N // SLICES
        count = tl.zeros((BLOCK_M,), tl.int32)
        for s in tl.static_range(SLICES):
            along = n0 + s * LENGTH + tl.arange(0, LENGTH)
            if not CHANNEL_LINES:
                quantizer = _load_quantizer(offset_ptr, inv_scale_ptr, levels_ptr, along, channels, 1)
            codes, changed = _quantize(parts[s], quantizer)
            if EDGES:
                inside = in_line[:, None] & (along < columns)[None, :]
                codes = tl.where(inside, codes, FILL)
                changed &= inside
            count += tl.sum(changed.to(tl.int32), 1)
            store_codes(
                out_ptr,
                codes,
                line,
                n0,
                g,
                TILES,
                SPLIT,
                SHIFT,
                WIDE,
                s * LENGTH,
                PIECE,
                VECTOR,
            )
        tl.atomic_add(clamped_ptr, tl.sum(count), sem="relaxed")
    store_fill(out_ptr, tiles_m * BLOCK_M, g, TILES, SPLIT, SHIFT, FILL, WIDE, BLOCK_FILL)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    offset_ptr,
    inv_scale_ptr,
    levels_ptr,
    out_ptr,
    clamped_ptr,
    tokens,
    channels,
    x_strides,
    g,
    CHANNEL_LINES: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    FILL: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_FILL: tl.constexpr,
):
    """`project_quantize_kernel` of z = x [tokens, channels]."""
    rows = channels if CHANNEL_LINES else tokens
    columns = tokens if CHANNEL_LINES else channels
    tiles_n = tl.cdiv(g.length, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(g.lines, BLOCK_M) * tiles_n, tl.num_programs(0)):
        first = tile % tiles_n * BLOCK_N
        line = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        along = first + tl.arange(0, BLOCK_N)
        row, column = line.to(tl.int64)[:, None], along.to(tl.int64)[None, :]
        at = x_ptr + row * x_strides[0] + column * x_strides[1]
        z = tl.load(at, mask=(row < rows) & (column < columns), other=0.0).to(tl.float32)
        if CHANNEL_LINES:
            quantizer = _load_quantizer(offset_ptr, inv_scale_ptr, levels_ptr, line, channels, 0)
        else:
            quantizer = _load_quantizer(offset_ptr, inv_scale_ptr, levels_ptr, along, channels, 1)
        codes, changed = _quantize(z, quantizer)
        inside = (line < rows)[:, None] & (along < columns)[None, :]
        codes = tl.where(inside, codes, FILL)
        tl.atomic_add(clamped_ptr, tl.sum((changed & inside).to(tl.int32)), sem="relaxed")
        store_codes(out_ptr, codes, line, first, g, TILES, SPLIT, SHIFT, WIDE, 0, PIECE, VECTOR)
    store_fill(out_ptr, g.lines, g, TILES, SPLIT, SHIFT, FILL, WIDE, BLOCK_FILL)


@triton.jit  # type: ignore[untyped-decorator]
def split_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    parts_ptr,
    depth,
    channels,
    padded,
    pitch,
    strides,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """parts[d] = components[d] in bfloat16, parts[padded + d] = what that dropped; zero from `depth` on."""
    tiles_k = tl.cdiv(channels, BLOCK_K)
    for tile in range(tl.program_id(0), tl.cdiv(padded, BLOCK_D) * tiles_k, tl.num_programs(0)):
        d = (tile // tiles_k * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[:, None]
        k = (tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        at = components_ptr + d * strides[0] + k * strides[1]
        c = tl.load(at, mask=(d < depth) & (k < channels), other=0.0).to(tl.float32)
        high = c.to(tl.bfloat16)
        low = (c - high.to(tl.float32)).to(tl.bfloat16)
        mask = (d < padded) & (k < channels)
        tl.store(parts_ptr + d * pitch + k, high, mask=mask)
        tl.store(parts_ptr + (d + padded) * pitch + k, low, mask=mask)


def project(
    x: Tensor,
    components: Tensor | None,
    offset: Tensor,
    inv_scale: Tensor,
    levels: Tensor,
    out: Tensor,
    g: Geometry,
    fill: int,
    flags: dict[str, Any],
    sms: int | None,
) -> Tensor:
    """Launch the forward kernels; returns the clamp counter."""
    clamped = torch.zeros(1, dtype=torch.int32, device=x.device)
    flags = {"FILL": fill, "BLOCK_FILL": FILL_BLOCK, "VECTOR": g.alignment, "WIDE": g.wide, **flags}
    operands = (offset, inv_scale, levels, out, clamped, *x.shape)
    with device_of(x):
        if components is not None:
            _project(x, components, operands, g, flags, sms)
            return clamped
        block_m, block_n = pass_blocks(g.lines, g.length, flags)
        tiles = cdiv(g.lines, block_m) * cdiv(g.length, block_n)
        quantize_kernel[(programs(tiles, PASS_PER_SM, sms, x.device),)](
            x,
            *operands,
            by_line(x.stride(), flags),
            g,
            PIECE=piece(g, block_n),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            enable_fp_fusion=False,  # a fused multiply-add would round otherwise than the reference
            **flags,
        )
    return clamped


def _project(
    x: Tensor,
    components: Tensor,
    operands: tuple[Any, ...],
    g: Geometry,
    flags: dict[str, Any],
    sms: int | None,
) -> None:
    depth, channels = components.shape
    native = x.dtype == components.dtype and x.itemsize == 2 and not interpreted()
    parts = 1
    if x.dtype == torch.bfloat16 != components.dtype and not interpreted():
        native, parts = True, 2
    rows, columns = (channels, len(x)) if flags["CHANNEL_LINES"] else (len(x), channels)
    t = _project_tiles(rows, columns, depth, native)
    if parts == 2:
        components = _split(components, cdiv(depth, t.step) * t.step, sms)
    a, b = (components.t(), x.t()) if flags["CHANNEL_LINES"] else (x, components)
    a_tiles, a_access = access(a, t.m, t.step)
    b_tiles, b_access = access(b, t.step, t.n)
    tiles = cdiv(rows, t.m) * cdiv(g.length, t.n)
    project_quantize_kernel[(programs(tiles, t.per_sm, sms, x.device),)](
        a_tiles,
        b_tiles,
        *operands,
        channels,
        len(components),
        a.stride(),
        b.stride(),
        g,
        A=a_access,
        B=b_access,
        PRECISION="native" if native else "ieee" if interpreted() else "bf16x3",
        PARTS=parts,
        PIECE=piece(g, t.n),
        BLOCK_M=t.m,
        BLOCK_N=t.n,
        BLOCK_D=t.step,
        GROUP=t.group,
        SLICES=t.slices,
        FLATTEN=t.flatten,
        EDGES=bool(rows % t.m or columns % t.n) or columns < g.length,
        num_warps=t.warps,
        num_stages=t.stages,
        enable_fp_fusion=False,  # a fused multiply-add would round otherwise than the reference
        **flags,
    )


def _split(components: Tensor, padded: int, sms: int | None) -> Tensor:
    """The bfloat16 parts [2 * padded, K] of components [D, K]."""
    depth, channels = components.shape
    parts = torch.empty((2 * padded, cdiv(channels, 8) * 8), dtype=torch.bfloat16, device=components.device)
    tiles = cdiv(padded, 16) * cdiv(channels, 128)
    split_kernel[(programs(tiles, PASS_PER_SM, sms, components.device),)](
        components,
        parts,
        depth,
        channels,
        padded,
        parts.stride(0),
        components.stride(),
        BLOCK_D=16,
        BLOCK_K=128,
    )
    return parts[:, :channels]


def _project_tiles(rows: int, columns: int, depth: int, native: bool) -> Tiles:
    """Tiles of a [rows, depth] x [depth, columns] product of 16-bit or 32-bit operands."""
    if not native:
        return Tiles(side(rows, 128), side(columns, 64), side(depth, 32), stages=4, warps=4, per_sm=2)
    if rows * columns >= 128 * 256 * 100:
        return Tiles(128, 256, 64, stages=4, warps=8, slices=4)
    if min(rows, columns) <= 64:  # bound by memory: long steps
        m, n = side(rows, 64), side(columns, 64 if columns >= 8192 else 32)
        return Tiles(m, n, side(depth, 8192 // n), stages=3, warps=4, per_sm=2, flatten=False)
    return Tiles(side(rows, 64), side(columns, 128), side(depth, 64), stages=4, warps=4, per_sm=2)
