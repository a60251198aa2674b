"""What provokes races on a device: kernels that sleep, and memory that is overwritten once it is free."""

from __future__ import annotations

import torch

SLEEP = 100_000_000  # cycles, 50 ms at 2 GHz


def garbage(device: torch.device) -> None:
    """Overwrite memory that the pool of the current stream has free."""
    for size in (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20):
        for block in [torch.empty(size, device=device) for _ in range(16)]:
            block.fill_(torch.nan)
