"""An NVENC encoder: a session, its ring of surfaces, and the order in which they are used.

No machine with NVENC has run this code: it is tested against an emulated driver only (tests/emulated_driver).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sidelane.codec import _driver
from sidelane.codec._closing import Closing
from sidelane.codec._nvenc import NOT_OFFERED, Memory, Session, open_session
from sidelane.codec._nvenc_checks import (
    PITCH_ALIGNMENT,
    Accepted,
    as_array,
    check_options,
    check_source,
)
from sidelane.codec._nvenc_config import Coding, EncoderCaps
from sidelane.codec._nvenc_memory import DevicePlace
from sidelane.codec._nvenc_output import (
    DeviceOutput,
    EncodedSurface,
    HostOutput,
    Output,
    PictureTaker,
    StreamTaker,
    Taker,
)
from sidelane.codec._nvenc_ring import Collector, Job, Picture, Ring, Surface, SurfaceRing, next_surface
from sidelane.errors import DriverError, LaneError, LaneUnavailable
from sidelane.layout import SurfaceLayout

OUTPUTS = 4  # pictures in flight per session; the API asks for at least this many bitstream buffers


def _nothing() -> None:
    pass


class Encoder(Closing):
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
        max_size: tuple[int, int] = (0, 0),
        on_device: bool = False,
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
            max_size: width and height of the largest frames that `reconfigure` may change to, at least
                those of `layout`.
            on_device: leave the streams in device memory, for `submit_stream` and `encode_stream` alone.
            make_room: called when all encode sessions of the system are taken, before trying again.
            ring: where free surfaces go, a queue of the encoder's own by default.

        Raises LaneUnavailable if this GPU cannot encode it or has no session left, LaneError for a wrong
        argument, DriverError.
        """
        check_options(layout, qp, preset, qp_map)
        self.index = _driver.device_index(device)
        self._session = open_session(self.index, make_room)
        self._ring = SurfaceRing(self._session, layout, ring)
        self._submitting = threading.Lock()
        self._error: BaseException | None = None
        self._stamp = 0
        try:
            self.caps: EncoderCaps = self._session.caps()
            size = (layout.width, layout.height)
            coding = Coding(layout.format, *size, qp, preset, qp_map, repeat_headers, *max_size, on_device)
            if (refusal := self.caps.refusal(coding)) is not None:
                raise LaneUnavailable(f"NVENC on cuda:{self.index}: {refusal}; encode in software")
            self._initialize(coding)
            self._place = self._session.place()
            outputs = [self._new_output() for _ in range(OUTPUTS)]
            slots = [self._ring.new() for _ in range(surfaces)]
            self._collector = Collector(outputs, self._ring)
        except BaseException:
            close_quietly(self._session)
            raise
        for slot in slots:
            self._ring.ring.put(slot)
        self._finalizer = weakref.finalize(self, _shut, self._session, self._collector)

    def _initialize(self, coding: Coding) -> None:
        try:
            self._session.initialize(coding)
        except DriverError as error:
            if error.status in NOT_OFFERED and error.call.startswith("nvEnc"):
                remedy = "leave streams in host memory or encode" if coding.on_device else "encode"
                text = f"NVENC on cuda:{self.index}: {error}; {remedy} in software"
                raise LaneUnavailable(text) from error
            raise
        self._fetch_headers()

    def _fetch_headers(self) -> None:
        self._headers = b"" if self._session.coding.repeat_headers else self._session.headers()

    def _new_output(self) -> Output:
        if not isinstance(self._place, DevicePlace):
            return HostOutput(self._session)
        # Twice a frame: the API's recommendation for small frames, where coding may cost more than samples.
        coding, fmt = self._session.coding, self.layout.format
        room = 2 * coding.max_width * fmt.itemsize * fmt.rows(coding.max_height)
        return DeviceOutput(self._session, self._place, room)

    @property
    def layout(self) -> SurfaceLayout:
        """Of every surface."""
        return self._ring.layout

    @property
    def api(self) -> str:
        """Version of the NVENC interface the session speaks, "13.0" for example."""
        return self._session.abi.name.partition("-")[2]

    @property
    def qp(self) -> int | None:
        """The constant QP; None is lossless."""
        return self._session.coding.qp

    def acquire(self, timeout: float | None = None) -> Surface:
        """A free surface of the ring; waits for one.

        Raises LaneError after `timeout` seconds or if the encoder is closed or failed, DriverError.
        """
        surface = next_surface(self._ring.ring, timeout)
        if surface is None:
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

    def adopt(self, memory: Memory) -> Surface:
        """A surface of this encoder, acquired, on memory of the caller or of an encoder that failed."""
        with self._call():
            mine = self._ring.new(memory)
        mine.held = True
        return mine

    def submit(self, surface: Surface, qp_map: Tensor | None = None) -> Future[EncodedSurface]:
        """Encode an acquired surface after the work of the current stream; it returns to the ring by itself.

        Blocks while the encoder has `OUTPUTS` pictures in flight.

        Args:
            qp_map: int8 [frames, ceil(height / 32), ceil(width / 32)] on the CPU, added to the QP of each
                coding tree block; `sidelane.codec.qp_map` makes one from variances.

        The future raises DriverError; its callbacks run on the collecting thread and must not wait for this
        encoder. Raises LaneError for a surface that is not acquired, a wrong map, or an encoder that is
        closed, failed or leaves its streams on the device, DriverError.
        """
        self.accepted.check(qp_map)
        return self._submit(surface, qp_map, lambda: PictureTaker(self._headers))

    def submit_stream(
        self, surface: Surface, *, out: Tensor | None = None, qp_map: Tensor | None = None
    ) -> Future[Tensor]:
        """`submit`, with the stream in one tensor, uint8 [bytes], as `EncodedSurface.stream` has it.

        Every picture is copied once, from the driver's memory to its place: host memory, or device memory for
        an encoder that is `on_device`, where the bytes are complete when the future is done.

        Args:
            out: contiguous uint8 [room] in that memory, of which the result is a view; nobody else may use it
                before the future is done. By default the result has memory of its own.

        The future raises SpaceError when `out` is too small. The encoder goes on, and the error carries the
        stream.
        """
        self.accepted.check_stream(qp_map, out)
        return self._submit(surface, qp_map, lambda: StreamTaker(self._place, self._headers, out))

    @property
    def accepted(self) -> Accepted:
        """What `submit` and `submit_stream` take."""
        coding = self._session.coding
        return Accepted(self.layout, self._place.device, coding.on_device, coding.qp_map)

    def _submit(
        self, surface: Surface, qp_map: Tensor | None, taker: Callable[[], Taker[Any]]
    ) -> Future[Any]:
        maps = None if qp_map is None else [as_array(frame) for frame in qp_map]
        with self._call():
            if surface.session is not self._session or not surface.held:
                raise LaneError("this surface is not acquired from this encoder: acquire it before submit")
            surface.held = False
            job = Job(surface, taker(), self.layout.frames)
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
                mapped, target = self._session.map(registered), output.begin()
                one = None if maps is None else maps[number]
                self._session.encode(mapped, self.layout.pitch, target, self._stamp, one)
                self._collector.put(Picture(job, output, self._stamp, one))
                self._stamp += 1
        return job.future

    def encode(self, source: Tensor, qp_map: Tensor | None = None) -> EncodedSurface:
        """Encode a copy of `source`, uint8 [layout.rows, layout.pitch], and wait for the bytes.

        Raises as `acquire` and `submit`.
        """
        self.accepted.check(qp_map)
        return self.submit(self._filled(source), qp_map).result()

    def encode_stream(
        self, source: Tensor, *, out: Tensor | None = None, qp_map: Tensor | None = None
    ) -> Tensor:
        """`encode` with the stream in one tensor. Arguments, result and errors as in `submit_stream`."""
        self.accepted.check_stream(qp_map, out)
        return self.submit_stream(self._filled(source), out=out, qp_map=qp_map).result()

    def _filled(self, source: Tensor) -> Surface:
        check_source(source, self.layout)
        surface = self.acquire()
        surface.tensor.copy_(source)
        return surface

    def set_qp(self, qp: int) -> None:
        """Encode surfaces submitted from now on with constant `qp`; the session stays.

        Raises LaneError if the encoder is lossless, closed or failed or `qp` out of range, DriverError.
        """
        if self.qp is None:
            raise LaneError("a lossless session cannot change to a QP: open another encoder")
        check_options(self.layout, qp, 1, False)
        with self._call():
            self._session.reconfigure(replace(self._session.coding, qp=qp))
            self._fetch_headers()

    def takes(self, layout: SurfaceLayout) -> bool:
        """Whether `reconfigure` can change to `layout`."""
        now = self._session.coding
        new = replace(now, width=layout.width, height=layout.height)
        within = new.width <= now.max_width and new.height <= now.max_height
        possible = new == now or (self.caps.resize and self.caps.refusal(new) is None)
        same_kind = layout.format == now.format and layout.pitch % PITCH_ALIGNMENT == 0
        return self._ring.is_own and same_kind and within and possible

    def reconfigure(self, layout: SurfaceLayout) -> None:
        """Encode surfaces of another frame size, pitch or number of frames from now on; the session stays.

        Waits for what was submitted. The surfaces of the ring are made anew, in their memory where it is
        large enough.

        Raises LaneError if `layout` has another format, larger frames than the session was opened for, or
        this GPU cannot do it; while surfaces are acquired; for an encoder of a pool or one that is closed or
        failed; DriverError.
        """
        if not self.takes(layout):
            now = self._session.coding
            wanted = f"'{layout.format.name}' {layout.width}x{layout.height}, pitch {layout.pitch}"
            limit = f"'{now.format.name}' up to {now.max_width}x{now.max_height}"
            raise LaneError(f"a session for {limit} cannot change to {wanted}: open another encoder")
        with self._call():
            if geometry(layout) == geometry(self.layout):
                self._ring.layout = layout
                return
            self._collector.drain()
            self._check_open()
            surfaces = self._ring.take_all()
            changed = replace(self._session.coding, width=layout.width, height=layout.height)
            if changed != self._session.coding:
                self._session.reconfigure(changed)
                self._fetch_headers()
            self._ring.layout = layout
            for surface in surfaces:
                self._ring.ring.put(self._ring.new(surface.memory))

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
                self._ring.clear()

    @contextmanager
    def _call(self) -> Iterator[None]:
        """One thread at a time; a driver call that fails in here ends the session."""
        with self._submitting:
            self._check_open()
            try:
                yield
            except DriverError as error:
                self._error = error
                self._ring.end()
                raise

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise LaneError("this encoder is closed; make a new one")
        if (error := self._error or self._collector.error) is not None:
            raise LaneError(f"this encoder failed ({error}); make a new one") from error


def geometry(layout: SurfaceLayout) -> tuple[int, int, int, int]:
    """What surfaces of one format are told apart by: width, height, frames, pitch."""
    return layout.width, layout.height, layout.frames, layout.pitch


def _shut(session: Session, collector: Collector) -> None:
    collector.finish()
    session.close()


def close_quietly(owner: Session | Encoder) -> None:
    """Close what failed already: its first error is the one to tell."""
    with suppress(DriverError):
        owner.close()
