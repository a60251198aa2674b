"""NVENC sessions side by side, as many as the GPU has engines, behind one ring of surfaces.

No machine with NVENC has run this code: it is tested against an emulated driver only (tests/emulated_driver).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from sidelane.codec import _driver
from sidelane.codec._closing import Closing
from sidelane.codec._nvenc import Memory
from sidelane.codec._nvenc_encoder import close_quietly
from sidelane.codec._nvenc_ring import EncodedSurface, Ring, Surface, next_surface
from sidelane.codec.nvenc import Encoder, check_source, release_idle_encoders
from sidelane.errors import DriverError, LaneError, LaneUnavailable, SpaceError
from sidelane.layout import SurfaceLayout

ATTEMPTS = 3  # sessions that may fail over one surface


@dataclass(eq=False)
class _Job:
    surface: Surface
    submit: Callable[[Encoder, Surface], Future[Any]]
    tries: int = 0
    future: Future[Any] = field(default_factory=Future)


class EncoderPool(Closing):
    """Encodes surfaces of one size on all engines at once; every surface has its own result.

    A session that fails is replaced, or left out where none can be opened; what it had is encoded by the
    others, from the same memory. Use it as a context manager or call `close`.
    """

    def __init__(
        self,
        layout: SurfaceLayout,
        *,
        qp: int | None = None,
        device: torch.device | str = "cuda",
        sessions: int | None = None,
        surfaces: int = 2,
        preset: int = 1,
        qp_map: bool = False,
        on_device: bool = False,
        make_room: Callable[[], None] = release_idle_encoders,
    ) -> None:
        """Open the sessions.

        Args:
            sessions: how many, by default one per engine; fewer are opened where the system allows fewer.
            surfaces: slots of the ring for each session.
            layout, qp, device, preset, qp_map, on_device, make_room: as for `Encoder`.

        Raises as `Encoder`.
        """
        if sessions is not None and sessions < 1:
            raise LaneError(f"{sessions} sessions encode nothing; sessions must be at least 1")
        self.layout = layout
        self._ring: Ring = SimpleQueue()
        self._open = partial(
            Encoder,
            layout,
            qp=qp,
            device=device,
            preset=preset,
            qp_map=qp_map,
            on_device=on_device,
            make_room=make_room,
            ring=self._ring,
        )
        self._lock = threading.Lock()  # of the two that follow
        self._encoders: deque[Encoder] = deque([self._open(surfaces=surfaces)])
        self._closed = False
        self._accepted = self._encoders[0].accepted  # by all of them
        wanted = sessions or self._encoders[0].caps.engines
        try:
            while len(self._encoders) < wanted:
                self._encoders.append(self._open(surfaces=surfaces))
        except LaneUnavailable:
            pass  # no session is left: go on with those there are
        except BaseException:
            for encoder in self._encoders:
                close_quietly(encoder)
            raise
        self._running: set[Future[Any]] = set()
        self._repairs = ThreadPoolExecutor(1, thread_name_prefix="nvenc-repair")

    @property
    def sessions(self) -> int:
        """Sessions that are open."""
        return len(self._encoders)

    def acquire(self, timeout: float | None = None) -> Surface:
        """A free surface of the ring; waits for one.

        Raises LaneError after `timeout` seconds or if the pool is closed, LaneUnavailable or DriverError when
        no session is left.
        """
        surface = next_surface(self._ring, timeout)
        if surface is None:
            raise LaneError("this pool is closed; make a new one")
        try:
            encoder = self._owner(surface)
            if encoder is not None:
                try:
                    return encoder.take(surface)
                except (DriverError, LaneError):
                    if not encoder.failed:
                        raise
            return self._move(surface.memory)[1]
        except BaseException:
            self._ring.put(surface)  # whoever waits next shall hear of it too
            raise

    def adopt(self, memory: Memory) -> Surface:
        """A surface on memory of the caller, acquired from the session whose turn it is.

        Raises as `acquire`.
        """
        return self._move(memory)[1]

    def submit(self, surface: Surface, qp_map: Tensor | None = None) -> Future[EncodedSurface]:
        """Encode an acquired surface after the work of the current stream; it returns to the ring by itself.

        Raises LaneError for a surface that is not acquired, arguments that `Encoder.submit` refuses, or a
        closed pool; the future raises what stopped the last of `ATTEMPTS` sessions.
        """
        self._accepted.check(qp_map)
        return self._accept(_Job(surface, lambda encoder, surface: encoder.submit(surface, qp_map)))

    def submit_stream(
        self, surface: Surface, *, out: Tensor | None = None, qp_map: Tensor | None = None
    ) -> Future[Tensor]:
        """`Encoder.submit_stream` on the session of the surface.

        Raises as `submit`; the future raises SpaceError too.
        """
        self._accepted.check_stream(qp_map, out)

        def start(encoder: Encoder, surface: Surface) -> Future[Tensor]:
            return encoder.submit_stream(surface, out=out, qp_map=qp_map)

        return self._accept(_Job(surface, start))

    def _accept(self, job: _Job) -> Future[Any]:
        if not job.surface.held:
            raise LaneError("this surface is not acquired: acquire it before submit")
        with self._lock:
            if self._closed:
                raise LaneError("this pool is closed; make a new one")
            self._running.add(job.future)
        job.future.set_running_or_notify_cancel()
        job.future.add_done_callback(self._running.discard)
        self._start(job)
        return job.future

    def encode(self, sources: Iterable[Tensor]) -> Iterator[EncodedSurface]:
        """Encode copies of surfaces, uint8 [layout.rows, layout.pitch]; results come in their order.

        Encoding starts when the first result is asked for and runs up to the size of the ring ahead. The
        error of a surface is raised at its place.
        """
        running: deque[Future[EncodedSurface]] = deque()
        wrong: LaneError | None = None
        for source in sources:
            try:
                check_source(source, self.layout)
            except LaneError as error:
                wrong = error
                break
            surface = self.acquire()
            surface.tensor.copy_(source)
            running.append(self.submit(surface))
            while running and running[0].done():
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
        if wrong is not None:
            raise wrong

    def close(self) -> None:
        """Deliver what was submitted, then free the sessions and the ring. Further calls do nothing.

        Raises the first DriverError of a call that failed in between; everything is freed nonetheless.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        wait(list(self._running))
        self._repairs.shutdown()
        errors = []
        for encoder in self._encoders:
            try:
                encoder.close()
            except DriverError as error:
                errors.append(error)
        self._encoders.clear()
        while not self._ring.empty():
            self._ring.get()
        self._ring.put(None)
        if errors:
            raise errors[0]

    def _start(self, job: _Job) -> None:
        """Submit the surface of `job` to its session, or to others as long as sessions fail."""
        try:
            encoder = self._owner(job.surface)
            while True:
                if encoder is None or encoder.failed:
                    encoder, job.surface = self._move(job.surface.memory)
                job.tries += 1
                try:
                    job.submit(encoder, job.surface).add_done_callback(partial(self._finish, job))
                    return
                except (DriverError, LaneError) as error:
                    if not encoder.failed or not _worth_repeating(error, job.tries):
                        raise
        except BaseException as error:
            self._give_up(job, error)

    def _finish(self, job: _Job, done: Future[Any]) -> None:
        """Runs on the thread that collects the pictures of a session, which must not wait for the session."""
        error = done.exception()
        if error is None:
            job.future.set_result(done.result())
        elif isinstance(error, SpaceError):  # of the destination; the surface went back to the ring
            job.future.set_exception(error)
        elif _worth_repeating(error, job.tries):
            self._repairs.submit(self._start, job)
        else:
            self._give_up(job, error)

    def _give_up(self, job: _Job, error: BaseException) -> None:
        self._ring.put(job.surface)
        job.future.set_exception(error)

    def _owner(self, surface: Surface) -> Encoder | None:
        """The session of `surface`; None if it was retired."""
        with self._lock:
            return next((e for e in self._encoders if e.owns(surface)), None)

    def _move(self, memory: Memory) -> tuple[Encoder, Surface]:
        """A live session and an acquired surface of it on `memory`."""
        tries = 0
        while True:
            encoder = self._live_encoder()
            tries += 1
            try:
                return encoder, encoder.adopt(memory)
            except (DriverError, LaneError) as error:
                if not encoder.failed or not _worth_repeating(error, tries):
                    raise

    def _live_encoder(self) -> Encoder:
        """The session whose turn it is, after those that failed are closed and replaced."""
        with self._lock:
            for encoder in [e for e in self._encoders if e.failed]:
                with suppress(DriverError):
                    encoder.settle()  # others may read its surfaces from now on
                close_quietly(encoder)
                self._encoders.remove(encoder)
                try:
                    self._encoders.append(self._open(surfaces=0))
                except (LaneUnavailable, DriverError):
                    if not self._encoders:
                        raise
            if not self._encoders:
                raise LaneUnavailable("no encode session is left; encode in software")
            self._encoders.rotate(1)
            return self._encoders[0]


def _worth_repeating(error: BaseException, tries: int) -> bool:
    lost = isinstance(error, DriverError) and error.status in _driver.CUDA_STICKY
    return isinstance(error, (DriverError, LaneError)) and not lost and tries < ATTEMPTS
