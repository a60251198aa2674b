"""What a chain costs the host for each tensor, whatever its size."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from sidelane.pipeline.chain import Chain
from sidelane.pipeline.machine import MAX_SIZE, Curve

NBYTES = 8 << 10  # of a tensor, so that neither kernels nor wires count
COUNT = 64


def chain(device: torch.device, limit: float) -> dict[str, Curve]:
    """ "chain out" and "chain back": seconds that a `Chain` of the raw lane takes for a tensor on its way to
    host memory and back, at any size. Medians of the rounds that fit in `limit` seconds, after one."""
    tensor = torch.zeros(NBYTES, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {"chain out": [], "chain back": []}
    end = perf_counter() + limit
    with Chain("raw") as through:
        while len(times["chain out"]) < 2 or perf_counter() < end:
            begin = perf_counter()
            tickets = [through.send(tensor) for _ in range(COUNT)]
            through.flush()
            out = perf_counter()
            for _ in through.receive_all(tickets):
                pass
            back = perf_counter()
            times["chain out"].append((out - begin) / COUNT)
            times["chain back"].append((back - out) / COUNT)
    return {name: Curve((1, MAX_SIZE), (median(found[1:]),) * 2) for name, found in times.items()}
