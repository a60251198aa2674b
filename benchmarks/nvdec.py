"""NVDEC throughput: streams in memory, video files, and PyNvVideoCodec on the same files if it is installed.

    python benchmarks/nvdec.py --out FILE [--cache DIR] [--distinct N] [--repeat N] [--engines N]
        [--only NAME]

A workload is a few distinct pictures (smooth waves under Gaussian noise), coded by libx265 as all-intra HEVC
and repeated until every decoder has frames for a good part of a second. `NvDecoder` and `NvDecoderPool` read
the stream from memory; the other rows read an MP4 file of the same frames, one pass per decoder. Frames end
in CUDA tensors; those of PyNvVideoCodec are DLPack views that its next call overwrites, ours stay. Decoders
are kept from run to run, but for `open_video` and the rows that say "made anew": they include start-up.

Each kind of decoder is timed only after its samples were equal to FFmpeg's. Rates in pixels count luma only,
those in samples all planes.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import av
import torch
from common import environment
from torch import Tensor

from sidelane.codec.hevc import END_OF_BITSTREAM, decode_hevc, encode_hevc
from sidelane.codec.nvdec import NvDecoder, NvDecoderPool
from sidelane.codec.video_file import Frame, open_video
from sidelane.layout import FORMATS, TOKEN_ROWS, SurfaceLayout

Reader = Callable[[], Iterator[Tensor]]  # one pass over a file: surfaces [rows of a frame, width] of samples
Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """What every decoder decodes. `noise`: standard deviation in code steps; `qp` None is lossless."""

    name: str
    format: str
    width: int
    height: int
    noise: float
    qp: int | None
    frames: int

    def layout(self, frames: int) -> SurfaceLayout:
        fmt = FORMATS[self.format]
        pitch = -(-self.width * fmt.itemsize // 256) * 256
        return SurfaceLayout(fmt, TOKEN_ROWS, 1, 2, self.width, self.height, frames, pitch)


WORKLOADS = (
    Workload("lossless-8bit", "nv12", 1280, 1280, 3.5, None, 60),
    Workload("lossless-10bit", "yuv444_10", 768, 768, 3.5, None, 60),
    Workload("low-rate-8bit", "nv12", 2048, 2048, 3.5, 27, 120),
    Workload("low-rate-10bit", "p010", 2048, 2048, 14.0, 27, 120),
    Workload("small-frames", "nv12", 256, 256, 3.5, 27, 300),
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
    distinct = workload.layout(args.distinct)
    repeats = -(-workload.frames // args.distinct)
    layout = workload.layout(repeats * args.distinct)
    coded = cached_stream(workload, distinct, args.cache)
    stream = coded.removesuffix(END_OF_BITSTREAM) * repeats + END_OF_BITSTREAM
    used = layout.width * layout.format.itemsize
    reference = decode_hevc(coded, distinct)[:, :used].cuda()
    whole = reference.repeat(repeats, 1)
    rows: list[Row] = []

    def add(who: str, decoders: int, run: Callable[[], object]) -> None:
        rows.append(row(workload, layout, len(stream), who, decoders, timed(run, args.repeat)))
        told = ("workload", "decoder", "decoders", "seconds_median", "gpixel_s", "stream_mb_s")
        print(json.dumps({key: rows[-1][key] for key in told}), flush=True)

    with NvDecoder("cuda") as decoder:
        out = decoder.decode(stream, layout)
        gate(workload, "NvDecoder", out[:, :used], whole)
        add("NvDecoder", 1, lambda: decoder.decode(stream, layout, out=out))
    with NvDecoderPool("cuda", args.engines) as pool:
        engines = pool.engines
        gate(workload, "NvDecoderPool", pool.decode_surface(stream, layout)[:, :used], whole)
        jobs = [(stream, layout)] * engines
        for surface in pool.decode(jobs):
            gate(workload, "NvDecoderPool", surface[:, :used], whole)
        add("NvDecoderPool", engines, lambda: exhaust(pool, jobs))
    with TemporaryDirectory() as folder:
        path = Path(folder, "stream.mp4")
        write_mp4(path, stream)
        for who, make in readers(path).items():
            for decoders in (1, engines):
                try:
                    own = [make() for _ in range(decoders)]
                    gate_frames(workload, who, own[0](), reference, layout.frames)
                    with ThreadPoolExecutor(decoders) as threads:
                        add(who, decoders, partial(drain, own, threads, layout.frames))
                except Exception as error:
                    if who == "open_video":
                        raise
                    # What a peer cannot do is a result, too.
                    rows.append({"workload": workload.name, "decoder": who, "error": str(error)})
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def readers(path: Path) -> dict[str, Callable[[], Reader]]:
    """For everything that decodes files a function that makes a reader with a decoder of its own."""
    found: dict[str, Callable[[], Reader]] = {"open_video": lambda: lambda: map(as_surface, open_video(path))}
    try:
        import PyNvVideoCodec as nvc
    except ImportError:
        return found

    def new_decoder() -> Any:
        codec = nvc.CreateDemuxer(filename=str(path)).GetNvCodecId()
        return nvc.CreateDecoder(gpuid=0, codec=codec, usedevicememory=True)

    def frames(decoder: Any) -> Iterator[Tensor]:
        for packet in nvc.CreateDemuxer(filename=str(path)):
            yield from map(torch.from_dlpack, decoder.Decode(packet))

    def kept_decoder() -> Reader:
        kept = new_decoder()
        return lambda: frames(kept)

    def threaded() -> Reader:
        kept: list[Any] = []

        def read() -> Iterator[Tensor]:
            if kept:
                kept[0].reconfigure_decoder(str(path))
            else:
                kept.append(nvc.ThreadedDecoder(str(path), 16, gpu_id=0, use_device_memory=True))
            while batch := kept[0].get_batch_frames(8):
                yield from map(torch.from_dlpack, batch)

        return read

    return found | {
        "PyNvVideoCodec decoder made anew": lambda: lambda: frames(new_decoder()),
        "PyNvVideoCodec decoder": kept_decoder,
        "PyNvVideoCodec ThreadedDecoder": threaded,
    }


def as_surface(frame: Frame) -> Tensor:
    """The samples of a frame as NVDEC lays them out, [rows, W]; no copy, as they came that way."""
    height, width = frame.y.shape
    chroma = frame.uv.shape[0] * 2 if frame.uv.shape[0] == height else height // 2
    return frame.y.as_strided((height + chroma, width), frame.y.stride())


def drain(own: list[Reader], threads: ThreadPoolExecutor, frames: int) -> None:
    """One pass of every reader at the same time; stops unless each gives `frames` frames."""
    counts = list(threads.map(lambda reader: sum(1 for _ in reader()), own))
    if counts != [frames] * len(own):
        raise RuntimeError(f"{counts} of {frames} frames each were decoded")


def write_mp4(path: Path, stream: bytes) -> None:
    """The frames of an Annex B stream in an MP4 file, not coded anew."""
    raw = path.with_suffix(".hevc")
    raw.write_bytes(stream)
    with av.open(raw) as source, av.open(path, "w") as target:
        track = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux() if p.size):
            packet.stream = track
            packet.pts = packet.dts = number * packet.duration
            target.mux(packet)
    raw.unlink()


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
    """Stop unless two surfaces [rows, bytes] are equal."""
    if not torch.equal(got, reference):
        raise RuntimeError(f"{workload.name}: {who} and FFmpeg decode different samples; nothing is timed")


def gate_frames(workload: Workload, who: str, got: Iterator[Tensor], reference: Tensor, frames: int) -> None:
    """Stop unless there are `frames` frames, those of `reference` again and again."""
    fmt = FORMATS[workload.format]
    distinct = reference.chunk(reference.shape[0] // fmt.rows(workload.height))
    count = 0
    for frame in got:
        if fmt.itemsize == 2 and who == "open_video":
            frame = frame.view(torch.int16) << fmt.shift  # as NVDEC aligns the samples
        gate(workload, who, frame.contiguous().view(torch.uint8), distinct[count % len(distinct)])
        count += 1
    if count != frames:
        raise RuntimeError(f"{workload.name}: {who} decodes {count} of {frames} frames")


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
    decoders: int,
    seconds: list[float],
) -> Row:
    middle = median(seconds)
    low, *_, high = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else (middle, middle)
    pixels = decoders * layout.frames * layout.width * layout.height
    samples = decoders * layout.rows * layout.width
    return {
        "workload": workload.name,
        "decoder": who,
        "decoders": decoders,
        "samples_checked": True,
        **{k: v for k, v in asdict(workload).items() if k not in ("name", "frames")},
        "frames": decoders * layout.frames,
        "stream_bytes": decoders * size,
        "bits_per_pixel": 8 * decoders * size / pixels,
        "bits_per_sample": 8 * decoders * size / samples,
        "seconds_median": middle,
        "seconds_p20": low,
        "seconds_p80": high,
        "runs": len(seconds),
        "gpixel_s": pixels / middle / 1e9,
        "gsample_s": samples / middle / 1e9,
        "stream_mb_s": decoders * size / middle / 1e6,
    }


def _arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--cache", type=Path, help="folder that keeps the coded streams")
    parser.add_argument("--distinct", type=int, default=6, help="distinct frames of a stream")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs")
    parser.add_argument("--engines", type=int, help="decoders of the pool; all engines by default")
    parser.add_argument("--only", choices=[w.name for w in WORKLOADS], help="measure one workload")
    return parser.parse_args()


if __name__ == "__main__":
    main()
