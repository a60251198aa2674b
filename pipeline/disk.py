"""A tier behind pinned memory: bytes in a file, written and read around the page cache by a few threads.

Note: [Staging]
Bytes reach the file, and come back, through slots of an arena whose limit bounds them: that is the back
pressure. Who needs a slot and finds none first gives up what was read ahead and is not used yet, then waits
for the oldest write. Writes wait for the device alone, so this ends. When there is nothing left to wait for,
callers hold the slots, and there is none to be had.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from time import perf_counter
from typing import TypeVar
from weakref import ref

import torch
from crc32c import crc32c

from sidelane.errors import LaneError, OffloadError
from sidelane.pipeline.arena import Arena, Slot
from sidelane.pipeline.blockfile import FULL, BlockFile, Extent
from sidelane.pipeline.pool import GRANULE, Piece, Pool

T = TypeVar("T")
IN_FLIGHT = 512 << 20  # bytes of staging memory
THREADS = 4  # that write, and as many that read
STEP = 256 << 20  # bytes by which the file grows
RESERVE = 1 << 30  # bytes of the file system that are left alone


class Disk:
    """Bytes kept in one file without a name, which vanishes with its last user or with the process.

    Thread-safe. What was written is compared with its CRC-32C when it is read.

    Args:
        folder: where the file is; default: the system's for temporary files, which may be memory.
        limit: bytes of the file at most; None: all that is free but 1 GiB.
        in_flight: bytes of staging memory at most. See Note: [Staging].
        threads: that write, and as many that read.

    Attributes:
        error: why bytes were not taken last: OSError of the file system, or None.
        bytes_written, bytes_read: by transfers that are done.
        seconds_waited: that callers of `place` and `load` stood still, together.

    Raises LaneError when `folder` takes no file.
    """

    def __init__(
        self,
        folder: str | None = None,
        *,
        limit: int | None = None,
        in_flight: int = IN_FLIGHT,
        threads: int = THREADS,
    ) -> None:
        if (limit is not None and limit < 0) or in_flight < GRANULE or threads < 1:
            raise LaneError(
                f"limit={limit}, in_flight={in_flight}, threads={threads}: a disk tier needs {GRANULE} bytes "
                "in flight and a thread"
            )
        self.error: OSError | None = None
        self.bytes_written = self.bytes_read = 0
        self.seconds_waited = 0.0
        self._file = BlockFile(folder)
        self._space: Pool[Extent] = Pool(self._extend, lambda: None, limit, STEP)
        self._staging = Arena(in_flight, step=min(in_flight, STEP))
        self._spare = Arena(pinned=False, step=1)  # to read into when callers hold all staging memory
        self._writers = ThreadPoolExecutor(threads, "sidelane-write")
        self._readers = ThreadPoolExecutor(threads, "sidelane-read")
        self._writes: deque[Future[None]] = deque()
        self._ahead: deque[ref[_Copy]] = deque()
        self._lock = Lock()  # of counters and queues; no other lock is taken, and nothing waited for, inside
        self._closed = False
        self._process = os.getpid()  # a forked child has none of the threads

    @property
    def direct(self) -> bool:
        """Whether transfers pass by the page cache."""
        return self._file.direct

    @property
    def held(self) -> int:
        """Bytes of the file in use."""
        return self._space.held

    @property
    def size(self) -> int:
        """Bytes the file takes from the file system."""
        return self._space.reserved

    def place(self, nbytes: int) -> Spill | None:
        """Room for `nbytes`, in the file and in staging memory; the caller fills the latter.

        None when the disk is full or has failed (`error` says how), when `limit` is reached, when no staging
        memory can be had, or when the tier is closed. Waits while staging memory is full of earlier writes.
        """
        if not self._open or (self.error is not None and self.error.errno not in FULL):
            return None
        self.error = None
        self._spare.trim()
        piece = self._space.take(nbytes)
        slot = None if piece is None else self._stage(nbytes)
        return None if piece is None or slot is None else Spill(self, _Copy(nbytes, piece, slot))

    def trim(self) -> int:
        """Give free space back to the file system; returns its bytes."""
        return self._space.trim()

    def close(self) -> None:
        """Finish the writes under way and take no more. To load anything from the file is an error."""
        self._closed = True
        self._writers.shutdown()
        self._readers.shutdown()
        self._file.close()
        self._staging.close()

    @property
    def _open(self) -> bool:
        return not self._closed and self._process == os.getpid()

    def _extend(self, nbytes: int) -> Extent | None:
        try:
            extent = self._file.extend(nbytes, RESERVE)
        except OSError as error:
            self.error = error.with_traceback(None)
            return None
        self.error = None
        return extent

    def _stage(self, nbytes: int) -> Slot | None:
        """A slot of staging memory. See Note: [Staging]."""
        slot, before = self._staging.take(nbytes), perf_counter()
        if slot is None:
            while slot is None and (self._drop_ahead() or self._finish_write()):
                slot = self._staging.take(nbytes)
            self._count(seconds_waited=perf_counter() - before)
        return slot

    def _drop_ahead(self) -> bool:
        """Give up the oldest read that nobody has asked for."""
        while (held := self._pop(self._ahead)) is not None:
            copy = held()
            if copy is not None and (read := self._pop(copy.reads)) is not None:
                read.drop()
                return True
        return False

    def _finish_write(self) -> bool:
        """Wait for the oldest write."""
        future = self._pop(self._writes)
        if future is not None:
            future.result()
        return future is not None

    def _pop(self, queue: deque[T]) -> T | None:
        with self._lock:
            return queue.popleft() if queue else None

    def _start_write(self, copy: _Copy) -> None:
        self._writes.append(self._writers.submit(self._write, [copy]))
        while self._writes[0].done() and len(self._writes) > 1:
            self._pop(self._writes)

    def _start_read(self, copy: _Copy, slot: Slot) -> _Read:
        read = _Read(slot)
        read.future = self._readers.submit(self._read, [copy], read)
        return read

    # The pool holds the arguments of a transfer for a moment after it is done: they are an emptied list then.

    def _write(self, box: list[_Copy]) -> None:
        copy = box.pop()
        try:
            if copy.ready is not None:
                copy.ready.synchronize()
            if copy.owner() is None or copy.slot is None:
                return
            data = _bytes(copy.slot)
            copy.checksum = crc32c(data[: copy.nbytes])
            self._file.write(data, copy.piece.start)
        except Exception as error:
            copy.error = error.with_traceback(None)  # whose frames hold the slot
            if isinstance(error, OSError):
                self.error = error
            return
        copy.slot = None
        self._count(bytes_written=len(data))

    def _read(self, box: list[_Copy], read: _Read) -> None:
        copy, slot = box.pop(), read.slot
        if copy.owner() is None or slot is None:
            return
        try:
            slot.synchronize()
            data = _bytes(slot)
            self._file.read(data, copy.piece.start)
            if crc32c(data[: copy.nbytes]) != copy.checksum:
                raise OSError(errno.EIO, "it was changed on the disk, its checksum does not match")
        except Exception as error:
            read.slot, read.error = None, error.with_traceback(None)  # whose frames hold the slot
            return
        self._count(bytes_read=len(data))

    def _count(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)


class Spill:
    """Bytes on the disk or on their way: fill `slot`, write once, load any number of times.

    The room in the file is free again when this is collected; a write that has not begun is left out.
    """

    def __init__(self, disk: Disk, copy: _Copy) -> None:
        self._disk = disk
        self._copy = copy
        copy.owner = ref(self)

    @property
    def nbytes(self) -> int:
        return self._copy.nbytes

    @property
    def slot(self) -> Slot | None:
        """Memory with the bytes: until they are in the file, and for good when that failed."""
        return self._copy.slot

    @property
    def error(self) -> Exception | None:
        """Why the bytes are not in the file. They stay in memory then, and can be loaded as ever."""
        return self._copy.error

    def write(self, ready: torch.cuda.Event | None = None) -> None:
        """Write what `slot` holds when `ready` is reached. Does not wait."""
        self._copy.ready = ready
        self._disk._start_write(self._copy)

    def fetch(self) -> None:
        """Read ahead, as far as there is staging memory to spare. Does not wait."""
        copy, disk = self._copy, self._disk
        if copy.slot is None and not copy.reads and disk._open:
            slot = disk._staging.take(copy.nbytes)
            if slot is not None:
                copy.reads.append(disk._start_read(copy, slot))
                disk._ahead.append(ref(copy))

    def load(self, stream: torch.cuda.Stream | None = None) -> Slot:
        """Memory with the bytes, for work enqueued on `stream` from now on; for the host without one.

        Waits until they are read. The caller sets `released` of the slot after its copy, as for every slot.
        Raises OffloadError when they cannot be read, or are not what was written.
        """
        copy, disk = self._copy, self._disk
        if (slot := copy.slot) is not None:
            for event in (copy.ready, slot.released):
                if event is not None:
                    event.synchronize() if stream is None else stream.wait_event(event)
            return slot
        if not disk._open:
            raise OffloadError("a spilled tensor is gone: its disk tier was closed, or this process forked")
        before = perf_counter()
        read = disk._pop(copy.reads)
        if read is None:
            slot = disk._stage(copy.nbytes) or disk._spare.take(copy.nbytes)
            if slot is None:
                raise OffloadError(f"no memory to load a spilled tensor of {copy.nbytes} bytes")
            read = disk._start_read(copy, slot)
        read.future.result()
        disk._count(seconds_waited=perf_counter() - before)
        if read.slot is None:
            raise OffloadError(f"a spilled tensor cannot be read back: {read.error}")
        return read.slot


class _Copy:
    """What the transfers of a spill share with it. They outlive it when it dies while they run."""

    owner: ref[Spill]

    def __init__(self, nbytes: int, piece: Piece, slot: Slot) -> None:
        self.nbytes = nbytes
        self.piece = piece
        self.slot: Slot | None = slot
        self.ready: torch.cuda.Event | None = None
        self.reads: deque[_Read] = deque()  # ahead; one, unless threads race
        self.checksum = 0
        self.error: Exception | None = None


class _Read:
    """A transfer from the file. The slot is here, and not the result of the future, so that it is free as
    soon as it is dropped."""

    future: Future[None]

    def __init__(self, slot: Slot) -> None:
        self.slot: Slot | None = slot
        self.error: Exception | None = None

    def drop(self) -> None:
        self.future.result()
        self.slot = None


def _bytes(slot: Slot) -> memoryview:
    return slot.padded.numpy().data
