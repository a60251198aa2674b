"""Software HEVC through PyAV: libx265 encodes surfaces, FFmpeg decodes them into the layout of NVDEC.

Streams are plain Annex B: one IDR picture with its own parameter sets per frame, full range, no SEI. They end
with an end-of-bitstream NAL unit, which a stream that was cut anywhere lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidelane.codec.hevc_syntax import END_OF_BITSTREAM as END_OF_BITSTREAM
from sidelane.codec.hevc_syntax import check_stream
from sidelane.errors import LaneError, LaneUnavailable, PacketError
from sidelane.layout import FORMATS, SurfaceFormat, SurfaceLayout

MAX_QP = 51
PIXEL_FORMATS = {
    "nv12": "yuv420p",
    "nv12_split12": "yuv420p",
    "p010": "yuv420p10le",
    "p012": "yuv420p12le",
    "yuv444": "yuv444p",
    "yuv444_10": "yuv444p10le",
    "yuv444_12": "yuv444p12le",
}

_MAX_STREAM = 2**31 - 1  # bytes; FFmpeg counts them in an int
_PRESET = "superfast"  # the fastest with 8x8 coding units; slower ones save nothing lossless, 2-6 % at a QP
# The wavefront (x265's default when there is a pool) gives the same bytes for every number of threads.
_X265 = {
    "info": 0,
    "log-level": "none",
    "pools": 8,
    "frame-threads": 1,
    "keyint": -1,  # every picture is forced to IDR; keyint=1 would leave the Main profiles for a RExt one
    "open-gop": 0,  # IDR, not CRA
    "bframes": 0,
    "rc-lookahead": 0,
    "scenecut": 0,
    "ref": 1,
    "range": "full",
    "ipratio": 1,  # else intra pictures get a lower QP than the one asked for
}


def hevc_support() -> dict[str, str | None]:
    """For every surface format None, or the reason why this PyAV cannot encode and decode it.

    Raises LaneUnavailable when PyAV cannot be imported.
    """
    av = _import_av()
    try:
        av.Codec("hevc", "r")
        offered = {f.name for f in av.Codec("libx265", "w").video_formats or ()}
    except ValueError as error:
        missing = f"PyAV {av.__version__} has no such codec ({error}): install the wheel from PyPI"
        return dict.fromkeys(FORMATS, missing)
    return {
        name: None if pixels in offered else f"libx265 of PyAV {av.__version__} does not encode {pixels}"
        for name, pixels in PIXEL_FORMATS.items()
    }


def encode_hevc(surface: Tensor, layout: SurfaceLayout, *, qp: int | None = None) -> bytes:
    """Encode a surface, uint8 [layout.rows, layout.pitch] on the CPU. The same samples give the same bytes.

    Args:
        qp: None codes the samples losslessly; 0..51 is the constant quantization parameter of every block.

    Raises LaneError for a wrong surface, QP or frame size, LaneUnavailable when libx265 is missing.
    """
    fmt = layout.format
    _check_surface(surface, layout)
    check_qp(qp, fmt)
    if (reason := hevc_support()[fmt.name]) is not None:
        raise LaneUnavailable(reason)
    av = _import_av()
    rate = {"lossless": 1} if qp is None else {"qp": qp}
    encoder = av.CodecContext.create("libx265", "w")
    encoder.width, encoder.height, encoder.pix_fmt = layout.width, layout.height, PIXEL_FORMATS[fmt.name]
    encoder.time_base = Fraction(1, 25)
    encoder.options = {
        "preset": _PRESET,
        "tune": "psnr",  # no adaptive quantization and no psychovisual decisions
        "forced-idr": "1",
        "x265-params": ":".join(f"{key}={value}" for key, value in (_X265 | rate).items()),
    }
    stream = bytearray()
    try:
        for number, rows in enumerate(_frames(surface.numpy(), layout)):
            frame = av.VideoFrame(layout.width, layout.height, encoder.pix_fmt)
            frame.pts = number
            frame.pict_type = av.video.frame.PictureType.I
            for source, plane in zip(_surface_planes(rows, layout), frame.planes, strict=True):
                np.right_shift(source, fmt.shift, out=_samples(plane, fmt))
            for packet in encoder.encode(frame):
                stream += memoryview(packet)
        for packet in encoder.encode(None):
            stream += memoryview(packet)
    except av.FFmpegError as error:
        picture = f"{layout.width}x{layout.height} {encoder.pix_fmt}"
        raise LaneError(f"libx265 refuses {picture} ({error}): change the frame size") from error
    return bytes(stream + END_OF_BITSTREAM)


def check_qp(qp: int | None, fmt: SurfaceFormat) -> None:
    """Raise LaneError unless surfaces of `fmt` can be coded with `qp`, None for without loss."""
    if qp is not None and not (type(qp) is int and 0 <= qp <= MAX_QP):
        raise LaneError(f"qp={qp!r} is neither None (lossless) nor an integer 0..{MAX_QP}")
    if qp is not None and fmt.split:
        raise LaneError(f"surface format '{fmt.name}' splits codes over planes: use qp=None (lossless)")


def decode_hevc(stream: bytes | bytearray | memoryview, layout: SurfaceLayout) -> Tensor:
    """Decode a stream of `encode_hevc` into a surface, uint8 [layout.rows, layout.pitch] on the CPU.

    Planes lie below each other, chroma of 4:2:0 interleaved, 16-bit samples MSB aligned, pitch padding zero,
    as NVDEC delivers frames. Memory is taken only for frames of the layout that the stream really holds.

    Raises PacketError ('bitstream') when the stream is cut or damaged or does not hold the frames of the
    layout, LaneUnavailable when PyAV is missing. Changed bits that still decode go unseen: packets carry
    checksums.
    """
    av = _import_av()
    data = bytes(stream)
    check_stream(data, layout)
    if len(data) > _MAX_STREAM:
        raise PacketError("bitstream", f"{len(data)} bytes are more than {_MAX_STREAM}")
    decoder = av.CodecContext.create("hevc", "r")
    decoder.thread_count = 0  # as many as there are cores
    # FFmpeg counts the padding to whole coding blocks and to its alignment of rows.
    width, height = (-(-side // 64) * 64 for side in (layout.width, layout.height))
    decoder.options = {"err_detect": "explode", "max_pixels": str(width * height)}
    blocks: list[Tensor] = []
    try:
        units = decoder.parse(memoryview(data)[: -len(END_OF_BITSTREAM)]) + decoder.parse(b"")
        for unit in (*units, None):
            for frame in decoder.decode(unit):
                if len(blocks) == layout.frames:
                    raise PacketError("bitstream", f"more than {layout.frames} frames come out")
                blocks.append(_read_frame(frame, layout))
    except PacketError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise PacketError("bitstream", f"FFmpeg cannot decode it: {error}") from error
    if len(blocks) != layout.frames:
        raise PacketError("bitstream", f"{len(blocks)} frames came out, {layout.frames} expected")
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise LaneUnavailable(f"software HEVC needs PyAV ({error}): pip install av") from error
    return av


def _check_surface(surface: Tensor, layout: SurfaceLayout) -> None:
    if surface.dtype != torch.uint8 or surface.shape != layout.shape or not surface.is_contiguous():
        found = f"{surface.dtype} {list(surface.shape)}"
        raise LaneError(f"surface is {found}: pass contiguous torch.uint8 {list(layout.shape)}")
    if surface.device.type != "cpu":
        raise LaneError(f"surface is on {surface.device}: software HEVC needs it on the CPU")


def _read_frame(frame: Any, layout: SurfaceLayout) -> Tensor:
    """uint8 [rows of one frame, pitch]."""
    fmt = layout.format
    found = (frame.width, frame.height, frame.format.name.replace("yuvj", "yuv"))  # yuvj: FFmpeg's full range
    if found != (layout.width, layout.height, PIXEL_FORMATS[fmt.name]):
        want = f"{layout.width}x{layout.height} {PIXEL_FORMATS[fmt.name]}"
        raise PacketError("bitstream", f"a frame is {found[0]}x{found[1]} {found[2]}, {want} expected")
    rows = np.zeros((fmt.rows(layout.height), layout.pitch), dtype=np.uint8)
    for plane, target in zip(frame.planes, _surface_planes(rows.view(_dtype(fmt)), layout), strict=True):
        np.left_shift(_samples(plane, fmt), fmt.shift, out=target)
    return torch.from_numpy(rows)


def _frames(surface: NDArray[Any], layout: SurfaceLayout) -> Iterator[NDArray[Any]]:
    """The samples [rows, pitch in samples] of each frame."""
    rows = layout.format.rows(layout.height)
    yield from surface.view(_dtype(layout.format)).reshape(layout.frames, rows, -1)


def _surface_planes(rows: NDArray[Any], layout: SurfaceLayout) -> list[NDArray[Any]]:
    """Views of Y, U and V in the samples [rows, pitch in samples] of one frame."""
    height, width = layout.height, layout.width
    if layout.format.subsampled:
        chroma = rows[height:, :width]
        return [rows[:height, :width], chroma[:, 0::2], chroma[:, 1::2]]
    return [rows[i * height : (i + 1) * height, :width] for i in range(3)]


def _samples(plane: Any, fmt: SurfaceFormat) -> NDArray[Any]:
    """The samples [height, width] of a plane of FFmpeg, without the padding of its lines."""
    lines = np.frombuffer(plane, dtype=_dtype(fmt)).reshape(-1, plane.line_size // fmt.itemsize)
    return lines[: plane.height, : plane.width]


def _dtype(fmt: SurfaceFormat) -> Any:
    return np.uint8 if fmt.itemsize == 1 else np.uint16
