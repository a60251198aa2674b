"""One hardware decoder of NVDEC: made, resized, fed with pictures, emptied of frames.

All methods but `close` need the CUDA context of the device to be current on the calling thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sidelane.codec import _driver
from sidelane.codec._driver import Stream, cuda, cuvid
from sidelane.codec.probe import chroma_number, codec_number, decoder_caps
from sidelane.errors import DriverError, LaneUnavailable
from sidelane.layout import SurfaceFormat

# Pictures in the hardware's queue while the host waits for the oldest, so that the engine never idles.
PIPELINE_DEPTH = 4
# Copies queued before the host waits: far fewer than make the driver block a call (which holds the GIL).
MAX_COPIES = 64
_NOT_SUPPORTED = 801
_REPORTING = ("hevc", "h264")  # codecs for which NVDEC tells whether a picture was damaged


@dataclass(frozen=True)
class CodedFormat:
    """What a decoder is made for.

    Attributes:
        chroma, bits: of the coded samples; "4:2:0" or "4:4:4".
        codec: "hevc", "h264", "vp9" or "av1".
        intra: no picture refers to another one, which saves memory.
    """

    chroma: str
    bits: int
    codec: str = "hevc"
    intra: bool = True

    @classmethod
    def of(cls, format: SurfaceFormat) -> CodedFormat:
        """All-intra HEVC of a surface format."""
        return cls("4:2:0" if format.subsampled else "4:4:4", 8 if format.itemsize == 1 else format.bits)

    @property
    def output(self) -> str:
        """The surface format NVDEC writes the samples in, as cuvid calls it."""
        if self.chroma == "4:2:0":
            return "NV12" if self.bits == 8 else "P016"
        return "YUV444" if self.bits == 8 else "YUV444_16Bit"


@dataclass(frozen=True)
class Geometry:
    """Coded frame size, the visible rectangle in it, and decode surfaces the stream needs.

    NVDEC writes even numbers of columns and rows: `padded_width` and `padded_height`.
    """

    coded_width: int
    coded_height: int
    left: int
    top: int
    width: int
    height: int
    surfaces: int

    @property
    def padded_width(self) -> int:
        return self.width + self.width % 2

    @property
    def padded_height(self) -> int:
        return self.height + self.height % 2

    @classmethod
    def of(cls, sequence: Any) -> Geometry:
        """Geometry of a CUVIDEOFORMAT, with surfaces for the queue of pictures on top."""
        area = sequence.display_area
        return cls(
            sequence.coded_width,
            sequence.coded_height,
            area.left,
            area.top,
            area.right - area.left,
            area.bottom - area.top,
            sequence.min_num_decode_surfaces + PIPELINE_DEPTH,
        )


class _Calls:
    """What is called for every picture and the structures it fills, made once: that takes longer than a call.

    Calls that never wait hold the GIL: with seven decoders at work, to get it back takes longer than they do.
    """

    def __init__(self, stream: Stream) -> None:
        video, compute = cuvid(), cuda()
        self.decode = video.fast_function("cuvidDecodePicture")
        self.map = video.fast_function("cuvidMapVideoFrame64")
        self.status = video.fast_function("cuvidGetDecodeStatus", hold_gil=True)
        self.copy = compute.fast_function("cuMemcpy2DAsync_v2", hold_gil=True)
        self.unmap = video.fast_function("cuvidUnmapVideoFrame64", hold_gil=True)
        device = compute.abi.number("CU_MEMORYTYPE_DEVICE")
        self.damaged = tuple(video.abi.number(f"cuvidDecodeStatus_{n}") for n in ("Error", "Error_Concealed"))
        self.source, self.pitch = ctypes.c_uint64(), ctypes.c_uint32()
        self.how = video.abi.struct("CUVIDPROCPARAMS")(progressive_frame=1, output_stream=stream.handle)
        self.mapping = tuple(map(ctypes.addressof, (self.source, self.pitch, self.how)))
        self.report = video.abi.struct("CUVIDGETDECODESTATUS")()
        self.report_at = ctypes.addressof(self.report)
        self.plan = compute.abi.struct("CUDA_MEMCPY2D")(srcMemoryType=device, dstMemoryType=device)
        self.copying = ctypes.addressof(self.plan), stream.handle.value


class HardwareDecoder:
    """A cuvid decoder and the stream its frames are copied on; created and resized as streams ask for it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.coded: CodedFormat | None = None
        self.geometry: Geometry | None = None
        self._limit = (0, 0)  # coded size up to which reconfiguration works
        self._decoder = ctypes.c_void_p()
        self._stream: Stream | None = None
        self._calls: _Calls | None = None
        self._reports = False
        self._copies = 0  # queued since the host last waited
        self.known: Any = None  # for StreamDecode; forgotten when the decoder changes

    @property
    def stream(self) -> Stream:
        if self._stream is None:
            self._stream = Stream()
        return self._stream

    @property
    def calls(self) -> _Calls:
        if self._calls is None:
            self._calls = _Calls(self.stream)
        return self._calls

    def is_prepared(self, coded: CodedFormat, geometry: Geometry) -> bool:
        return (coded, geometry) == (self.coded, self.geometry)

    def prepare(self, coded: CodedFormat, geometry: Geometry) -> None:
        """Get ready for a stream by reconfiguration or, failing that, anew; decoded pictures are lost."""
        within = geometry.coded_width <= self._limit[0] and geometry.coded_height <= self._limit[1]
        if self._decoder and coded == self.coded and within:
            self._reconfigure(geometry)
        else:
            self._create(coded, geometry)
        self.geometry, self.known = geometry, None

    def _create(self, coded: CodedFormat, geometry: Geometry) -> None:
        self.destroy()
        device = f"cuda:{self.index}"
        caps = decoder_caps(device, coded.codec, coded.chroma, coded.bits)
        refusal = caps.refusal(geometry.coded_width, geometry.coded_height)
        if refusal:
            raise LaneUnavailable(f"NVDEC on {device}: {refusal}; decode in software")
        abi = cuvid().abi
        info = abi.struct("CUVIDDECODECREATEINFO")(
            CodecType=codec_number(coded.codec),
            ChromaFormat=chroma_number(coded.chroma),
            OutputFormat=abi.number(f"cudaVideoSurfaceFormat_{coded.output}"),
            DeinterlaceMode=abi.number("cudaVideoDeinterlaceMode_Weave"),
            ulCreationFlags=abi.number("cudaVideoCreate_PreferCUVID"),
            bitDepthMinus8=coded.bits - 8,
            ulIntraDecodeOnly=int(coded.intra),
            ulNumOutputSurfaces=1,
            ulMaxWidth=geometry.coded_width,
            ulMaxHeight=geometry.coded_height,
        )
        _set_geometry(info, geometry)
        cuvid().call("cuvidCreateDecoder", ctypes.byref(self._decoder), ctypes.byref(info))
        self.coded = coded
        self._reports = coded.codec in _REPORTING
        self._limit = (geometry.coded_width, geometry.coded_height)

    def _reconfigure(self, geometry: Geometry) -> None:
        self.synchronize()
        info = cuvid().abi.struct("CUVIDRECONFIGUREDECODERINFO")()
        _set_geometry(info, geometry)
        cuvid().call("cuvidReconfigureDecoder", self._decoder, ctypes.byref(info))

    def submit(self, picture: int) -> None:
        """Queue a picture (address of its CUVIDPICPARAMS); blocks while the hardware queue is full."""
        if status := self.calls.decode(self._decoder, picture):
            _driver.check("cuvidDecodePicture", status)

    def copy_out(self, picture: int, target: int, pitch: int, row_bytes: int, rows: int) -> str | None:
        """Wait for `picture` and queue the copy of its rows to device address `target` on `stream`.

        Returns None, or what the decoder found wrong with the picture, which then is not copied.
        """
        calls, decoder = self.calls, self._decoder
        if status := calls.map(decoder, picture, *calls.mapping):
            _driver.check("cuvidMapVideoFrame64", status)
        source, plan = calls.source.value, calls.plan
        try:
            if self._reports:
                status = calls.status(decoder, picture, calls.report_at)
                if status == _NOT_SUPPORTED:  # GPUs before Maxwell cannot tell
                    self._reports = False
                elif status or calls.report.decodeStatus in calls.damaged:
                    return self._damage(status)
            plan.srcDevice, plan.srcPitch = source, calls.pitch.value
            plan.dstDevice, plan.dstPitch = target, pitch
            plan.WidthInBytes, plan.Height = row_bytes, rows
            if status := calls.copy(*calls.copying):
                _driver.check("cuMemcpy2DAsync_v2", status)
            self._copies += 1
        finally:
            # The decoder writes its next frame to the same memory on the same stream: after this copy.
            if status := calls.unmap(decoder, source):
                _driver.check("cuvidUnmapVideoFrame64", status)
        if self._copies >= MAX_COPIES:
            self.synchronize()
        return None

    def _damage(self, status: int) -> str:
        """What the decoder reports; raises DriverError for the `status` of asking it."""
        _driver.check("cuvidGetDecodeStatus", status)
        name = cuvid().abi.enumerator("cuvidDecodeStatus", self.calls.report.decodeStatus)
        return f"the hardware decoder reports {name}: the stream is damaged"

    def synchronize(self) -> None:
        """Wait until all queued copies are over."""
        self._copies = 0
        if self._stream is not None:
            self._stream.synchronize()

    def destroy(self) -> None:
        """Destroy the decoder, if there is one, after its copies; `prepare` makes a new one."""
        if self._decoder:
            decoder, self._decoder = self._decoder, ctypes.c_void_p()
            self.coded, self.geometry, self.known, self._limit = None, None, None, (0, 0)
            try:
                self.synchronize()
            finally:
                cuvid().call("cuvidDestroyDecoder", decoder)

    def close(self) -> None:
        """Destroy the decoder and the stream; binds the context itself and forgives a driver that is gone."""
        if not self._decoder and self._stream is None:
            return
        freeing(self.index, self._destroy_all)

    def _destroy_all(self) -> None:
        try:
            self.destroy()
        finally:
            if self._stream is not None:
                stream, self._stream, self._calls = self._stream, None, None
                stream.close()


def freeing(index: int, work: Callable[[], None]) -> None:
    """Run `work` in the context of device `index`; a driver that is gone has freed everything itself."""
    try:
        with _driver.bound(index):
            work()
    except DriverError as error:
        if error.status != _driver.CUDA_DEINITIALIZED:
            raise


def _set_geometry(info: Any, geometry: Geometry) -> None:
    """Fill the fields CUVIDDECODECREATEINFO and CUVIDRECONFIGUREDECODERINFO have in common."""
    info.ulWidth, info.ulHeight = geometry.coded_width, geometry.coded_height
    info.ulTargetWidth, info.ulTargetHeight = geometry.padded_width, geometry.padded_height
    info.ulNumDecodeSurfaces = geometry.surfaces
    info.display_area.left, info.display_area.top = geometry.left, geometry.top
    info.display_area.right = geometry.left + geometry.padded_width
    info.display_area.bottom = geometry.top + geometry.padded_height
