"""Codes to x: a pass that prepares a float16 GEMM and the GEMM, and the pass without components."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from sidelane.kernels._center import center_kernel, weigh_kernel
from sidelane.kernels._launch import cdiv, device_of
from sidelane.kernels._surface import Geometry, load_codes
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
    prefetch_channels,
    programs,
    side,
    slices,
    starts_early,
    store_tile,
    tile_of,
)

WEIGHTS = 2048  # that a program of the pass computes at a time
CODES = 4096  # that it centers
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
    PREFETCH: tl.constexpr,
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
        if PREFETCH:
            prefetch_channels(unit_ptr, n0 + tl.arange(0, BLOCK_N), depth)
            prefetch_channels(constant_ptr, n0 + tl.arange(0, BLOCK_N), depth)
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
    centered,
    weights,
    unit_ptr,
    constant_ptr,
    out,
    tokens,
    depth,
    rows_of_part,
    sharers,
    CENTERED: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`restore_kernel` of BLOCK_K channels at most.

    A program keeps what belongs to BLOCK_N features, whose tokens `sharers` programs share. EARLY: it may
    start before its operands are written.
    """
    if EARLY:
        cuda.gdc_wait()
    columns = tl.cdiv(depth, BLOCK_N)
    for share in range(tl.program_id(0), columns * sharers, tl.num_programs(0)):
        n0 = share % columns * BLOCK_N
        d = n0 + tl.arange(0, BLOCK_N)
        unit = load_channels(unit_ptr, d, depth, 1)
        constant = load_channels(constant_ptr, d, depth, 1)
        w = weights.load([n0, 0]).T
        if PARTS == 2:
            low = weights.load([rows_of_part + n0, 0]).T
        for m0 in range(share // columns * BLOCK_M, tokens, sharers * BLOCK_M):
            a = load_tile(centered, m0, 0, 0, 0, (0, 0), CENTERED, BLOCK_M, BLOCK_K)
            x = tl.dot(a, w)
            if PARTS == 2:
                x = tl.dot(a, low, x)
            store_tile(out, x * unit + constant, m0, n0, tokens, depth, OUT)


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


class Weights(NamedTuple):
    """What `restore_kernel` multiplies codes by and adds; see `_center._weigh_components`.

    `scaled` float16 [parts * rows of a part, K] for float16 results and bfloat16 (`parts` 1), or others (2);
    `unit` and `constant` float32 [D], the latter for codes less `middle`.
    """

    scaled: Tensor
    unit: Tensor
    constant: Tensor
    parts: int
    middle: int

    @property
    def rows_of_part(self) -> int:
        return len(self.scaled) // self.parts

    @property
    def blocks(self) -> dict[str, int]:
        """Rows and channels of a program that makes them."""
        block_k = side(self.scaled.shape[1], 1024)
        return {"BLOCK_D": min(16, WEIGHTS // block_k), "BLOCK_K": block_k}

    @classmethod
    def empty(cls, components: Tensor, bias: Tensor, parts: int, middle: int) -> Weights:
        depth, channels = components.shape
        shape = (parts * cdiv(depth, 16) * 16, cdiv(channels, 8) * 8)
        scaled = torch.empty(shape, dtype=torch.float16, device=components.device)[:, :channels]
        return cls(scaled, torch.empty_like(bias), torch.empty_like(bias), parts, middle)


def weigh(components: Tensor, scale: Tensor, bias: Tensor, parts: int, middle: int) -> Weights:
    """Launch the kernel that makes the weights alone."""
    out = Weights.empty(components, bias, parts, middle)
    with device_of(components):
        weigh_kernel[(out.rows_of_part // out.blocks["BLOCK_D"],)](
            components,
            scale,
            bias,
            scale,  # not read
            out.scaled,
            out.unit,
            out.constant,
            *components.shape,
            out.rows_of_part,
            out.scaled.stride(0),
            components.stride(),
            MIDDLE=middle,
            PARTS=parts,
            enable_fp_fusion=False,
            **out.blocks,
        )
    return out


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
    weights: Weights | None = None,
) -> Tensor:
    """Launch the inverse kernels; returns [tokens, D].

    `middle` is that of the codes where `levels` are not given, `parts` the float16 numbers for each weight.
    `weights`: of `weigh` for the other operands.
    """
    out = torch.empty((tokens, bias.numel()), dtype=dtype, device=codes.device)
    flags = {"VECTOR": g.alignment, "WIDE": g.wide, **flags}
    lines, length = by_line((tokens, scale.numel()), flags)
    if components is None:
        block_m, block_n = pass_blocks(lines, length, flags)
    else:
        block_n = side(length, 1024)
        # The low bits of split codes take registers of their own.
        block_m = min(CODES // (2 if flags["SPLIT"] else 1) // block_n, triton.next_power_of_2(lines))
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
        centered = torch.empty((lines, cdiv(length, 8) * 8), dtype=torch.float16, device=codes.device)
        if levels is None:
            levels = scale  # not read
        else:
            middle = 0
        made = weights or Weights.empty(components, bias, parts, middle)
        rows_to_weigh = 0 if weights else made.rows_of_part
        tiles += rows_to_weigh // made.blocks["BLOCK_D"]
        # Without a limit every tile is a program: that takes less time than sharing them.
        grid = tiles if sms is None else programs(tiles, PASS_PER_SM, sms, codes.device)
        center_kernel[(grid,)](
            codes,
            centered,
            components,
            scale,
            bias,
            levels,
            made.scaled,
            made.unit,
            made.constant,
            lines,
            length,
            *components.shape,
            rows_to_weigh,
            centered.stride(0),
            made.scaled.stride(0),
            components.stride(),
            g,
            MIDDLE=middle,
            PARTS=parts,
            EARLY=starts_early(),
            enable_fp_fusion=False,
            **made.blocks,
            **blocks,
            **flags,
        )
        a = centered[:, :length]
        a = a.t() if flags["CHANNEL_LINES"] else a
        operands = (a, made.scaled, made.unit, made.constant, out)
        if components.shape[1] <= NARROW:
            _restore_narrow(*operands, parts, sms)
        elif (hopper := _hopper()) is not None and hopper.runs_here(out, parts):
            hopper.restore_hopper(*operands, sms)
        else:
            _restore(*operands, parts, sms)
    return out


@cache
def _hopper() -> ModuleType | None:
    """`_restore_hopper` with a Triton that it was written for."""
    if not triton.__version__.startswith(("3.6.", "3.7.")):
        return None
    from sidelane.kernels import _restore_hopper

    return _restore_hopper


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
    rounds = cdiv(tiles, programs(tiles, t.per_sm, sms, out.device))
    # As few programs as end in as many rounds: then a round is a band of tiles more often.
    restore_kernel[(cdiv(tiles, rounds),)](
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
        PREFETCH=t.prefetch and not interpreted(),
        num_warps=t.warps,
        num_stages=t.stages,
        enable_fp_fusion=False,
    )


def _restore_narrow(
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
    out_tiles, out_access = access(out, t.m, t.n)
    columns = cdiv(depth, t.n)
    available = programs(cdiv(tokens, t.m) * columns, t.per_sm, sms, out.device)
    sharers = max(1, available // columns)
    early = starts_early()
    restore_narrow_kernel[(min(available, columns * sharers),)](
        a_tiles,
        b_tiles,
        unit,
        constant,
        out_tiles,
        tokens,
        depth,
        len(weights) // parts,
        sharers,
        CENTERED=a_access,
        OUT=out_access,
        PARTS=parts,
        BLOCK_M=t.m,
        BLOCK_N=t.n,
        BLOCK_K=t.step,
        EARLY=early,
        launch_pdl=early,
        num_warps=t.warps,
        num_stages=t.stages,
        enable_fp_fusion=False,
    )


def _restore_tiles(tokens: int, depth: int, channels: int, parts: int) -> Tiles:
    """Tiles of a product [tokens, channels] x [channels, depth]."""
    if channels <= NARROW:  # bound by what it stores
        return Tiles(side(tokens, 64), side(depth, 128), side(channels, NARROW), stages=3, warps=4, per_sm=3)
    if parts == 2:
        return Tiles(side(tokens, 128), side(depth, 128), 64, stages=3, warps=8)
    if tokens * depth >= 128 * 256 * 500 and channels > 768:
        return Tiles(128, 256, 64, stages=3, warps=8)
    # Two programs on a multiprocessor: one stores while the other multiplies.
    m, n = side(tokens, 128), side(depth, 128)
    return Tiles(m, n, 64, stages=3, warps=4, slices=4 if n == 128 else 1, per_sm=2, prefetch=True)
