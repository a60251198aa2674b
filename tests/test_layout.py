"""The documented positions of SurfaceLayout, the reference against them, and the frames of plan_surface."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidelane.kernels.reference import pack_surface_ref, unpack_surface_ref
from sidelane.layout import (
    CHANNEL_ROWS,
    CHANNEL_TILES,
    FORMATS,
    MAPPINGS,
    MAX_SIDE,
    MIN_SIDE,
    NV12,
    NV12_SPLIT12,
    P010,
    TOKEN_ROWS,
    SurfaceFormat,
    SurfaceLayout,
    plan_surface,
)

SENTINEL = 0xA5
formats = st.sampled_from(list(FORMATS.values()))
mappings = st.sampled_from(list(MAPPINGS))


@st.composite
def layouts(draw: st.DrawFn) -> SurfaceLayout:
    """Small surfaces of every kind: any width, several frames, room to spare, wide pitch."""
    fmt, mapping = draw(formats), draw(mappings)
    tokens, channels = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    width, height = 2 * draw(st.integers(1, 16)), 2 * draw(st.integers(1, 16))
    tile_w = 2 * draw(st.integers(1, width // 2)) if mapping == CHANNEL_TILES else 0
    pitch = (width + draw(st.integers(0, 5))) * fmt.itemsize
    roomy = SurfaceLayout(fmt, mapping, tokens, channels, width, height, 10**6, pitch, tile_w)
    frames = -(-roomy.positions // (fmt.code_rows(height) * width)) + draw(st.integers(0, 1))
    return replace(roomy, frames=frames)


def positions(layout: SurfaceLayout) -> Tensor:
    """Linear position of every code [T, K], by the formulas in the docstring of SurfaceLayout."""
    t = torch.arange(layout.tokens)[:, None]
    k = torch.arange(layout.channels)[None, :]
    if layout.mapping == TOKEN_ROWS:
        return t * layout.stride + k
    if layout.mapping == CHANNEL_ROWS:
        return k * layout.stride + t
    row = (k // layout.across) * layout.tile_h + t // layout.tile_w
    return row * layout.width + (k % layout.across) * layout.tile_w + t % layout.tile_w


def byte_offsets(layout: SurfaceLayout, i: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of the surface that hold linear positions `i`: the first of the sample, and the low nibble's."""
    fmt = layout.format
    row, x = i // layout.width, i % layout.width
    if not fmt.split:
        return row * layout.pitch + x * fmt.itemsize, torch.zeros_like(i)
    frame, p = i // (layout.width * layout.height), i % (layout.width * layout.height)
    top = frame * fmt.rows(layout.height)
    luma = (top + p // layout.width) * layout.pitch + p % layout.width
    j = p // 2
    chroma = (top + layout.height + j // layout.width) * layout.pitch + j % layout.width
    return luma, chroma


def read_codes(surface: Tensor, layout: SurfaceLayout, i: Tensor) -> Tensor:
    """Codes at linear positions `i`."""
    fmt, data = layout.format, surface.reshape(-1).to(torch.int64)
    sample, nibble = byte_offsets(layout, i)
    if fmt.split:
        return data[sample] << 4 | (data[nibble] >> (i % 2 * 4) & 15)
    if fmt.itemsize == 1:
        return data[sample]
    return (data[sample] | data[sample + 1] << 8) >> fmt.shift


def random_codes(layout: SurfaceLayout) -> Tensor:
    return torch.randint(0, 2**layout.format.bits, (layout.tokens, layout.channels)).to(torch.int16)


@settings(deadline=None, max_examples=150)
@given(layouts())
def test_positions_are_distinct_and_in_use(layout: SurfaceLayout) -> None:
    i = positions(layout)
    assert i.unique().numel() == layout.tokens * layout.channels
    assert i.min() >= 0 and i.max() < layout.positions <= layout.capacity


@settings(deadline=None, max_examples=150)
@given(layouts())
def test_pack_writes_codes_where_documented(layout: SurfaceLayout) -> None:
    codes = random_codes(layout)
    surface = torch.full(layout.shape, SENTINEL, dtype=torch.uint8)
    pack_surface_ref(codes, surface, layout)
    i = positions(layout)
    assert torch.equal(read_codes(surface, layout, i), codes.long())
    unused = torch.ones(layout.capacity, dtype=torch.bool)
    unused[i.reshape(-1)] = False
    rest = read_codes(surface, layout, torch.arange(layout.capacity)[unused])
    assert torch.equal(rest, torch.full_like(rest, layout.fill))
    assert (surface[:, layout.width * layout.format.itemsize :] == SENTINEL).all()


@settings(deadline=None, max_examples=150)
@given(layouts())
def test_unpack_reads_codes_where_documented(layout: SurfaceLayout) -> None:
    surface = torch.randint(0, 256, layout.shape, dtype=torch.uint8)
    codes = unpack_surface_ref(surface, layout)
    assert codes.dtype == torch.int16 and codes.is_contiguous()
    assert torch.equal(codes.long(), read_codes(surface, layout, positions(layout)))


@settings(deadline=None, max_examples=150)
@given(layouts())
def test_neighbours_share_no_byte_across_lines(layout: SurfaceLayout) -> None:
    layout = replace(layout, format=NV12_SPLIT12, frames=3 * layout.frames, pitch=2 * layout.pitch)
    _, nibble = byte_offsets(layout, positions(layout))
    line = (
        torch.arange(layout.tokens)[:, None]
        if layout.mapping == TOKEN_ROWS
        else torch.arange(layout.channels)
    )
    owners = torch.stack((nibble.reshape(-1), line.expand_as(nibble).reshape(-1)), dim=1).unique(dim=0)
    assert owners.shape[0] == nibble.unique().numel()


def test_split_nibbles_by_hand() -> None:
    """Two frames of 4x2 luma: positions 0..7 in the first, 8..15 in the second, one chroma row each."""
    layout = SurfaceLayout(NV12_SPLIT12, TOKEN_ROWS, 2, 5, width=4, height=2, frames=2, pitch=6)
    codes = torch.tensor([[0x123, 0x456, 0x789, 0xABC, 0xDEF], [0x321, 0x654, 0x987, 0xCBA, 0xFED]])
    surface = torch.zeros(layout.shape, dtype=torch.uint8)
    pack_surface_ref(codes.to(torch.int16), surface, layout)
    assert surface.tolist() == [
        [0x12, 0x45, 0x78, 0xAB, 0, 0],
        [0xDE, 0x80, 0x32, 0x65, 0, 0],
        [0x63, 0xC9, 0x0F, 0x41, 0, 0],
        [0x98, 0xCB, 0xFE, 0x80, 0, 0],
        [0x80, 0x80, 0x80, 0x80, 0, 0],
        [0xA7, 0x0D, 0x00, 0x00, 0, 0],
    ]


@settings(deadline=None, max_examples=300)
@given(
    formats,
    mappings,
    st.integers(1, 20_000),
    st.integers(1, 5_000),
    st.integers(MIN_SIDE, MAX_SIDE),
    st.sampled_from([2, 64, 256, 512]),
)
def test_planned_surface_is_valid_and_small(
    fmt: SurfaceFormat, mapping: str, tokens: int, channels: int, max_side: int, alignment: int
) -> None:
    layout = plan_surface(fmt, mapping, tokens, channels, pitch_alignment=alignment, max_side=max_side)
    assert layout.width % 2 == 0 and layout.height % 2 == 0
    assert MIN_SIDE <= layout.width <= max_side and MIN_SIDE <= layout.height <= max_side
    assert layout.positions <= layout.capacity
    assert layout.pitch % alignment == 0
    assert 0 <= layout.pitch - layout.width * fmt.itemsize < alignment
    even = max_side // 2 * 2
    assert layout.positions > (layout.frames - 1) * fmt.code_rows(even) * layout.width
    # No shorter frame holds the codes.
    if layout.height > MIN_SIDE:
        assert layout.positions > layout.frames * fmt.code_rows(layout.height - 2) * layout.width
    unit = layout.tile_w if mapping == CHANNEL_TILES else layout.stride
    if max_side // unit * unit >= MIN_SIDE:
        assert layout.width % unit == 0


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(("tokens", "channels"), [(16384, 256), (256, 16384), (1000, 999), (100_000, 1)])
def test_planned_frame_is_near_square(mapping: str, tokens: int, channels: int) -> None:
    layout = plan_surface(NV12, mapping, tokens, channels)
    assert layout.frames == 1
    assert 0.6 < layout.width / layout.height < 1.7


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mapping": "diagonal"}, "unknown mapping 'diagonal'"),
        ({"width": 15}, "must be even"),
        ({"height": 7}, "must be even"),
        ({"width": 0}, "at least 2"),
        ({"pitch": 31}, "does not hold 16 samples"),
        ({"pitch": 33}, "does not hold 16 samples"),
        ({"mapping": CHANNEL_TILES, "tile_w": 0}, "tile width 0"),
        ({"mapping": CHANNEL_TILES, "tile_w": 3}, "tile width 3"),
        ({"mapping": CHANNEL_TILES, "tile_w": 18}, "tile width 18"),
        ({"tokens": 0}, "at least 1 each"),
        ({"channels": 0}, "at least 1 each"),
        ({"frames": 0}, "at least 1 each"),
        ({"tokens": 13}, "do not fit"),
    ],
)
def test_layout_refuses(change: dict[str, Any], text: str) -> None:
    layout = SurfaceLayout(P010, TOKEN_ROWS, 12, 16, width=16, height=8, frames=1, pitch=32)
    with pytest.raises(ValueError, match=text):
        replace(layout, **change)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mapping": "diagonal"}, "unknown mapping 'diagonal'"),
        ({"max_side": MIN_SIDE - 1}, "max_side 143"),
        ({"max_side": MAX_SIDE + 1}, "max_side 8193"),
        ({"tokens": 0}, "tokens 0"),
        ({"channels": 0}, "channels 0"),
        ({"pitch_alignment": 0}, "pitch_alignment 0"),
        ({"pitch_alignment": 3}, "pitch_alignment 3"),
    ],
)
def test_plan_refuses(options: dict[str, Any], text: str) -> None:
    good: dict[str, Any] = {"format": P010, "mapping": TOKEN_ROWS, "tokens": 8, "channels": 8}
    with pytest.raises(ValueError, match=text):
        plan_surface(**(good | options))
