"""The ring of an encoder: surfaces for kernels to fill, the thread that collects their pictures in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

from sidelane.codec import _nvenc
from sidelane.codec._nvenc import Memory, Session
from sidelane.codec.hevc import END_OF_BITSTREAM


class EncodedSurface(NamedTuple):
    """The pictures of one surface. `headers`: the parameter sets of each; b"" if the driver put them in."""

    headers: bytes
    pictures: tuple[bytes, ...]

    def stream(self) -> bytes:
        """Plain HEVC (Annex B) as `encode_hevc` writes it: parameter sets before every picture."""
        return b"".join(self.headers + picture for picture in self.pictures) + END_OF_BITSTREAM


class Surface:
    """One slot of an encoder's ring.

    Attributes:
        tensor: uint8 [layout.rows, layout.pitch] in the encoder's memory. Write it between `acquire` and
            `submit`; what is in it before is undefined.
        held: whether a caller has it: after `acquire`, before `submit`.
    """

    def __init__(self, session: Session, memory: Memory, shape: tuple[int, int], frames: int) -> None:
        self.tensor = _nvenc.view(memory).view(shape)
        self.session, self.memory = session, memory
        size = memory.nbytes // frames
        self.inputs = [session.register(memory, i * size, shape[1]) for i in range(frames)]
        self.held = False


Ring: TypeAlias = SimpleQueue["Surface | None"]  # of free surfaces; None when there will be no more


class Job:
    """A submitted surface; its future is done once, with all pictures or the first error."""

    def __init__(self, surface: Surface, headers: bytes, frames: int) -> None:
        self.surface, self.headers, self.frames = surface, headers, frames
        self.pictures: list[bytes] = []
        self.future: Future[EncodedSurface] = Future()
        self.future.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Picture(NamedTuple):
    job: Job
    output: int
    stamp: int
    qp_map: Any  # the driver may read it until the picture is collected


class Collector:
    """The thread that takes pictures out of a session in the order in which they were submitted."""

    def __init__(self, session: Session, outputs: list[int], ring: Ring, wake: Callable[[], None]) -> None:
        """`ring` gets collected surfaces; `wake` is called when no more will come because of an error."""
        self.error: BaseException | None = None
        self.free_outputs: SimpleQueue[int] = SimpleQueue()
        for output in outputs:
            self.free_outputs.put(output)
        self._session, self._ring, self._wake = session, ring, wake
        self._pictures: SimpleQueue[Picture | None] = SimpleQueue()
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="nvenc-collect", daemon=True)
        self._thread.start()

    def put(self, picture: Picture) -> None:
        self._pictures.put(picture)

    def finish(self) -> None:
        """Return when all pictures are collected; no more may be put."""
        self._pictures.put(None)
        if threading.current_thread() is self._thread:  # a callback of a future closes the encoder
            self._run()
        else:
            self._thread.join()

    def _run(self) -> None:
        while not self._finished:
            picture = self._pictures.get()
            if picture is None:
                self._finished = True
            else:
                self._collect(picture)

    def _collect(self, picture: Picture) -> None:
        job = picture.job
        try:
            if self.error is not None:  # after an error later pictures might never come out
                raise self.error
            job.pictures.append(self._session.collect(picture.output, picture.stamp))
        except BaseException as error:
            if self.error is None:
                self.error = error
                self._wake()
            job.fail(error)
        self.free_outputs.put(picture.output)
        if len(job.pictures) == job.frames:
            self._ring.put(job.surface)
            job.future.set_result(EncodedSurface(job.headers, tuple(job.pictures)))
