"""What the headers of an HEVC stream say, read before memory is taken for it (ITU-T H.265, clause 7.3)."""

from __future__ import annotations

from typing import NamedTuple

from sidelane.errors import PacketError
from sidelane.layout import SurfaceLayout

END_OF_BITSTREAM = b"\x00\x00\x01\x4a\x01"  # EOB_NUT, table 7-1
MAX_CODING_BLOCK = 64

_START = b"\x00\x00\x01"
_SPS = 33
_LONGEST_SPS = 512  # bytes of one that are read
_PICTURES = range(16, 22)  # NAL unit types of pictures that refer to no other
_OTHER_PICTURES = range(16)
_CHROMA = ("4:0:0", "4:2:0", "4:2:2", "4:4:4")


class Sequence(NamedTuple):
    """Pictures of a sequence parameter set: visible size, chroma format, bits of luma and chroma samples."""

    width: int
    height: int
    chroma: str
    luma_bits: int
    chroma_bits: int

    def __str__(self) -> str:
        bits = "/".join(map(str, sorted({self.luma_bits, self.chroma_bits})))
        return f"{self.width}x{self.height} {self.chroma}, {bits} bit"


def check_stream(stream: bytes, layout: SurfaceLayout) -> None:
    """Compare what a stream of `encode_hevc` says of itself with `layout`; decodes nothing.

    Memory for the frames of the layout then is in proportion to the bytes that are here: every coding unit of
    an intra picture takes at least a bit, that of its prediction mode (clause 7.3.8.5), and covers at most
    64x64 samples.

    Raises PacketError ('bitstream') when the stream is cut, is too short for the frames of the layout, or
    holds pictures of another size, format, kind or number.
    """
    if not stream.endswith(END_OF_BITSTREAM):
        raise PacketError(
            "bitstream", f"{len(stream)} bytes do not end as a stream does: it is cut or damaged"
        )
    blocks = -(-layout.width // MAX_CODING_BLOCK) * -(-layout.height // MAX_CODING_BLOCK)
    if layout.frames * blocks > 8 * len(stream):
        frames = f"{layout.frames} frames of {layout.width}x{layout.height}"
        raise PacketError("bitstream", f"{len(stream)} bytes are too few for {frames}")
    want = _sequence_of(layout)
    pictures, known = 0, set[bytes]()
    at = stream.find(_START)
    while 0 <= at < len(stream) - len(END_OF_BITSTREAM):
        start = at + len(_START)
        at = stream.find(_START, start)
        kind = stream[start] >> 1 & 63
        if kind == _SPS:
            unit = stream[start : min(at, start + _LONGEST_SPS)]
            if unit not in known:
                if (found := parse_sps(unit)) != want:
                    raise PacketError("bitstream", f"the stream holds {found}, the packet says {want}")
                known.add(unit)
        elif kind in _PICTURES:
            pictures += stream[start + 2] >> 7  # first_slice_segment_in_pic_flag
        elif kind in _OTHER_PICTURES:
            raise PacketError("bitstream", f"a NAL unit of type {kind}, but every picture has to be intra")
    if pictures != layout.frames:
        raise PacketError("bitstream", f"holds {pictures} frames, {layout.frames} expected")
    if not known:
        raise PacketError("bitstream", "holds no sequence parameter set")


def parse_sps(unit: bytes) -> Sequence:
    """Read a sequence parameter set (clause 7.3.2.2), a NAL unit without its start code.

    Raises PacketError ('bitstream') when it ends early or says what no decoder supports.
    """
    bits = _Bits(unit.replace(b"\x00\x00\x03", b"\x00\x00"))
    bits.skip(16 + 4)  # NAL unit header, sps_video_parameter_set_id
    sub_layers = bits.take(3)
    bits.skip(1 + 88 + 8)  # temporal nesting, profile, level
    present = [bits.take(2) for _ in range(sub_layers)]
    if sub_layers:
        bits.skip(2 * (8 - sub_layers))
    for flags in present:
        bits.skip(88 * (flags >> 1) + 8 * (flags & 1))
    bits.golomb()  # sps_seq_parameter_set_id
    chroma = bits.golomb()
    if chroma >= len(_CHROMA):
        raise PacketError("bitstream", f"its chroma format {chroma} does not exist")
    if chroma == 3:
        bits.skip(1)  # separate_colour_plane_flag
    width, height = bits.golomb(), bits.golomb()
    if bits.take(1):
        across, down = (2 if chroma in (1, 2) else 1), (2 if chroma == 1 else 1)
        width -= across * (bits.golomb() + bits.golomb())
        height -= down * (bits.golomb() + bits.golomb())
    return Sequence(width, height, _CHROMA[chroma], 8 + bits.golomb(), 8 + bits.golomb())


def _sequence_of(layout: SurfaceLayout) -> Sequence:
    fmt = layout.format
    bits = 8 if fmt.itemsize == 1 else fmt.bits
    return Sequence(layout.width, layout.height, "4:2:0" if fmt.subsampled else "4:4:4", bits, bits)


class _Bits:
    """A bit reader. Raises PacketError at the end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        self.skip(count)
        return self._value >> self._left & ((1 << count) - 1)

    def skip(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise PacketError("bitstream", "a parameter set ends early")

    def golomb(self) -> int:
        """ue(v): an unsigned number in exponential Golomb code (clause 9.2)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        if zeros > 32:
            raise PacketError("bitstream", "a number in a parameter set has more than 32 bits")
        return (1 << zeros) - 1 + self.take(zeros)
