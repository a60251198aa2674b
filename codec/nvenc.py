"""Surfaces encoded as HEVC by NVENC: an encoder with a ring of surfaces, a pool over all engines.

Kernels write the very memory the encoder reads: acquire a surface of the ring, fill it, submit it. No machine
with NVENC has run this code: it is tested against an emulated driver only (tests/emulated_driver).
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidelane.codec import _driver
from sidelane.codec._nvenc import NOT_OFFERED, Memory, Session, open_session
from sidelane.codec._nvenc_config import CTB, Coding, EncoderCaps
from sidelane.codec._nvenc_ring import Collector, EncodedSurface, Job, Picture, Ring, Surface
from sidelane.codec.hevc import MAX_QP
from sidelane.errors import DriverError, LaneError, LaneUnavailable
from sidelane.layout import SurfaceLayout

IDLE_ENCODERS = 2  # kept by encode_nvenc; all processes of a system share a few sessions
OUTPUTS = 4  # pictures in flight per session; the API asks for at least this many bitstream buffers
PITCH_ALIGNMENT = 256  # bytes; also aligns the frames of a surface
PRESETS = range(1, 8)


def _nothing() -> None:
    pass


class Encoder:
    """An NVENC session for surfaces of one size: HEVC, every picture intra, in the order of submission.

    Several threads may use it, one at a time; `EncoderPool` runs sessions side by side. A driver call that
    fails ends the session: what was submitted before is still delivered, later calls raise. Use it as a
    context manager or call `close`; surfaces keep their memory as long as their tensors are in use.

    Not run on hardware yet (see the module).
    """

    def __init__(
        self,
        layout: SurfaceLayout,
        *,
        qp: int | None = None,
        device: torch.device | str = "cuda",
        surfaces: int = 2,
        preset: int = 1,
        qp_map: bool = False,
        repeat_headers: bool = False,
        make_room: Callable[[], None] = _nothing,
        ring: Ring | None = None,
    ) -> None:
        """Open and configure a session.

        Args:
            layout: format, frame size, frames and pitch (a multiple of 256) of every surface.
            qp: None is lossless; 0..51 the constant quantization parameter.
            surfaces: slots of the ring.
            preset: 1 (fastest) to 7.
            qp_map: allow a map of QP differences with every surface; needs `qp`.
            repeat_headers: let the driver write the parameter sets before every picture; they are the same
                bytes that `EncodedSurface.stream` puts there.
            make_room: called when all encode sessions of the system are taken, before trying again.
            ring: where free surfaces go, a queue of the encoder's own by default.

        Raises LaneUnavailable if this GPU cannot encode it or has no session left, LaneError for a wrong
        argument, DriverError.
        """
        _check_options(layout, qp, preset, qp_map)
        self.layout = layout
        self.index = _driver.device_index(device)
        self._session = open_session(self.index, make_room)
        self._owns_ring = ring is None
        self._ring: Ring = SimpleQueue() if ring is None else ring
        self._submitting = threading.Lock()
        self._error: BaseException | None = None
        self._stamp = 0
        try:
            self.caps: EncoderCaps = self._session.caps()
            fmt = layout.format
            coding = Coding(fmt, layout.width, layout.height, qp, preset, qp_map, repeat_headers)
            if (refusal := self.caps.refusal(coding)) is not None:
                raise LaneUnavailable(f"NVENC on cuda:{self.index}: {refusal}; encode in software")
            self._initialize(coding)
            outputs = [self._session.create_output() for _ in range(OUTPUTS)]
            size = layout.rows * layout.pitch
            slots = [self._new_surface(Memory(self.index, size)) for _ in range(surfaces)]
            wake = partial(self._ring.put, None) if self._owns_ring else _nothing
            self._collector = Collector(self._session, outputs, self._ring, wake)
        except BaseException:
            _close_quietly(self._session)
            raise
        for slot in slots:
            self._ring.put(slot)
        self._finalizer = weakref.finalize(self, _shut, self._session, self._collector)

    def _initialize(self, coding: Coding) -> None:
        try:
            self._session.initialize(coding)
        except DriverError as error:
            if error.status in NOT_OFFERED and error.call.startswith("nvEnc"):
                raise LaneUnavailable(f"NVENC on cuda:{self.index}: {error}; encode in software") from error
            raise
        self._headers = b"" if coding.repeat_headers else self._session.headers()

    def _new_surface(self, memory: Memory) -> Surface:
        return Surface(self._session, memory, self.layout.shape, self.layout.frames)

    def acquire(self, timeout: float | None = None) -> Surface:
        """A free surface of the ring; waits for one.

        Raises LaneError after `timeout` seconds or if the encoder is closed or failed, DriverError.
        """
        try:
            surface = self._ring.get(timeout=timeout)
        except Empty:
            raise LaneError(f"no surface came free in {timeout} s: submit those acquired before") from None
        if surface is None:
            self._ring.put(None)
            self._check_open()
            raise LaneError("this encoder is closed; make a new one")
        return self.take(surface)

    def take(self, surface: Surface) -> Surface:
        """Make a surface out of the ring the caller's to write. Raises as `acquire`."""
        with self._call():
            for registered in surface.inputs:
                self._session.unmap(registered)
        surface.held = True
        return surface

    def adopt(self, surface: Surface) -> Surface:
        """A surface of this encoder, acquired, on the memory of one that another encoder of its kind lost."""
        with self._call():
            mine = self._new_surface(surface.memory)
        mine.held = True
        return mine

    def submit(self, surface: Surface, qp_map: Tensor | None = None) -> Future[EncodedSurface]:
        """Encode an acquired surface after the work of the current stream; it returns to the ring by itself.

        Blocks while the encoder has `OUTPUTS` pictures in flight.

        Args:
            qp_map: int8 [frames, ceil(height / 32), ceil(width / 32)] on the CPU, added to the QP of each
                coding tree block.

        The future raises DriverError; its callbacks run on the collecting thread and must not wait for this
        encoder. Raises LaneError for a surface that is not acquired or an encoder that is closed or failed,
        DriverError.
        """
        maps = self._check_map(qp_map)
        with self._call():
            if surface.session is not self._session or not surface.held:
                raise LaneError("this surface is not acquired from this encoder: acquire it before submit")
            surface.held = False
            job = Job(surface, self._headers, self.layout.frames)
            ready = _driver.Event(self.index)
            try:
                with _driver.bound(self.index):
                    self._session.stream.wait(ready)
            finally:
                ready.close()
            for number, registered in enumerate(surface.inputs):
                output = self._collector.free_outputs.get()
                if self._collector.error is not None:
                    raise self._collector.error
                mapped = self._session.map(registered)
                one = None if maps is None else maps[number]
                self._session.encode(mapped, self.layout.pitch, output, self._stamp, one)
                self._collector.put(Picture(job, output, self._stamp, one))
                self._stamp += 1
        return job.future

    def encode(self, source: Tensor) -> EncodedSurface:
        """Encode a copy of `source`, uint8 [layout.rows, layout.pitch], and wait for the bytes.

        Raises as `acquire` and `submit`.
        """
        check_source(source, self.layout)
        surface = self.acquire()
        surface.tensor.copy_(source)
        return self.submit(surface).result()

    def set_qp(self, qp: int) -> None:
        """Encode surfaces submitted from now on with constant `qp`; the session stays.

        Raises LaneError if the encoder is lossless, closed or failed or `qp` out of range, DriverError.
        """
        if self._session.coding.qp is None:
            raise LaneError("a lossless session cannot change to a QP: open another encoder")
        _check_options(self.layout, qp, 1, False)
        with self._call():
            self._session.set_qp(qp)
            if self._headers:
                self._headers = self._session.headers()

    def settle(self) -> None:
        """Wait for the kernels that fill the surfaces submitted so far."""
        with _driver.bound(self.index):
            self._session.stream.synchronize()

    def owns(self, surface: Surface) -> bool:
        """Whether `surface` is of this encoder."""
        return surface.session is self._session

    @property
    def failed(self) -> bool:
        """Whether a driver call ended the session."""
        return self._error is not None or self._collector.error is not None

    def close(self) -> None:
        """Deliver what was submitted, then free the session and the ring. Further calls do nothing.

        Raises the first DriverError of a call that failed in between; everything is freed nonetheless.
        """
        with self._submitting:
            if not self._finalizer.alive:
                return
            try:
                self._finalizer()
            finally:
                if self._owns_ring:
                    while not self._ring.empty():
                        self._ring.get()
                    self._ring.put(None)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except DriverError:
            if error is None:
                raise

    @contextmanager
    def _call(self) -> Iterator[None]:
        """One thread at a time; a driver call that fails in here ends the session."""
        with self._submitting:
            self._check_open()
            try:
                yield
            except DriverError as error:
                self._error = error
                if self._owns_ring:
                    self._ring.put(None)
                raise

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise LaneError("this encoder is closed; make a new one")
        if (error := self._error or self._collector.error) is not None:
            raise LaneError(f"this encoder failed ({error}); make a new one") from error

    def _check_map(self, qp_map: Tensor | None) -> list[Any] | None:
        """One ctypes array of int8 per frame."""
        if qp_map is None:
            return None
        if not self._session.coding.qp_map:
            raise LaneError("this encoder takes no QP map: open it with qp_map=True")
        blocks = (-(-self.layout.height // CTB), -(-self.layout.width // CTB))
        want = (self.layout.frames, *blocks)
        if qp_map.dtype != torch.int8 or tuple(qp_map.shape) != want or qp_map.device.type != "cpu":
            got = f"{qp_map.dtype} {list(qp_map.shape)} on {qp_map.device}"
            raise LaneError(f"qp_map is {got}: pass torch.int8 {list(want)} on the CPU")
        row = ctypes.c_int8 * (blocks[0] * blocks[1])
        return [row(*frame.flatten().tolist()) for frame in qp_map]


def _shut(session: Session, collector: Collector) -> None:
    collector.finish()
    session.close()


def _close_quietly(session: Session) -> None:
    """Close a session that failed already: its first error is the one to tell."""
    with suppress(DriverError):
        session.close()


def _check_options(layout: SurfaceLayout, qp: int | None, preset: int, qp_map: bool) -> None:
    if qp is not None and not (isinstance(qp, int) and 0 <= qp <= MAX_QP):
        raise LaneError(f"qp={qp!r} is neither None (lossless) nor an integer 0..{MAX_QP}")
    if qp is not None and layout.format.split:
        raise LaneError(
            f"surface format '{layout.format.name}' splits codes over planes: use qp=None (lossless)"
        )
    if qp is None and qp_map:
        raise LaneError("lossless coding has no QP to map: pass qp=")
    if preset not in PRESETS:
        raise LaneError(f"preset={preset!r} is outside {PRESETS.start}..{PRESETS.stop - 1}")
    if layout.pitch % PITCH_ALIGNMENT:
        raise LaneError(f"pitch {layout.pitch} is not a multiple of {PITCH_ALIGNMENT} bytes")


def check_source(source: Tensor, layout: SurfaceLayout) -> None:
    if source.dtype != torch.uint8 or tuple(source.shape) != layout.shape:
        found = f"{source.dtype} {list(source.shape)}"
        raise LaneError(f"surface is {found}: pass torch.uint8 {list(layout.shape)}")


def encoder_caps(device: torch.device | str = "cuda") -> EncoderCaps:
    """What NVENC does with HEVC on `device`, asked in a session of its own.

    Raises LaneUnavailable if there is no encoder, no driver library or no free session, DriverError.
    """
    session = open_session(_driver.device_index(device), release_idle_encoders)
    try:
        caps = session.caps()
    except BaseException:
        _close_quietly(session)
        raise
    session.close()
    return caps


class _Key(NamedTuple):
    device: int
    format: str
    width: int
    height: int
    pitch: int
    frames: int
    qp: int | None


_idle: dict[_Key, Encoder] = {}  # least recently used first
_idle_lock = threading.Lock()


def encode_nvenc(
    surface: Tensor, layout: SurfaceLayout, *, qp: int | None = None, device: torch.device | str = "cuda"
) -> bytes:
    """`encode_hevc` by NVENC: the stream of a surface, uint8 [layout.rows, layout.pitch] on `device`.

    Up to `IDLE_ENCODERS` sessions are kept for later surfaces of their kind. Raises as `Encoder`.
    """
    index = _driver.device_index(device)
    frame = (layout.width, layout.height, layout.pitch, layout.frames)
    key = _Key(index, layout.format.name, *frame, qp)
    with _idle_lock:
        encoder = _idle.pop(key, None)
    if encoder is None:
        encoder = Encoder(layout, qp=qp, device=f"cuda:{index}", surfaces=1, make_room=release_idle_encoders)
    try:
        stream = encoder.encode(surface).stream()
    except BaseException:
        with suppress(DriverError):
            encoder.close()
        raise
    with _idle_lock:
        surplus = [_idle.pop(key)] if key in _idle else []
        _idle[key] = encoder
        while len(_idle) > IDLE_ENCODERS:
            surplus.append(_idle.pop(next(iter(_idle))))
    for old in surplus:
        old.close()
    return stream


def release_idle_encoders() -> None:
    """Close the sessions that `encode_nvenc` keeps; consumer GPUs allow few per system."""
    with _idle_lock:
        encoders = list(_idle.values())
        _idle.clear()
    for encoder in encoders:
        encoder.close()
