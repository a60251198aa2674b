"""NVDEC throughput: one decoder, the pool over all engines, and PyNvVideoCodec where it is installed.

    python benchmarks/nvdec.py --out FILE [--cache DIR] [--frames N] [--repeat N] [--engines N] [--only NAME]

Every workload is a few distinct frames (smooth waves under Gaussian noise), coded by libx265 and decoded
again and again. The streams are kept in --cache, since encoding them takes far longer than decoding. Nothing
is timed before NVDEC's samples of that very stream were equal to FFmpeg's; of PyNvVideoCodec only the frames
are counted. Rates in pixels count luma only, those in samples all planes.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from common import environment
from torch import Tensor

from sidelane.codec.hevc import decode_hevc, encode_hevc
from sidelane.codec.nvdec import NvDecoder, NvDecoderPool
from sidelane.layout import FORMATS, TOKEN_ROWS, SurfaceLayout

Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """What is decoded. `noise`: standard deviation in code steps; `qp` None is lossless."""

    name: str
    format: str
    width: int
    height: int
    noise: float
    qp: int | None

    def layout(self, frames: int) -> SurfaceLayout:
        fmt = FORMATS[self.format]
        pitch = -(-self.width * fmt.itemsize // 256) * 256
        return SurfaceLayout(fmt, TOKEN_ROWS, 1, 2, self.width, self.height, frames, pitch)


WORKLOADS = (
    Workload("lossless-8bit", "nv12", 4096, 4096, 3.5, None),
    Workload("lossless-10bit", "yuv444_10", 2048, 2048, 3.5, None),
    Workload("low-rate-8bit", "nv12", 4096, 4096, 3.5, 27),
    Workload("low-rate-10bit", "p010", 4096, 4096, 14.0, 27),
    Workload("small-frames", "nv12", 256, 256, 3.5, 27),
)


def main() -> None:
    args = _arguments()
    rows: list[Row] = []
    for workload in WORKLOADS:
        if args.only in (None, workload.name):
            rows += measure(workload, args)
            args.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


def measure(workload: Workload, args: Namespace) -> list[Row]:
    """Rows of one workload. Raises RuntimeError when NVDEC and FFmpeg disagree."""
    layout = workload.layout(args.frames)
    stream = cached_stream(workload, layout, args.cache)
    used = layout.width * layout.format.itemsize
    reference = decode_hevc(stream, layout)[:, :used]
    rows: list[Row] = []

    def add(who: str, streams: int, run: Callable[[], object], checked: bool = True) -> None:
        seconds = timed(run, args.repeat)
        rows.append(row(workload, layout, len(stream), who, streams, seconds, checked))
        print(
            json.dumps({k: rows[-1][k] for k in ("workload", "decoder", "gpixel_s", "stream_mb_s")}),
            flush=True,
        )

    with NvDecoder("cuda") as decoder:
        out = decoder.decode(stream, layout)
        reference = reference.to(out.device)
        gate(workload, "NvDecoder", out, reference)
        add("NvDecoder", 1, lambda: decoder.decode(stream, layout, out=out))
    with NvDecoderPool("cuda", args.engines) as pool:
        gate(workload, "NvDecoderPool", pool.decode_surface(stream, layout), reference)
        jobs = [(stream, layout)] * (3 * pool.engines)
        for surface in pool.decode(jobs):
            gate(workload, "NvDecoderPool", surface, reference)
        add(f"NvDecoderPool({pool.engines})", len(jobs), lambda: exhaust(pool, jobs))
        add(f"NvDecoderPool({pool.engines}).decode_surface", 1, lambda: pool.decode_surface(stream, layout))
    with TemporaryDirectory() as folder:
        path = Path(folder, "stream.hevc")
        path.write_bytes(stream)
        decode = peer_decoder(path)
        try:
            if decode is not None and (got := decode()) != layout.frames:
                raise RuntimeError(f"{got} of {layout.frames} frames")
            if decode is not None:
                add("PyNvVideoCodec", 1, decode, checked=False)
        except Exception as error:  # what a peer cannot do is a result, too
            rows.append({"workload": workload.name, "decoder": "PyNvVideoCodec", "error": str(error)})
    return rows


def cached_stream(workload: Workload, layout: SurfaceLayout, cache: Path | None) -> bytes:
    """The coded frames, from the cache when they are there."""
    coding = "lossless" if workload.qp is None else f"qp{workload.qp}"
    size = f"{workload.format}-{workload.width}x{workload.height}x{layout.frames}"
    path = None if cache is None else cache / f"{size}-noise{workload.noise}-{coding}.hevc"
    if path is not None and path.exists():
        return path.read_bytes()
    stream = encode_hevc(picture(layout, workload.noise), layout, qp=workload.qp)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stream)
    return stream


def picture(layout: SurfaceLayout, noise: float) -> Tensor:
    """A surface of waves under Gaussian noise; no two frames are alike."""
    generator = torch.Generator().manual_seed(0)
    fmt = layout.format
    top = (1 << (8 if fmt.itemsize == 1 else fmt.bits)) - 1
    surface = torch.zeros(layout.shape, dtype=torch.uint8)
    samples = surface if fmt.itemsize == 1 else surface.view(torch.int16)
    x = torch.arange(layout.width) / 97.0
    for number, frame in enumerate(samples.chunk(layout.frames)):
        y = torch.arange(frame.shape[0])[:, None] / 61.0
        wave = (0.5 + 0.2 * torch.sin(y + number) + 0.2 * torch.cos(x)) * top
        codes = torch.normal(wave, noise, generator=generator).round_().clamp_(0, top).to(torch.int32)
        frame[:, : layout.width] = (codes << fmt.shift).to(samples.dtype)
    return surface


def gate(workload: Workload, who: str, got: Tensor, reference: Tensor) -> None:
    if not torch.equal(got[:, : reference.shape[1]], reference):
        raise RuntimeError(f"{workload.name}: {who} and FFmpeg decode different samples; nothing is timed")


def exhaust(pool: NvDecoderPool, jobs: list[tuple[bytes, SurfaceLayout]]) -> None:
    for _ in pool.decode(jobs):
        pass


def timed(run: Callable[[], object], repeat: int) -> list[float]:
    """Wall-clock seconds of `repeat` runs after one to warm up. Every run ends with complete surfaces."""
    run()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(repeat):
        start = perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    return seconds


def row(
    workload: Workload,
    layout: SurfaceLayout,
    size: int,
    who: str,
    streams: int,
    seconds: list[float],
    checked: bool,
) -> Row:
    middle = median(seconds)
    low, *_, high = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else (middle, middle)
    pixels = streams * layout.frames * layout.width * layout.height
    samples = streams * layout.rows * layout.width
    return {
        "workload": workload.name,
        "decoder": who,
        "samples_checked": checked,
        **{k: v for k, v in asdict(workload).items() if k != "name"},
        "frames": streams * layout.frames,
        "stream_bytes": streams * size,
        "bits_per_pixel": 8 * streams * size / pixels,
        "bits_per_sample": 8 * streams * size / samples,
        "seconds_median": middle,
        "seconds_p20": low,
        "seconds_p80": high,
        "runs": len(seconds),
        "gpixel_s": pixels / middle / 1e9,
        "gsample_s": samples / middle / 1e9,
        "stream_mb_s": streams * size / middle / 1e6,
    }


def peer_decoder(path: Path) -> Callable[[], int] | None:
    """Decodes the file with PyNvVideoCodec and returns the number of frames; None if it is not installed."""
    try:
        import PyNvVideoCodec as nvc
    except ImportError:
        return None

    def decode() -> int:
        demuxer = nvc.CreateDemuxer(filename=str(path))
        decoder = nvc.CreateDecoder(gpuid=0, codec=demuxer.GetNvCodecId(), usedevicememory=True)
        return sum(len(decoder.Decode(packet)) for packet in demuxer)

    return decode


def _arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--cache", type=Path, help="folder that keeps the coded streams")
    parser.add_argument("--frames", type=int, default=12, help="distinct frames of a stream")
    parser.add_argument("--repeat", type=int, default=7, help="timed runs")
    parser.add_argument("--engines", type=int, help="decoders of the pool; all engines by default")
    parser.add_argument("--only", choices=[w.name for w in WORKLOADS], help="measure one workload")
    return parser.parse_args()


if __name__ == "__main__":
    main()
