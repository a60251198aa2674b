"""Passes of cuvid's parser over coded video: it finds the pictures and says when each is decoded and shown.

All methods but `close` need the CUDA context of the device to be current on the calling thread.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from typing import Any

from sidelane.codec import _driver
from sidelane.codec._driver import cuvid
from sidelane.codec._nvdec import (
    PIPELINE_DEPTH,
    CodedFormat,
    Geometry,
    HardwareDecoder,
    chroma_number,
    codec_number,
    freeing,
)
from sidelane.errors import PacketError
from sidelane.layout import SurfaceLayout

MAX_CODING_BLOCK = 64  # frames are coded in whole blocks, so less than one is cut off


class Parsing:
    """One pass of cuvid's parser over one stream; what pictures become is up to the subclass.

    The parser calls back on the thread that feeds it, inside the feeding call. A Python exception cannot
    cross that C frame: the first is kept, later callbacks do nothing, and the feeding method raises it.
    """

    def __init__(
        self, hardware: HardwareDecoder, codec: str, *, clock_rate: int = 0, error_threshold: int = 0
    ) -> None:
        """Make the parser.

        Args:
            codec: "hevc", "h264", "vp9" or "av1".
            clock_rate: timestamp units in a second; 0 for 10 MHz.
            error_threshold: 0 drops damaged pictures, 100 has them decoded, which reports the damage.
        """
        self._hardware = hardware
        self._depth = PIPELINE_DEPTH
        self._waiting: deque[tuple[int, int]] = deque()  # (surface, timestamp) displayed and not yet copied
        self._error: BaseException | None = None
        self._parser = ctypes.c_void_p()
        abi = cuvid().abi
        self._callbacks = {  # the parser holds their addresses
            "pfnSequenceCallback": abi.callback("PFNVIDSEQUENCECALLBACK")(self._guarded(self._sequence)),
            "pfnDecodePicture": abi.callback("PFNVIDDECODECALLBACK")(self._guarded(self._decode)),
            "pfnDisplayPicture": abi.callback("PFNVIDDISPLAYCALLBACK")(self._guarded(self._display)),
        }
        params = abi.struct("CUVIDPARSERPARAMS")(
            CodecType=codec_number(codec),
            ulMaxNumDecodeSurfaces=1,  # replaced by what the sequence callback returns
            ulClockRate=clock_rate,
            ulErrorThreshold=error_threshold,
            ulMaxDisplayDelay=0,  # pictures queue up here, in _waiting
            **{name: ctypes.cast(function, ctypes.c_void_p) for name, function in self._callbacks.items()},
        )
        cuvid().call("cuvidCreateVideoParser", ctypes.byref(self._parser), ctypes.byref(params))

    def feed(self, address: int, size: int, timestamp: int | None = None) -> None:
        """Parse `size` bytes at host `address`; callbacks run before it returns."""
        fields = {"payload": address, "payload_size": size}
        if timestamp is not None:
            fields |= {"flags": cuvid().abi.number("CUVID_PKT_TIMESTAMP"), "timestamp": timestamp}
        self._parse(**fields)

    def finish(self) -> None:
        """End the stream: the last pictures are decoded, displayed and copied."""
        self._parse(flags=cuvid().abi.number("CUVID_PKT_ENDOFSTREAM"))
        while self._waiting:
            self._copy_oldest()

    def close(self) -> None:
        """Destroy the parser; binds the context itself."""
        if self._parser:
            parser, self._parser = self._parser, ctypes.c_void_p()
            freeing(self._hardware.index, lambda: cuvid().call("cuvidDestroyVideoParser", parser))
            self._callbacks.clear()  # they refer to this object

    def _parse(self, **fields: int) -> None:
        packet = cuvid().abi.struct("CUVIDSOURCEDATAPACKET")(**fields)
        status = cuvid().function("cuvidParseVideoData")(self._parser, ctypes.byref(packet))
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
        coded, geometry = self._accept(pointer.contents)
        if not self._hardware.is_prepared(coded, geometry):
            while self._waiting:
                self._copy_oldest()
            self._hardware.prepare(coded, geometry)
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
        self._waiting.append((pointer.contents.picture_index, pointer.contents.timestamp))
        if len(self._waiting) > self._depth:
            self._copy_oldest()
        return 1

    def _copy_oldest(self) -> None:
        self._copy(*self._waiting.popleft())

    def _accept(self, found: Any) -> tuple[CodedFormat, Geometry]:
        """What to decode the sequence `found` (CUVIDEOFORMAT) with; raises if it cannot be decoded."""
        raise NotImplementedError

    def _copy(self, surface: int, timestamp: int) -> None:
        """Take the next displayed picture out of decode surface `surface`."""
        raise NotImplementedError


class StreamDecode(Parsing):
    """An all-intra HEVC stream that becomes the frames of a surface."""

    def __init__(self, hardware: HardwareDecoder, layout: SurfaceLayout, target: int, frames: int) -> None:
        """`target`: device address of the first frame; `frames`: how many the stream must hold."""
        super().__init__(hardware, "hevc")
        self._layout = layout
        self._expected = frames
        self._target = target
        self._shown = 0
        self._copied = 0

    def run(self, address: int, size: int) -> None:
        """Decode the `size` bytes at host `address` into the target surface, and close.

        Raises PacketError if the stream is damaged or differs from the layout in format, size or frames.
        """
        try:
            # The parser finds the pictures itself; the end of the stream, sent at once, flushes the last one.
            # With ENDOFPICTURE it would drop whatever follows the first picture.
            self.feed(address, size)
            self.finish()
        finally:
            self.close()
        if self._shown != self._expected:
            got = f"{self._shown} of {self._expected} frames were decoded"
            raise PacketError("bitstream", f"{got}; the stream is cut or damaged")

    def _accept(self, found: Any) -> tuple[CodedFormat, Geometry]:
        geometry = Geometry.of(found)
        bits = {8 + found.bit_depth_luma_minus8, 8 + found.bit_depth_chroma_minus8}
        chroma = cuvid().abi.enumerator("cudaVideoChromaFormat", found.chroma_format).partition("_")[2]
        got = f"{geometry.width}x{geometry.height} {chroma} {'/'.join(map(str, sorted(bits)))} bit"
        layout, want = self._layout, CodedFormat.of(self._layout.format)
        if (
            (geometry.width, geometry.height) != (layout.width, layout.height)
            or found.chroma_format != chroma_number(want.chroma)
            or bits != {want.bits}
        ):
            size = f"{layout.width}x{layout.height} {want.chroma.replace(':', '')} {want.bits} bit"
            raise PacketError("bitstream", f"the stream is {got}, the packet says {size}")
        padding = max(geometry.coded_width - geometry.width, geometry.coded_height - geometry.height)
        if padding >= MAX_CODING_BLOCK:
            raise PacketError("bitstream", f"{got} are cut out of frames {padding} samples larger")
        return want, geometry

    def _display(self, pointer: Any) -> int:
        if pointer:
            if self._shown >= self._expected:
                raise PacketError("bitstream", f"holds more than the {self._expected} frames expected")
            self._shown += 1
        return super()._display(pointer)

    def _copy(self, surface: int, timestamp: int) -> None:
        layout = self._layout
        rows = layout.format.rows(layout.height)
        target = self._target + self._copied * rows * layout.pitch
        row_bytes = layout.width * layout.format.itemsize
        damage = self._hardware.copy_out(surface, target, layout.pitch, row_bytes, rows)
        if damage is not None:
            raise PacketError("bitstream", damage)
        self._copied += 1
