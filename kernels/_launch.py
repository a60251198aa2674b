"""Rules every launcher shares: where a call runs, how grids and blocks are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_interpret: ContextVar[bool] = ContextVar("interpret", default=False)


@contextmanager
def interpret() -> Iterator[None]:
    """Run kernels on CPU tensors through the Triton interpreter.

    TRITON_INTERPRET=1 must be set before a kernel module is first imported.
    """
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def use_triton(tensor: Tensor) -> bool:
    """True where the Triton kernel runs; elsewhere the launcher calls the reference."""
    return tensor.is_cuda or _interpret.get()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
