"""Toy HEVC for a stand-in decoder: NAL units with start codes, in which raw frames travel as slices."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from sidelane.layout import TOKEN_ROWS, SurfaceFormat, SurfaceLayout

START = b"\x00\x00\x01"
VPS, _SEI, SLICE = b"\x40\x01", b"\x4e\x01", b"\x26\x01"  # headers of NAL units
SEQUENCE = struct.Struct("<HHBBH")  # width, height, chroma, bits, cut: in place of parameter sets
_COUNTED = struct.Struct("<BI")  # status and number of bytes that follow
GOOD, DAMAGED = 2, 8  # cuvidDecodeStatus


def toy_stream(
    frames: list[bytes],
    layout: SurfaceLayout,
    *,
    width: int | None = None,
    bits: int | None = None,
    chroma: int | None = None,
    damaged: int | None = None,
    cut: int = 0,
    slices: int = 1,
    sei: int | None = None,
    long: bool = True,
) -> bytes:
    """A stream of raw frames, each `layout.format.rows(height)` rows of `width` samples without pitch.

    Frame number `damaged` is reported so; `cut` samples more than needed are coded to the right; frames come
    in `slices`; before number `sei` there is a unit more; `long`: frames have start codes of four bytes.
    """
    fmt = layout.format
    sequence = SEQUENCE.pack(
        width or layout.width,
        layout.height,
        chroma or (1 if fmt.subsampled else 3),
        bits or (8 if fmt.itemsize == 1 else fmt.bits),
        cut,
    )
    stream = b""
    for number, frame in enumerate(frames):
        step = -(-len(frame) // slices)
        parts = [frame[at : at + step] for at in range(0, max(len(frame), 1), step or 1)]
        status = DAMAGED if number == damaged else GOOD
        units = [_unit(VPS, sequence)]
        units += [_unit(_SEI, b"toy")] * (number == sei)
        units += [_unit(SLICE, _COUNTED.pack(status, len(part)) + part) for part in parts]
        stream += b"\x00" * long + b"".join(units)
    return stream


def _unit(header: bytes, payload: bytes) -> bytes:
    """A NAL unit: no start code inside, no zero at the end."""
    return START + header + payload.replace(b"\x00\x00", b"\x00\x00\x03") + b"\x80"


def payload_of(unit: bytes) -> bytes:
    """What `_unit` packed, from behind the start code."""
    return unit[2:].rstrip(b"\x00")[:-1].replace(b"\x00\x00\x03", b"\x00\x00")


def picture_of(data: bytes) -> bytes:
    """A status byte and the samples of a coded picture."""
    status, samples = GOOD, b""
    for unit in data.split(START)[1:]:
        payload = payload_of(unit)
        if len(payload) < _COUNTED.size:
            return bytes([DAMAGED])
        found, size = _COUNTED.unpack_from(payload)
        status = max(status, found, DAMAGED if size != len(payload) - _COUNTED.size else GOOD)
        samples += payload[_COUNTED.size :]
    return bytes([status]) + samples


def layout_of(
    format: SurfaceFormat, width: int = 160, height: int = 144, frames: int = 1, pitch: int = 1024
) -> SurfaceLayout:
    return SurfaceLayout(format, TOKEN_ROWS, 1, 2, width, height, frames, pitch)


def samples(layout: SurfaceLayout, seed: int = 0) -> Tensor:
    """A surface [rows, pitch] of random samples of the layout's depth; the padding is zero."""
    generator = torch.Generator().manual_seed(seed)
    fmt = layout.format
    codes = torch.randint(
        0, 1 << (8 if fmt.itemsize == 1 else fmt.bits), (layout.rows, layout.width), generator=generator
    )
    surface = torch.zeros(layout.shape, dtype=torch.uint8)
    if fmt.itemsize == 1:
        surface[:, : layout.width] = codes.to(torch.uint8)
    else:
        surface.view(torch.int16)[:, : layout.width] = (codes << fmt.shift).to(torch.int16)
    return surface


def frames_of(surface: Tensor, layout: SurfaceLayout) -> list[bytes]:
    """The bytes of each frame's samples, rows without padding."""
    rows = surface[:, : layout.width * layout.format.itemsize]
    return [frame.contiguous().numpy().tobytes() for frame in rows.chunk(layout.frames)]
