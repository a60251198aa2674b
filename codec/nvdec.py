"""HEVC streams decoded by NVDEC into surfaces: single calls, a reusable decoder, a pool over all engines.

Decoding blocks the host, with the GIL released, until the surface is complete; then any stream may read it.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sidelane.codec import _driver
from sidelane.codec._closing import Closing
from sidelane.codec._nvdec import CodedFormat, HardwareDecoder
from sidelane.codec._nvdec_stream import StreamDecode, frame_starts
from sidelane.codec.probe import decoder_caps
from sidelane.errors import DriverError, LaneError, LaneUnavailable
from sidelane.layout import SurfaceLayout

IDLE_DECODERS = 4  # kept by decode_nvdec; each holds the surfaces of its largest stream


class _Piece(NamedTuple):
    """Consecutive frames of a surface and the bytes of `stream` that code them."""

    stream: bytes | Tensor
    start: int
    size: int
    first: int
    frames: int


class _Job(NamedTuple):
    """A piece and the surface it belongs to."""

    piece: _Piece
    out: Tensor
    layout: SurfaceLayout


class NvDecoder(Closing):
    """One hardware decoder for streams of any format; made anew when chroma format or bit depth change.

    Safe to call from several threads, which then take turns; `NvDecoderPool` runs decoders side by side. Use
    it as a context manager or call `close`.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        """Raises LaneError for a device that is not CUDA."""
        self.index = _driver.device_index(device)
        self._hardware = HardwareDecoder(self.index)
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, self._hardware.close)

    @property
    def coded(self) -> CodedFormat | None:
        """What the decoder is set up for; None before its first stream and after a failure."""
        return self._hardware.coded

    def decode(self, stream: bytes | Tensor, layout: SurfaceLayout, *, out: Tensor | None = None) -> Tensor:
        """Decode an all-intra HEVC stream (Annex B) into a surface.

        Args:
            stream: the bytes, or a contiguous uint8 tensor [bytes] on the CPU.
            layout: of the surface; its format, frame size and number of frames must be the stream's.
            out: uint8 [layout.rows, layout.pitch] on this device, made on the current stream by default. It
                is written after the work of the current stream; bytes between the samples of a row and the
                pitch keep their value.

        Returns:
            `out`, complete.

        Raises PacketError for a stream that is damaged or not what `layout` says, LaneUnavailable if this GPU
        cannot decode it, LaneError for a wrong argument or a closed decoder, DriverError.
        """
        if out is None:
            out = _new_surface(layout, self.index)
        _check_surface(out, layout, self.index)
        ready = _driver.Event(self.index)
        try:
            return self._decode_piece(_whole(stream, layout), out, layout, ready)
        finally:
            ready.close()

    def _decode_piece(
        self, piece: _Piece, out: Tensor, layout: SurfaceLayout, ready: _driver.Event
    ) -> Tensor:
        """Decode `piece` into its frames of `out`, which may be written once `ready` has happened."""
        address = _address(piece.stream) + piece.start
        target = out.data_ptr() + piece.first * layout.format.rows(layout.height) * layout.pitch
        with self._lock, _driver.bound(self.index):
            if not self._finalizer.alive:
                raise LaneError("this decoder is closed; make a new one")
            self._hardware.stream.wait(ready)
            try:
                StreamDecode(self._hardware, layout, target, piece.frames).run(address, piece.size)
            except BaseException:
                self._hardware.destroy()  # it may still hold pictures of this stream
                raise
        return out

    def close(self) -> None:
        """Free the decoder. Further calls do nothing."""
        with self._lock:
            self._finalizer()


_idle: list[NvDecoder] = []  # least recently used first
_idle_lock = threading.Lock()


def decode_nvdec(
    stream: bytes | Tensor, layout: SurfaceLayout, device: torch.device | str = "cuda"
) -> Tensor:
    """Decode an all-intra HEVC stream (Annex B) into a new surface, uint8 [layout.rows, layout.pitch].

    Up to `IDLE_DECODERS` decoders are kept for later streams of their format. Raises as `NvDecoder.decode`.
    """
    index = _driver.device_index(device)
    try:
        return _decode_with_idle(stream, layout, index)
    except DriverError as error:
        if error.status != _driver.CUDA_OUT_OF_MEMORY:
            raise
    release_idle_decoders()
    torch.cuda.empty_cache()
    return _decode_with_idle(stream, layout, index)


def _decode_with_idle(stream: bytes | Tensor, layout: SurfaceLayout, index: int) -> Tensor:
    decoder = _take_idle(index, CodedFormat.of(layout.format)) or NvDecoder(f"cuda:{index}")
    try:
        surface = decoder.decode(stream, layout)
    except BaseException:
        decoder.close()
        raise
    with _idle_lock:
        _idle.append(decoder)
        surplus = _idle[:-IDLE_DECODERS]
        del _idle[:-IDLE_DECODERS]
    for old in surplus:
        old.close()
    return surface


def _take_idle(index: int, coded: CodedFormat) -> NvDecoder | None:
    with _idle_lock:
        for at in reversed(range(len(_idle))):
            if (_idle[at].index, _idle[at].coded) == (index, coded):
                return _idle.pop(at)
    return None


def release_idle_decoders() -> None:
    """Free the decoders that `decode_nvdec` keeps."""
    with _idle_lock:
        decoders, _idle[:] = list(_idle), []
    for decoder in decoders:
        decoder.close()


class NvDecoderPool(Closing):
    """Decodes many streams at once, one decoder and one thread per engine.

    A stream that fails raises where its result is asked for and harms no other; a decoder whose driver call
    failed is replaced and the stream tried once more. Use it as a context manager or call `close`.
    """

    def __init__(self, device: torch.device | str = "cuda", engines: int | None = None) -> None:
        """`engines`: decoders to run, by default one per engine of the GPU.

        Raises LaneUnavailable if the GPU has no decoder, LaneError for a wrong argument.
        """
        self.index = _driver.device_index(device)
        caps = decoder_caps(f"cuda:{self.index}", "hevc", "4:2:0", 8)
        if not caps.supported:
            raise LaneUnavailable(f"cuda:{self.index} has no HEVC decoder; decode in software")
        if engines is not None and engines < 1:
            raise LaneError(f"{engines} decoders decode nothing; engines must be at least 1")
        self.engines = caps.engines if engines is None else engines
        self._decoders: list[NvDecoder] = []
        self._local = threading.local()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self.engines, thread_name_prefix="nvdec")

    def submit(self, stream: bytes | Tensor, layout: SurfaceLayout) -> Future[Tensor]:
        """Start decoding; arguments, result and errors as in `NvDecoder.decode`.

        The surface is made here, on the current stream. A tensor passed as `stream` must stay unchanged.
        """
        return self._start([self._job(stream, layout)])[0]

    def decode_surface(self, stream: bytes | Tensor, layout: SurfaceLayout) -> Tensor:
        """`NvDecoder.decode` with the frames of one stream spread over all decoders.

        Needs the same parameter sets before every frame; a stream without them goes to one decoder.
        """
        whole, out, _ = self._job(stream, layout)
        jobs = self._start([_Job(piece, out, layout) for piece in _split(whole, layout, self.engines)])
        wait(jobs)
        for job in jobs:
            job.result()
        return out

    def decode(self, jobs: Iterable[tuple[bytes | Tensor, SurfaceLayout]]) -> Iterator[Tensor]:
        """The surfaces of (stream, layout) pairs in their order, decoded up to two per engine ahead.

        Decoding starts when the first surface is asked for. The error of a stream is raised at its place.
        """
        coming = iter(jobs)
        running = deque(self._start_next(coming, 2 * self.engines))
        try:
            while running:
                running.extend(self._start_next(coming, 1))
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """Wait for what is running and free the decoders. Further calls do nothing."""
        self._threads.shutdown(cancel_futures=True)
        while self._decoders:
            self._decoders.pop().close()

    def _job(self, stream: bytes | Tensor, layout: SurfaceLayout) -> _Job:
        """A stream and a new surface for it, made on the current stream."""
        whole = _whole(stream, layout)
        return _Job(whole, _new_surface(layout, self.index), layout)

    def _start_next(
        self, coming: Iterator[tuple[bytes | Tensor, SurfaceLayout]], count: int
    ) -> list[Future[Tensor]]:
        """Start the next `count` jobs; the error of one takes its place."""
        jobs: list[_Job] = []
        try:
            for stream, layout in islice(coming, count):
                jobs.append(self._job(stream, layout))
        except Exception as error:
            failed: Future[Tensor] = Future()
            failed.set_exception(error)
            return [*self._start(jobs), failed]
        return self._start(jobs)

    def _start(self, jobs: list[_Job]) -> list[Future[Tensor]]:
        """Start decoding after the present work of the current stream."""
        futures: list[Future[Tensor]] = []
        if not jobs:
            return futures
        ready = _driver.Event(self.index)
        left = iter(range(len(jobs) - 1, -1, -1))

        def done(_: object) -> None:
            if next(left) == 0:
                ready.close()

        try:
            for job in jobs:
                futures.append(self._threads.submit(self._decode_piece, *job, ready))
        except RuntimeError:
            wait(futures)
            ready.close()
            raise LaneError("this pool is closed; make a new one") from None
        for future in futures:
            future.add_done_callback(done)
        return futures

    def _decode_piece(
        self, piece: _Piece, out: Tensor, layout: SurfaceLayout, ready: _driver.Event
    ) -> Tensor:
        decoder = self._own_decoder()
        try:
            return decoder._decode_piece(piece, out, layout, ready)
        except DriverError as error:
            if error.status in _driver.CUDA_STICKY:
                raise
            return decoder._decode_piece(piece, out, layout, ready)

    def _own_decoder(self) -> NvDecoder:
        """The decoder of the calling thread."""
        if not hasattr(self._local, "decoder"):
            self._local.decoder = NvDecoder(f"cuda:{self.index}")
            with self._lock:
                self._decoders.append(self._local.decoder)
        decoder: NvDecoder = self._local.decoder
        return decoder


def _new_surface(layout: SurfaceLayout, index: int) -> Tensor:
    """An uninitialized surface for `layout`."""
    return torch.empty(layout.shape, dtype=torch.uint8, device=_driver.torch_device(index))


def _check_surface(out: Tensor, layout: SurfaceLayout, index: int) -> None:
    device = _driver.torch_device(index)
    got = (tuple(out.shape), out.dtype, out.device, out.is_contiguous())
    if got != (layout.shape, torch.uint8, device, True):
        want = f"contiguous uint8 {list(layout.shape)} on {device}"
        raise LaneError(f"surface is {out.dtype} {list(out.shape)} on {out.device}; pass {want}")


def _whole(stream: bytes | Tensor, layout: SurfaceLayout) -> _Piece:
    if isinstance(stream, Tensor):
        if stream.dtype != torch.uint8 or stream.device.type != "cpu" or not stream.is_contiguous():
            got = f"{stream.dtype} on {stream.device}"
            raise LaneError(f"the stream is {got}; pass bytes or a contiguous uint8 tensor on the CPU")
        return _Piece(stream, 0, stream.numel(), 0, layout.frames)
    return _Piece(stream, 0, len(stream), 0, layout.frames)


def _split(whole: _Piece, layout: SurfaceLayout, parts: int) -> list[_Piece]:
    """At most `parts` pieces of about as many frames each, where all frames have the same parameter sets."""
    starts = frame_starts(_address(whole.stream), whole.size)
    if len(starts) != layout.frames:
        return [whole]
    starts.append(whole.size)
    count = min(parts, layout.frames)
    bounds = [part * layout.frames // count for part in range(count + 1)]
    return [_Piece(whole.stream, starts[a], starts[b] - starts[a], a, b - a) for a, b in pairwise(bounds)]


def _address(stream: bytes | Tensor) -> int:
    """Host address of the bytes; they stay there while `stream` lives."""
    if isinstance(stream, Tensor):
        return stream.data_ptr()
    return ctypes.cast(ctypes.c_char_p(stream), ctypes.c_void_p).value or 0
