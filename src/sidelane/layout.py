"""Where every code sits in a video surface: formats, pixel mappings, frame sizes. Standard library only.

A *surface* is `frames` consecutive frames, each a matrix of `rows` by `width` samples with a common pitch.
Every supported format stores its planes below each other with the same pitch (Y then interleaved UV for
4:2:0; Y, U, V for 4:4:4), so the whole surface is one tall matrix and a pixel mapping is a rule (token,
channel) -> position in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

MIN_SIDE = 144  # smallest frame side HEVC hardware decoders accept
MAX_SIDE = 8192


@dataclass(frozen=True)
class SurfaceFormat:
    """A sample layout: `bits` per code, `itemsize` bytes per sample, codes stored shifted left by `shift`."""

    name: str
    code: int  # number in packet headers
    bits: int
    itemsize: int
    subsampled: bool  # 4:2:0 with interleaved chroma, else three full planes
    split: bool = False  # high 8 bits in Y, low 4 bits two to a byte in UV

    @property
    def shift(self) -> int:
        return 0 if self.itemsize == 1 else 16 - self.bits

    @property
    def fill(self) -> int:
        """Code at positions that carry none: mid-grey, which costs an encoder least."""
        return 1 << (self.bits - 1)

    def rows(self, height: int) -> int:
        """Sample rows of one frame of luma height `height`, all planes together."""
        return height * 3 // 2 if self.subsampled else height * 3

    def code_rows(self, height: int) -> int:
        """Rows that hold one code per sample: all of them, but only luma in the split format."""
        return height if self.split else self.rows(height)


NV12 = SurfaceFormat("nv12", 1, bits=8, itemsize=1, subsampled=True)
P010 = SurfaceFormat("p010", 2, bits=10, itemsize=2, subsampled=True)
NV12_SPLIT12 = SurfaceFormat("nv12_split12", 3, bits=12, itemsize=1, subsampled=True, split=True)
YUV444 = SurfaceFormat("yuv444", 4, bits=8, itemsize=1, subsampled=False)
YUV444_10 = SurfaceFormat("yuv444_10", 5, bits=10, itemsize=2, subsampled=False)
# 12-bit samples: decoded by NVDEC and written by software encoders; no NVENC writes them.
P012 = SurfaceFormat("p012", 6, bits=12, itemsize=2, subsampled=True)
YUV444_12 = SurfaceFormat("yuv444_12", 7, bits=12, itemsize=2, subsampled=False)

FORMATS = {f.name: f for f in (NV12, P010, NV12_SPLIT12, YUV444, YUV444_10, P012, YUV444_12)}

TOKEN_ROWS = "token_rows"  # raster order of [T, K]: the channels of a token are neighbours in a row
CHANNEL_ROWS = "channel_rows"  # raster order of [K, T]: the tokens of a channel are neighbours in a row
CHANNEL_TILES = "channel_tiles"  # the tokens of a channel fill a near-square tile
MAPPINGS = {TOKEN_ROWS: 1, CHANNEL_ROWS: 2, CHANNEL_TILES: 3}  # name -> number in packet headers


@dataclass(frozen=True)
class SurfaceLayout:
    """Position of codes [T, K] in a surface.

    The code (t, k) has the linear position i in the matrix of code rows (`frames *
    format.code_rows(height)` rows of `width` samples):

    - token_rows:    i = t * stride + k
    - channel_rows:  i = k * stride + t
    - channel_tiles: i = ((k // across) * tile_h + t // tile_w) * width + (k % across) * tile_w + t % tile_w

    Row g = i // width, column x = i % width. In the split format the low nibble of position i sits in the
    UV plane of the same frame at byte j = p // 2 of its `width`-byte rows, p = i modulo the luma samples of
    a frame; even p in the low half of the byte. Both codes of such a byte belong to one token (token_rows)
    or one channel.
    """

    format: SurfaceFormat
    mapping: str
    tokens: int
    channels: int
    width: int  # samples per row, even
    height: int  # luma rows, even
    frames: int
    pitch: int  # bytes from row to row
    tile_w: int = 0  # channel_tiles only, even

    def __post_init__(self) -> None:
        if self.mapping not in MAPPINGS:
            raise ValueError(f"unknown mapping '{self.mapping}': use one of {', '.join(MAPPINGS)}")
        if self.width % 2 or self.height % 2 or self.width < 2 or self.height < 2:
            raise ValueError(f"surface {self.width}x{self.height}: both sides must be even and at least 2")
        if self.pitch < self.width * self.format.itemsize or self.pitch % self.format.itemsize:
            raise ValueError(
                f"pitch {self.pitch} does not hold {self.width} samples of {self.format.itemsize} bytes"
            )
        if self.mapping == CHANNEL_TILES and not (0 < self.tile_w <= self.width and self.tile_w % 2 == 0):
            raise ValueError(f"tile width {self.tile_w} must be even and within {self.width}")
        if min(self.tokens, self.channels, self.frames) < 1:
            raise ValueError(
                f"tokens {self.tokens}, channels {self.channels}, frames {self.frames}: at least 1 each"
            )
        if self.positions > self.capacity:
            raise ValueError(
                f"{self.positions} positions do not fit the {self.capacity} samples of the surface"
            )

    @property
    def stride(self) -> int:
        """Positions from one row of the mapping to the next, even so that no byte is shared between rows."""
        length = self.channels if self.mapping == TOKEN_ROWS else self.tokens
        return length + length % 2

    @property
    def across(self) -> int:
        """Tiles side by side in a row of tiles."""
        return self.width // self.tile_w if self.tile_w else 1

    @property
    def tile_h(self) -> int:
        return -(-self.tokens // self.tile_w) if self.tile_w else 1

    @property
    def positions(self) -> int:
        """Code positions in use, counted from the first, padding between rows or tiles included."""
        if self.mapping == TOKEN_ROWS:
            return self.tokens * self.stride
        if self.mapping == CHANNEL_ROWS:
            return self.channels * self.stride
        return -(-self.channels // self.across) * self.tile_h * self.width

    @property
    def capacity(self) -> int:
        return self.frames * self.format.code_rows(self.height) * self.width

    @property
    def rows(self) -> int:
        """Sample rows of the whole surface."""
        return self.frames * self.format.rows(self.height)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, pitch) of the surface as a uint8 tensor."""
        return self.rows, self.pitch

    @property
    def fill(self) -> int:
        return self.format.fill


def plan_surface(
    format: SurfaceFormat,
    mapping: str,
    tokens: int,
    channels: int,
    *,
    pitch_alignment: int = 256,
    max_side: int = 4096,
) -> SurfaceLayout:
    """Frame size for codes [tokens, channels]: rows of the mapping aligned with rows of the picture where
    they fit, frames near square, at least MIN_SIDE, at most `max_side` per side, as few as possible.

    Raises ValueError if an argument is out of range.
    """
    if not MIN_SIDE <= max_side <= MAX_SIDE:
        raise ValueError(f"max_side {max_side} is outside {MIN_SIDE}..{MAX_SIDE}")
    if mapping not in MAPPINGS:
        raise ValueError(f"unknown mapping '{mapping}': use one of {', '.join(MAPPINGS)}")
    if min(tokens, channels) < 1:
        raise ValueError(f"tokens {tokens}, channels {channels}: at least 1 each")
    if pitch_alignment < 1 or pitch_alignment % format.itemsize:
        raise ValueError(f"pitch_alignment {pitch_alignment} is not a positive multiple of {format.itemsize}")
    max_side -= max_side % 2
    tile_w = 0
    if mapping == CHANNEL_TILES:
        tile_w = min(-(-max(isqrt(tokens), 2) // 8) * 8, max_side)
        unit, count = tile_w, channels * -(-tokens // tile_w)  # rows of `unit` samples
    else:
        length, count = (channels, tokens) if mapping == TOKEN_ROWS else (tokens, channels)
        unit = length + length % 2
    # Near square in luma: width^2 ~ samples / code rows per luma row.
    luma = unit * count * 2 // (2 if format.split else 3 if format.subsampled else 6)
    width = min(max(isqrt(luma), MIN_SIDE), max_side)
    fitting = max_side // unit  # rows of the mapping side by side
    if fitting * unit < MIN_SIDE:
        width -= width % 2
    else:
        width = min(max(width // unit, -(-MIN_SIDE // unit)), fitting) * unit
    probe = SurfaceLayout(
        format, mapping, tokens, channels, width, MAX_SIDE, 1 << 40, width * format.itemsize, tile_w
    )
    code_rows = -(-probe.positions // width)
    frames = -(-code_rows // format.code_rows(max_side))
    per_frame = -(-code_rows // frames)
    height = MIN_SIDE
    while format.code_rows(height) < per_frame:
        height = max(height + 2, per_frame * height // format.code_rows(height) // 2 * 2)
    pitch = -(-width * format.itemsize // pitch_alignment) * pitch_alignment
    return SurfaceLayout(format, mapping, tokens, channels, width, height, frames, pitch, tile_w)
