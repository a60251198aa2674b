"""What the video engines of a GPU can do, asked from the driver."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from sidelane.codec._abi import NVENC_VERSIONS
from sidelane.codec._driver import (
    Nvenc,
    bound,
    cuvid,
    device_index,
    nvenc_driver_version,
    primary_context,
)
from sidelane.codec._limits import FrameLimits
from sidelane.errors import DriverError, LaneUnavailable

_PROBED = (
    *(("hevc", chroma, bits) for chroma in ("4:2:0", "4:4:4") for bits in (8, 10, 12)),
    ("h264", "4:2:0", 8),
    ("vp9", "4:2:0", 8),
    ("vp9", "4:2:0", 10),
    ("av1", "4:2:0", 8),
    ("av1", "4:2:0", 10),
)


@dataclass(frozen=True)
class DecoderCaps(FrameLimits):
    """What NVDEC does with one codec, chroma format and bit depth.

    Attributes:
        codec, chroma, bits: "hevc", "h264", "vp9" or "av1"; "4:2:0" or "4:4:4"; bits per sample.
        supported: False leaves all that follows at zero.
        engines: decoder engines of the GPU.
        min_width, min_height, max_width, max_height: frame size in pixels.
        max_macroblocks: 16x16 blocks in a frame.
        outputs: surface formats of decoded frames, as cuvid calls them ("NV12", "P016", ...).
    """

    codec: str
    chroma: str
    bits: int
    supported: bool
    engines: int
    min_width: int
    min_height: int
    max_width: int
    max_height: int
    max_macroblocks: int
    outputs: tuple[str, ...]

    def refusal(self, width: int, height: int) -> str | None:
        """Why frames of width x height cannot be decoded; None if they can."""
        if not self.supported:
            return f"this GPU does not decode {self.codec} {self.chroma} at {self.bits} bit"
        return self.size_refusal(width, height)


def decoder_caps(device: torch.device | str, codec: str, chroma: str, bits: int) -> DecoderCaps:
    """Ask the driver about one kind of stream. Raises LaneUnavailable without its library, DriverError."""
    abi = cuvid().abi
    query = abi.struct("CUVIDDECODECAPS")(
        eCodecType=codec_number(codec),
        eChromaFormat=chroma_number(chroma),
        nBitDepthMinus8=bits - 8,
    )
    with bound(device_index(device)):
        cuvid().call("cuvidGetDecoderCaps", ctypes.byref(query))
    formats = abi.enum("cudaVideoSurfaceFormat")
    return DecoderCaps(
        codec,
        chroma,
        bits,
        bool(query.bIsSupported),
        query.nNumNVDECs,
        query.nMinWidth,
        query.nMinHeight,
        query.nMaxWidth,
        query.nMaxHeight,
        query.nMaxMBCount,
        tuple(n.partition("_")[2] for n, value in formats.items() if query.nOutputFormatMask >> value & 1),
    )


def probe_nvdec(device: torch.device | str = "cuda") -> tuple[DecoderCaps, ...]:
    """Capabilities for HEVC 4:2:0 and 4:4:4 at 8, 10 and 12 bit, H.264, VP9 and AV1.

    Raises LaneUnavailable without the driver's decoder library, DriverError if it refuses to answer.
    """
    return tuple(decoder_caps(device, *kind) for kind in _PROBED)


@dataclass(frozen=True)
class SessionAttempt:
    """The answer to opening an encode session with one API version.

    `status` 0: it opened and was closed; -1: the driver lacks the entry point.
    """

    api: str
    status: int
    text: str


@dataclass(frozen=True)
class NvencProbe:
    """Whether NVENC can be used. `driver_api`: the newest API the driver knows, "" without the library."""

    available: bool
    reason: str
    driver_api: str
    attempts: tuple[SessionAttempt, ...]


def probe_nvenc(device: torch.device | str = "cuda") -> NvencProbe:
    """Try to open an encode session with every API version there is a table for."""
    index = device_index(device)
    try:
        driver = "{}.{}".format(*nvenc_driver_version())
    except (LaneUnavailable, DriverError) as error:
        return NvencProbe(False, str(error), "", ())
    with bound(index):
        attempts = tuple(_attempt(version, primary_context(index)) for version in NVENC_VERSIONS)
    available = any(a.status == 0 for a in attempts)
    return NvencProbe(available, "" if available else attempts[0].text, driver, attempts)


def _attempt(version: str, context: int) -> SessionAttempt:
    try:
        nvenc = Nvenc(version)
        nvenc.call("nvEncDestroyEncoder", nvenc.open_session(context))
    except DriverError as error:
        return SessionAttempt(version, error.status, str(error))
    except LaneUnavailable as error:
        return SessionAttempt(version, -1, str(error))
    return SessionAttempt(version, 0, "a session opens")


def codec_number(codec: str) -> int:
    return cuvid().abi.number(f"cudaVideoCodec_{codec.upper()}")


def chroma_number(chroma: str) -> int:
    return cuvid().abi.number(f"cudaVideoChromaFormat_{chroma.replace(':', '')}")
