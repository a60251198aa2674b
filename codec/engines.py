"""Which engine codes a surface: NVENC and NVDEC where they are and can, else software; the format is one.

No machine with NVENC has run the encoding half: it is tested against an emulated driver only.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from time import monotonic
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sidelane.codec import _driver
from sidelane.codec._nvdec import CodedFormat
from sidelane.codec._nvenc import NO_SESSION_LEFT
from sidelane.codec._nvenc_config import Coding, EncoderCaps
from sidelane.codec.hevc import decode_hevc, encode_hevc, hevc_support
from sidelane.codec.hevc_syntax import check_stream
from sidelane.codec.nvdec import NvDecoderPool, decode_nvdec, release_idle_decoders
from sidelane.codec.nvenc import encoder_caps
from sidelane.codec.probe import DecoderCaps, decoder_caps
from sidelane.codec.self_test import TEST_SIDE, SelfTest, check_nvdec, check_nvenc
from sidelane.codec.surface_pool import (
    PAUSE,
    NoSession,
    SurfaceSlot,
    acquire_slot,
    no_session,
    release_idle_sessions,
)
from sidelane.errors import DriverError, LaneError, LaneUnavailable
from sidelane.layout import FORMATS, SurfaceFormat, SurfaceLayout

LARGE_FRAME = 2048 * 2048  # samples of luma; decoders for more take too much memory to keep one per engine

Caps = TypeVar("Caps", EncoderCaps, DecoderCaps)
Key = TypeVar("Key")

_lock = threading.RLock()


@dataclass(frozen=True)
class Engine:
    """The engine for one direction and format ("nvenc", "nvdec", "software" or "none") and why it is that.

    Where that is hardware, the reason also tells how often software had to take over, and why it last did.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Capability:
    """Engines for surfaces of one format: of lossless encoding, of encoding at a QP, of decoding."""

    lossless: Engine
    constant_qp: Engine
    decode: Engine


@dataclass(frozen=True)
class _Answer(Generic[Caps]):
    """What an engine can do, or why it cannot be used; good `until` then, on the monotonic clock."""

    caps: Caps | str
    until: float


@dataclass
class _History:
    """What happened on one device with one format and engine. `until`: when to ask it again, monotonic."""

    test: SelfTest | None = None
    left: int = 0  # times that software took over
    trouble: str = ""
    until: float = 0.0

    def told(self) -> str:
        return f"; software took over {self.left} times, last because {self.trouble}" if self.left else ""


_encoders: dict[int, _Answer[EncoderCaps]] = {}  # by device
_decoders: dict[tuple[int, str], _Answer[DecoderCaps]] = {}  # by device and format
_histories: defaultdict[tuple[int, str, str], _History] = defaultdict(_History)  # by device, format, engine
_decoder_pools: dict[int, NvDecoderPool] = {}


class EncodingSlot:
    """Memory for one surface and its way into a stream: write `tensor`, `submit`, take the `stream`.

    `tensor`, uint8 [layout.rows, layout.pitch], is undefined before, and not to be used after `stream` or
    `discard`, one of which has to be called.
    """

    def __init__(self, layout: SurfaceLayout, qp: int | None, device: torch.device) -> None:
        """In software. `qp`: None is lossless, 0..51 constant."""
        self.layout, self.qp = layout, qp
        self.tensor = torch.empty(layout.shape, dtype=torch.uint8, device=device)

    def submit(self) -> None:
        """Encode what the current stream writes to `tensor`; hardware starts now."""

    def stream(self) -> bytes:
        """Wait for the stream. Raises LaneError as `encode_hevc`, DriverError when the GPU is lost."""
        return encode_hevc(self.tensor.cpu(), self.layout, qp=self.qp)

    def discard(self) -> None:
        """Give the memory back."""


class _NvencSlot(EncodingSlot):
    """A slot whose `tensor` the encode sessions read; software takes over when they fail."""

    def __init__(self, slot: SurfaceSlot, layout: SurfaceLayout, qp: int | None, index: int) -> None:
        self.layout, self.qp, self.tensor = layout, qp, slot.tensor
        self._slot, self._index = slot, index

    def submit(self) -> None:
        self._slot.submit()

    def stream(self) -> bytes:
        try:
            return self._slot.stream()
        except (LaneError, DriverError) as error:
            _leave_to_software(self._index, self.layout.format, "nvenc", error, PAUSE)
            return super().stream()
        finally:
            self._slot.release()

    def discard(self) -> None:
        self._slot.release()


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


def encoding_slot(layout: SurfaceLayout, device: torch.device, *, qp: int | None = None) -> EncodingSlot:
    """Memory for a surface, and its way to NVENC where that works; several may be under way at a time.

    The frames of a surface, and surfaces one after the other, are spread over all engines.

    Raises DriverError when the GPU is lost.
    """
    index = gpu_index(device)
    if index is not None and encoding_engine(index, layout.format, qp).name == "nvenc":
        caps = _encoder(index)
        size = Coding(layout.format, layout.width, layout.height, qp)
        if isinstance(caps, EncoderCaps) and (refusal := caps.refusal(size)) is not None:
            _leave_to_software(index, layout.format, "nvenc", LaneUnavailable(refusal))
            return EncodingSlot(layout, qp, device)
        try:
            return _NvencSlot(acquire_slot(layout, qp, index), layout, qp, index)
        except NoSession as error:
            _leave_to_software(index, layout.format, "nvenc", error)
        except (LaneError, DriverError) as error:
            _leave_to_software(index, layout.format, "nvenc", error, PAUSE)
    return EncodingSlot(layout, qp, device)


def decode_surface(stream: bytes, layout: SurfaceLayout, device: torch.device) -> Tensor:
    """`decode_hevc` onto any device, by NVDEC where that works. Bytes of the row padding are undefined.

    Memory is taken only for frames that the stream holds, as far as its headers tell.

    Raises as `decode_hevc`, and DriverError when the GPU is lost.
    """
    index = gpu_index(device)
    if index is not None and decoding_engine(index, layout.format).name == "nvdec":
        check_stream(stream, layout)
        try:
            return _decode_nvdec(stream, layout, index)
        except (LaneUnavailable, DriverError, torch.OutOfMemoryError) as error:
            _leave_to_software(index, layout.format, "nvdec", error)
    return decode_hevc(stream, layout).to(device)


def release_engines() -> None:
    """Close the encode sessions and decoders that are kept; not while another thread decodes."""
    release_idle_sessions()
    release_idle_decoders()
    with _lock:
        pools = list(_decoder_pools.values())
        _decoder_pools.clear()
    for pool in pools:
        pool.close()


def encoding_engine(index: int | None, format: SurfaceFormat, qp: int | None) -> Engine:
    """The engine that encodes surfaces of `format` on GPU `index` (None: the CPU); `qp` None is lossless.

    The first question for lossless coding on a GPU runs a self-test: a format in which a bit changes is
    withdrawn for the life of the process.
    """
    if index is None:
        return _software(format, "the tensor is on the CPU")
    if format.split and qp is not None:
        return Engine("none", f"format '{format.name}' splits codes over planes: lossless only")
    caps = _encoder(index)
    if isinstance(caps, str):
        return _software(format, caps)
    if (refusal := caps.refusal(Coding(format, TEST_SIDE, TEST_SIDE, qp))) is not None:
        return _software(format, refusal)
    if (refusal := no_session(index)) is not None:
        return _software(format, refusal)
    return _hardware("nvenc", index, format, caps.engines, exact=qp is None)


def decoding_engine(index: int | None, format: SurfaceFormat) -> Engine:
    """The engine that decodes surfaces of `format` to GPU `index` (None: the CPU).

    The first question runs a self-test, as for `encoding_engine`.
    """
    if index is None:
        return _software(format, "the tensor is on the CPU")
    caps = _decoder(index, format)
    if isinstance(caps, str):
        return _software(format, caps)
    if (refusal := caps.refusal(TEST_SIDE, TEST_SIDE)) is not None:
        return _software(format, refusal)
    return _hardware("nvdec", index, format, caps.engines, exact=True)


def gpu_index(device: torch.device) -> int | None:
    """Ordinal of a CUDA device, None for others."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _hardware(name: str, index: int, format: SurfaceFormat, engines: int, exact: bool) -> Engine:
    """The engine, unless it is to be left alone for a while or, where it has to be `exact`, changes bits."""
    history = _histories[index, format.name, name]
    if monotonic() < history.until:
        return _software(format, history.trouble)
    reason = f"{engines} engines"
    if exact:
        test = _self_test(index, format, name)
        if not test.passed:
            return _software(format, test.text)
        reason += f"; {test.text}"
    return Engine(name, reason + history.told())


def _software(format: SurfaceFormat, why: str) -> Engine:
    missing = hevc_support()[format.name]
    return Engine("software", why) if missing is None else Engine("none", f"{why}; {missing}")


def _leave_to_software(
    index: int, format: SurfaceFormat, engine: str, error: Exception, pause: float = 0
) -> None:
    """Remember why software takes a surface over. Raises `error` when the GPU is lost."""
    if isinstance(error, DriverError) and error.status in _driver.CUDA_STICKY:
        raise error
    with _lock:
        history = _histories[index, format.name, engine]
        history.left += 1
        history.trouble, history.until = str(error), monotonic() + pause


def _encoder(index: int) -> EncoderCaps | str:
    return _ask(_encoders, index, lambda: encoder_caps(f"cuda:{index}"))


def _decoder(index: int, format: SurfaceFormat) -> DecoderCaps | str:
    coded = CodedFormat.of(format)
    question = partial(decoder_caps, f"cuda:{index}", "hevc", coded.chroma, coded.bits)
    return _ask(_decoders, (index, format.name), question)


def _ask(answers: dict[Key, _Answer[Caps]], key: Key, question: Callable[[], Caps]) -> Caps | str:
    """The answer to `question`, asked once, as that takes milliseconds; a failure is asked again later."""
    with _lock:
        if key not in answers or monotonic() >= answers[key].until:
            until = inf
            caps: Caps | str
            try:
                caps = question()
            except (LaneUnavailable, DriverError) as error:
                caps, cause = str(error), error.__cause__
                full = isinstance(cause, DriverError) and cause.status in NO_SESSION_LEFT
                if full or isinstance(error, DriverError):
                    until = monotonic() + PAUSE
            answers[key] = _Answer(caps, until)
        return answers[key].caps


def _self_test(index: int, format: SurfaceFormat, engine: str) -> SelfTest:
    """The outcome for an engine, found out once; where the test cannot be made it is tried again later."""
    with _lock:
        history = _histories[index, format.name, engine]
        if history.test is not None:
            return history.test
        try:
            history.test = check_nvenc(index, format) if engine == "nvenc" else check_nvdec(index, format)
            return history.test
        except (LaneError, DriverError) as error:
            history.trouble = f"the self-test failed: {error}"
            history.until = monotonic() + PAUSE
            return SelfTest(False, history.trouble)


def _decode_nvdec(stream: bytes, layout: SurfaceLayout, index: int) -> Tensor:
    """Frames of one surface on all engines, where there are several and memory for that."""
    caps = _decoder(index, layout.format)
    if isinstance(caps, DecoderCaps) and (refusal := caps.refusal(layout.width, layout.height)) is not None:
        raise LaneUnavailable(refusal)
    if layout.frames > 1 and layout.width * layout.height <= LARGE_FRAME:
        with _lock:
            if index not in _decoder_pools:
                _decoder_pools[index] = NvDecoderPool(f"cuda:{index}")
            pool = _decoder_pools[index]
        try:
            return pool.decode_surface(stream, layout)
        except DriverError as error:
            if error.status != _driver.CUDA_OUT_OF_MEMORY:
                raise
    return decode_nvdec(stream, layout, f"cuda:{index}")
