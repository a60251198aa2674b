"""Device code of surface.py: fused GEMM, quantization and surface access.

Both directions share `_position`, the formula of `SurfaceLayout`. A *line* is a token for token_rows and a
channel for the other mappings; *along* counts within it. Plain codes [T, K] are token_rows of width K.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sidelane.kernels._launch import cdiv
from sidelane.layout import CHANNEL_TILES, SurfaceLayout


class Geometry(NamedTuple):
    """The numbers of a `SurfaceLayout` that kernels need; pitch in samples."""

    stride: int
    width: int
    height: int
    pitch: int
    across: int
    tile_w: int
    tile_h: int
    lines: int  # with the padding of the last row of tiles
    length: int  # of a line, with padding
    positions: int
    capacity: int
    margin: int  # columns to the right of the tiles
    beside: int  # positions in that margin

    @classmethod
    def of(cls, layout: SurfaceLayout) -> Geometry:
        tiles = layout.mapping == CHANNEL_TILES
        bands = cdiv(layout.channels, layout.across)
        margin = layout.width - layout.across * layout.tile_w if tiles else 0
        return cls(
            stride=layout.stride,
            width=layout.width,
            height=layout.height,
            pitch=layout.pitch // layout.format.itemsize,
            across=layout.across,
            tile_w=layout.tile_w,
            tile_h=layout.tile_h,
            lines=bands * layout.across if tiles else layout.positions // layout.stride,
            length=layout.tile_h * layout.tile_w if tiles else layout.stride,
            positions=layout.positions,
            capacity=layout.capacity,
            margin=margin,
            beside=margin * bands * layout.tile_h,
        )

    @classmethod
    def plain(cls, tokens: int, channels: int) -> Geometry:
        """Of contiguous codes [tokens, channels]."""
        n = tokens * channels
        return cls(channels, channels, tokens, channels, 1, 0, 1, tokens, channels, n, n, 0, 0)

    @property
    def unused(self) -> int:
        """Positions outside all lines: right of the tiles and behind the last."""
        return self.beside + self.capacity - self.positions


@triton.jit  # type: ignore[untyped-decorator]
def _tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of tile `pid`, column by column within bands of GROUP rows: operands stay in L2."""
    per_band = GROUP * tiles_n
    first = pid // per_band * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + pid % per_band % rows, pid % per_band // rows


@triton.jit  # type: ignore[untyped-decorator]
def _position(line, along, g, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of codes in the matrix of code rows, int32.

    Tiles: row = line // across * tile_h + along // tile_w, column = line % across * tile_w + along % tile_w.
    Rows: quotient and remainder of line * stride + along by width, with one 64-bit division per line.
    """
    if TILES:
        row = line // g.across * g.tile_h + along // g.tile_w
        column = line % g.across * g.tile_w + along % g.tile_w
    else:
        start = line.to(tl.int64) * g.stride
        above = start // g.width
        shifted = (start - above * g.width).to(tl.int32) + along
        row = above.to(tl.int32) + shifted // g.width
        column = shifted % g.width
    return row, column


@triton.jit  # type: ignore[untyped-decorator]
def _luma_offset(row, column, g, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sample (row, column); a frame of the split format has height / 2 chroma rows after its luma rows."""
    if SPLIT:
        row += row // g.height * (g.height // 2)
    return row.to(tl.int64) * g.pitch + column


@triton.jit
def _chroma_offset(row, column, g):  # type: ignore[no-untyped-def]
    """Byte of the low nibble in the split format: two luma rows share one chroma row."""
    y = row % g.height
    row = row // g.height * (g.height // 2 * 3) + g.height + y // 2
    return row.to(tl.int64) * g.pitch + (y % 2 * g.width + column) // 2


@triton.jit  # type: ignore[untyped-decorator]
def _store_codes(  # type: ignore[no-untyped-def]
    out_ptr,
    codes,
    line,
    first,
    g,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Write codes int32 [LINES, LENGTH] of lines `line` from the even index `first` on, clipped to `g`."""
    line = line[:, None]
    along = first + tl.arange(0, LENGTH)[None, :]
    row, column = _position(line, along, g, TILES)
    luma = out_ptr + _luma_offset(row, column, g, SPLIT)
    samples = codes >> 4 if SPLIT else codes << SHIFT
    tl.store(luma, samples.to(out_ptr.dtype.element_ty), mask=(line < g.lines) & (along < g.length))
    if SPLIT:
        even, odd = tl.split(tl.reshape(codes & 15, (LINES, LENGTH // 2, 2)))
        along = first + 2 * tl.arange(0, LENGTH // 2)[None, :]
        row, column = _position(line, along, g, TILES)
        chroma = out_ptr + _chroma_offset(row, column, g)
        tl.store(chroma, (even | odd << 4).to(tl.uint8), mask=(line < g.lines) & (along < g.length))


@triton.jit  # type: ignore[untyped-decorator]
def _store_fill(out_ptr, index, g, SPLIT: tl.constexpr, SHIFT: tl.constexpr, FILL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write FILL to unused positions; `index` int64 counts those right of the tiles, then those behind."""
    margin = tl.maximum(g.margin, 1)
    beside = index // margin * g.width + g.width - g.margin + index % margin
    i = tl.where(index < g.beside, beside, g.positions + index - g.beside)
    row = (i // g.width).to(tl.int32)
    column = (i % g.width).to(tl.int32)
    mask = i < g.capacity
    luma = out_ptr + _luma_offset(row, column, g, SPLIT)
    tl.store(luma, FILL >> 4 if SPLIT else FILL << SHIFT, mask=mask)
    if SPLIT:
        tl.store(out_ptr + _chroma_offset(row, column, g), (FILL & 15) * 17, mask=mask & (column % 2 == 0))


@triton.jit  # type: ignore[untyped-decorator]
def _load_codes(  # type: ignore[no-untyped-def]
    codes_ptr,
    t,
    k,
    tokens,
    channels,
    g,
    CHANNEL_LINES: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Codes of tokens `t` and channels `k`, int32 [t, k]; 0 outside."""
    t, k = t[:, None], k[None, :]
    mask = (t < tokens) & (k < channels)
    if CHANNEL_LINES:
        row, column = _position(k, t, g, TILES)
    else:
        row, column = _position(t, k, g, TILES)
    codes = tl.load(codes_ptr + _luma_offset(row, column, g, SPLIT), mask=mask, other=0).to(tl.int32)
    if SPLIT:
        nibbles = tl.load(codes_ptr + _chroma_offset(row, column, g), mask=mask, other=0).to(tl.int32)
        codes = codes << 4 | ((nibbles >> (column % 2 * 4)) & 15)
    elif SHIFT:
        codes = (codes & 0xFFFF) >> SHIFT
    return codes


@triton.jit  # type: ignore[untyped-decorator]
def project_quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    components_ptr,
    offset_ptr,
    inv_scale_ptr,
    levels_ptr,
    out_ptr,
    clamped_ptr,
    tokens,
    depth,
    channels,
    x_strides,
    components_strides,
    g,
    PROJECT: tl.constexpr,
    NATIVE: tl.constexpr,
    CHANNEL_LINES: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    FILL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_FILL: tl.constexpr,
):
    """code = clamp(floor((z - offset) * inv_scale + 0.5), 0, levels) of z = x @ components or z = x.

    Tiles [BLOCK_T, BLOCK_K] cover all lines with their padding, which gets FILL; the programs after them
    write FILL to BLOCK_FILL unused positions each. Adds the number of codes clamped to clamped[0]. NATIVE
    multiplies in the 16-bit dtype that both operands share, else in float32; sums are float32.
    """
    pid = tl.program_id(0)
    tiles_t = tl.cdiv(g.length if CHANNEL_LINES else g.lines, BLOCK_T)
    tiles_k = tl.cdiv(g.lines if CHANNEL_LINES else g.length, BLOCK_K)
    if pid >= tiles_t * tiles_k:
        index = (pid - tiles_t * tiles_k).to(tl.int64) * BLOCK_FILL + tl.arange(0, BLOCK_FILL)
        _store_fill(out_ptr, index, g, SPLIT, SHIFT, FILL)
    else:
        tile_t, tile_k = _tile(pid, tiles_t, tiles_k, 8)
        t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
        k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        in_t = t < tokens
        in_k = k < channels
        inside = in_t[:, None] & in_k[None, :]
        x_rows = x_ptr + t.to(tl.int64)[:, None] * x_strides[0]
        if PROJECT:
            columns = components_ptr + k.to(tl.int64)[None, :] * components_strides[1]
            z = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
            for d0 in range(0, depth, BLOCK_D):
                d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
                in_d = d < depth
                x_cells = x_rows + d[None, :] * x_strides[1]
                cells = columns + d[:, None] * components_strides[0]
                a = tl.load(x_cells, mask=in_t[:, None] & in_d[None, :], other=0.0)
                b = tl.load(cells, mask=in_d[:, None] & in_k[None, :], other=0.0)
                if NATIVE:
                    z = tl.dot(a, b, z)
                else:
                    z = tl.dot(a.to(tl.float32), b.to(tl.float32), z, input_precision="ieee")
        else:
            z = tl.load(x_rows + k.to(tl.int64)[None, :] * x_strides[1], mask=inside, other=0.0).to(
                tl.float32
            )
        offset = tl.load(offset_ptr + k, mask=in_k, other=0.0)[None, :]
        inv_scale = tl.load(inv_scale_ptr + k, mask=in_k, other=0.0)[None, :]
        levels = tl.load(levels_ptr + k, mask=in_k, other=0.0)[None, :]
        rounded = tl.floor((z - offset) * inv_scale + 0.5)
        clamped = tl.minimum(tl.maximum(rounded, 0.0), levels)
        changed = tl.sum((inside & (clamped != rounded)).to(tl.int32))
        tl.atomic_add(clamped_ptr, changed, sem="relaxed")
        codes = tl.where(inside, clamped.to(tl.int32), FILL)
        if CHANNEL_LINES:
            codes = tl.trans(codes)
            _store_codes(out_ptr, codes, k, tile_t * BLOCK_T, g, TILES, SPLIT, SHIFT, BLOCK_K, BLOCK_T)
        else:
            _store_codes(out_ptr, codes, t, tile_k * BLOCK_K, g, TILES, SPLIT, SHIFT, BLOCK_T, BLOCK_K)


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_project_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,
    components_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    depth,
    channels,
    components_strides,
    g,
    PROJECT: tl.constexpr,
    NATIVE: tl.constexpr,
    CHANNEL_LINES: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = (code * scale) @ components^T + bias, or code * scale + bias, contiguous [tokens, depth].

    A program makes one tile [BLOCK_T, BLOCK_D]. NATIVE multiplies in bfloat16, the dtype of the components.
    """
    tile_t, tile_d = _tile(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.cdiv(depth, BLOCK_D), 8)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < depth
    if PROJECT:
        rows = components_ptr + d.to(tl.int64)[None, :] * components_strides[0]
        x = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for k0 in range(0, channels, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            in_k = k < channels
            codes = _load_codes(codes_ptr, t, k, tokens, channels, g, CHANNEL_LINES, TILES, SPLIT, SHIFT)
            z = codes.to(tl.float32) * tl.load(scale_ptr + k, mask=in_k, other=0.0)[None, :]
            cells = rows + k.to(tl.int64)[:, None] * components_strides[1]
            b = tl.load(cells, mask=in_k[:, None] & in_d[None, :], other=0.0)
            # A coefficient has 12 bits of code times 24 of scale: rounding it to bfloat16 or TF32 would lose
            # more than the quantizer did. Two bfloat16 parts keep 17 bits, three TF32 products 21.
            if NATIVE:
                high = z.to(tl.bfloat16)
                x = tl.dot(high, b, x)
                x = tl.dot((z - high.to(tl.float32)).to(tl.bfloat16), b, x)
            else:
                x = tl.dot(z, b.to(tl.float32), x, input_precision="tf32x3")
    else:
        codes = _load_codes(codes_ptr, t, d, tokens, channels, g, CHANNEL_LINES, TILES, SPLIT, SHIFT)
        x = codes.to(tl.float32) * tl.load(scale_ptr + d, mask=in_d, other=0.0)[None, :]
    x += tl.load(bias_ptr + d, mask=in_d, other=0.0)[None, :]
    cells = out_ptr + t.to(tl.int64)[:, None] * depth + d[None, :]
    tl.store(cells, x.to(out_ptr.dtype.element_ty), mask=(t < tokens)[:, None] & in_d[None, :])
