"""Pinned host memory of exactly the asked size: mapped, registered with CUDA once, and reused.

PyTorch's own host allocator rounds every block up to a power of two and never gives one back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidelane.errors import DriverError, LaneError, OffloadError
from sidelane.pipeline.pool import GRANULE as GRANULE
from sidelane.pipeline.pool import Piece, Pool, rounded

STEP = 256 << 20  # regions are no smaller in the end, unless a limit or the machine wants it
FIRST = 16 << 20  # bytes of the first region of the shared arena
RESERVE = 1 << 30  # bytes of host memory that are left alone
PREFAULT_THREADS = 8
VIEWS = 1024  # tensors over a region that are kept
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14

_forks = 0  # how many times this process descends from a fork


def slot_bytes(nbytes: int) -> int:
    """What a slot of `nbytes` takes from an arena."""
    return rounded(nbytes)


class Slot:
    """A piece of an arena; it returns there when it is collected, on any thread.

    Attributes:
        nbytes: as asked for.
    """

    __slots__ = ("_piece", "nbytes")

    def __init__(self, piece: Piece, nbytes: int) -> None:
        self._piece = piece
        self.nbytes = nbytes

    @property
    def tensor(self) -> Tensor:
        """uint8 [nbytes] in pinned memory (plain memory in an arena that is not pinned). Its address is a
        multiple of 4096, and the bytes up to the next such multiple belong to it. Not to be used after the
        slot. Raises OffloadError in a forked process, which has none of this memory."""
        return self._view(self.nbytes)

    @property
    def padded(self) -> Tensor:
        """uint8 [slot_bytes(nbytes)]: `tensor` and what lies up to the next multiple of 4096."""
        return self._view(self._piece.nbytes)

    @property
    def released(self) -> torch.cuda.Event | None:
        """Reached when all that was enqueued for this memory is done: set by its last user, at once after
        enqueuing. The memory is lent again without waiting for it."""
        return self._piece.released  # type: ignore[no-any-return]

    @released.setter
    def released(self, event: torch.cuda.Event | None) -> None:
        self._piece.released = event

    def wait(self, stream: torch.cuda.Stream) -> None:
        """Let `stream` wait for the users before, as it must before the first write."""
        for event in self._piece.after:
            stream.wait_event(event)

    def synchronize(self) -> None:
        """Wait on the host for the users before, as the first writer must if it is the host."""
        for event in self._piece.after:
            event.synchronize()

    def _view(self, nbytes: int) -> Tensor:
        return self._piece.region.view(self._piece.start, nbytes)  # type: ignore[no-any-return]


class Arena:
    """Host memory in slots, mapped and registered in large regions. Thread-safe.

    Args:
        limit: bytes mapped at most; None for what the machine has (see `available_memory`).
        pinned: registered with CUDA; default: where there is CUDA. Plain memory otherwise.
        step: bytes by which it grows, or the size asked for if that is larger; a region costs about 80 ms
            per GiB. A slot lies in one region, since no copy may span two registrations.
        first: bytes of the first region, from which the next ones double up to `step`; default: `step`.

    Raises LaneError for a bad argument.
    """

    def __init__(
        self,
        limit: int | None = None,
        *,
        pinned: bool | None = None,
        step: int = STEP,
        first: int | None = None,
    ) -> None:
        if (limit is not None and limit < 0) or step < 1:
            raise LaneError(f"limit={limit}, step={step}: an arena has bytes, 0 or more")
        self.limit = limit
        pinned = torch.cuda.is_available() if pinned is None else pinned
        self._pool: Pool[_Region] = Pool(partial(_Region.open, pinned), _synchronize, limit, step, first)

    @property
    def held(self) -> int:
        """Bytes of the slots that are alive, each a multiple of 4096 (`slot_bytes`)."""
        return self._pool.held

    @property
    def peak(self) -> int:
        """Most bytes that were ever held."""
        return self._pool.peak

    @property
    def reserved(self) -> int:
        """Bytes that are mapped and registered."""
        return self._pool.reserved

    def take(self, nbytes: int) -> Slot | None:
        """A slot, or None when the limit or the machine does not allow it, or the arena is closed.

        Its content is undefined, and earlier users may be at work: see `Slot.wait`. Raises LaneError for a
        negative size, DriverError when CUDA refuses to register memory for another reason than its amount.
        """
        if nbytes < 0:
            raise LaneError(f"a slot of {nbytes} bytes: the size is 0 or more")
        piece = self._pool.take(nbytes)
        return None if piece is None else Slot(piece, nbytes)

    def trim(self) -> int:
        """Unregister and unmap the regions that are free; returns their bytes. Waits for their users."""
        return self._pool.trim()

    def close(self) -> None:
        """Lend no more, and unmap what is free. What is lent is unmapped by `trim`, or when the arena and
        the slot are gone."""
        self._pool.close()


@cache
def shared() -> Arena:
    """The arena of this process, without a limit of its own."""
    return Arena(first=FIRST)


class _Region:
    """One mapping, registered as a whole.

    A forked child gets none of the registered pages: copying them at the fork would take as long as touching
    them, and sharing them copy-on-write would move them away from under the device.
    """

    _registered = False

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        with torch.inference_mode(False):  # or later writes outside of it would be refused
            self._tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.nbytes = len(memory)
        self.start = self._tensor.data_ptr()
        self._views: dict[tuple[int, int], Tensor] = {}  # the same are wanted in every step
        self._forks = _forks

    @classmethod
    def open(cls, pinned: bool, nbytes: int) -> _Region | None:
        """None when the machine has not enough memory."""
        if available_memory() - RESERVE < nbytes:
            return None
        try:
            region = cls(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        except (OSError, OverflowError):
            return None
        return region if not pinned or region.pin() else None

    def pin(self) -> bool:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            _advise(self.start, self.nbytes, mmap.MADV_HUGEPAGE)
        _advise(self.start, self.nbytes, mmap.MADV_DONTFORK)
        _prefault(self.start, self.nbytes)
        self._registered = True  # before the fact: an interrupt may come right after it
        self._registered = register(self.start, self.nbytes)
        return self._registered

    def view(self, start: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] at an address."""
        if self._registered and self._forks != _forks:
            raise OffloadError("memory of an arena is not there after a fork: offload in one process only")
        found = self._views.get((start, nbytes))
        if found is None:
            if len(self._views) >= VIEWS:
                self._views.clear()
            found = self._views[start, nbytes] = self._tensor[start - self.start :][:nbytes]
        return found

    def close(self) -> None:
        """Unregister. The memory is unmapped with the last tensor over it."""
        if self._registered and self._forks == _forks:
            self._registered = False
            unregister(self.start)

    def __del__(self) -> None:
        if self._registered and self._forks == _forks and not sys.is_finalizing():
            _synchronize()
            self.close()


def _count_fork() -> None:
    global _forks
    _forks += 1
    shared.cache_clear()


os.register_at_fork(after_in_child=_count_fork)


# The runtime of cuda-python keeps its own last error. A failed call through PyTorch's would be reported again
# by the next kernel launch.


def register(address: int, nbytes: int) -> bool:
    """Pin memory for all devices; False when there is not enough. Raises DriverError."""
    from cuda.bindings import runtime

    torch.cuda.init()  # type: ignore[no-untyped-call]
    (status,) = runtime.cudaHostRegister(address, nbytes, _PORTABLE)
    if int(status) in (0, _OUT_OF_MEMORY):
        return int(status) == 0
    raise DriverError("cudaHostRegister", int(status), status.name, f"{nbytes} bytes cannot be pinned")


def unregister(address: int) -> None:
    """Undo `register`; of memory that is not registered, nothing."""
    from cuda.bindings import runtime

    runtime.cudaHostUnregister(address)


def _synchronize() -> None:
    """Wait for all devices in use."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for i in range(torch.cuda.device_count()):
            if torch._C._cuda_hasPrimaryContext(i):  # type: ignore[attr-defined]
                torch.cuda.synchronize(i)


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _advise(address: int, nbytes: int, advice: int) -> bool:
    """madvise(2), without the interpreter lock, which the method of mmap keeps."""
    return bool(_madvise()(address, nbytes, advice) == 0)


def _prefault(address: int, nbytes: int) -> None:
    """Touch all pages on several threads, which halves the time that `register` takes to do it. A kernel that
    does not know how leaves it to that."""
    share = rounded(max(nbytes // PREFAULT_THREADS, 16 << 20))
    parts = [(address + i, min(share, nbytes - i), _POPULATE_WRITE) for i in range(0, nbytes, share)]
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(_advise, *zip(*parts, strict=True)))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process can still use: of the machine, and of its control groups (v1
    and v2, page cache that can be dropped counted as free)."""
    found = [sys.maxsize]
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) << 10)
    for line in _lines(root / "proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's; the group of the container is then at the root.
        group = Path(path.strip().lstrip("/"))
        found += [_headroom(base / part, *names) for part in (group, *group.parents)]
    return min(found)


def _headroom(group: Path, limit: str, usage: str, cache: str) -> int:
    most, used = _lines(group / limit), _lines(group / usage)
    if not most or not used or not most[0].isdigit():
        return sys.maxsize
    stat = dict(line.split() for line in _lines(group / "memory.stat"))
    return max(int(most[0]) - int(used[0]) + int(stat.get(cache, 0)), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
