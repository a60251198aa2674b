"""A wire of any speed, simulated: a token bucket, and copies that the host paces with it.

The bytes really move; what is simulated is how long they take. Rates above that of the real wire under a copy
stay out of reach, since a throttled copy is never faster than the copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from threading import Lock
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor

from sidelane.errors import LaneError
from sidelane.pipeline.streams import current_stream, on, side_stream

SLACK = 1e-4  # seconds: by so much, and no more, `sleep` may wake too late on an idle machine
PACE = 1e-3  # seconds that a chunk of a copy takes
CHUNKS = (1 << 16, 1 << 24)  # bytes of the smallest and the largest chunk


class TokenBucket:
    """One simulated wire, which carries `rate` bytes a second for all threads that take from it together.

    A wire that was idle is `burst` bytes ahead at most, and each transfer begins when the one before it ends.
    (J. Turner, New directions in communications, IEEE Communications Magazine 24(10), 1986, as the equivalent
    virtual schedule of ITU-T I.371.)

    Args:
        rate: bytes per second.
        burst: bytes that pass at once after a pause; default: those of `SLACK` seconds, so that a thread that
            takes again and again keeps the rate although it wakes late.

    Raises LaneError for a rate that is not a positive finite number, and a burst below 0 or infinite.
    """

    def __init__(self, rate: float, burst: float | None = None) -> None:
        if not _is_number(rate) or not 0 < rate < inf:
            raise LaneError(f"rate={rate!r} is not a number of bytes per second above 0")
        if burst is not None and (not _is_number(burst) or not 0 <= burst < inf):
            raise LaneError(f"burst={burst!r} is neither None nor a number of bytes from 0 up")
        self.rate = float(rate)
        self.burst = self.rate * SLACK if burst is None else float(burst)
        self._free = -inf  # when the last transfer that was granted ends, by perf_counter
        self._lock = Lock()

    def take(self, nbytes: int, ready: float | None = None) -> float:
        """Wait until `nbytes` have crossed the wire; when that was, in seconds of `perf_counter`.

        Args:
            ready: since when the bytes have been there, by the same clock; default: since this call. Who
                sends pieces in a row passes what the call before returned, and loses nothing by waking late.

        Raises LaneError for a negative number of bytes.
        """
        end = self.grant(nbytes, ready)
        _sleep_until(end)
        return end

    def copy(
        self,
        source: Tensor,
        target: Tensor,
        *,
        chunk: int | None = None,
        stream: Any = None,
        ready: float | None = None,
    ) -> Any:
        """Copy `source` into `target` at the rate of the wire, chunk by chunk.

        Chunks are enqueued on `stream` after the work that the current stream has now, each when the one
        before has crossed; the host sleeps until the last has, and may wake some `SLACK` later. Threads that
        copy share the wire chunk by chunk.

        Args:
            source, target: contiguous, of equal size in bytes. Host memory has to be pinned where the other
                side is a GPU.
            chunk: bytes, default: those of `PACE` seconds within `CHUNKS`.
            stream: of the GPU that takes part, default: a side stream.
            ready: as for `take`.

        Returns:
            An event after the copy, which a stream has to wait for before it reads `target`.

        Raises LaneError for tensors that do not fit this, and a chunk below 1.
        """
        _check_copy(source, target)
        if chunk is not None and (type(chunk) is not int or chunk < 1):
            raise LaneError(f"chunk={chunk!r} is neither None nor a whole number of bytes from 1 up")
        size = chunk or min(max(int(self.rate * PACE), CHUNKS[0]), CHUNKS[1])
        device = target.device if target.device.type == "cuda" else source.device
        stream = stream or side_stream(device, "throttled copy")
        stream.wait_event(current_stream(device).record_event())
        for tensor in (source, target):
            if tensor.device.type == "cuda":
                tensor.record_stream(stream)
        for part, place in zip(_pieces(source, size), _pieces(target, size), strict=True):
            with on(stream):
                place.copy_(part, non_blocking=True)
            ready = self.grant(part.numel(), ready)
            if (left := ready - perf_counter()) > 0:
                sleep(left)
        return stream.record_event()

    def grant(self, nbytes: int, ready: float | None = None) -> float:
        """When `nbytes` will have crossed, after all that was granted before, in seconds of `perf_counter`.

        Waits for nothing; `ready` as for `take`. Raises LaneError for a negative number of bytes.
        """
        if type(nbytes) is not int or nbytes < 0:
            raise LaneError(f"nbytes={nbytes!r} is not a whole number of bytes from 0 up")
        with self._lock:
            earliest = perf_counter() - self.burst / self.rate if ready is None else ready
            self._free = max(self._free, earliest) + nbytes / self.rate
            return self._free


def _pieces(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """The bytes of a contiguous tensor, `size` at a time."""
    flat = tensor.detach().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0).byte()
    return iter(torch.split(flat, size))


def _check_copy(source: Tensor, target: Tensor) -> None:
    if not (source.is_contiguous() and target.is_contiguous()):
        raise LaneError("a throttled copy moves bytes: pass contiguous tensors")
    if source.nbytes != target.nbytes:
        raise LaneError(f"{source.nbytes} bytes do not fit into {target.nbytes}: pass tensors of equal size")
    devices = {source.device.type, target.device.type}
    if not devices <= {"cpu", "cuda"}:
        raise LaneError(f"no throttled copy from {source.device} to {target.device}: use the CPU or CUDA")
    if devices == {"cpu", "cuda"}:
        host = source if source.device.type == "cpu" else target
        if not host.is_pinned():
            raise LaneError("host memory of a throttled copy is not pinned: use pin_memory()")


def _sleep_until(moment: float) -> None:
    """`sleep` wakes late, so the last `SLACK` seconds are spent asking for the time, without the GIL."""
    while (left := moment - perf_counter()) > 0:
        sleep(left - SLACK if left > SLACK else 0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
