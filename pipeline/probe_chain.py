"""What a chain costs the host for each tensor, whatever its size."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from sidelane.pipeline.chain import Chain
from sidelane.pipeline.machine import CHAIN_LANES, CHAIN_TIMES, MAX_SIZE, Curve
from sidelane.pipeline.samples import lane_named

NBYTES = 8 << 10  # of a tensor, so that neither kernels nor wires count
COUNT = 64


def chains(device: torch.device, limit: float) -> dict[str, Curve]:
    """`HOST_TIMES` of raw and the other lanes of chains, each in its share of `limit` seconds."""
    found = chain(device, limit / (1 + len(CHAIN_LANES)))
    for lane in CHAIN_LANES:
        curves = chain(device, limit / (1 + len(CHAIN_LANES)), lane)
        found |= {f"{name} {lane}": curve for name, curve in curves.items()}
    return found


def chain(device: torch.device, limit: float, lane: str = "raw") -> dict[str, Curve]:
    """`CHAIN_TIMES`: seconds that a `Chain` takes for a tensor to host memory and back, whatever its size.

    Medians of the rounds that fit in `limit` seconds, after one.
    """
    tensor = torch.ones(NBYTES // 2, dtype=torch.bfloat16, device=device)
    times: dict[str, list[float]] = {name: [] for name in CHAIN_TIMES}
    with Chain(lane_named(lane)) as through:
        end = perf_counter() + limit
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
