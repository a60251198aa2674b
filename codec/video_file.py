"""Ordinary video files decoded by NVDEC into CUDA tensors.

    from sidelane.codec import open_video

    with open_video("clip.mp4") as video:
        for frame in video:
            frame.y, frame.uv, frame.pts

PyAV demuxes, cuvid's parser reorders, NVDEC decodes. No color conversion: samples are those that were coded.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidelane.codec import _driver
from sidelane.codec._closing import Closing
from sidelane.codec._nvdec import CodedFormat, Geometry, HardwareDecoder
from sidelane.codec._nvdec_parser import Parsing
from sidelane.errors import LaneError, LaneUnavailable, VideoError

# The parser takes Annex B; in MP4 and Matroska H.264 and HEVC are length-prefixed. Annex B passes unchanged.
_FILTERS = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb", "vp9": None, "av1": None}


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame; the tensors are views of one allocation that nothing else uses.

    Attributes:
        y: luma [H, W], uint8 for 8 bit and uint16 for more; values 0 .. 2**bits - 1.
        uv: chroma [ceil(H/2), ceil(W/2), 2] of 4:2:0, [H, W, 2] of 4:4:4; Cb, then Cr.
        bits: per sample.
        pts: presentation time in seconds; None if the file has no timestamps.
    """

    y: Tensor
    uv: Tensor
    bits: int
    pts: float | None

    @property
    def u(self) -> Tensor:
        """Cb [rows, columns of uv], a strided view."""
        return self.uv[..., 0]

    @property
    def v(self) -> Tensor:
        """Cr [rows, columns of uv], a strided view."""
        return self.uv[..., 1]


def open_video(path: str | os.PathLike[str], *, device: torch.device | str = "cuda") -> VideoFile:
    """Open the video stream of an H.264, HEVC, VP9 or AV1 file in any container FFmpeg reads.

    8 bit and more, 4:2:0 and 4:4:4, as far as the GPU decodes them; the frame size may change on the way.

    Raises FileNotFoundError and its like, VideoError for a file that is damaged or holds no video, LaneError
    for another codec or device, LaneUnavailable where there is no NVDEC, DriverError.
    """
    av = _import_av()
    try:
        container = av.open(os.fspath(path))
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise VideoError(f"{path}: FFmpeg cannot read it ({error})") from error
    try:
        return VideoFile(container, _nvdec_device(device))
    except BaseException:
        container.close()
        raise


class VideoFile(Closing):
    """Iterates once over the frames of a file, in display order; made by `open_video`.

    A frame is ready for work of the stream that is current when it is asked for. Asking blocks the host, with
    the GIL released, while NVDEC decodes. Threads take turns. Use it as a context manager or call `close`.
    """

    def __init__(self, container: Any, index: int) -> None:
        self._lock = threading.Lock()
        self._decode = _FileDecode(container, index)
        self.codec = self._decode.codec  # "h264", "hevc", "vp9" or "av1"
        self._finalizer = weakref.finalize(self, self._decode.close)

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        """The next frame. Raises VideoError for a damaged file, LaneUnavailable if this GPU cannot decode it,
        LaneError once closed, DriverError. Any of them closes the file.
        """
        with self._lock:
            if not self._finalizer.alive:
                raise LaneError("this video file is closed; open it again")
            try:
                frame = self._decode.next_frame()
            except BaseException:
                self._finalizer()
                raise
        if frame is None:
            raise StopIteration
        return frame

    def close(self) -> None:
        """Free the decoder and close the file; frames stay valid. Further calls do nothing."""
        with self._lock:
            self._finalizer()


class _FileDecode(Parsing):
    """The pass over one file: packets in, frames out. Owns the container and the hardware decoder."""

    def __init__(self, container: Any, index: int) -> None:
        self._container = container
        stream = container.streams.best("video")
        if stream is None:
            raise VideoError(f"{container.name}: holds no video")
        self.codec: str = stream.codec_context.codec.canonical_name
        if self.codec not in _FILTERS:
            can = ", ".join(_FILTERS)
            raise LaneError(f"{container.name} holds {self.codec} video; NVDEC decodes {can}: transcode it")
        self._time_base = stream.time_base
        self._packets = _demux(container, stream, _FILTERS[self.codec])
        self._frames: deque[Frame] = deque()  # copied and not yet handed out
        self._timed = True  # every packet had a timestamp
        self._keyframe = False  # the packet being parsed
        self._cut: set[int] = set()  # timestamps of pictures an edit list hides, needed as references
        self._seen = False  # a frame came out
        self._ended = False
        with _driver.bound(index):
            clock_rate = round(1 / stream.time_base)
            super().__init__(HardwareDecoder(index), self.codec, clock_rate=clock_rate, error_threshold=100)
        if self.codec == "av1":
            self._depth = 0  # film grain is added on a second surface, whose reuse would go unseen

    def next_frame(self) -> Frame | None:
        """The next frame in display order; None at the end."""
        with _driver.bound(self._hardware.index):
            while not self._frames and not self._ended:
                self._advance()
        return self._frames.popleft() if self._frames else None

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._container.close)
            stack.callback(self._hardware.close)
            super().close()

    def _advance(self) -> None:
        """Parse one packet, or the end."""
        packet = self._next_packet()
        if packet is not None:
            self._keyframe = packet.is_keyframe
            self._timed = self._timed and packet.pts is not None
            if packet.is_discard and packet.pts is not None:
                self._cut.add(packet.pts)
            self.feed(packet.buffer_ptr, packet.buffer_size, packet.pts)
            return
        self.finish()
        self._ended = True
        if not self._seen:
            raise self._damage("no picture in it could be decoded")

    def _next_packet(self) -> Any:
        av = _import_av()
        try:
            packet = next(self._packets, None)
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise self._damage(f"FFmpeg cannot read it ({error})") from error
        if packet is not None and packet.is_corrupt:
            raise self._damage("a packet is cut or damaged")
        return packet

    def _damage(self, problem: str) -> VideoError:
        return VideoError(f"{self._container.name}: {problem}")

    def _accept(self, found: Any) -> tuple[CodedFormat, Geometry]:
        name = self._container.name
        enumerator = _driver.cuvid().abi.enumerator("cudaVideoChromaFormat", found.chroma_format)
        chroma = ":".join(enumerator.partition("_")[2])
        bits = 8 + found.bit_depth_luma_minus8
        if chroma not in ("4:2:0", "4:4:4") or found.bit_depth_chroma_minus8 != found.bit_depth_luma_minus8:
            depth = f"{bits}/{8 + found.bit_depth_chroma_minus8}"
            raise LaneUnavailable(
                f"{name} is {enumerator} at {depth} bit, NVDEC is used for 420 and 444 of one depth: "
                "decode in software"
            )
        coded, geometry = CodedFormat(chroma, bits, self.codec, intra=False), Geometry.of(found)
        if geometry.width < 1 or geometry.height < 1:
            raise self._damage(f"its frames are {geometry.width}x{geometry.height}")
        resized = self._hardware.coded is not None and not self._hardware.is_prepared(coded, geometry)
        if resized and not self._keyframe and self.codec in ("vp9", "av1"):
            raise LaneUnavailable(f"{name} changes its frame size between key frames: decode in software")
        return coded, geometry

    def _copy(self, surface: int, timestamp: int) -> None:
        if timestamp in self._cut:
            return
        hardware = self._hardware
        coded, geometry = hardware.coded, hardware.geometry
        if coded is None or geometry is None:
            raise self._damage("a picture is shown before any sequence header")
        columns, luma_rows = geometry.padded_width, geometry.padded_height
        rows = luma_rows * 3 // 2 if coded.chroma == "4:2:0" else luma_rows * 3
        dtype = torch.uint8 if coded.bits == 8 else torch.int16
        samples = torch.empty((rows, columns), dtype=dtype, device=_driver.torch_device(hardware.index))
        ready = _driver.Event(hardware.index)
        try:
            hardware.stream.wait(ready)
        finally:
            ready.close()
        pitch = columns * samples.itemsize
        damage = hardware.copy_out(surface, samples.data_ptr(), pitch, pitch, rows)
        hardware.synchronize()
        if damage is not None:
            raise self._damage(damage)
        if coded.bits > 8:  # NVDEC aligns samples to the most significant bit
            samples.bitwise_right_shift_(16 - coded.bits).bitwise_and_((1 << coded.bits) - 1)
            samples = samples.view(torch.uint16)
        self._seen = True
        pts = float(timestamp * self._time_base) if self._timed else None
        y, uv = samples[:luma_rows], samples[luma_rows:]
        if coded.chroma == "4:2:0":
            uv = uv.view(luma_rows // 2, columns // 2, 2)[: -(-geometry.height // 2)]
        else:
            uv = uv.view(2, luma_rows, columns).permute(1, 2, 0)[: geometry.height, : geometry.width]
        self._frames.append(Frame(y[: geometry.height, : geometry.width], uv, coded.bits, pts))


def _demux(container: Any, stream: Any, filter_name: str | None) -> Iterator[Any]:
    """Packets of `stream`, through a bitstream filter if one is named."""
    packets = (packet for packet in container.demux(stream) if packet.size)
    if filter_name is None:
        yield from packets
        return
    bitstream_filter = _import_av().bitstream.BitStreamFilterContext(filter_name, stream)
    for packet in packets:
        yield from bitstream_filter.filter(packet)
    yield from bitstream_filter.filter(None)


def _nvdec_device(device: torch.device | str) -> int:
    """Ordinal of a CUDA device. Raises LaneUnavailable without the driver's libraries or a GPU."""
    for library in (_driver.cuda(), _driver.cuvid()):
        if library.missing is not None:
            raise LaneUnavailable(f"NVDEC cannot be used: {library.missing}")
    try:
        return _driver.device_index(device)
    except (AssertionError, RuntimeError) as error:  # what torch raises without CUDA or without a GPU
        raise LaneUnavailable(
            f"NVDEC cannot be used: {error}; run on a machine with an NVIDIA GPU"
        ) from error


def _import_av() -> Any:
    try:
        import av
        import av.bitstream
    except ImportError as error:
        raise LaneUnavailable(f"video files are read by PyAV ({error}): pip install av") from error
    return av
