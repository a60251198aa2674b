"""A device that is late for as long as a test wants it to be.

Kernels that sleep end after a time that was guessed, which a slow host outlasts. A latch ends when the host
says so. What makes the host wait for the device, such as the first use of a kernel, then waits for the latch,
which gives up after `LIMIT`: a test fails and does not hang. So whatever is used behind a latch has to be
used before.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

LIMIT = 20.0  # seconds


@triton.jit
def _latch_kernel(flag_ptr, nanoseconds):
    end = globaltimer() + nanoseconds
    while (tl.load(flag_ptr, volatile=True) == 0) & (globaltimer() < end):
        pass


class Latch:
    """Context whose start the current stream passes at the end of the context, or after `seconds`.

    Attributes:
        passed: the event behind it on the stream.
    """

    def __init__(self, seconds: float = LIMIT) -> None:
        self._flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._nanoseconds = int(seconds * 1e9)
        self.passed: Any = torch.cuda.Event()

    @property
    def holds(self) -> bool:
        """Nothing that was enqueued on the stream since the start has begun."""
        return not self.passed.query()

    def __enter__(self) -> Latch:
        _latch_kernel[(1,)](self._flag, self._nanoseconds)
        self.passed.record()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flag.fill_(1)
        self.passed.synchronize()  # the flag may go only then
