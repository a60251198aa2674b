"""Outputs between guard bands: every byte starts as a sentinel, and those around an output must stay so."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

BAND = 2**14  # bytes on each side, more than a tile of any kernel
SENTINEL = 0xA5


class Guarded:
    """Allocates poisoned outputs on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bands: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = prod(shape) * dtype.itemsize
        buffer = torch.full((size + 2 * BAND,), SENTINEL, dtype=torch.uint8, device=self.device)
        self._bands += [buffer[:BAND], buffer[BAND + size :]]
        return buffer[BAND : BAND + size].view(dtype).view(shape)

    def like(self, tensor: Tensor) -> Tensor:
        return self.empty(tuple(tensor.shape), tensor.dtype)

    def check(self) -> None:
        """Fails if a byte beside an output has changed."""
        for band in self._bands:
            assert bool((band == SENTINEL).all()), "a kernel wrote outside its output"
