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
    freeing,
)
from sidelane.codec.probe import codec_number


class Parsing:
    """One pass of cuvid's parser over one stream; what pictures become is up to the subclass.

    The parser calls back on the thread that feeds it, inside the feeding call. A Python exception cannot
    cross that C frame: the first is kept, later callbacks do nothing, and the feeding method raises it.
    """

    def __init__(
        self, hardware: HardwareDecoder, codec: str, *, clock_rate: int = 0, error_threshold: int = 0
    ) -> None:
        """The parser is made when it is fed.

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
        self._callbacks: dict[str, Any] = {}  # the parser holds their addresses
        self._options = {
            "CodecType": codec_number(codec),
            "ulMaxNumDecodeSurfaces": 1,  # replaced by what the sequence callback returns
            "ulClockRate": clock_rate,
            "ulErrorThreshold": error_threshold,
            "ulMaxDisplayDelay": 0,  # pictures queue up here, in _waiting
        }

    def _open(self) -> None:
        abi = cuvid().abi
        self._callbacks = {
            "pfnSequenceCallback": abi.callback("PFNVIDSEQUENCECALLBACK")(self._guarded(self._sequence)),
            "pfnDecodePicture": abi.callback("PFNVIDDECODECALLBACK")(self._guarded(self._decode)),
            "pfnDisplayPicture": abi.callback("PFNVIDDISPLAYCALLBACK")(self._guarded(self._display)),
        }
        addresses = {name: ctypes.cast(f, ctypes.c_void_p) for name, f in self._callbacks.items()}
        params = abi.struct("CUVIDPARSERPARAMS")(**self._options, **addresses)
        cuvid().call("cuvidCreateVideoParser", ctypes.byref(self._parser), ctypes.byref(params))

    def feed(self, address: int, size: int, timestamp: int | None = None) -> None:
        """Parse `size` bytes at host `address`; callbacks run before it returns."""
        fields = {"payload": address, "payload_size": size}
        if timestamp is not None:
            fields |= {"flags": cuvid().abi.number("CUVID_PKT_TIMESTAMP"), "timestamp": timestamp}
        self._parse(**fields)

    def finish(self) -> None:
        """End the stream: all pictures are decoded, displayed and copied when this returns."""
        if self._parser:
            self._parse(flags=cuvid().abi.number("CUVID_PKT_ENDOFSTREAM"))
        while self._waiting:
            self._copy_oldest()
        self._hardware.synchronize()

    def close(self) -> None:
        """Destroy the parser; binds the context itself."""
        if self._parser:
            parser, self._parser = self._parser, ctypes.c_void_p()
            freeing(self._hardware.index, lambda: cuvid().call("cuvidDestroyVideoParser", parser))
            self._callbacks.clear()  # they refer to this object

    def _parse(self, **fields: int) -> None:
        if not self._parser:
            self._open()
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
        picture = pointer.contents
        while picture.CurrPicIdx in [surface for surface, _ in self._waiting]:
            self._copy_oldest()
        self._hardware.submit(ctypes.addressof(picture))
        return 1

    def _display(self, pointer: Any) -> int:
        if not pointer:  # end of stream
            return 1
        shown = pointer.contents
        self._waiting.append((shown.picture_index, shown.timestamp))
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
