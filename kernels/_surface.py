"""Device code shared by the surface kernels: positions in a surface, access to samples.

A *line* is a token for token_rows and a channel for the other mappings; *along* counts within it. Plain codes
[T, K] are token_rows of width K.
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

    @property
    def run(self) -> int:
        """Samples of a line from one break to the next: a row of its tile, or of the picture."""
        return self.tile_w or self.width

    @property
    def wide(self) -> bool:
        """Whether counting positions, up to a block past the end, takes 64 bits."""
        return self.capacity >= 2**31 - 2**16

    @property
    def alignment(self) -> int:
        """Power of two up to 16 that every run starts and ends at, in the surface and within its line."""
        sizes = self.stride | self.width | self.pitch | self.tile_w | 16
        return sizes & -sizes


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
def _offsets(  # type: ignore[no-untyped-def]
    line,
    first,
    g,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    CHROMA: tl.constexpr,
    WIDE: tl.constexpr,
    AT: tl.constexpr,
    LENGTH: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Offsets of LENGTH samples of each line from index first + AT on, or of their low nibbles (CHROMA).

    int64 [lines, pieces, samples or nibbles of a piece]. A piece starts at a multiple of PIECE after `first`
    and is not longer than a run, so it breaks once at most. VECTOR samples are neighbours and aligned. WIDE:
    positions need 64 bits.
    """
    SAMPLES: tl.constexpr = min(LENGTH, PIECE)
    along = first + AT // PIECE * PIECE + PIECE * tl.arange(0, LENGTH // SAMPLES)[None, :]
    line = line[:, None]
    if TILES:
        row = line // g.across * g.tile_h + along // g.tile_w
        start = line % g.across * g.tile_w
        column = start + along % g.tile_w
        left = g.tile_w - along % g.tile_w
    else:
        # 32-bit unsigned division takes a tenth of the instructions of a 64-bit one.
        position = line.to(tl.int64 if WIDE else tl.uint32) * g.stride + along
        width = tl.cast(g.width, position.dtype)
        above = position // width
        row = above.to(tl.int32)
        column = (position - above * width).to(tl.int32)
        left = g.width - column
        start = tl.zeros_like(column)
    SHARE: tl.constexpr = 2 if CHROMA else 1  # samples to one offset
    if CHROMA:
        here = _chroma_offset(row, column, g)
        after = _chroma_offset(row + 1, start, g) - left // 2
    else:
        here = _luma_offset(row, column, g, SPLIT)
        after = _luma_offset(row + 1, start, g, SPLIT) - left
    j = AT % PIECE // SHARE + tl.arange(0, SAMPLES // SHARE)[None, None, :]
    offsets = tl.where(j < left[:, :, None] // SHARE, here[:, :, None], after[:, :, None]) + j
    NEIGHBOURS: tl.constexpr = max(VECTOR // SHARE, 1)
    return tl.multiple_of(tl.max_contiguous(offsets, (1, 1, NEIGHBOURS)), (1, 1, NEIGHBOURS))


@triton.jit  # type: ignore[untyped-decorator]
def _in_surface(  # type: ignore[no-untyped-def]
    line,
    first,
    g,
    SHARE: tl.constexpr,
    AT: tl.constexpr,
    LENGTH: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Mask of the offsets of `_offsets`: those within lines and length of `g`."""
    SAMPLES: tl.constexpr = min(LENGTH, PIECE)
    NEIGHBOURS: tl.constexpr = max(VECTOR // SHARE, 1)
    along = first + AT + PIECE * tl.arange(0, LENGTH // SAMPLES)[None, :, None]
    # One mask for each vector, in a form that the compiler sees.
    j = tl.arange(0, SAMPLES // SHARE) // NEIGHBOURS * (NEIGHBOURS * SHARE)
    return (line < g.lines)[:, None, None] & (along + j[None, None, :] < g.length)


@triton.jit  # type: ignore[untyped-decorator]
def store_codes(  # type: ignore[no-untyped-def]
    out_ptr,
    codes,
    line,
    first,
    g,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDE: tl.constexpr,
    AT: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write codes int32 [lines, length] of lines `line` from index first + AT on, clipped to `g`."""
    LINES: tl.constexpr = codes.shape[0]
    LENGTH: tl.constexpr = codes.shape[1]
    SAMPLES: tl.constexpr = min(LENGTH, PIECE)
    samples = (codes >> 4 if SPLIT else codes << SHIFT).to(out_ptr.dtype.element_ty)
    samples = tl.reshape(samples, (LINES, LENGTH // SAMPLES, SAMPLES))
    offsets = _offsets(line, first, g, TILES, SPLIT, False, WIDE, AT, LENGTH, PIECE, VECTOR)
    tl.store(
        out_ptr + offsets,
        samples,
        mask=_in_surface(line, first, g, 1, AT, LENGTH, PIECE, VECTOR),
    )
    if SPLIT:
        low = tl.reshape((codes & 15).to(tl.uint8), (LINES, LENGTH // SAMPLES, SAMPLES // 2, 2))
        even, odd = tl.split(low)
        offsets = _offsets(line, first, g, TILES, SPLIT, True, WIDE, AT, LENGTH, PIECE, VECTOR)
        mask = _in_surface(line, first, g, 2, AT, LENGTH, PIECE, VECTOR)
        tl.store(out_ptr + offsets, even | odd << 4, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def load_codes(  # type: ignore[no-untyped-def]
    codes_ptr,
    line,
    first,
    g,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDE: tl.constexpr,
    LENGTH: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Codes int32 [lines, LENGTH] of lines `line` from index `first` on; 0 outside `g`."""
    LINES: tl.constexpr = line.shape[0]
    offsets = _offsets(line, first, g, TILES, SPLIT, False, WIDE, 0, LENGTH, PIECE, VECTOR)
    mask = _in_surface(line, first, g, 1, 0, LENGTH, PIECE, VECTOR)
    codes = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    if SPLIT:
        offsets = _offsets(line, first, g, TILES, SPLIT, True, WIDE, 0, LENGTH, PIECE, VECTOR)
        mask = _in_surface(line, first, g, 2, 0, LENGTH, PIECE, VECTOR)
        low = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
        codes = codes << 4 | tl.reshape(tl.join(low & 15, low >> 4), codes.shape)
    elif SHIFT:
        codes = (codes & 0xFFFF) >> SHIFT
    return tl.reshape(codes, (LINES, LENGTH))


@triton.jit  # type: ignore[untyped-decorator]
def store_fill(  # type: ignore[no-untyped-def]
    out_ptr,
    lines,
    g,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    FILL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write FILL to the positions right of the tiles, behind the last, and of lines from `lines` on.

    All programs share them, the last first: those have less to do where other work is not shared evenly.
    """
    margin = tl.maximum(g.margin, 1)
    unused = g.beside + g.capacity - g.positions
    blocks = tl.cdiv(unused, BLOCK)
    if TILES:
        rest = tl.maximum(g.lines - lines, 0) * tl.cast(g.length, tl.int64 if WIDE else tl.int32)
        blocks = tl.cdiv(unused + rest, BLOCK).to(tl.int32)
    turn = tl.num_programs(0) - 1 - tl.program_id(0)
    for block in range(turn, blocks, tl.num_programs(0)):
        index = tl.cast(block, tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
        beside = index // margin * g.width + g.width - g.margin + index % margin
        i = tl.where(index < g.beside, beside, g.positions + index - g.beside)
        if TILES:
            line, along = lines + (index - unused) // g.length, (index - unused) % g.length
            row = line // g.across * g.tile_h + along // g.tile_w
            column = line % g.across * g.tile_w + along % g.tile_w
            padding = tl.where(line < g.lines, row * g.width + column, g.capacity)
            i = tl.where(index < unused, i, padding)
        row = (i // g.width).to(tl.int32)
        column = (i % g.width).to(tl.int32)
        mask = i < g.capacity
        luma = out_ptr + _luma_offset(row, column, g, SPLIT)
        tl.store(luma, FILL >> 4 if SPLIT else FILL << SHIFT, mask=mask)
        if SPLIT:
            chroma = out_ptr + _chroma_offset(row, column, g)
            tl.store(chroma, (FILL & 15) * 17, mask=mask & (column % 2 == 0))
