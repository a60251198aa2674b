"""Software HEVC: bit-exact streams of every surface format, an independent decoder, refusal of bad bytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidelane.codec import hevc
from sidelane.codec.hevc import (
    END_OF_BITSTREAM,
    PIXEL_FORMATS,
    decode_hevc,
    encode_hevc,
    hevc_support,
)
from sidelane.codec.hevc_syntax import Sequence, check_stream, parse_sps
from sidelane.errors import LaneError, LaneUnavailable, PacketError
from sidelane.kernels.reference import pack_surface_ref, unpack_surface_ref
from sidelane.layout import (
    CHANNEL_ROWS,
    FORMATS,
    NV12,
    NV12_SPLIT12,
    P010,
    YUV444,
    SurfaceLayout,
    plan_surface,
)

# tokens, channels, largest side: less than a frame, odd counts, several frames
SIZES = {"tiny": (3, 5, 4096), "ragged": (83, 77, 4096), "frames": (551, 123, 144)}
VPS, SPS, PPS, IDR, EOB = 32, 33, 34, (19, 20), 37


def wave(layout: SurfaceLayout) -> Tensor:
    """Smooth codes [T, K] with a little noise, over the whole range of the format."""
    t, k = torch.arange(layout.tokens)[:, None], torch.arange(layout.channels)[None]
    z = torch.sin(t / 29) * torch.cos(k / 17) * 0.49 + torch.rand(t.shape[0], k.shape[1]) * 0.01 + 0.49
    codes: Tensor = z * (2**layout.format.bits - 1)
    return codes.to(torch.int16)


def surface_of(codes: Tensor, layout: SurfaceLayout) -> Tensor:
    surface = torch.zeros(layout.shape, dtype=torch.uint8)
    pack_surface_ref(codes, surface, layout)
    return surface


def sample(format: str = "nv12", size: str = "ragged") -> tuple[Tensor, SurfaceLayout]:
    tokens, channels, side = SIZES[size]
    layout = plan_surface(FORMATS[format], CHANNEL_ROWS, tokens, channels, max_side=side)
    return surface_of(wave(layout), layout), layout


def ffmpeg(path: Path, *output: str) -> subprocess.CompletedProcess[bytes]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path), *output]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


def nal_types(stream: bytes) -> list[int]:
    return [stream[m.end()] >> 1 & 63 for m in re.finditer(b"\x00\x00\x01", stream)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_lossless_restores_every_sample(name: str, size: str) -> None:
    surface, layout = sample(name, size)
    stream = encode_hevc(surface, layout)
    assert (layout.frames > 1) == (size == "frames")
    assert torch.equal(decode_hevc(stream, layout), surface)


@pytest.mark.parametrize("name", FORMATS)
def test_lossless_restores_noise(name: str) -> None:
    layout = plan_surface(FORMATS[name], CHANNEL_ROWS, 64, 31)
    codes = torch.randint(0, 2**layout.format.bits, (64, 31), dtype=torch.int16)
    decoded = decode_hevc(encode_hevc(surface_of(codes, layout), layout), layout)
    assert torch.equal(unpack_surface_ref(decoded, layout), codes)


@pytest.mark.parametrize("height", [144, 146, 150, 192, 194])
@pytest.mark.parametrize("width", [144, 146, 190, 192, 194])
def test_sides_that_are_no_multiple_of_a_coding_block(width: int, height: int) -> None:
    layout = SurfaceLayout(NV12, CHANNEL_ROWS, 144, 144, width, height, frames=1, pitch=256)
    surface = surface_of(wave(layout), layout)
    assert torch.equal(decode_hevc(encode_hevc(surface, layout), layout), surface)


@pytest.mark.parametrize("name", ["nv12", "p010", "yuv444_12"])
def test_padding_and_unused_low_bits_do_not_travel(name: str) -> None:
    surface, layout = sample(name)
    dirty = surface.clone()
    row = layout.width * layout.format.itemsize
    dirty[:, row:] = 0xA5
    if layout.format.shift:
        dirty.view(torch.int16)[:, : layout.width] |= 2**layout.format.shift - 1
    assert not torch.equal(dirty, surface)
    stream = encode_hevc(dirty, layout)
    assert stream == encode_hevc(surface, layout)
    assert torch.equal(decode_hevc(stream, layout), surface)


def test_stream_is_plain_annex_b_with_one_idr_per_frame() -> None:
    surface, layout = sample(size="frames")
    stream = encode_hevc(surface, layout)
    types = nal_types(stream)
    assert stream.startswith(b"\x00\x00\x00\x01\x40\x01")  # start code, VPS
    assert len(types) == 4 * layout.frames + 1 and types[-1] == EOB
    for i in range(layout.frames):
        assert types[4 * i : 4 * i + 3] == [VPS, SPS, PPS]
        assert types[4 * i + 3] in IDR


@pytest.mark.parametrize("qp", [None, 20, 37])
@pytest.mark.parametrize("name", sorted(set(PIXEL_FORMATS) - {"nv12_split12"}))
def test_the_ffmpeg_program_decodes_the_same_samples(name: str, qp: int | None, tmp_path: Path) -> None:
    surface, layout = sample(name)
    stream = encode_hevc(surface, layout, qp=qp)
    path, raw = tmp_path / "stream.hevc", tmp_path / "samples.yuv"
    path.write_bytes(stream)
    run = ffmpeg(path, "-v", "error", "-f", "rawvideo", str(raw))
    assert run.returncode == 0 and run.stderr == b""
    decoded = decode_hevc(stream, layout)
    assert torch.equal(decoded, surface) == (qp is None)
    fmt = layout.format
    rows = decoded.numpy().view(np.uint16 if fmt.itemsize == 2 else np.uint8)[:, : layout.width] >> fmt.shift
    luma, chroma = rows[: layout.height], rows[layout.height :]
    planes = [luma, chroma[:, 0::2], chroma[:, 1::2]] if fmt.subsampled else [rows]
    assert raw.read_bytes() == b"".join(plane.tobytes() for plane in planes)


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("nv12", "Main"),
        ("nv12_split12", "Main"),
        ("p010", "Main 10"),
        ("p012", "Rext"),
        ("yuv444_10", "Rext"),
    ],
)
def test_the_ffmpeg_program_sees_codec_size_and_full_range(name: str, profile: str, tmp_path: Path) -> None:
    surface, layout = sample(name)
    path = tmp_path / "stream.hevc"
    path.write_bytes(encode_hevc(surface, layout))
    info = ffmpeg(path).stderr.decode()
    pixels = PIXEL_FORMATS[name].replace("yuv420p", "yuvj420p") if layout.format.itemsize == 1 else None
    assert f"Video: hevc ({profile}), {pixels or PIXEL_FORMATS[name]}(pc" in info
    assert f"{layout.width}x{layout.height}" in info


@pytest.mark.parametrize("name", ["nv12", "p010", "yuv444"])
def test_error_grows_and_size_falls_with_qp(name: str) -> None:
    surface, layout = sample(name)
    codes = unpack_surface_ref(surface, layout).float()
    errors, sizes = [], [len(encode_hevc(surface, layout))]
    for qp in (4, 16, 28, 40):
        stream = encode_hevc(surface, layout, qp=qp)
        decoded = unpack_surface_ref(decode_hevc(stream, layout), layout).float()
        errors.append((decoded - codes).square().mean().item())
        sizes.append(len(stream))
    assert errors == sorted(errors) and errors[0] < errors[-1] / 4
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("qp", [None, 30])
def test_the_same_samples_give_the_same_bytes(qp: int | None) -> None:
    surface, layout = sample(size="frames")
    first = encode_hevc(surface, layout, qp=qp)
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: encode_hevc(surface, layout, qp=qp), range(6))) == {first}
        assert all(
            torch.equal(d, decode_hevc(first, layout))
            for d in pool.map(decode_hevc, [first] * 6, [layout] * 6)
        )


def test_the_number_of_cores_does_not_change_the_bytes() -> None:
    surface, layout = sample(size="frames")
    cores = os.sched_getaffinity(0)
    first = encode_hevc(surface, layout)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert encode_hevc(surface, layout) == first
    finally:
        os.sched_setaffinity(0, cores)


def test_the_split_format_is_lossless_only() -> None:
    surface, layout = sample("nv12_split12")
    with pytest.raises(LaneError, match="lossless"):
        encode_hevc(surface, layout, qp=10)


@pytest.mark.parametrize("qp", [-1, 52, 1.5, "30"])
def test_a_qp_outside_the_range_is_refused(qp: object) -> None:
    surface, layout = sample()
    with pytest.raises(LaneError, match="qp="):
        encode_hevc(surface, layout, qp=qp)  # type: ignore[arg-type]


def test_a_surface_that_does_not_fit_the_layout_is_refused() -> None:
    surface, layout = sample()
    for wrong in (surface[1:], surface.int(), surface.t().contiguous().t(), surface.to("meta")):
        with pytest.raises(LaneError, match="surface is"):
            encode_hevc(wrong, layout)


def test_a_frame_too_small_for_the_encoder_is_refused() -> None:
    layout = SurfaceLayout(NV12, CHANNEL_ROWS, 2, 2, width=2, height=2, frames=1, pitch=2)
    with pytest.raises(LaneError, match="libx265 refuses 2x2 yuv420p"):
        encode_hevc(torch.zeros(layout.shape, dtype=torch.uint8), layout)


@pytest.mark.parametrize("qp", [None, 30])
def test_a_stream_cut_anywhere_is_refused(qp: int | None) -> None:
    surface, layout = sample(size="frames")
    stream = encode_hevc(surface, layout, qp=qp)
    for length in [*range(0, len(stream), 997), *range(len(stream) - 8, len(stream))]:
        with pytest.raises(PacketError, match="'bitstream'"):
            decode_hevc(stream[:length], layout)


def test_frames_of_another_size_format_or_number_are_refused() -> None:
    surface, layout = sample()
    stream = encode_hevc(surface, layout)
    tokens, channels, _ = SIZES["ragged"]
    others = [
        plan_surface(P010, CHANNEL_ROWS, tokens, channels),
        plan_surface(YUV444, CHANNEL_ROWS, tokens, channels),
        plan_surface(NV12, CHANNEL_ROWS, tokens * 2, channels),
        plan_surface(NV12, CHANNEL_ROWS, tokens * 9, channels, max_side=144),
    ]
    for other in others:
        with pytest.raises(PacketError, match="'bitstream'"):
            decode_hevc(stream, other)
    with pytest.raises(PacketError, match="2 frames"):
        decode_hevc(stream[: -len(END_OF_BITSTREAM)] + stream, layout)


def test_pictures_larger_than_the_layout_are_refused_before_they_are_decoded() -> None:
    large = plan_surface(NV12, CHANNEL_ROWS, 1024, 1536)
    stream = encode_hevc(torch.zeros(large.shape, dtype=torch.uint8), large)
    layout = plan_surface(NV12, CHANNEL_ROWS, 100, 100)
    with pytest.raises(
        PacketError, match="holds 1024x1024 4:2:0, 8 bit, the packet says 200x144 4:2:0, 8 bit"
    ):
        decode_hevc(stream, layout)


def units(stream: bytes) -> list[bytes]:
    """The NAL units of a stream, start codes included."""
    starts = [m.start() for m in re.finditer(b"\x00\x00\x01", stream)]
    return [stream[a:b] for a, b in zip(starts, [*starts[1:], len(stream)], strict=True)]


@pytest.mark.parametrize("qp", [None, 51])
@pytest.mark.parametrize(("width", "height", "frames"), [(144, 144, 1), (178, 150, 3), (194, 1002, 2)])
@pytest.mark.parametrize("name", FORMATS)
def test_headers_say_what_is_in_the_stream(
    name: str, width: int, height: int, frames: int, qp: int | None
) -> None:
    fmt = FORMATS[name]
    layout = SurfaceLayout(fmt, CHANNEL_ROWS, 2, 2, width, height, frames, 512)
    surface = surface_of(torch.zeros(2, 2, dtype=torch.int16), layout)
    stream = encode_hevc(surface, layout, qp=None if fmt.split else qp)
    check_stream(stream, layout)
    depth = 8 if fmt.itemsize == 1 else fmt.bits
    sps = units(stream)[1][3:]
    assert sps[0] >> 1 == SPS
    want = Sequence(width, height, "4:2:0" if fmt.subsampled else "4:4:4", depth, depth)
    assert parse_sps(sps) == want


def test_the_flattest_pictures_are_long_enough() -> None:
    """A bit for every block of 64x64 samples is a bound that no stream may fall below."""
    layout = SurfaceLayout(NV12, CHANNEL_ROWS, 2, 2, 2048, 1024, 2, 2048)
    for qp in (None, 51):
        stream = encode_hevc(torch.full(layout.shape, 128, dtype=torch.uint8), layout, qp=qp)
        check_stream(stream, layout)
        assert len(stream) * 8 > 2 * layout.frames * (2048 // 64) * (1024 // 64)


@cache
def lies() -> dict[str, tuple[bytes, str]]:
    """Streams that do not hold the 3 frames of the layout of `sample(size="frames")`, and what is said."""
    surface, layout = sample(size="frames")
    parts = units(encode_hevc(surface, layout))
    vps, sps, pps, picture, end = *parts[:4], parts[-1]
    large = SurfaceLayout(NV12, CHANNEL_ROWS, 2, 2, 8192, 144, 1, 8192)
    header = units(encode_hevc(surface_of(torch.zeros(2, 2, dtype=torch.int16), large), large, qp=51))[1]
    whole = b"".join(parts)
    return {
        "empty": (b"", "0 bytes do not end as a stream does"),
        "end alone": (end, "holds 0 frames, 3 expected"),
        "cut": (whole[:-1], "do not end as a stream does"),
        "another frame": (whole[: -len(end)] + vps + sps + pps + picture + end, "holds 4 frames, 3 expected"),
        "no frames": (vps + sps + pps + bytes(500) + end, "holds 0 frames, 3 expected"),
        "no parameters": (picture * 3 + end, "holds no sequence parameter set"),
        "larger frames": (vps + header + pps + picture * 3 + end, "holds 8192x144 4:2:0, 8 bit"),
        "larger frames later": (
            whole[: -len(end)] + header + end,
            "holds 8192x144 4:2:0, 8 bit",
        ),
        "short parameters": (vps + sps[:12] + pps + picture * 3 + end, "a parameter set ends early"),
        "long parameters": (vps + sps[:6] + b"\x5a" * 10**6 + pps + picture * 3 + end, "'bitstream'"),
        "endless number": (
            vps + sps[:6] + bytes([0, 0, 3]) * 100 + b"\xff" + pps + picture * 3 + end,
            "more than 32 bits",
        ),
        "pictures that refer to others": (
            b"".join(parts[:4]) + b"\0\0\1\x02\1" + picture[5:] + end,
            "a NAL unit of type 1, but every picture has to be intra",
        ),
    }


@pytest.mark.parametrize("lie", lies())
def test_headers_that_lie_are_refused_before_decoding(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, problem = lies()[lie]
    _, layout = sample(size="frames")
    assert layout.frames == 3

    def refuse(*args: object) -> Tensor:
        raise AssertionError("a frame was made")

    monkeypatch.setattr(hevc, "_read_frame", refuse)
    for check in (check_stream, decode_hevc):
        with pytest.raises(PacketError, match=problem) as caught:
            check(stream, layout)
        assert caught.value.field == "bitstream"


def test_a_stream_too_short_for_its_frames_is_not_even_read() -> None:
    surface, layout = sample(size="frames")
    stream = encode_hevc(surface, layout)
    blocks = len(stream) * 8
    huge = SurfaceLayout(NV12, CHANNEL_ROWS, 2, 2, 64, 64 * blocks, 1, 64)
    with pytest.raises(PacketError, match="the stream holds"):
        check_stream(stream, huge)
    with pytest.raises(PacketError, match=f"{len(stream)} bytes are too few for 2 frames of 64x"):
        check_stream(stream, replace(huge, frames=2))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_sequence_parameter_set_or_refused(data: bytes) -> None:
    try:
        assert parse_sps(data).luma_bits >= 8
    except PacketError as error:
        assert error.field == "bitstream"


FUZZED = {
    qp: encode_hevc(*sample("nv12_split12" if qp is None else "p010", "frames"), qp=qp) for qp in (None, 25)
}
FUZZ_LAYOUTS = {None: sample("nv12_split12", "frames")[1], 25: sample("p010", "frames")[1]}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_streams_decode_or_are_refused(data: st.DataObject) -> None:
    qp = data.draw(st.sampled_from([None, 25]))
    stream = bytearray(FUZZED[qp])
    for _ in range(data.draw(st.integers(1, 12))):
        # Half of the damage in the parameter sets, where it does most.
        limit = data.draw(st.sampled_from([120, len(stream) - 1]))
        stream[data.draw(st.integers(0, limit))] = data.draw(st.integers(0, 255))
    layout = FUZZ_LAYOUTS[qp]
    try:
        assert decode_hevc(stream, layout).shape == layout.shape
    except PacketError as error:
        assert error.field == "bitstream"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", b"\x00\x00\x00\x01\x40\x01", b"\x00\x00\x01\x26\x01"]))
def test_garbage_is_refused(garbage: bytes, start: bytes) -> None:
    layout = FUZZ_LAYOUTS[None]
    for end in (b"", END_OF_BITSTREAM):
        with pytest.raises(PacketError) as caught:
            decode_hevc(start + garbage + end, layout)
        assert caught.value.field == "bitstream"


def test_nothing_is_printed() -> None:
    code = """
from test_hevc import *
surface, layout = sample()
stream = bytearray(encode_hevc(surface, layout))
decode_hevc(stream, layout)
stream[40:60] = bytes(20)
stream[500:900] = bytes(400)
try:
    decode_hevc(stream, layout)
except PacketError:
    pass
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=120, check=True, env=environment
    )
    assert (run.stdout, run.stderr) == (b"", b"")


def test_support_names_every_format() -> None:
    assert hevc_support() == dict.fromkeys(FORMATS, None)


def test_without_pyav_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    surface, layout = sample()
    monkeypatch.setitem(sys.modules, "av", None)
    for call in (hevc_support, lambda: encode_hevc(surface, layout), lambda: decode_hevc(b"", layout)):
        with pytest.raises(LaneUnavailable, match="pip install av"):
            call()


def test_without_libx265_only_encoding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    surface, layout = sample()
    stream = encode_hevc(surface, layout)
    real = av.Codec

    def codec(name: str, mode: str) -> av.Codec:
        return real("no-such-codec" if name == "libx265" else name, mode)

    monkeypatch.setattr(av, "Codec", codec)
    assert all("no such codec" in str(reason) for reason in hevc_support().values())
    with pytest.raises(LaneUnavailable, match="no such codec"):
        encode_hevc(surface, layout)
    assert torch.equal(decode_hevc(stream, layout), surface)


def test_a_libx265_without_12_bits_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    class EightBit:
        def __init__(self, name: str, mode: str) -> None:
            self.video_formats = [av.VideoFormat("yuv420p"), av.VideoFormat("yuv444p")]

    monkeypatch.setattr(av, "Codec", EightBit)
    usable = {name for name, reason in hevc_support().items() if reason is None}
    assert usable == {"nv12", NV12_SPLIT12.name, "yuv444"}
