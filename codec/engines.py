"""Which engine codes a surface: NVENC and NVDEC where they are and can, else software; the format is one.

No machine with NVENC has run the encoding half: it is tested against an emulated driver only.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from sidelane.codec._nvdec import CodedFormat
from sidelane.codec._nvenc import NO_SESSION_LEFT
from sidelane.codec._nvenc_config import Coding, EncoderCaps
from sidelane.codec.hevc import decode_hevc, encode_hevc, hevc_support
from sidelane.codec.nvdec import decode_nvdec
from sidelane.codec.nvenc import encode_nvenc, encoder_caps
from sidelane.codec.probe import decoder_caps
from sidelane.errors import DriverError, LaneUnavailable
from sidelane.layout import FORMATS, TOKEN_ROWS, SurfaceFormat, SurfaceLayout

TEST_SIDE = 256  # of the self-test's frame; every engine takes it

_lock = threading.RLock()
_encoders: dict[int, EncoderCaps | str] = {}  # by device, or why there is none
_withdrawn: dict[tuple[int, str], str | None] = {}  # by device and format, why lossless is not; None if it is


@dataclass(frozen=True)
class Engine:
    """The engine for one direction and format ("nvenc", "nvdec", "software" or "none") and why it is that."""

    name: str
    reason: str


@dataclass(frozen=True)
class Capability:
    """Engines for surfaces of one format: of lossless encoding, of encoding at a QP, of decoding."""

    lossless: Engine
    constant_qp: Engine
    decode: Engine


def capabilities(device: torch.device | str) -> dict[str, Capability]:
    """For every surface format the engines that work on tensors of `device`.

    Raises LaneUnavailable when PyAV cannot be imported.
    """
    index = gpu_index(torch.device(device))
    return {
        name: Capability(
            encoding_engine(index, fmt, None), encoding_engine(index, fmt, 0), decoding_engine(index, fmt)
        )
        for name, fmt in FORMATS.items()
    }


def encode_surface(surface: Tensor, layout: SurfaceLayout, *, qp: int | None = None) -> bytes:
    """`encode_hevc` for a surface on any device, by NVENC where that works.

    Raises as `encode_hevc`, and DriverError when the hardware fails.
    """
    index = gpu_index(surface.device)
    if index is not None and encoding_engine(index, layout.format, qp).name == "nvenc":
        try:
            return encode_nvenc(surface, layout, qp=qp, device=f"cuda:{index}")
        except LaneUnavailable:
            pass  # this frame size, or all sessions are in use at the moment
    return encode_hevc(surface.cpu(), layout, qp=qp)


def decode_surface(stream: bytes, layout: SurfaceLayout, device: torch.device) -> Tensor:
    """`decode_hevc` onto any device, by NVDEC where that works. Bytes of the row padding are undefined.

    Raises as `decode_hevc`, and DriverError when the hardware fails.
    """
    index = gpu_index(device)
    if index is not None and decoding_engine(index, layout.format).name == "nvdec":
        try:
            return decode_nvdec(stream, layout, f"cuda:{index}")
        except (LaneUnavailable, torch.OutOfMemoryError):
            pass  # this frame size; or more frames than fit, which software counts before it takes memory
    return decode_hevc(stream, layout).to(device)


def encoding_engine(index: int | None, format: SurfaceFormat, qp: int | None) -> Engine:
    """The engine that encodes surfaces of `format` on GPU `index` (None: the CPU); `qp` None is lossless.

    The first question for lossless coding on a GPU runs a self-test: a format in which a bit changes is
    withdrawn for the life of the process.
    """
    if index is None:
        return _software(format, "the tensor is on the CPU")
    caps = _encoder(index)
    if isinstance(caps, str):
        return _software(format, caps)
    if format.split and qp is not None:
        return Engine("none", f"format '{format.name}' splits codes over planes: lossless only")
    refusal = caps.refusal(Coding(format, TEST_SIDE, TEST_SIDE, qp))
    if refusal is None and qp is None:
        refusal = _lossless_fault(index, format)
    if refusal is not None:
        return _software(format, refusal)
    return Engine(
        "nvenc", f"{caps.engines} engines" + ("; the self-test came back exact" if qp is None else "")
    )


def decoding_engine(index: int | None, format: SurfaceFormat) -> Engine:
    """The engine that decodes surfaces of `format` to GPU `index` (None: the CPU)."""
    if index is None:
        return _software(format, "the tensor is on the CPU")
    coded = CodedFormat.of(format)
    try:
        caps = decoder_caps(f"cuda:{index}", "hevc", coded.chroma, coded.bits)
    except (LaneUnavailable, DriverError) as error:
        return _software(format, str(error))
    if (refusal := caps.refusal(TEST_SIDE, TEST_SIDE)) is not None:
        return _software(format, refusal)
    return Engine("nvdec", f"{caps.engines} engines")


def gpu_index(device: torch.device) -> int | None:
    """Ordinal of a CUDA device, None for others."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _software(format: SurfaceFormat, why: str) -> Engine:
    missing = hevc_support()[format.name]
    return Engine("software", why) if missing is None else Engine("none", f"{why}; {missing}")


def _encoder(index: int) -> EncoderCaps | str:
    with _lock:
        if index not in _encoders:
            try:
                _encoders[index] = encoder_caps(f"cuda:{index}")
            except (LaneUnavailable, DriverError) as error:
                cause = error.__cause__
                if isinstance(cause, DriverError) and cause.status in NO_SESSION_LEFT:
                    return str(error)  # there may be one later
                _encoders[index] = str(error)
        return _encoders[index]


def _lossless_fault(index: int, format: SurfaceFormat) -> str | None:
    """Encode random samples, decode them in software, compare; the answer is kept."""
    with _lock:
        key = (index, format.name)
        if key not in _withdrawn:
            _withdrawn[key] = _self_test(index, format)
        return _withdrawn[key]


def _self_test(index: int, format: SurfaceFormat) -> str | None:
    pitch = TEST_SIDE * format.itemsize
    layout = SurfaceLayout(format, TOKEN_ROWS, 1, 1, TEST_SIDE, TEST_SIDE, 1, pitch)
    draw = torch.Generator().manual_seed(0)
    bits = 8 if format.itemsize == 1 else format.bits
    samples = torch.randint(2**bits, (layout.rows, TEST_SIDE), generator=draw) << format.shift
    surface = samples.to(torch.uint8 if format.itemsize == 1 else torch.int16).view(torch.uint8)
    try:
        stream = encode_nvenc(surface, layout, device=f"cuda:{index}")
        if not torch.equal(decode_hevc(stream, layout), surface):
            return "the self-test came back changed: NVENC is not lossless in this format here"
    except (LaneUnavailable, DriverError, ValueError) as error:
        return f"the self-test failed: {error}"
    return None
