"""Rules every launcher shares: where a call runs, how its output is laid out in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes; of the parts of one encoding
_interpret: ContextVar[bool] = ContextVar("interpret", default=False)
_HERE: AbstractContextManager[Any] = nullcontext()


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


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of `tensor` current, which costs nothing where it is already."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def carve(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """uint8 vectors of `sizes` bytes in order in one new allocation, each at a multiple of ALIGNMENT.

    The allocation is a multiple of ALIGNMENT long.
    """
    total, cuts = _cuts(sizes)
    return torch.empty(total, dtype=torch.uint8, device=device).split_with_sizes(cuts)[::2]


@lru_cache(maxsize=4096)
def _cuts(sizes: tuple[int, ...]) -> tuple[int, list[int]]:
    """The sum of `sizes` rounded up to ALIGNMENT, and each size followed by the padding behind it."""
    pairs = [(size, -size % ALIGNMENT) for size in sizes]
    return sum(map(sum, pairs)), [n for pair in pairs for n in pair]


def aligned(part: Tensor) -> Tensor:
    """The contiguous `part`, copied if its address is no multiple of 16."""
    return part.clone() if part.data_ptr() % 16 else part


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
