"""NVDEC throughput next to a plain C loop over the same calls and to PyNvVideoCodec.

    python benchmarks/nvdec.py --prepare DIR [--only NAME]
    python benchmarks/nvdec.py --inputs DIR --out FILE [--loop FILE] [--repeat N] [--engines N] [--only NAME]

The first command needs PyAV and no GPU: it codes a few distinct pictures (smooth waves under Gaussian
noise) with libx265 as all-intra HEVC, decodes them with FFmpeg for the digest of their samples, and writes
them repeated to an MP4 file for the peers. The second needs a GPU: every decoder has to give samples of that
digest before it is timed.

`NvDecoder`, `NvDecoderPool` and `C loop` (nvdec_loop.c says how to build --loop) read the stream from memory
and copy every frame into a CUDA tensor of the caller. `open_video` (where PyAV is) and PyNvVideoCodec read
the MP4 file; frames of PyNvVideoCodec are DLPack views that its next call overwrites. Decoders are kept from
run to run, but for `open_video`, which makes one per file: its rows include start-up. SimpleDecoder of
PyNvVideoCodec, made for random access, is a quarter as fast as its plain decoder and left out.

Rates: gpixel_s counts luma only, gsample_s all planes; raw_gb_s counts 2 bytes per sample, the bfloat16
tensor that the codes stand for; stream_mb_s is the bitstream.
"""

from __future__ import annotations

import ctypes
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from common import environment
from nvdec_inputs import DISTINCT, WORKLOADS, Inputs, Workload, prepare, sha256
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sidelane.codec.nvdec import NvDecoder, NvDecoderPool
from sidelane.codec.video_file import Frame, open_video
from sidelane.layout import SurfaceLayout

Reader = Callable[[], Iterator[Tensor]]  # one pass over a file: surfaces [rows of a frame, width] of samples
Run = Callable[[], "float | None"]  # one pass of all decoders; its seconds if it measures them itself
Row = dict[str, Any]


class Measurement:
    """The rows of one workload, and the gate every decoder passes before a row is added."""

    def __init__(self, workload: Workload, inputs: Inputs, repeat: int) -> None:
        self.workload = workload
        self.layout = workload.layout(workload.frames)
        self.inputs = inputs
        self.rows: list[Row] = []
        self._repeat = repeat

    def gate(self, who: str, samples: Tensor) -> None:
        """Stop unless `samples`, bytes [rows, used], are the frames that FFmpeg decodes, again and again."""
        repeats = self.workload.frames // DISTINCT
        first = samples[: samples.shape[0] // repeats]
        if sha256(first) != self.inputs.digest or not torch.equal(samples, first.repeat(repeats, 1)):
            name = self.workload.name
            raise RuntimeError(f"{name}: {who} and FFmpeg decode different samples; nothing is timed")

    def add(self, who: str, decoders: int, run: Run) -> None:
        """Time passes of `run`, all of which end with complete surfaces, after one to warm up."""
        run()
        torch.cuda.synchronize()
        seconds = []
        for _ in range(self._repeat):
            start = perf_counter()
            own = run()
            torch.cuda.synchronize()
            seconds.append(perf_counter() - start if own is None else own)
        self.rows.append(self._row(who, decoders, seconds))
        told = ("workload", "decoder", "decoders", "gpixel_s", "stream_mb_s", "seconds_median")
        print(json.dumps({key: self.rows[-1][key] for key in told}), flush=True)

    def fail(self, who: str, error: Exception) -> None:
        """Record that something cannot decode this: that is a result, too."""
        self.rows.append({"workload": self.workload.name, "decoder": who, "error": str(error)})
        print(json.dumps(self.rows[-1]), flush=True)

    def _row(self, who: str, decoders: int, seconds: list[float]) -> Row:
        layout, size = self.layout, decoders * len(self.inputs.stream)
        middle = median(seconds)
        low, *_, high = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else (middle, middle)
        pixels = decoders * layout.frames * layout.width * layout.height
        samples = decoders * layout.rows * layout.width
        return {
            "workload": self.workload.name,
            "decoder": who,
            "decoders": decoders,
            "samples_checked": True,
            **{k: v for k, v in asdict(self.workload).items() if k not in ("name", "frames")},
            "frames": decoders * layout.frames,
            "stream_bytes": size,
            "bits_per_pixel": 8 * size / pixels,
            "bits_per_sample": 8 * size / samples,
            "seconds_median": middle,
            "seconds_p20": low,
            "seconds_p80": high,
            "runs": len(seconds),
            "us_per_frame": 1e6 * middle / decoders / layout.frames,
            "gpixel_s": pixels / middle / 1e9,
            "gsample_s": samples / middle / 1e9,
            "raw_gb_s": 2 * samples / middle / 1e9,
            "stream_mb_s": size / middle / 1e6,
        }


def main() -> None:
    args = _arguments()
    chosen = [w for w in WORKLOADS if args.only in (None, w.name)]
    if args.prepare is not None:
        for workload in chosen:
            prepare(workload, args.prepare)
        return
    rows: list[Row] = []
    for workload in chosen:
        rows += measure(workload, args)
        about = environment() | {"PyNvVideoCodec": _version("PyNvVideoCodec")}
        args.out.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


def measure(workload: Workload, args: Namespace) -> list[Row]:
    """Rows of one workload. Raises RuntimeError when samples differ from FFmpeg's."""
    inputs = Inputs.load(workload, args.inputs)
    found = Measurement(workload, inputs, args.repeat)
    layout, stream = found.layout, inputs.stream
    used = layout.width * layout.format.itemsize
    with NvDecoder("cuda") as decoder:
        out = decoder.decode(stream, layout)
        found.gate("NvDecoder", out[:, :used])
        found.add("NvDecoder", 1, lambda: _nothing(decoder.decode(stream, layout, out=out)))
    with NvDecoderPool("cuda", args.engines) as pool:
        engines = pool.engines
        found.gate("NvDecoderPool", pool.decode_surface(stream, layout)[:, :used])
        jobs = [(stream, layout)] * engines
        for surface in pool.decode(jobs):
            found.gate("NvDecoderPool", surface[:, :used])
        found.add("NvDecoderPool", engines, lambda: _nothing(*pool.decode(jobs)))
    for decoders in (1, engines) if args.loop else ():
        c_loop(found, args.loop, decoders, args.repeat)
    with TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        path.write_bytes(inputs.video)
        for who, make in readers(path).items():
            for decoders in (1, engines):
                try:
                    read_files(found, who, [make() for _ in range(decoders)])
                except Exception as error:
                    found.fail(who, error)
    return found.rows


def read_files(found: Measurement, who: str, own: list[Reader]) -> None:
    """The row of decoders that read a file each, at the same time."""
    frames = found.layout.frames
    found.gate(who, all_samples(own[0](), found.layout))
    with ThreadPoolExecutor(len(own)) as threads:
        found.add(who, len(own), partial(drain, own, threads, frames))


def c_loop(found: Measurement, library: Path, decoders: int, repeat: int) -> None:
    """The rows of nvdec_loop.c."""
    layout, stream = found.layout, found.inputs.stream
    used = layout.width * layout.format.itemsize
    surfaces = [torch.zeros(layout.shape, dtype=torch.uint8, device="cuda") for _ in range(decoders)]
    addresses = (ctypes.c_uint64 * decoders)(*(s.data_ptr() for s in surfaces))
    seconds = (ctypes.c_double * repeat)()
    torch.cuda.synchronize()
    failed = ctypes.CDLL(str(library.resolve())).nvdec_loop(
        ctypes.c_char_p(stream),
        ctypes.c_size_t(len(stream)),
        decoders,
        repeat,
        addresses,
        ctypes.c_size_t(layout.pitch),
        used,
        layout.rows // layout.frames,
        layout.frames,
        seconds,
    )
    if failed:
        raise RuntimeError("the C loop failed")
    for surface in surfaces:
        found.gate("C loop", surface[:, :used])
    measured = chain([0.0], seconds)
    found.add("C loop", decoders, lambda: next(measured))


def readers(path: Path) -> dict[str, Callable[[], Reader]]:
    """For everything that decodes files a function that makes a reader with a decoder of its own."""
    found: dict[str, Callable[[], Reader]] = {}
    if find_spec("av"):
        found["open_video"] = lambda: lambda: map(as_surface, open_video(path))
    try:
        import PyNvVideoCodec as nvc
    except ImportError:
        return found

    def plain() -> Reader:
        codec = nvc.CreateDemuxer(filename=str(path)).GetNvCodecId()
        kept = nvc.CreateDecoder(gpuid=0, codec=codec, usedevicememory=True)

        def read() -> Iterator[Tensor]:
            for packet in nvc.CreateDemuxer(filename=str(path)):
                yield from map(from_dlpack, kept.Decode(packet))

        return read

    def threaded() -> Reader:
        kept: list[Any] = []

        def read() -> Iterator[Tensor]:
            if kept:
                kept[0].reconfigure_decoder(str(path))
            else:
                kept.append(nvc.ThreadedDecoder(str(path), 32, gpu_id=0, use_device_memory=True))
            while frames := kept[0].get_batch_frames(16):
                yield from map(from_dlpack, frames)

        return read

    return found | {"PyNvVideoCodec decoder": plain, "PyNvVideoCodec ThreadedDecoder": threaded}


def as_surface(frame: Frame) -> Tensor:
    """The samples of a frame as NVDEC lays them out, [rows, W]."""
    height, width = frame.y.shape
    chroma = frame.uv.shape[0] * 2 if frame.uv.shape[0] == height else height // 2
    samples = frame.y.as_strided((height + chroma, width), frame.y.stride())
    return samples if frame.bits == 8 else samples.view(torch.int16) << (16 - frame.bits)


def all_samples(frames: Iterator[Tensor], layout: SurfaceLayout) -> Tensor:
    """Bytes [rows, used] of one more frame than there should be, if there is."""
    copies = [frame.contiguous().view(torch.uint8).clone() for frame in islice(frames, layout.frames + 1)]
    if len(copies) != layout.frames:
        raise RuntimeError(f"{len(copies)} frames or more were decoded, {layout.frames} expected")
    return torch.cat([copy.reshape(-1, layout.width * layout.format.itemsize) for copy in copies])


def drain(own: list[Reader], threads: ThreadPoolExecutor, frames: int) -> None:
    """One pass of every reader at the same time; stops unless each gives `frames` frames."""
    counts = list(threads.map(lambda reader: sum(1 for _ in reader()), own))
    if counts != [frames] * len(own):
        raise RuntimeError(f"{counts} of {frames} frames each were decoded")


def _nothing(*_: object) -> None:
    """Drop what a run returns."""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--prepare", type=Path, metavar="DIR", help="write the inputs to this folder and stop"
    )
    parser.add_argument("--inputs", type=Path, metavar="DIR", help="folder of --prepare")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--loop", type=Path, metavar="FILE", help="the library built from nvdec_loop.c")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs")
    parser.add_argument("--engines", type=int, help="decoders side by side; all engines by default")
    parser.add_argument("--only", choices=[w.name for w in WORKLOADS], help="one workload")
    args = parser.parse_args()
    if args.prepare is None and (args.inputs is None or args.out is None):
        parser.error("give --prepare DIR, or --inputs DIR and --out FILE")
    return args


if __name__ == "__main__":
    main()
