"""The streams and video files of nvdec.py, made where PyAV is, used where the GPU is."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sidelane.codec.hevc import END_OF_BITSTREAM, decode_hevc, encode_hevc
from sidelane.layout import FORMATS, TOKEN_ROWS, SurfaceLayout

DISTINCT = 3  # pictures; more would not fit the window in which xz finds that the rest repeats them


@dataclass(frozen=True)
class Workload:
    """What every decoder decodes. `noise`: standard deviation in code steps; `qp` None is lossless.

    `frames`, a multiple of DISTINCT, keep one decoder busy for a fifth of a second.
    """

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
    Workload("lossless-8bit", "nv12", 1280, 1280, 3.5, None, 30),
    Workload("low-rate-8bit", "nv12", 2048, 2048, 3.5, 27, 60),
    Workload("small-frames", "nv12", 256, 256, 3.5, 27, 1500),
    Workload("lossless-10bit", "yuv444_10", 768, 768, 3.5, None, 42),
    Workload("low-rate-10bit", "p010", 2048, 2048, 14.0, 27, 60),
)


@dataclass(frozen=True)
class Inputs:
    """Frames of a workload, the first DISTINCT repeated; `digest`: SHA-256 of the samples of those."""

    stream: bytes  # Annex B
    video: bytes  # MP4
    digest: str

    @classmethod
    def load(cls, workload: Workload, folder: Path) -> Inputs:
        with tarfile.open(folder / f"{workload.name}.tar.xz") as tar:
            coded, video, digest = (_member(tar, name) for name in ("stream.hevc", "video.mp4", "sha256"))
        return cls(_repeated(coded, workload), video, digest.decode())


def prepare(workload: Workload, folder: Path) -> None:
    """Encode the workload, decode it with FFmpeg for the digest, and write what `Inputs.load` reads."""
    layout = workload.layout(DISTINCT)
    coded = encode_hevc(picture(layout, workload.noise), layout, qp=workload.qp)
    used = layout.width * layout.format.itemsize
    members = {
        "stream.hevc": coded,
        "video.mp4": as_mp4(_repeated(coded, workload)),
        "sha256": sha256(decode_hevc(coded, layout)[:, :used]).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{workload.name}.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    print(f"{archive}: {archive.stat().st_size} bytes", flush=True)


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


def as_mp4(stream: bytes) -> bytes:
    """The frames of an Annex B stream in an MP4 file, not coded anew."""
    import av

    target = io.BytesIO()
    with av.open(io.BytesIO(stream), format="hevc") as source, av.open(target, "w", format="mp4") as file:
        track = file.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux() if p.size):
            packet.stream = track
            packet.pts = packet.dts = number * packet.duration
            file.mux(packet)
    return target.getvalue()


def sha256(samples: Tensor) -> str:
    return hashlib.sha256(samples.contiguous().cpu().numpy().data).hexdigest()


def _repeated(coded: bytes, workload: Workload) -> bytes:
    return coded.removesuffix(END_OF_BITSTREAM) * (workload.frames // DISTINCT) + END_OF_BITSTREAM


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise RuntimeError(f"{tar.name} has no {name}: prepare it anew")  # type: ignore[str-bytes-safe]
    return file.read()
