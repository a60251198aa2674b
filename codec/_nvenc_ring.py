"""The ring of an encoder: surfaces for kernels to fill, the thread that collects their pictures in order."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeAlias

from sidelane.codec import _nvenc
from sidelane.codec._nvenc import Memory, Session
from sidelane.codec._nvenc_output import EncodedSurface as EncodedSurface
from sidelane.codec._nvenc_output import Output, Taker
from sidelane.errors import LaneError, SpaceError
from sidelane.layout import SurfaceLayout


class Surface:
    """One slot of an encoder's ring.

    Attributes:
        tensor: uint8 [layout.rows, layout.pitch] in the encoder's memory. Write it between `acquire` and
            `submit`; what is in it before is undefined.
        held: whether a caller has it: after `acquire`, before `submit`.
    """

    def __init__(self, session: Session, memory: Memory, shape: tuple[int, int], frames: int) -> None:
        rows, pitch = shape
        self.tensor = _nvenc.view(memory)[: rows * pitch].view(shape)
        self.session, self.memory = session, memory
        self.inputs = [session.register(memory, i * rows // frames * pitch, pitch) for i in range(frames)]
        self.held = False

    def unregister(self) -> None:
        """Leave the encoder, which must not work on it; the memory stays."""
        for registered in self.inputs:
            self.session.unmap(registered)
            self.session.unregister(registered)


Ring: TypeAlias = SimpleQueue["Surface | None"]  # of free surfaces; None when there will be no more


def next_surface(ring: Ring, timeout: float | None) -> Surface | None:
    """Wait for a free surface; None, to everybody, when there will be no more.

    Raises LaneError after `timeout` seconds.
    """
    try:
        surface = ring.get(timeout=timeout)
    except Empty:
        raise LaneError(f"no surface came free in {timeout} s: submit those acquired before") from None
    if surface is None:
        ring.put(None)
    return surface


class SurfaceRing:
    """The surfaces of a session, and the ring of the free ones: its own, or that of a pool."""

    def __init__(self, session: Session, layout: SurfaceLayout, ring: Ring | None) -> None:
        self.layout = layout
        self.is_own = ring is None
        self.ring: Ring = SimpleQueue() if ring is None else ring
        self._session = session
        self._count = 0

    def new(self, memory: Memory | None = None) -> Surface:
        """A surface that is not in the ring, on memory of its own by default."""
        nbytes = self.layout.rows * self.layout.pitch
        if memory is None or memory.nbytes < nbytes:
            memory = Memory(self._session.index, nbytes)
        surface = Surface(self._session, memory, self.layout.shape, self.layout.frames)
        self._count += 1
        return surface

    def take_all(self) -> list[Surface]:
        """All surfaces, unregistered. Raises LaneError, changing nothing, if some are not in the ring."""
        surfaces: list[Surface] = []
        with suppress(Empty):
            while (surface := self.ring.get_nowait()) is not None:
                surfaces.append(surface)
            self.ring.put(None)
        if len(surfaces) < self._count:
            for surface in surfaces:
                self.ring.put(surface)
            raise LaneError("submit the surfaces that are acquired, then reconfigure")
        for surface in surfaces:
            surface.unregister()
        self._count = 0
        return surfaces

    def end(self) -> None:
        """Wake who waits for a surface of the session: there will be no more."""
        if self.is_own:
            self.ring.put(None)

    def clear(self) -> None:
        """Forget the surfaces, and `end`."""
        if self.is_own:
            while not self.ring.empty():
                self.ring.get()
            self.end()


class Job:
    """A submitted surface; its future is done once, with the result of `taker` or the first error."""

    def __init__(self, surface: Surface, taker: Taker[Any], frames: int) -> None:
        self.surface, self.taker, self.missing = surface, taker, frames
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Picture(NamedTuple):
    job: Job
    output: Output
    stamp: int
    qp_map: Any  # the driver may read it until the picture is collected


class Collector:
    """The thread that takes pictures out of a session in the order in which they were submitted."""

    def __init__(self, outputs: list[Output], ring: SurfaceRing) -> None:
        """`ring` gets collected surfaces, until an error ends it."""
        self.error: BaseException | None = None
        self.free_outputs: SimpleQueue[Output] = SimpleQueue()
        for output in outputs:
            self.free_outputs.put(output)
        self._ring = ring
        self._pictures: SimpleQueue[Picture | threading.Event | None] = SimpleQueue()
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="nvenc-collect", daemon=True)
        self._thread.start()

    def put(self, picture: Picture) -> None:
        self._pictures.put(picture)

    def drain(self) -> None:
        """Return when all pictures put so far are collected."""
        done = threading.Event()
        self._pictures.put(done)
        done.wait()

    def finish(self) -> None:
        """Return when all pictures are collected, and forget the outputs; no more may be put."""
        self._pictures.put(None)
        if threading.current_thread() is self._thread:  # a callback of a future closes the encoder
            self._run()
        else:
            self._thread.join()
        while not self.free_outputs.empty():
            self.free_outputs.get()

    def _run(self) -> None:
        while not self._finished:
            picture = self._pictures.get()
            if picture is None:
                self._finished = True
            elif isinstance(picture, threading.Event):
                picture.set()
            else:
                self._collect(picture)

    def _collect(self, picture: Picture) -> None:
        job, result, too_long = picture.job, None, None
        try:
            if self.error is not None:  # after an error later pictures might never come out
                raise self.error
            picture.output.collect(picture.stamp, job.taker.take)
            job.missing -= 1
            if not job.missing:
                result = job.taker.result()
        except SpaceError as error:  # the encoder has done its part
            too_long = error
        except BaseException as error:
            if self.error is None:
                self.error = error
                self._ring.end()
            job.fail(error)
        self.free_outputs.put(picture.output)
        if not job.missing and not job.future.done():
            self._ring.ring.put(job.surface)
            if too_long is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(too_long)
