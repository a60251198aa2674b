"""NVDEC on a GPU: streams of the software encoder must come out as the same samples, to the bit."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sidelane.codec._nvdec_stream import StreamDecode
from sidelane.codec.hevc import decode_hevc, encode_hevc
from sidelane.codec.nvdec import NvDecoder, NvDecoderPool, decode_nvdec, release_idle_decoders
from sidelane.codec.probe import probe_nvdec, probe_nvenc
from sidelane.errors import DriverError, PacketError
from sidelane.kernels.reference import pack_surface_ref, unpack_surface_ref
from sidelane.layout import (
    FORMATS,
    MAPPINGS,
    NV12,
    P010,
    TOKEN_ROWS,
    YUV444,
    YUV444_10,
    SurfaceFormat,
    SurfaceLayout,
    plan_surface,
)

pytestmark = pytest.mark.gpu
CODED = [(f, qp) for f in FORMATS.values() for qp in (None, 4, 22, 40) if qp is None or not f.split]
SIZES = [
    (144, 144, 1),
    (144, 144, 20),
    (146, 150, 3),
    (1920, 1080, 2),
    (4096, 2304, 2),
    (8192, 144, 1),
    (144, 8192, 1),
    (8192, 8192, 1),
]


def layout_of(
    format: SurfaceFormat, width: int, height: int, frames: int = 1, pitch: int = 1024
) -> SurfaceLayout:
    return SurfaceLayout(format, TOKEN_ROWS, 1, 2, width, height, frames, pitch)


def picture(layout: SurfaceLayout, seed: int = 0) -> Tensor:
    """A surface [rows, pitch] of smooth waves with a little noise, cheap to encode; padding is zero."""
    generator = torch.Generator().manual_seed(seed)
    fmt = layout.format
    top = (1 << (8 if fmt.itemsize == 1 else fmt.bits)) - 1
    y, x = torch.arange(layout.rows)[:, None] / 37.0, torch.arange(layout.width) / 23.0
    wave = (0.5 + 0.2 * torch.sin(y + seed) + 0.2 * torch.cos(x)) * top
    noise = torch.randint(0, 4, wave.shape, generator=generator)
    codes = (wave.to(torch.int32) + noise).clamp_(0, top)
    surface = torch.zeros(layout.shape, dtype=torch.uint8)
    if fmt.itemsize == 1:
        surface[:, : layout.width] = codes.to(torch.uint8)
    else:
        surface.view(torch.int16)[:, : layout.width] = (codes << fmt.shift).to(torch.int16)
    return surface


def same_samples(got: Tensor, want: Tensor, layout: SurfaceLayout) -> bool:
    used = layout.width * layout.format.itemsize
    return torch.equal(got.cpu()[:, :used], want[:, :used])


@pytest.mark.parametrize(("format", "qp"), CODED, ids=lambda p: getattr(p, "name", f"qp{p}"))
def test_decodes_as_software_does(cuda: torch.device, format: SurfaceFormat, qp: int | None) -> None:
    layout = layout_of(format, 256, 208, frames=6)
    want = picture(layout)
    stream = encode_hevc(want, layout, qp=qp)
    got = decode_nvdec(stream, layout, cuda)
    assert same_samples(got, decode_hevc(stream, layout), layout)
    assert same_samples(got, want, layout) == (qp is None)


@pytest.mark.parametrize(("width", "height", "frames"), SIZES)
@pytest.mark.parametrize("format", [NV12, P010, YUV444], ids=lambda f: f.name)
def test_sizes(cuda: torch.device, format: SurfaceFormat, width: int, height: int, frames: int) -> None:
    layout = layout_of(format, width, height, frames, pitch=-(-width * format.itemsize // 256) * 256)
    want = picture(layout)
    got = decode_nvdec(encode_hevc(want, layout), layout, cuda)
    release_idle_decoders()
    assert same_samples(got, want, layout)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(("tokens", "channels"), [(777, 33), (4096, 129), (1, 1), (3001, 257)])
def test_planned_surfaces(cuda: torch.device, mapping: str, tokens: int, channels: int) -> None:
    layout = plan_surface(YUV444_10, mapping, tokens, channels, max_side=256)
    codes = torch.randint(0, 1024, (tokens, channels), dtype=torch.int16)
    surface = torch.zeros(layout.shape, dtype=torch.uint8)
    pack_surface_ref(codes, surface, layout)
    got = decode_nvdec(encode_hevc(surface, layout), layout, cuda)
    assert torch.equal(unpack_surface_ref(got, layout).cpu(), codes)


def test_decoder_changes_size_and_format(cuda: torch.device) -> None:
    sizes = [
        (NV12, 512, 384),
        (NV12, 256, 208),
        (NV12, 512, 384),
        (NV12, 640, 144),
        (P010, 256, 208),
        (YUV444, 160, 144),
    ]
    with NvDecoder(cuda) as decoder:
        for seed, (format, width, height) in enumerate(sizes * 2):
            layout = layout_of(format, width, height, frames=1 + seed % 3, pitch=2048)
            want = picture(layout, seed)
            assert same_samples(decoder.decode(encode_hevc(want, layout), layout), want, layout), seed


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
def test_the_parser_is_not_asked_again(
    cuda: torch.device, format: SurfaceFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("the parser was asked")

    layout = layout_of(format, 256, 208, frames=12)
    pictures = [picture(layout, seed) for seed in range(2)]
    streams = [encode_hevc(p, layout) for p in pictures]
    with NvDecoder(cuda) as decoder:
        decoder.decode(streams[0], layout)
        monkeypatch.setattr(StreamDecode, "feed", refuse)
        for stream, want in zip(streams, pictures, strict=True):
            assert same_samples(decoder.decode(stream, layout), want, layout)


def test_writes_after_the_work_of_the_callers_stream(cuda: torch.device) -> None:
    layout = layout_of(NV12, 256, 208, frames=100)  # many times the surfaces of the decoder
    want = picture(layout)
    stream = encode_hevc(want, layout)
    out = torch.empty(layout.shape, dtype=torch.uint8, device=cuda)
    with NvDecoder(cuda) as decoder:
        decoder.decode(stream, layout, out=out)
        side = torch.cuda.Stream(cuda)
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # holds the stream back while the decoder gets going
            out.fill_(7)
            decoder.decode(stream, layout, out=out)
        torch.cuda.synchronize()
    assert same_samples(out, want, layout)
    assert (out[:, layout.width :] == 7).all()


def test_pool(cuda: torch.device) -> None:
    layouts = [layout_of(NV12, 160 + 32 * (i % 3), 144, frames=1 + i % 4) for i in range(24)]
    pictures = [picture(layout, i) for i, layout in enumerate(layouts)]
    streams = [encode_hevc(p, layout) for p, layout in zip(pictures, layouts, strict=True)]
    with NvDecoderPool(cuda) as pool:
        got = pool.decode(zip(streams, layouts, strict=True))
        for surface, want, layout in zip(got, pictures, layouts, strict=True):
            assert same_samples(surface, want, layout)
        layout = layout_of(P010, 256, 208, frames=17)
        want = picture(layout)
        assert same_samples(pool.decode_surface(encode_hevc(want, layout), layout), want, layout)


@pytest.mark.parametrize("format", [P010, YUV444], ids=lambda f: f.name)
def test_refuses_a_stream_unlike_its_packet(cuda: torch.device, format: SurfaceFormat) -> None:
    layout = layout_of(NV12, 256, 208, frames=2)
    stream = encode_hevc(picture(layout), layout)
    for other in (layout_of(format, 256, 208, 2), layout_of(NV12, 208, 256, 2)):
        with pytest.raises(PacketError, match="the stream is 256x208 420 8 bit, the packet says"):
            decode_nvdec(stream, other, cuda)
    for frames in (1, 3):
        with pytest.raises(PacketError, match="frames"):
            decode_nvdec(stream, layout_of(NV12, 256, 208, frames), cuda)
    with pytest.raises(PacketError, match="0 of 2 frames"):
        decode_nvdec(b"", layout, cuda)
    with pytest.raises(PacketError, match="0 of 2 frames"):
        decode_nvdec(bytes(1000), layout, cuda)


def test_survives_damaged_streams(cuda: torch.device) -> None:
    layout = layout_of(NV12, 256, 208, frames=2)
    want = picture(layout)
    stream = encode_hevc(want, layout)
    place = torch.Generator().manual_seed(0)
    for _ in range(40):
        damaged = bytearray(stream)
        for at in torch.randint(0, len(stream), (3,), generator=place).tolist():
            damaged[at] ^= 0x55
        # A flipped residual decodes to other samples; checksums of packets see it, the decoder cannot.
        with contextlib.suppress(PacketError, DriverError):
            assert decode_nvdec(bytes(damaged), layout, cuda).shape == layout.shape
    assert same_samples(decode_nvdec(stream, layout, cuda), want, layout)


def test_memory_of_closed_decoders_comes_back(cuda: torch.device) -> None:
    layout = layout_of(NV12, 1024, 1024)
    stream = encode_hevc(picture(layout), layout)

    def cycle(times: int) -> int:
        for _ in range(times):
            with NvDecoder(cuda) as decoder:
                decoder.decode(stream, layout)
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info(cuda)[0]

    release_idle_decoders()
    before = cycle(2)
    assert before - cycle(20) < 64 << 20  # 20 leaked decoders would hold 200 MiB and more


def test_decoders_left_open_at_exit(cuda: torch.device, tmp_path: Path) -> None:
    layout = layout_of(NV12, 256, 208)
    (tmp_path / "stream").write_bytes(encode_hevc(picture(layout), layout))
    code = (
        "from sidelane.codec.nvdec import NvDecoder, NvDecoderPool, decode_nvdec\n"
        "from sidelane.layout import NV12, TOKEN_ROWS, SurfaceLayout\n"
        "layout = SurfaceLayout(NV12, TOKEN_ROWS, 1, 2, 256, 208, 1, 1024)\n"
        "stream = open('stream', 'rb').read()\n"
        "decode_nvdec(stream, layout)\n"
        "decoder, pool = NvDecoder(), NvDecoderPool()\n"
        "decoder.decode(stream, layout)\n"
        "pool.submit(stream, layout).result()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_probes(cuda: torch.device) -> None:
    caps = {(c.codec, c.chroma, c.bits): c for c in probe_nvdec(cuda)}
    main = caps["hevc", "4:2:0", 8]
    assert main.supported and main.engines >= 1 and main.refusal(144, 144) is None and "NV12" in main.outputs
    found = probe_nvenc(cuda)
    assert found.available == any(attempt.status == 0 for attempt in found.attempts)
    assert found.available or found.reason
    for attempt in found.attempts:
        assert attempt.status == 0 or f"-> {attempt.status} (NV_ENC_ERR_" in attempt.text
