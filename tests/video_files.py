"""Video files made by FFmpeg's encoders, and what its software decoders make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

RATE = Fraction(30000, 1001)


@dataclass(frozen=True)
class SoftwareFrame:
    """y [H, W] and uv [rows, columns, 2] with the values FFmpeg decoded; pts in seconds."""

    y: Tensor
    uv: Tensor
    pts: float | None


def write_video(
    path: Path,
    encoder: str,
    sizes: Sequence[tuple[int, int]],
    *,
    pixels: str = "yuv420p",
    frames: int = 20,
    options: dict[str, str] | None = None,
    audio: bool = False,
) -> None:
    """Write `frames` moving pictures of every (width, height), one coded sequence after the other."""
    with av.open(path, "w") as container:
        stream = container.add_stream(encoder, rate=RATE)
        stream.width, stream.height = sizes[0]
        stream.pix_fmt = pixels
        stream.options = options or {}
        if audio:
            _add_silence(container)
        number = 0
        for part, (width, height) in enumerate(sizes):
            context = stream if part == 0 else _encoder(encoder, width, height, pixels, options)
            for _ in range(frames):
                picture = _picture(width, height, number).reformat(format=pixels)
                picture.pts, picture.time_base = number, 1 / RATE
                number += 1
                _mux(container, stream, context.encode(picture))
            _mux(container, stream, context.encode(None))


def software_frames(path: Path) -> list[SoftwareFrame]:
    with av.open(path) as container:
        return [_read(frame) for frame in container.decode(video=0)]


def _encoder(name: str, width: int, height: int, pixels: str, options: dict[str, str] | None) -> Any:
    context = av.CodecContext.create(name, "w")
    context.width, context.height, context.pix_fmt = width, height, pixels
    context.time_base, context.framerate = 1 / RATE, RATE
    context.options = options or {}
    return context


def _mux(container: Any, stream: Any, packets: Any) -> None:
    for packet in packets:
        packet.stream = stream
        container.mux(packet)


def _add_silence(container: Any) -> None:
    stream = container.add_stream("aac", rate=48000)
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    sound.sample_rate = 48000
    container.mux(stream.encode(sound))
    container.mux(stream.encode(None))


def _picture(width: int, height: int, number: int) -> Any:
    """Gradients that move, under a little noise: motion and residuals to code."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x + 5 * number, y * 2 - 3 * number, x // 2 + y + number], axis=-1) % 256
    rgb = np.clip(rgb + rng.integers(0, 6, rgb.shape), 0, 255)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb, np.uint8), format="rgb24")


def _read(frame: Any) -> SoftwareFrame:
    planes = []
    dtype = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
    for plane in frame.planes:
        lines = np.frombuffer(plane, dtype).reshape(-1, plane.line_size // np.dtype(dtype).itemsize)
        planes.append(torch.from_numpy(lines[: plane.height, : plane.width].copy()))
    y, u, v = planes
    return SoftwareFrame(y, torch.stack([u, v], -1), frame.time)
