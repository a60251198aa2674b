"""Video files on a GPU: NVDEC's frames must equal those of FFmpeg's software decoders, to the bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sidelane.codec.probe import decoder_caps
from sidelane.codec.video_file import Frame, open_video
from sidelane.errors import DriverError, LaneError, LaneUnavailable, VideoError
from video_files import SoftwareFrame, software_frames, write_video

pytestmark = pytest.mark.gpu

B_FRAMES = {"bf": "3", "x264-params": "b-pyramid=normal:ref=4"}
QUIET = {"x265-params": "bframes=4:b-pyramid=1:log-level=none"}
FIELDS = {"flags": "+ilme+ildct", "x264-params": "tff=1:bframes=2"}
# file name, encoder, pixel format, (width, height), options of the encoder
CASES = [
    ("b_frames.mp4", "libx264", "yuv420p", (322, 242), B_FRAMES),
    ("b_frames.mkv", "libx264", "yuv420p", (1278, 718), B_FRAMES),
    ("b_frames.ts", "libx264", "yuv420p", (322, 242), B_FRAMES),
    ("low_delay.mp4", "libx264", "yuv420p", (320, 240), {"tune": "zerolatency"}),
    ("lossless.h264", "libx264", "yuv420p", (176, 144), {"crf": "1", "profile": "high"}),
    ("interlaced.mp4", "libx264", "yuv420p", (322, 256), FIELDS),
    ("8bit.mp4", "libx265", "yuv420p", (322, 242), QUIET),
    ("8bit.ts", "libx265", "yuv420p", (1278, 718), QUIET),
    ("10bit.mkv", "libx265", "yuv420p10le", (322, 242), QUIET),
    ("12bit.mkv", "libx265", "yuv420p12le", (322, 242), QUIET),
    ("444.mp4", "libx265", "yuv444p", (322, 242), QUIET),
    ("444_10bit.mp4", "libx265", "yuv444p10le", (322, 242), QUIET),
    ("8bit.webm", "libvpx-vp9", "yuv420p", (322, 242), {"auto-alt-ref": "1", "lag-in-frames": "12"}),
    ("odd.webm", "libvpx-vp9", "yuv420p", (321, 241), {}),
]
AV1_CASES = [
    ("8bit_av1.mp4", "libsvtav1", "yuv420p", (322, 242), {"preset": "10"}),
    ("odd_av1.mkv", "libsvtav1", "yuv420p", (321, 241), {"preset": "10"}),
    ("10bit_av1.mp4", "libsvtav1", "yuv420p10le", (322, 242), {"preset": "10"}),
]


def same(got: Frame, want: SoftwareFrame) -> bool:
    return torch.equal(got.y.cpu(), want.y) and torch.equal(got.uv.cpu(), want.uv)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, "libx264", [(640, 360)], frames=40, options=B_FRAMES, audio=True)
    return path


@pytest.mark.parametrize(
    ("name", "encoder", "pixels", "size", "options"), CASES, ids=[case[0] for case in CASES]
)
def test_decodes_as_software_does(
    cuda: torch.device,
    tmp_path: Path,
    name: str,
    encoder: str,
    pixels: str,
    size: tuple[int, int],
    options: dict[str, str],
) -> None:
    path = tmp_path / name
    write_video(path, encoder, [size], pixels=pixels, frames=30, options=options)
    want = software_frames(path)
    assert len(want) == 30
    with open_video(path, device=cuda) as video:
        got = list(video)
    assert len(got) == 30
    assert [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if not same(a, b)] == []
    assert got[0].y.is_cuda and got[0].y.dtype == (torch.uint16 if got[0].bits > 8 else torch.uint8)
    if name.endswith(".h264"):
        assert {frame.pts for frame in got} == {None}
    else:
        assert [frame.pts for frame in got] == pytest.approx([frame.pts for frame in want])


@pytest.mark.parametrize(("name", "encoder", "pixels", "size", "options"), AV1_CASES)
def test_av1_decodes_or_is_refused_as_the_driver_says(
    cuda: torch.device,
    tmp_path: Path,
    name: str,
    encoder: str,
    pixels: str,
    size: tuple[int, int],
    options: dict[str, str],
) -> None:
    if decoder_caps(cuda, "av1", "4:2:0", 10 if pixels == "yuv420p10le" else 8).supported:
        test_decodes_as_software_does(cuda, tmp_path, name, encoder, pixels, size, options)
        return
    write_video(tmp_path / name, encoder, [size], pixels=pixels, frames=4, options=options)
    with pytest.raises(LaneUnavailable, match="does not decode av1 4:2:0 at .* bit; decode in software"):
        list(open_video(tmp_path / name, device=cuda))


@pytest.mark.parametrize("encoder", ["libx264", "libx265"])
def test_the_size_may_change_on_the_way(cuda: torch.device, tmp_path: Path, encoder: str) -> None:
    path = tmp_path / ("clip.h264" if encoder == "libx264" else "clip.hevc")
    options = QUIET if encoder == "libx265" else B_FRAMES
    write_video(path, encoder, [(322, 242), (256, 160), (640, 480)], frames=10, options=options)
    want = software_frames(path)
    with open_video(path, device=cuda) as video:
        got = list(video)
    assert [f.y.shape for f in got] == [f.y.shape for f in want]
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


def test_a_frame_is_written_after_the_work_of_the_callers_stream(cuda: torch.device, clip: Path) -> None:
    want = software_frames(clip)
    with open_video(clip, device=cuda) as video, torch.cuda.stream(torch.cuda.Stream(cuda)):
        for reference in want[:5]:
            block = torch.empty(360 * 3 // 2, 640, dtype=torch.uint8, device=cuda)
            torch.cuda._sleep(50_000_000)  # the memory is in use until long after it is free for reuse
            block.fill_(7)
            del block
            frame = next(video)
            assert same(frame, reference)


def test_files_in_several_threads(cuda: torch.device, clip: Path) -> None:
    want = software_frames(clip)

    def work(_: int) -> bool:
        with open_video(clip, device=cuda) as video:
            return all(same(a, b) for a, b in zip(video, want, strict=True))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(16))) == [True] * 16


def test_closing_midway(cuda: torch.device, clip: Path) -> None:
    video = open_video(clip, device=cuda)
    frame = next(video)
    video.close()
    video.close()
    assert same(frame, software_frames(clip)[0])
    with pytest.raises(LaneError, match="closed"):
        next(video)


def test_damaged_files_harm_nothing_else(cuda: torch.device, clip: Path, tmp_path: Path) -> None:
    data = clip.read_bytes()
    start = data.index(b"mdat") + 1000
    place = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(20):
        damaged = bytearray(data)
        for at in torch.randint(start, start + len(data) // 2, (20,), generator=place).tolist():
            damaged[at] ^= 0x55
        path = tmp_path / "damaged.mp4"
        path.write_bytes(damaged)
        try:
            with open_video(path, device=cuda) as video:
                assert {tuple(frame.y.shape) for frame in video} == {(360, 640)}
        except (VideoError, DriverError):
            refused += 1
    assert refused > 0
    with open_video(clip, device=cuda) as video:
        assert all(same(a, b) for a, b in zip(video, software_frames(clip), strict=True))


def test_memory_of_closed_files_comes_back(cuda: torch.device, clip: Path) -> None:
    def cycle(times: int) -> int:
        for _ in range(times):
            with open_video(clip, device=cuda) as video:
                next(video)
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info(cuda)[0]

    before = cycle(2)
    assert before - cycle(20) < 64 << 20  # 20 leaked decoders would hold 200 MiB and more
