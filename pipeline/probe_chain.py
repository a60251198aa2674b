"""What a chain costs the host for each tensor, whatever its size.

Threads of a chain stay for a while on the CPUs that they woke on, some of which are slower than others, so
every round has a chain of its own, and lanes take turns.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from sidelane.pipeline.chain import Chain
from sidelane.pipeline.decision import RAW
from sidelane.pipeline.machine import CHAIN_LANES, CHAIN_TIMES, MAX_SIZE, Curve
from sidelane.pipeline.samples import lane_named

NBYTES = 8 << 10  # of a tensor, so that neither kernels nor wires count
WARM, COUNT = 8, 32  # tensors through a chain, the first of which do not count

Times = tuple[float, float]  # out and back


def chains(device: torch.device, limit: float) -> dict[str, Curve]:
    """`HOST_TIMES` of raw and the other lanes of chains: seconds for a tensor to host memory and back.

    Medians of the rounds that fit in `limit` seconds, after one. Packed lanes share one, as they do the same
    whatever their bits.
    """
    tensor = torch.ones(NBYTES // 2, dtype=torch.bfloat16, device=device)
    found: dict[str, list[Times]] = {lane: [] for lane in (RAW, *CHAIN_LANES)}
    end, rounds = perf_counter() + limit, 0
    while rounds < 2 or perf_counter() < end:
        for lane, times in found.items():
            times.append(_round(lane, tensor))
        rounds += 1
    same: dict[str, list[Times]] = {}
    for lane, times in found.items():
        same.setdefault(lane.partition(":")[0], []).extend(times[1:])
    curves = {}
    for lane in found:
        for name, seconds in zip(CHAIN_TIMES, zip(*same[lane.partition(":")[0]], strict=True), strict=True):
            known = name if lane == RAW else f"{name} {lane}"
            curves[known] = Curve((1, MAX_SIZE), (median(seconds),) * 2)
    return curves


def _round(lane: str, tensor: torch.Tensor) -> Times:
    with Chain(lane_named(lane)) as through:
        for _ in through.stream([tensor] * WARM):
            pass
        begin = perf_counter()
        tickets = [through.send(tensor) for _ in range(COUNT)]
        through.flush()
        out = perf_counter()
        for _ in through.receive_all(tickets):
            pass
        back = perf_counter()
    return (out - begin) / COUNT, (back - out) / COUNT
