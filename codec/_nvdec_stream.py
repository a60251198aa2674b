"""An all-intra HEVC stream that becomes the frames of a surface.

Our encoders write all frames alike: the same parameter sets, then one slice of an IDR picture. What cuvid's
parser tells the decoder of such frames differs in address and length alone. So the parser sees the first one;
those like it go to the decoder directly, which spares two calls from C into Python for each. Whatever is not
like it goes to the parser again. A decoder keeps what it has learned for its next stream.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from sidelane.codec._driver import cuvid
from sidelane.codec._nvdec import CodedFormat, Geometry, HardwareDecoder
from sidelane.codec._nvdec_parser import Parsing
from sidelane.codec.hevc_syntax import END_OF_BITSTREAM, MAX_CODING_BLOCK
from sidelane.codec.probe import chroma_number
from sidelane.errors import PacketError
from sidelane.layout import SurfaceLayout

# NAL units, ITU-T H.265 table 7-1 and annex B
_START_CODE = b"\x00\x00\x01"
_NAL_HEADER = 2  # bytes
_IDR_SLICES = (19, 20)
_VPS = 32
_PARAMETER_SETS = (_VPS, 33, 34)

_NEAR = 1 << 14  # bytes searched in a few microseconds, less than it takes to get the GIL back
_SEARCH = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t)
_search = ctypes.CFUNCTYPE(*_SEARCH)(("memmem", ctypes.CDLL(None)))
_search_holding_gil = ctypes.PYFUNCTYPE(*_SEARCH)(("memmem", ctypes.CDLL(None)))
_needle = ctypes.create_string_buffer(_START_CODE, len(_START_CODE))
_NEEDLE = ctypes.addressof(_needle), len(_START_CODE)


class Known(NamedTuple):
    """What the parser has said about a frame, for frames that start with the same bytes.

    Attributes:
        start: the parameter sets, then start code and header of the slice.
        slice: offset of the slice in the frame.
        sequence: the CUVIDEOFORMAT.
        picture: the CUVIDPICPARAMS; surface, address and length are to be set.
        offsets: what `picture` refers to.
    """

    start: bytes
    slice: int
    sequence: Any
    picture: Any
    offsets: Any


class StreamDecode(Parsing):
    """One pass over a stream; the frames go to device memory one after the other."""

    def __init__(self, hardware: HardwareDecoder, layout: SurfaceLayout, target: int, frames: int) -> None:
        """`target`: device address of the first frame; `frames`: how many the stream must hold."""
        super().__init__(hardware, "hevc")
        self._layout = layout
        self._expected = frames
        self._target = target
        self._copied = 0
        self._rows = layout.format.rows(layout.height)  # of one frame
        self._row_bytes = layout.width * layout.format.itemsize
        self._slice: bytes | None = None  # of the frame that is being learned
        self._sequence_seen: Any = None
        self._picture_seen: Any = None

    def run(self, address: int, size: int) -> None:
        """Decode the `size` bytes at host `address` into the target surface, and close.

        Raises PacketError if the stream is damaged or differs from the layout in format, size or frames.
        """
        end = address + size
        try:
            at = self._decode_known(address, end)
            if (frame := _whole_frame(at, end)) is not None:
                self._learn(at, *frame)
                at = self._decode_known(frame[1], end)
            if not _is_over(at, end):
                # The parser finds the pictures itself; the end of the stream, sent at once, flushes the last
                # one. With ENDOFPICTURE it would drop whatever follows the first picture.
                self.feed(at, end - at)
            self.finish()
        finally:
            self.close()
        if self._copied != self._expected:
            got = f"{self._copied} of {self._expected} frames were decoded"
            raise PacketError("bitstream", f"{got}; the stream is cut or damaged")

    def _decode_known(self, at: int, end: int) -> int:
        """Decode the frames from `at` on that start as the known one does; returns where they end."""
        known: Known | None = self._hardware.known
        if known is None or not _starts_with(known.start, at, end):
            return at
        _, geometry = self._accept(known.sequence)
        picture, pointer, offset = known.picture, ctypes.addressof(known.picture), known.slice
        zeros = known.start.index(_START_CODE)  # 1 where frames begin with a start code of four bytes
        number, depth, surfaces = 0, self._depth, geometry.surfaces
        submit, copy = self._hardware.submit, self._copy
        alike = True
        while alike:
            following = _start_code(at + offset + 3, end)
            stop = following - zeros
            alike = _starts_with(known.start, stop, end)
            if not alike:
                stop = following
                if not _is_over(stop, end):
                    break  # there may be more of this frame
            picture.CurrPicIdx = number % surfaces
            picture.pBitstreamData, picture.nBitstreamDataLen = at + offset, stop - at - offset
            submit(pointer)
            if number >= depth:
                copy((number - depth) % surfaces)
            at, number = stop, number + 1
        for queued in range(max(number - depth, 0), number):
            copy(queued % surfaces)
        return at

    def _learn(self, at: int, slice_at: int, stop: int) -> None:
        """Have the parser decode the frame from `at` to `stop` and keep what it says."""
        self._slice = ctypes.string_at(slice_at, stop - slice_at).rstrip(b"\x00")
        self.feed(at, stop - at)
        self.finish()
        self.close()
        self._slice = None
        if self._picture_seen is not None:
            offsets = (ctypes.c_uint32 * 1)(0)
            self._picture_seen.pSliceDataOffsets = ctypes.addressof(offsets)
            offset = slice_at - at
            start = ctypes.string_at(at, offset + len(_START_CODE) + _NAL_HEADER)
            self._hardware.known = Known(start, offset, self._sequence_seen, self._picture_seen, offsets)

    def _sequence(self, pointer: Any) -> int:
        self._sequence_seen = _copy_of(pointer.contents)
        return super()._sequence(pointer)

    def _decode(self, pointer: Any) -> int:
        if self._slice is not None:
            found = pointer.contents
            # A stream's zeros between two NAL units count as part of the first.
            data = ctypes.string_at(found.pBitstreamData, found.nBitstreamDataLen).rstrip(b"\x00")
            self._picture_seen = _copy_of(found) if data == self._slice and found.nNumSlices == 1 else None
        return super()._decode(pointer)

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
        if padding >= MAX_CODING_BLOCK:  # frames are coded in whole blocks, so less than one is cut off
            raise PacketError("bitstream", f"{got} are cut out of frames {padding} samples larger")
        return want, geometry

    def _copy(self, surface: int, timestamp: int = 0) -> None:
        if self._copied == self._expected:
            raise PacketError("bitstream", f"holds more than the {self._expected} frames expected")
        pitch = self._layout.pitch
        target = self._target + self._copied * self._rows * pitch
        damage = self._hardware.copy_out(surface, target, pitch, self._row_bytes, self._rows)
        if damage is not None:
            raise PacketError("bitstream", damage)
        self._copied += 1


def frame_starts(address: int, size: int) -> list[int]:
    """Offsets of frames in `size` bytes at host `address`: where the parameter sets of the first come again.

    Empty if the stream does not start as those of our encoders do.
    """
    end = address + size
    if (frame := _whole_frame(address, end)) is None:
        return []
    starts: list[int] = []
    found: int | None = address
    while found is not None:
        starts.append(found - address)
        found = _search(found + 1, end - found - 1, address, frame[0] - address)
    return starts


def _copy_of(record: Any) -> Any:
    return type(record).from_buffer_copy(record)


def _start_code(at: int, end: int) -> int:
    """Address of the next start code; `end` if there is none."""
    size = end - at
    found = _search_holding_gil(at, size if size < _NEAR else _NEAR, *_NEEDLE)
    if found is None and size > _NEAR:
        overlap = _NEAR - len(_START_CODE) + 1
        found = _search(at + overlap, size - overlap, *_NEEDLE)
    return end if found is None else int(found)


def _starts_with(start: bytes, at: int, end: int) -> bool:
    return end - at >= len(start) and ctypes.string_at(at, len(start)) == start


def _is_over(at: int, end: int) -> bool:
    """Whether nothing but the end of a stream is left."""
    return end - at <= len(END_OF_BITSTREAM) and ctypes.string_at(at, end - at) in (b"", END_OF_BITSTREAM)


def _whole_frame(at: int, end: int) -> tuple[int, int] | None:
    """Slice and end of a frame at `at` that is parameter sets and one IDR slice, else None; addresses."""
    here = _start_code(at, end)
    if here - at > 1 or _kind(here, end) != _VPS:
        return None
    while _kind(here, end) in _PARAMETER_SETS:
        here = _start_code(here + 3, end)
    if _kind(here, end) not in _IDR_SLICES:
        return None
    stop = _start_code(here + 3, end)
    if stop < end and _kind(stop, end) != _VPS and not _is_over(stop, end):
        return None
    if stop < end and ctypes.string_at(stop - 1, 1) == b"\x00":
        stop -= 1  # the first byte of a start code of four
    return here, stop


def _kind(at: int, end: int) -> int:
    """Type of the NAL unit whose start code is at `at`; -1 if it is cut off."""
    return ctypes.string_at(at + 3, 1)[0] >> 1 & 63 if end - at > 3 else -1
