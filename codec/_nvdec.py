"""HEVC decoding by NVDEC through cuvid's parser: one hardware decoder, and one pass over a stream.

All functions need the CUDA context of the device to be current on the calling thread.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sidelane.codec import _driver
from sidelane.codec._driver import Stream, cuda, cuvid
from sidelane.codec.probe import decoder_caps
from sidelane.errors import DriverError, LaneUnavailable, PacketError
from sidelane.layout import SurfaceFormat, SurfaceLayout

# Pictures in the hardware's queue while the host waits for the oldest, so that the engine never idles.
PIPELINE_DEPTH = 4
MAX_CODING_BLOCK = 64  # frames are coded in whole blocks, so less than one is cut off
_NOT_SUPPORTED = 801


@dataclass(frozen=True)
class CodedFormat:
    """Samples as they are coded, and the surface format NVDEC writes them in (cuvid names)."""

    chroma: str  # "4:2:0" or "4:4:4"
    bits: int
    output: str

    @classmethod
    def of(cls, format: SurfaceFormat) -> CodedFormat:
        bits = 8 if format.itemsize == 1 else format.bits
        if format.subsampled:
            return cls("4:2:0", bits, "NV12" if bits == 8 else "P016")
        return cls("4:4:4", bits, "YUV444" if bits == 8 else "YUV444_16Bit")


@dataclass(frozen=True)
class Geometry:
    """Coded frame size, the visible rectangle in it, and decode surfaces the stream needs."""

    coded_width: int
    coded_height: int
    left: int
    top: int
    width: int
    height: int
    surfaces: int


class HardwareDecoder:
    """A cuvid decoder and the stream its frames are copied on; created and resized as streams ask for it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.coded: CodedFormat | None = None
        self._geometry: Geometry | None = None
        self._limit = (0, 0)  # coded size up to which reconfiguration works
        self._decoder = ctypes.c_void_p()
        self._stream: Stream | None = None

    @property
    def stream(self) -> Stream:
        if self._stream is None:
            self._stream = Stream()
        return self._stream

    def is_prepared(self, coded: CodedFormat, geometry: Geometry) -> bool:
        return (coded, geometry) == (self.coded, self._geometry)

    def prepare(self, coded: CodedFormat, geometry: Geometry) -> None:
        """Get ready for a stream by reconfiguration or, failing that, anew; decoded pictures are lost."""
        within = geometry.coded_width <= self._limit[0] and geometry.coded_height <= self._limit[1]
        if self._decoder and coded == self.coded and within:
            self._reconfigure(geometry)
        else:
            self._create(coded, geometry)
        self._geometry = geometry

    def _create(self, coded: CodedFormat, geometry: Geometry) -> None:
        self.destroy()
        device = f"cuda:{self.index}"
        caps = decoder_caps(device, "hevc", coded.chroma, coded.bits)
        refusal = caps.refusal(geometry.coded_width, geometry.coded_height)
        if refusal:
            raise LaneUnavailable(f"NVDEC on {device}: {refusal}; decode in software")
        abi = cuvid().abi
        info = abi.struct("CUVIDDECODECREATEINFO")(
            CodecType=abi.number("cudaVideoCodec_HEVC"),
            ChromaFormat=_chroma_number(coded.chroma),
            OutputFormat=abi.number(f"cudaVideoSurfaceFormat_{coded.output}"),
            DeinterlaceMode=abi.number("cudaVideoDeinterlaceMode_Weave"),
            ulCreationFlags=abi.number("cudaVideoCreate_PreferCUVID"),
            bitDepthMinus8=coded.bits - 8,
            ulIntraDecodeOnly=1,
            ulNumOutputSurfaces=1,
            ulMaxWidth=geometry.coded_width,
            ulMaxHeight=geometry.coded_height,
        )
        _set_geometry(info, geometry)
        cuvid().call("cuvidCreateDecoder", ctypes.byref(self._decoder), ctypes.byref(info))
        self.coded = coded
        self._limit = (geometry.coded_width, geometry.coded_height)

    def _reconfigure(self, geometry: Geometry) -> None:
        info = cuvid().abi.struct("CUVIDRECONFIGUREDECODERINFO")()
        _set_geometry(info, geometry)
        cuvid().call("cuvidReconfigureDecoder", self._decoder, ctypes.byref(info))

    def submit(self, picture: Any) -> None:
        """Queue a picture (pointer to CUVIDPICPARAMS); blocks while the hardware queue is full."""
        cuvid().call("cuvidDecodePicture", self._decoder, picture)

    def copy_out(self, picture: int, target: int, layout: SurfaceLayout) -> None:
        """Wait for `picture`, copy all its rows to device address `target`, return when they are there.

        Raises PacketError if the decoder found the picture damaged.
        """
        abi = cuvid().abi
        source, pitch = ctypes.c_uint64(), ctypes.c_uint32()
        how = abi.struct("CUVIDPROCPARAMS")(progressive_frame=1, output_stream=self.stream.handle)
        addresses = ctypes.byref(source), ctypes.byref(pitch)
        cuvid().call("cuvidMapVideoFrame64", self._decoder, picture, *addresses, ctypes.byref(how))
        try:
            self._check_status(picture)
            copy = cuda().abi.struct("CUDA_MEMCPY2D")(
                srcMemoryType=cuda().abi.number("CU_MEMORYTYPE_DEVICE"),
                srcDevice=source,
                srcPitch=pitch.value,
                dstMemoryType=cuda().abi.number("CU_MEMORYTYPE_DEVICE"),
                dstDevice=target,
                dstPitch=layout.pitch,
                WidthInBytes=layout.width * layout.format.itemsize,
                Height=layout.format.rows(layout.height),
            )
            cuda().call("cuMemcpy2DAsync_v2", ctypes.byref(copy), self.stream.handle)
            # The mapped frame goes back to the decoder below, so its copy has to be over.
            self.stream.synchronize()
        finally:
            cuvid().call("cuvidUnmapVideoFrame64", self._decoder, source)

    def _check_status(self, picture: int) -> None:
        abi = cuvid().abi
        report = abi.struct("CUVIDGETDECODESTATUS")()
        call = "cuvidGetDecodeStatus"
        status = cuvid().function(call)(self._decoder, picture, ctypes.byref(report))
        if status == _NOT_SUPPORTED:  # GPUs before Maxwell cannot tell
            return
        _driver.check(call, status)
        bad = (abi.number("cuvidDecodeStatus_Error"), abi.number("cuvidDecodeStatus_Error_Concealed"))
        if report.decodeStatus in bad:
            name = abi.enumerator("cuvidDecodeStatus", report.decodeStatus)
            raise PacketError("bitstream", f"the hardware decoder reports {name}: the stream is damaged")

    def destroy(self) -> None:
        """Destroy the decoder, if there is one; `prepare` makes a new one."""
        if self._decoder:
            decoder, self._decoder = self._decoder, ctypes.c_void_p()
            self.coded, self._geometry, self._limit = None, None, (0, 0)
            cuvid().call("cuvidDestroyDecoder", decoder)

    def close(self) -> None:
        """Destroy the decoder and the stream; binds the context itself and forgives a driver that is gone."""
        if not self._decoder and self._stream is None:
            return
        try:
            with _driver.bound(self.index):
                self.destroy()
                if self._stream is not None:
                    stream, self._stream = self._stream, None
                    stream.close()
        except DriverError as error:
            if error.status != _driver.CUDA_DEINITIALIZED:
                raise


class StreamDecode:
    """One pass of cuvid's parser over one stream.

    The parser calls back on the thread that feeds it, inside the feeding call. A Python exception cannot
    cross that C frame: the first is kept, later callbacks do nothing, and `run` raises it.
    """

    def __init__(self, hardware: HardwareDecoder, layout: SurfaceLayout, target: int, frames: int) -> None:
        """`target`: device address of the first frame; `frames`: how many the stream must hold."""
        self._hardware = hardware
        self._layout = layout
        self._expected = frames
        self._coded = CodedFormat.of(layout.format)
        self._target = target
        self._frame_bytes = layout.format.rows(layout.height) * layout.pitch
        self._frames = 0  # displayed
        self._waiting: deque[tuple[int, int]] = deque()  # (surface, frame) displayed and not yet copied
        self._error: BaseException | None = None

    def run(self, address: int, size: int) -> None:
        """Decode the `size` bytes at host `address` into the target surface.

        Raises PacketError if the stream is damaged or differs from the layout in format, size or frames.
        """
        abi = cuvid().abi
        callbacks = {
            "pfnSequenceCallback": abi.callback("PFNVIDSEQUENCECALLBACK")(self._guarded(self._sequence)),
            "pfnDecodePicture": abi.callback("PFNVIDDECODECALLBACK")(self._guarded(self._decode)),
            "pfnDisplayPicture": abi.callback("PFNVIDDISPLAYCALLBACK")(self._guarded(self._display)),
        }
        params = abi.struct("CUVIDPARSERPARAMS")(
            CodecType=abi.number("cudaVideoCodec_HEVC"),
            ulMaxNumDecodeSurfaces=1,  # replaced by what the sequence callback returns
            ulErrorThreshold=0,
            ulMaxDisplayDelay=0,  # pictures queue up here, in _waiting
            **{name: ctypes.cast(function, ctypes.c_void_p) for name, function in callbacks.items()},
        )
        parser = ctypes.c_void_p()
        cuvid().call("cuvidCreateVideoParser", ctypes.byref(parser), ctypes.byref(params))
        try:
            # The parser finds the pictures itself; the end of the stream, sent at once, flushes the last one.
            # With ENDOFPICTURE it would drop whatever follows the first picture.
            self._feed(parser, payload=address, payload_size=size)
            self._feed(parser, flags=abi.number("CUVID_PKT_ENDOFSTREAM"))
            while self._waiting:
                self._copy_oldest()
        finally:
            cuvid().call("cuvidDestroyVideoParser", parser)
        if self._frames != self._expected:
            got = f"{self._frames} of {self._expected} frames were decoded"
            raise PacketError("bitstream", f"{got}; the stream is cut or damaged")

    def _feed(self, parser: ctypes.c_void_p, **fields: int) -> None:
        packet = cuvid().abi.struct("CUVIDSOURCEDATAPACKET")(**fields)
        status = cuvid().function("cuvidParseVideoData")(parser, ctypes.byref(packet))
        if self._error is not None:
            raise self._error
        _driver.check("cuvidParseVideoData", status)

    def _guarded(self, work: Callable[[Any], int]) -> Callable[[int, Any], int]:
        def callback(_: int, argument: Any) -> int:
            if self._error is not None:
                return 0
            try:
                return work(argument)
            except BaseException as error:
                self._error = error
                return 0

        return callback

    def _sequence(self, pointer: Any) -> int:
        found = pointer.contents
        area = found.display_area
        geometry = Geometry(
            found.coded_width,
            found.coded_height,
            area.left,
            area.top,
            area.right - area.left,
            area.bottom - area.top,
            found.min_num_decode_surfaces + PIPELINE_DEPTH,
        )
        bits = {8 + found.bit_depth_luma_minus8, 8 + found.bit_depth_chroma_minus8}
        chroma = cuvid().abi.enumerator("cudaVideoChromaFormat", found.chroma_format).partition("_")[2]
        got = f"{geometry.width}x{geometry.height} {chroma} {'/'.join(map(str, sorted(bits)))} bit"
        layout, want = self._layout, self._coded
        if (
            (geometry.width, geometry.height) != (layout.width, layout.height)
            or found.chroma_format != _chroma_number(want.chroma)
            or bits != {want.bits}
        ):
            size = f"{layout.width}x{layout.height} {want.chroma.replace(':', '')} {want.bits} bit"
            raise PacketError("bitstream", f"the stream is {got}, the packet says {size}")
        padding = max(geometry.coded_width - geometry.width, geometry.coded_height - geometry.height)
        if padding >= MAX_CODING_BLOCK:
            raise PacketError("bitstream", f"{got} are cut out of frames {padding} samples larger")
        if not self._hardware.is_prepared(want, geometry):
            while self._waiting:
                self._copy_oldest()
            self._hardware.prepare(want, geometry)
        return geometry.surfaces

    def _decode(self, pointer: Any) -> int:
        # The parser may reuse a surface once it is displayed, which is before it is copied.
        while any(surface == pointer.contents.CurrPicIdx for surface, _ in self._waiting):
            self._copy_oldest()
        self._hardware.submit(pointer)
        return 1

    def _display(self, pointer: Any) -> int:
        if not pointer:  # end of stream
            return 1
        if self._frames >= self._expected:
            raise PacketError("bitstream", f"holds more than the {self._expected} frames expected")
        self._waiting.append((pointer.contents.picture_index, self._frames))
        self._frames += 1
        if len(self._waiting) > PIPELINE_DEPTH:
            self._copy_oldest()
        return 1

    def _copy_oldest(self) -> None:
        surface, frame = self._waiting.popleft()
        self._hardware.copy_out(surface, self._target + frame * self._frame_bytes, self._layout)


def _chroma_number(chroma: str) -> int:
    return cuvid().abi.number(f"cudaVideoChromaFormat_{chroma.replace(':', '')}")


def _set_geometry(info: Any, geometry: Geometry) -> None:
    """Fill the fields CUVIDDECODECREATEINFO and CUVIDRECONFIGUREDECODERINFO have in common."""
    info.ulWidth, info.ulHeight = geometry.coded_width, geometry.coded_height
    info.ulTargetWidth, info.ulTargetHeight = geometry.width, geometry.height
    info.ulNumDecodeSurfaces = geometry.surfaces
    info.display_area.left, info.display_area.top = geometry.left, geometry.top
    info.display_area.right = geometry.left + geometry.width
    info.display_area.bottom = geometry.top + geometry.height
