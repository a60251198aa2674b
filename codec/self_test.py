"""Whether a video engine is lossless: random samples through it one way and through software the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sidelane.codec.hevc import decode_hevc, encode_hevc
from sidelane.codec.nvdec import decode_nvdec
from sidelane.codec.nvenc import Encoder
from sidelane.codec.surface_pool import release_idle_sessions
from sidelane.errors import LaneUnavailable
from sidelane.layout import TOKEN_ROWS, SurfaceFormat, SurfaceLayout

TEST_SIDE = 256  # of the frame; every engine takes it


@dataclass(frozen=True)
class SelfTest:
    """The outcome, in words too. Where software is missing there is no test, and that passes."""

    passed: bool
    text: str


def check_nvenc(index: int, format: SurfaceFormat) -> SelfTest:
    """Encode with NVENC of device `index`. Raises LaneError, DriverError when that or its opposite fails."""
    layout, surface = _random_surface(format)
    with Encoder(layout, device=f"cuda:{index}", surfaces=1, make_room=release_idle_sessions) as encoder:
        stream = encoder.encode(surface).stream()
    return _compare("NVENC", decode_hevc(stream, layout), surface)


def check_nvdec(index: int, format: SurfaceFormat) -> SelfTest:
    """Decode with NVDEC of device `index`. Raises LaneError, DriverError when that fails."""
    layout, surface = _random_surface(format)
    try:
        stream = encode_hevc(surface, layout)
    except LaneUnavailable as error:
        return SelfTest(True, f"not tested: {error}")
    return _compare("NVDEC", decode_nvdec(stream, layout, f"cuda:{index}").cpu(), surface)


def _random_surface(format: SurfaceFormat) -> tuple[SurfaceLayout, Tensor]:
    pitch = TEST_SIDE * format.itemsize
    layout = SurfaceLayout(format, TOKEN_ROWS, 1, 1, TEST_SIDE, TEST_SIDE, 1, pitch)
    draw = torch.Generator().manual_seed(0)
    bits = 8 if format.itemsize == 1 else format.bits
    samples = torch.randint(2**bits, (layout.rows, TEST_SIDE), generator=draw, device="cpu") << format.shift
    return layout, samples.to(torch.uint8 if format.itemsize == 1 else torch.int16).view(torch.uint8)


def _compare(engine: str, restored: Tensor, surface: Tensor) -> SelfTest:
    if torch.equal(restored, surface):
        return SelfTest(True, "the self-test came back exact")
    return SelfTest(False, f"the self-test came back changed: {engine} is not lossless in this format here")
