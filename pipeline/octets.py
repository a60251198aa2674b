"""The memory of tensors as bytes."""

from __future__ import annotations

import torch
from torch import Tensor

PAGE = 4096  # bytes


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as a uint8 vector."""
    return tensor.reshape(-1).view(torch.uint8)


def copied(data: Tensor) -> Tensor:
    """A copy of a uint8 vector, by one kernel on a GPU.

    `clone` is two, one after the other, where the size is no multiple of 4 KiB, each of which waits for its
    turn beside other work (DESIGN.md, "What measurements decided").
    """
    return data.clone() if not data.is_cuda or data.numel() % PAGE == 0 else copied_by_kernel(data)


def copied_by_kernel(data: Tensor) -> Tensor:
    """A copy of a uint8 vector, words of 8 bytes at a time where it has no others."""
    words = (data.numel() | int(data.storage_offset()) | data.data_ptr()) % 8 == 0
    return torch.bitwise_or(data.view(torch.int64) if words else data, 0).view(torch.uint8)
