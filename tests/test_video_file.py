"""Video files: everything but NVDEC itself, in whose place a stand-in driver asks FFmpeg for the pictures.

test_video_file_gpu.py has the real hardware.
"""

from __future__ import annotations

import ctypes
import gc
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from fake_nvdec import DAMAGED, GOOD, FakeDriver
from sidelane.codec import _driver, open_video
from sidelane.codec._abi import CUVID_VERSION, load
from sidelane.codec.video_file import Frame
from sidelane.errors import DriverError, LaneError, LaneUnavailable, VideoError
from video_files import SoftwareFrame, software_frames, write_video

CODECS = {4: "h264", 8: "hevc", 10: "vp9", 11: "libdav1d"}  # FFmpeg decoders


class FFmpegDriver(FakeDriver):
    """A stand-in whose parser sees packets and whose pictures FFmpeg decodes from exactly those bytes.

    `damaged`: numbers of pictures it reports as damaged. `chroma`: overrides the chroma format announced.
    `wider_from`: number of the picture from which on 8 more columns are coded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.damaged: set[int] = set()
        self.chroma: int | None = None
        self.wider_from: int | None = None

    def cuvidGetDecoderCaps(self, pointer: Any) -> int:
        caps = pointer.contents
        caps.bIsSupported = caps.eCodecType in CODECS and caps.eChromaFormat == 1
        caps.nMinWidth = caps.nMinHeight = 48
        caps.nMaxWidth = caps.nMaxHeight = 4096
        caps.nMaxMBCount = 1 << 16
        return 0

    def cuvidCreateVideoParser(self, parser: Any, pointer: Any) -> int:
        status = super().cuvidCreateVideoParser(parser, pointer)
        state = self.live[parser[0]][1]
        state.context = av.CodecContext.create(CODECS[state.params.CodecType], "r")
        state.sequence, state.free, state.shown = None, [], 0
        return status

    def cuvidParseVideoData(self, parser: int, pointer: Any) -> int:
        packet, state = pointer.contents, self.live[parser][1]
        unit = None
        if packet.payload_size:
            unit = av.Packet(ctypes.string_at(packet.payload, packet.payload_size))
            unit.pts = packet.timestamp if packet.flags & 2 else None
        for frame in state.context.decode(unit):
            self._play_frame(state, frame)
        return 0

    def _play_frame(self, state: Any, frame: Any) -> None:
        abi = self._abi["libnvcuvid.so.1"]
        bits = frame.format.components[0].bits
        cut = 8 if self.wider_from is not None and state.shown >= self.wider_from else 0
        sequence = (frame.width, frame.height, self.chroma or 1, bits, cut)
        if sequence != state.sequence:
            state.sequence = sequence
            found = self._sequence(abi, *sequence)
            on_sequence = abi.callback("PFNVIDSEQUENCECALLBACK")(state.params.pfnSequenceCallback)
            state.free = list(range(on_sequence(None, ctypes.byref(found))))
        if not state.free:
            return
        status = bytes([DAMAGED if state.shown in self.damaged else GOOD])
        data = status + _surface(frame, bits)
        buffer = ctypes.create_string_buffer(data, len(data))
        index = state.free.pop(self.reuse)
        picture = abi.struct("CUVIDPICPARAMS")(
            CurrPicIdx=index, nBitstreamDataLen=len(data), pBitstreamData=ctypes.addressof(buffer)
        )
        abi.callback("PFNVIDDECODECALLBACK")(state.params.pfnDecodePicture)(None, ctypes.byref(picture))
        shown = abi.struct("CUVIDPARSERDISPINFO")(picture_index=index, timestamp=frame.pts or 0)
        abi.callback("PFNVIDDISPLAYCALLBACK")(state.params.pfnDisplayPicture)(None, ctypes.byref(shown))
        state.free.append(index)
        state.shown += 1


def _surface(frame: Any, bits: int) -> bytes:
    """The picture as NVDEC writes it: even sides, chroma interleaved, 16-bit samples MSB aligned."""
    dtype = np.dtype(np.uint8 if bits == 8 else np.uint16)
    height, width = -(-frame.height // 2) * 2, -(-frame.width // 2) * 2
    rows = np.zeros((height * 3 // 2, width), dtype)
    targets = rows[:height], rows[height:, 0::2], rows[height:, 1::2]
    for plane, target in zip(frame.planes, targets, strict=True):
        lines = np.frombuffer(plane, dtype).reshape(-1, plane.line_size // dtype.itemsize)
        target[: plane.height, : plane.width] = lines[: plane.height, : plane.width]
    return (rows << (8 * dtype.itemsize - bits)).tobytes()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FFmpegDriver]:
    """A stand-in driver whose device memory is host memory; every handle must be gone at the end."""
    fake = FFmpegDriver()
    names = ("cuda", f"cuvid-{CUVID_VERSION}")
    libraries = {name: _driver.Library(load(name), open=partial(fake.open, load(name))) for name in names}
    monkeypatch.setattr(_driver, "_libraries", libraries)
    monkeypatch.setattr(_driver, "_contexts", {})
    monkeypatch.setattr(_driver, "torch_device", lambda index: torch.device("cpu"))
    monkeypatch.setattr(_driver, "current_stream", lambda index: 0)
    yield fake
    gc.collect()
    assert fake.kinds() == []
    assert fake.stack == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264 with B-frames and a sound track, 322x242, 20 frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, "libx264", [(322, 242)], options={"bf": "3"}, audio=True)
    return path


def same(got: Frame, want: SoftwareFrame) -> bool:
    return torch.equal(got.y, want.y) and torch.equal(got.uv, want.uv)


@pytest.mark.parametrize("reuse", [0, -1])
def test_frames_of_an_mp4_with_b_frames(driver: FFmpegDriver, clip: Path, reuse: int) -> None:
    driver.reuse = reuse
    want = software_frames(clip)
    with open_video(clip, device="cuda:0") as video:
        assert video.codec == "h264"
        got = list(video)
        assert next(video, None) is None
    assert len(got) == 20
    for frame, reference in zip(got, want, strict=True):
        assert same(frame, reference)
        assert (frame.y.shape, frame.uv.shape, frame.bits) == ((242, 322), (121, 161, 2), 8)
        assert frame.pts == pytest.approx(reference.pts)
        assert torch.equal(frame.u, reference.uv[..., 0]) and torch.equal(frame.v, reference.uv[..., 1])


@pytest.mark.parametrize(
    ("name", "encoder", "codec", "pixels"),
    [
        ("clip.mkv", "libx265", "hevc", "yuv420p"),
        ("clip.mp4", "libx265", "hevc", "yuv420p10le"),
        ("clip.webm", "libvpx-vp9", "vp9", "yuv420p"),
        ("clip.mp4", "libsvtav1", "av1", "yuv420p10le"),
    ],
)
def test_codecs_and_containers(
    driver: FFmpegDriver, tmp_path: Path, name: str, encoder: str, codec: str, pixels: str
) -> None:
    path = tmp_path / name
    odd = codec in ("vp9", "av1")
    options = {"x265-params": "log-level=none"} if codec == "hevc" else {}
    write_video(path, encoder, [(321, 241) if odd else (322, 242)], pixels=pixels, frames=8, options=options)
    with open_video(path, device="cuda:0") as video:
        got = list(video)
        assert video.codec == codec
    assert got[0].y.dtype == (torch.uint16 if "10" in pixels else torch.uint8)
    assert got[0].bits == (10 if "10" in pixels else 8)
    assert len(got) == 8
    for frame, reference in zip(got, software_frames(path), strict=True):
        assert same(frame, reference)
        assert frame.pts == pytest.approx(reference.pts)


def test_a_raw_stream_has_no_timestamps_and_may_change_its_size(driver: FFmpegDriver, tmp_path: Path) -> None:
    path = tmp_path / "clip.h264"
    write_video(path, "libx264", [(322, 242), (256, 160), (480, 320)], frames=7)
    with open_video(str(path), device="cuda:0") as video:
        got = list(video)
    want = software_frames(path)
    assert [tuple(f.y.shape) for f in got] == [tuple(f.y.shape) for f in want]
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    assert {f.pts for f in got} == {None}
    assert driver.calls.count("cuvidReconfigureDecoder") == 1  # to fewer pixels; more need a new decoder
    assert driver.calls.count("cuvidCreateDecoder") == 2


def test_pictures_an_edit_list_hides_are_left_out(driver: FFmpegDriver, clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    with av.open(clip) as source, av.open(path, "w") as target:
        original = source.streams.video[0]
        stream = target.add_stream_from_template(original)
        for packet in source.demux(original):
            if packet.size:
                packet.pts, packet.dts = packet.pts - 5005, packet.dts - 5005
                packet.stream = stream
                target.mux(packet)
    want = software_frames(path)
    assert len(want) == 15
    with open_video(path, device="cuda:0") as video:
        got = list(video)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


def test_every_copy_waits_for_the_callers_stream(driver: FFmpegDriver, clip: Path) -> None:
    with open_video(clip, device="cuda:0") as video:
        next(video)
    order = ["cuEventRecord", "cuStreamWaitEvent", "cuMemcpy2DAsync_v2", "cuStreamSynchronize"]
    assert [c for c in driver.calls if c in order][:4] == order


def test_closing(driver: FFmpegDriver, clip: Path) -> None:
    video = open_video(clip, device="cuda:0")
    frame = next(video)
    assert driver.kinds() == ["decoder", "parser", "stream"]
    video.close()
    video.close()
    assert driver.kinds() == []
    assert same(frame, software_frames(clip)[0])
    with pytest.raises(LaneError, match="closed; open it again"):
        next(video)
    forgotten = open_video(clip, device="cuda:0")
    next(forgotten)
    del forgotten
    gc.collect()
    assert driver.kinds() == []


def test_closing_after_the_driver_is_gone(driver: FFmpegDriver, clip: Path) -> None:
    video = open_video(clip, device="cuda:0")
    next(video)
    driver.fail["cuCtxPushCurrent_v2"] = deque([4, 4])
    video.close()
    driver.live.clear()


@pytest.mark.parametrize(
    "call",
    [
        "cuvidCreateVideoParser",
        "cuvidCreateDecoder",
        "cuvidDecodePicture",
        "cuvidMapVideoFrame64",
        "cuMemcpy2DAsync_v2",
        "cuvidUnmapVideoFrame64",
        "cuvidParseVideoData",
    ],
)
def test_a_failing_call_is_named_and_all_is_freed(driver: FFmpegDriver, clip: Path, call: str) -> None:
    driver.fail[call] = deque([999])
    with pytest.raises(DriverError, match=rf"^{call} -> 999 \(CUDA_ERROR_999\)"):
        list(open_video(clip, device="cuda:0"))
    assert driver.kinds() == []


def test_a_python_error_in_a_callback_comes_out_unchanged(
    driver: FFmpegDriver, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_video(clip, device="cuda:0") as video:
        monkeypatch.setattr(video._decode._hardware, "submit", lambda picture: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            next(video)
        with pytest.raises(LaneError, match="closed"):
            next(video)


def test_a_damaged_picture_is_reported_at_its_place(driver: FFmpegDriver, clip: Path) -> None:
    driver.damaged = {3}
    video = open_video(clip, device="cuda:0")
    assert len([next(video) for _ in range(3)]) == 3
    with pytest.raises(VideoError, match=r"clip.mp4: .*cuvidDecodeStatus_Error: the stream is damaged"):
        next(video)


def test_broken_files(driver: FFmpegDriver, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_video(tmp_path / "none.mp4", device="cuda:0")
    with pytest.raises(IsADirectoryError):
        open_video(tmp_path, device="cuda:0")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:5000])
    for name in ("noise.mp4", "empty.mp4", "cut.mp4"):
        with pytest.raises(VideoError, match=f"{name}: FFmpeg cannot read it"):
            open_video(tmp_path / name, device="cuda:0")


def test_a_packet_that_is_cut(driver: FFmpegDriver, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, "libx264", [(322, 242)], options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    with pytest.raises(VideoError, match="clip.mp4: "), open_video(path, device="cuda:0") as video:
        list(video)


def test_files_without_video_for_nvdec(driver: FFmpegDriver, tmp_path: Path) -> None:
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=48000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="sound.mp4: holds no video"):
        open_video(tmp_path / "sound.mp4", device="cuda:0")
    write_video(tmp_path / "old.mp4", "mpeg4", [(320, 240)], frames=2)
    with pytest.raises(LaneError, match="old.mp4 holds mpeg4 video; NVDEC decodes h264, hevc, vp9, av1"):
        open_video(tmp_path / "old.mp4", device="cuda:0")


def test_what_the_gpu_cannot_decode(driver: FFmpegDriver, clip: Path) -> None:
    driver.chroma = 3
    with pytest.raises(LaneUnavailable, match="does not decode h264 4:4:4 at 8 bit; decode in software"):
        list(open_video(clip, device="cuda:0"))
    driver.chroma = 2
    with pytest.raises(LaneUnavailable, match="clip.mp4 is cudaVideoChromaFormat_422 at 8/8 bit"):
        list(open_video(clip, device="cuda:0"))


def test_a_size_that_changes_between_key_frames(driver: FFmpegDriver, clip: Path, tmp_path: Path) -> None:
    driver.wider_from = 5
    with open_video(clip, device="cuda:0") as video:
        assert all(same(a, b) for a, b in zip(video, software_frames(clip), strict=True))
    write_video(tmp_path / "clip.webm", "libvpx-vp9", [(322, 242)], frames=8)
    with pytest.raises(LaneUnavailable, match="clip.webm changes its frame size between key frames"):
        list(open_video(tmp_path / "clip.webm", device="cuda:0"))


def test_devices(driver: FFmpegDriver, clip: Path) -> None:
    with pytest.raises(LaneError, match="work on CUDA devices, not on 'cpu'"):
        open_video(clip, device="cpu")


def test_without_the_driver(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(soname: str) -> Any:
        raise OSError(f"{soname}: cannot open shared object file")

    names = ("cuda", f"cuvid-{CUVID_VERSION}")
    monkeypatch.setattr(_driver, "_libraries", {name: _driver.Library(load(name), missing) for name in names})
    with pytest.raises(LaneUnavailable, match=r"^NVDEC cannot be used: libcuda.so.1: .*; install") as caught:
        open_video(clip)
    assert "\n" not in str(caught.value)


def test_without_a_gpu(driver: FFmpegDriver, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "current_device", refuse)
    with pytest.raises(LaneUnavailable, match="^NVDEC cannot be used: No CUDA GPUs are available; run on"):
        open_video(clip)
