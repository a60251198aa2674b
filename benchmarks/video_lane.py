"""What the video lane takes to restore one bfloat16 tensor [N, N], by size of its frames.

    python benchmarks/video_lane.py [--out FILE] [--size N] [--repeat N]

From a packet on the device to the tensor, by the engines of the GPU and by software, which have to agree in
every bit first. The tensor is made up (a random walk under noise): the rows say nothing about compression.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, append_rows, environment
from torch import Tensor

from sidelane.codec.engines import decoding_engine, gpu_index
from sidelane.layout import FORMATS
from sidelane.pipeline.lanes import open_lane

SIDES = (4096, 2048, 1024, 512)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "video_lane.csv")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the tensor")
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    x = made_up(options.size, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for format in ("nv12", "p010"):
        for side in SIDES:
            rows = measured(x, format, side, options.repeat)
            append_rows(options.out, rows)
            for row in rows:
                print(format, side, row["frames"], row["engine"], row["ms_median"], flush=True)


def made_up(size: int, device: torch.device) -> Tensor:
    """bfloat16 [size, size], the same on every machine."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return (noise.cumsum(0) / 20 + noise).bfloat16().to(device)


def measured(x: Tensor, format: str, side: int, repeat: int) -> list[dict[str, Any]]:
    """A row for the engines and one for software."""
    lanes = [open_lane(name, format=format, max_side=side) for name in ("video", "video-cpu")]
    packet = lanes[0].encode(x)
    if packet.lane != "video" or not torch.equal(*(lane.decode(packet) for lane in lanes)):
        raise SystemExit(f"{format}, side {side}: the engines and software disagree")
    width, height, frames, _ = packet.numbers(4)
    facts = {
        "format": format,
        "elements": x.numel(),
        "max_side": side,
        "frames": frames,
        "width": width,
        "height": height,
        "stream_bytes": packet.section("bitstream").numel(),
    }
    engines = (decoding_engine(gpu_index(x.device), FORMATS[format]).name, "software")
    return [
        environment() | facts | {"engine": engine} | timed(partial(lane.decode, packet), repeat)
        for lane, engine in zip(lanes, engines, strict=True)
    ]


def timed(run: Callable[[], object], repeat: int) -> dict[str, float]:
    """Median and quartiles of `repeat` runs after one that warms up, in milliseconds."""
    times = []
    for _ in range(repeat + 1):
        wait()
        start = perf_counter()
        run()
        wait()
        times.append(1e3 * (perf_counter() - start))
    low, middle, high = quantiles(times[1:], n=4)
    return {"ms_low": round(low, 3), "ms_median": round(middle, 3), "ms_high": round(high, 3)}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
