"""Surfaces encoded by NVENC with their frames spread over all sessions; pools of sessions are kept for reuse.

Kernels write the very memory the encoders read. No machine with NVENC has run this code: it is tested against
an emulated driver only (tests/emulated_driver).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

import torch
from torch import Tensor

from sidelane.codec import _driver, _nvenc
from sidelane.codec._nvenc import Memory
from sidelane.codec._nvenc_ring import EncodedSurface, Surface
from sidelane.codec.nvenc import release_idle_encoders
from sidelane.codec.nvenc_pool import EncoderPool
from sidelane.errors import DriverError, LaneUnavailable
from sidelane.layout import TOKEN_ROWS, SurfaceLayout

IDLE_POOLS = 4  # kinds of surfaces whose sessions are kept; others are closed, least recently used first
PAUSE = 10.0  # seconds until sessions are asked for again after there were none: asking takes up to a second


class NoSession(LaneUnavailable):
    """All encode sessions are taken."""


class _Part(Memory):
    """Bytes of other memory, which it keeps."""

    def __init__(self, whole: Memory, offset: int, nbytes: int) -> None:
        self.index, self.nbytes, self.address = whole.index, nbytes, whole.address + offset
        self._whole = whole


class SurfaceSlot:
    """Memory for one surface that the encode sessions have registered.

    Write `tensor`, uint8 [layout.rows, layout.pitch], whose content is undefined before; then `submit`, then
    take the `stream`. `release` it in any case, once, after which the tensor is somebody else's.
    """

    def __init__(self, pool: SurfacePool) -> None:
        """Raises DriverError, LaneUnavailable when no session is left."""
        layout = pool.layout
        self.memory = Memory(pool.index, layout.rows * layout.pitch)
        self.tensor: Tensor = _nvenc.view(self.memory).view(layout.shape)
        size = self.memory.nbytes // layout.frames
        parts = [_Part(self.memory, i * size, size) for i in range(layout.frames)]
        self.frames = [pool.encoders.adopt(part) for part in parts]
        self._pool = pool
        self._running: list[Future[EncodedSurface]] = []

    def submit(self) -> None:
        """Encode the surface after the work of the current stream. Raises LaneError, DriverError."""
        for frame in self.frames:
            self._running.append(self._pool.encoders.submit(frame))

    def stream(self) -> bytes:
        """Wait for the stream, as `encode_hevc` writes it.

        Raises DriverError or LaneError when every session failed that tried a frame; `tensor` stays as it is.
        """
        wait(self._running)
        try:
            frames = [future.result() for future in self._running]
        except BaseException:
            self._pool.broken = True
            raise
        pictures = (frame.headers + picture for frame in frames for picture in frame.pictures)
        return EncodedSurface(b"", tuple(pictures)).stream()

    def release(self) -> None:
        """Give the slot back to its pool."""
        wait(self._running)
        self._running = []
        self._pool.take_back(self)


class SurfacePool:
    """An `EncoderPool` for single frames, and surfaces whose frames lie one behind the other in memory.

    The sessions take the frames of a surface in turn. There are as many slots as were in use at a time.
    """

    def __init__(self, layout: SurfaceLayout, qp: int | None, index: int) -> None:
        """Raises as `EncoderPool`."""
        self.layout, self.index = layout, index
        self.broken = False  # do not use it for further surfaces
        one = SurfaceLayout(layout.format, TOKEN_ROWS, 1, 1, layout.width, layout.height, 1, layout.pitch)
        self.encoders = EncoderPool(
            one, qp=qp, device=f"cuda:{index}", surfaces=0, make_room=release_idle_sessions
        )
        self.users = 0
        self._lock = threading.Lock()  # of the two that follow
        self._free: list[SurfaceSlot] = []
        self._frames: dict[int, Surface] = {}  # by address: acquired frames of free slots and of running ones

    def acquire(self) -> SurfaceSlot:
        """A slot nobody uses. Raises DriverError, LaneUnavailable when no session is left."""
        try:
            with self._lock:
                if self._free:  # in turn, as they may be of different sessions
                    return self._regain(self._free.pop(0))
            return self._new_slot()
        except BaseException:
            self.broken = True
            raise

    def _new_slot(self) -> SurfaceSlot:
        try:
            return SurfaceSlot(self)
        except DriverError as error:
            if (error.call, error.status) != ("cuMemAlloc_v2", _driver.CUDA_OUT_OF_MEMORY):
                raise
        release_idle_sessions()
        torch.cuda.empty_cache()
        return SurfaceSlot(self)

    def _regain(self, slot: SurfaceSlot) -> SurfaceSlot:
        """Acquire the frames of `slot` again. They are encoded, so they are among those that are free."""
        addresses = [frame.memory.address for frame in slot.frames]
        while not all(address in self._frames for address in addresses):
            frame = self.encoders.acquire(timeout=0)
            self._frames[frame.memory.address] = frame
        slot.frames = [self._frames.pop(address) for address in addresses]
        return slot

    def take_back(self, slot: SurfaceSlot) -> None:
        """Make `slot` free, all of whose frames that were submitted are encoded."""
        with self._lock:
            self._frames |= {frame.memory.address: frame for frame in slot.frames if frame.held}
            self._free.append(slot)
        _leave(self)

    def close(self) -> None:
        """Close the sessions. Raises the first DriverError of a call that failed in between."""
        self._free.clear()
        self._frames.clear()
        self.encoders.close()


class _Kind(NamedTuple):
    device: int
    format: str
    width: int
    height: int
    pitch: int
    frames: int
    qp: int | None


class _Refusal(NamedTuple):
    reason: str
    until: float


_pools: dict[_Kind, SurfacePool] = {}  # least recently used first
_refusals: dict[int, _Refusal] = {}  # by device, of the last try to open sessions
_lock = threading.RLock()  # of both and of the number of users of each pool


def acquire_slot(layout: SurfaceLayout, qp: int | None, index: int) -> SurfaceSlot:
    """A slot for a surface to be encoded on device `index`, losslessly or with constant `qp`.

    Raises LaneUnavailable if this GPU cannot encode it, NoSession if there is none left, DriverError.
    """
    frame = (layout.width, layout.height, layout.pitch, layout.frames)
    kind = _Kind(index, layout.format.name, *frame, qp)
    with _lock:
        pool = _pools.pop(kind, None)
        if pool is None or pool.broken:
            pool = _open_pool(layout, qp, index)
        _pools[kind] = pool
        pool.users += 1
    try:
        return pool.acquire()
    except BaseException:
        _leave(pool)
        raise


def no_session(index: int) -> str | None:
    """Why device `index` has no encode session for us at the moment; None if there are some or may be."""
    with _lock:
        refusal = _refusals.get(index)
        if refusal is None or monotonic() >= refusal.until or any(kind.device == index for kind in _pools):
            return None
        return refusal.reason


def _open_pool(layout: SurfaceLayout, qp: int | None, index: int) -> SurfacePool:
    refusal = _refusals.get(index)
    if refusal is not None and monotonic() < refusal.until:
        raise NoSession(refusal.reason)
    try:
        return SurfacePool(layout, qp, index)
    except LaneUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, DriverError) and cause.status in _nvenc.NO_SESSION_LEFT:
            _refusals[index] = _Refusal(str(error), monotonic() + PAUSE)
            raise NoSession(str(error)) from error
        raise


def _leave(pool: SurfacePool) -> None:
    """`pool` has a user less: close it if it is broken, and what is idle beyond `IDLE_POOLS`."""
    with _lock:
        pool.users -= 1
        idle = [kind for kind, kept in _pools.items() if not kept.users]
        surplus = [kind for kind in idle if _pools[kind].broken] or idle[:-IDLE_POOLS]
        unwanted = {_pools.pop(kind) for kind in surplus}
        if pool.broken and not pool.users:
            unwanted.add(pool)
    _close(unwanted)


def _close(pools: Iterable[SurfacePool]) -> None:
    for pool in pools:
        with suppress(DriverError):  # what they had is delivered
            pool.close()
        with _lock:
            _refusals.pop(pool.index, None)  # now there are some


def release_idle_sessions() -> None:
    """Close the encode sessions that are kept and not in use; consumer GPUs allow few per system."""
    release_idle_encoders()
    with _lock:
        idle = [kind for kind, pool in _pools.items() if not pool.users]
        unwanted = [_pools.pop(kind) for kind in idle]
    _close(unwanted)
