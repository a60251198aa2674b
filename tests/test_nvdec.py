"""NVDEC: the decoder code against a stand-in for the driver; test_nvdec_gpu.py has the real one."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_nvdec import FakeDriver, installed
from sidelane.codec import _nvdec, nvdec
from sidelane.codec._nvdec import PIPELINE_DEPTH
from sidelane.codec.nvdec import NvDecoder, NvDecoderPool, decode_nvdec, release_idle_decoders
from sidelane.codec.probe import probe_nvdec
from sidelane.codec.video_file import VideoFile
from sidelane.errors import DriverError, LaneError, LaneUnavailable, PacketError
from sidelane.layout import FORMATS, NV12, P010, YUV444, SurfaceFormat
from toy_hevc import frames_of, layout_of, samples, toy_stream


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    with installed(FakeDriver(), monkeypatch) as fake:
        yield fake


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("reuse", [0, -1])
def test_frames_arrive_in_order_and_place(driver: FakeDriver, format: SurfaceFormat, reuse: int) -> None:
    driver.reuse = reuse
    layout = layout_of(format, width=162, height=150, frames=9)
    want = samples(layout)
    out = torch.full(layout.shape, 0xA5, dtype=torch.uint8)
    with NvDecoder("cuda:0") as decoder:
        got = decoder.decode(toy_stream(frames_of(want, layout), layout), layout, out=out)
    assert got.data_ptr() == out.data_ptr()
    used = layout.width * format.itemsize
    assert torch.equal(got[:, :used], want[:, :used])
    assert (got[:, used:] == 0xA5).all()


def test_the_engine_has_pictures_to_do_while_the_host_waits(driver: FakeDriver) -> None:
    layout = layout_of(NV12, frames=3 * PIPELINE_DEPTH)
    decode_nvdec(toy_stream(frames_of(samples(layout), layout), layout), layout, "cuda:0")
    queued, most = 0, 0
    for call in driver.calls:
        queued += (call == "cuvidDecodePicture") - (call == "cuvidMapVideoFrame64")
        most = max(most, queued)
    assert (most, queued) == (PIPELINE_DEPTH + 1, 0)


def test_a_stream_may_be_a_tensor(driver: FakeDriver) -> None:
    layout = layout_of(NV12)
    want = samples(layout)
    stream = torch.frombuffer(bytearray(toy_stream(frames_of(want, layout), layout)), dtype=torch.uint8)
    got = decode_nvdec(stream, layout, "cuda:0")
    assert torch.equal(got[:, : layout.width], want[:, : layout.width])


def test_copies_wait_for_the_callers_stream_and_are_awaited_once(driver: FakeDriver) -> None:
    layout = layout_of(NV12, frames=6)
    stream = toy_stream(frames_of(samples(layout), layout), layout)
    with NvDecoder("cuda:0") as decoder:
        decoder.decode(stream, layout)
        driver.calls.clear()
        decoder.decode(stream, layout)
    order = ["cuEventRecord", "cuStreamWaitEvent", "cuMemcpy2DAsync_v2", "cuStreamSynchronize"]
    found = [c for c in driver.calls[: driver.calls.index("cuvidDestroyDecoder")] if c in order]
    assert found == order[:2] + order[2:3] * 6 + order[3:] * 2  # the second time to destroy the decoder


def test_copies_do_not_pile_up(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvdec, "MAX_COPIES", 3)
    layout = layout_of(NV12, frames=17)
    want = samples(layout)
    got = decode_nvdec(toy_stream(frames_of(want, layout), layout), layout, "cuda:0")
    assert torch.equal(got[:, :160], want[:, :160])
    queued, most = 0, 0
    for call in driver.calls:
        queued = 0 if call == "cuStreamSynchronize" else queued + (call == "cuMemcpy2DAsync_v2")
        most = max(most, queued)
    assert (most, queued) == (3, 0)


@pytest.mark.parametrize("picture", [5, 6, 8])
def test_no_copy_is_under_way_after_a_failure(driver: FakeDriver, picture: int) -> None:
    layout = layout_of(NV12, frames=9)
    stream = toy_stream(frames_of(samples(layout), layout), layout)
    driver.fail["cuvidDecodePicture"] = deque([0] * picture + [999])
    with NvDecoder("cuda:0") as decoder:
        with pytest.raises(DriverError):
            decoder.decode(stream, layout)
        assert "cuMemcpy2DAsync_v2" in driver.calls
        assert [pending for kind, pending in driver.live.values() if kind == "stream"] == [[]]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"width": 176}, "the stream is 176x144 420 8 bit, the packet says 160x144 420 8 bit"),
        ({"bits": 10}, "160x144 420 10 bit, the packet says"),
        ({"chroma": 3}, "160x144 444 8 bit, the packet says"),
        ({"cut": 64}, "160x144 420 8 bit are cut out of frames 64 samples larger"),
        ({"damaged": 1}, "cuvidDecodeStatus_Error: the stream is damaged"),
    ],
)
def test_a_stream_unlike_its_packet_is_refused(
    driver: FakeDriver, changes: dict[str, int], problem: str
) -> None:
    layout = layout_of(NV12, frames=2)
    stream = toy_stream(frames_of(samples(layout), layout), layout, **changes)
    with pytest.raises(PacketError, match=f"'bitstream'.*{problem}"):
        decode_nvdec(stream, layout, "cuda:0")


def test_a_stream_may_change_its_coded_size_midway(driver: FakeDriver) -> None:
    layout = layout_of(NV12, frames=6)
    want = samples(layout)
    frames = frames_of(want, layout)
    parts = [
        toy_stream(frames[:2], layout),
        toy_stream(frames[2:4], layout, cut=8),
        toy_stream(frames[4:], layout),
    ]
    got = decode_nvdec(b"".join(parts), layout, "cuda:0")
    assert torch.equal(got[:, :160], want[:, :160])


def test_the_parser_sees_one_frame_of_those_that_are_alike(driver: FakeDriver) -> None:
    layout = layout_of(NV12, frames=9)
    with NvDecoder("cuda:0") as decoder:
        for seed in range(3):
            want = samples(layout, seed)
            got = decoder.decode(toy_stream(frames_of(want, layout), layout), layout)
            assert torch.equal(got[:, :160], want[:, :160])
    assert driver.calls.count("cuvidCreateVideoParser") == driver.calls.count("cuvidDestroyVideoParser") == 1
    parsed = [c for c in driver.calls if c == "cuvidParseVideoData"]
    assert len(parsed) == 2  # a frame and the end of the stream


@pytest.mark.parametrize(
    "changes",
    [{"slices": 2}, {"slices": 3, "long": False}, {"sei": 0}, {"sei": 4}, {"sei": 8}, {"long": False}],
)
def test_frames_unlike_those_of_our_encoders_go_to_the_parser(
    driver: FakeDriver, changes: dict[str, Any]
) -> None:
    layout = layout_of(NV12, frames=9)
    want = samples(layout)
    stream = toy_stream(frames_of(want, layout), layout, **changes)
    ours = toy_stream(frames_of(want, layout), layout)
    with NvDecoder("cuda:0") as decoder:
        for data in (stream, ours, stream):
            assert torch.equal(decoder.decode(data, layout)[:, :160], want[:, :160])


def test_slices_of_a_picture_stay_together_after_frames_of_one_slice(driver: FakeDriver) -> None:
    layout = layout_of(NV12, frames=6)
    want = samples(layout)
    frames = frames_of(want, layout)
    stream = toy_stream(frames[:3], layout) + toy_stream(frames[3:], layout, slices=2)
    with NvDecoder("cuda:0") as decoder:
        for _ in range(2):
            assert torch.equal(decoder.decode(stream, layout)[:, :160], want[:, :160])


@pytest.mark.parametrize("present", [0, 1, 2, 4, 9])
def test_another_number_of_frames_is_refused(driver: FakeDriver, present: int) -> None:
    layout = layout_of(NV12, frames=3)
    stream = toy_stream([bytes(layout.width * layout.rows // 3)] * present, layout)
    problem = f"{present} of 3 frames were decoded" if present < 3 else "holds more than the 3 frames"
    with pytest.raises(PacketError, match=problem):
        decode_nvdec(stream, layout, "cuda:0")


@pytest.mark.parametrize("known", [False, True])
def test_any_cut_of_a_stream_is_refused(driver: FakeDriver, known: bool) -> None:
    layout = layout_of(NV12, frames=2)
    stream = toy_stream(frames_of(samples(layout), layout), layout)
    for size in (0, 1, 4, 5, 10, 20, 40, len(stream) // 2 - 3, len(stream) // 2, len(stream) - 1):
        with NvDecoder("cuda:0") as decoder:
            if known:
                decoder.decode(stream, layout)
            with pytest.raises(PacketError, match="the stream is (cut or )?damaged"):
                decoder.decode(stream[:size], layout)


@pytest.mark.parametrize(
    "call",
    [
        "cuvidCreateVideoParser",
        "cuvidCreateDecoder",
        "cuvidDecodePicture",
        "cuvidMapVideoFrame64",
        "cuvidGetDecodeStatus",
        "cuMemcpy2DAsync_v2",
        "cuStreamSynchronize",
        "cuvidUnmapVideoFrame64",
        "cuvidParseVideoData",
    ],
)
def test_a_failing_call_is_named_and_the_decoder_recovers(driver: FakeDriver, call: str) -> None:
    layout = layout_of(NV12, frames=7)
    want = samples(layout)
    stream = toy_stream(frames_of(want, layout), layout)
    with NvDecoder("cuda:0") as decoder:
        driver.fail[call] = deque([999])
        with pytest.raises(
            DriverError, match=rf"^{call} -> 999 \(CUDA_ERROR_999\): .*try once more"
        ) as caught:
            decoder.decode(stream, layout)
        assert (caught.value.call, caught.value.status) == (call, 999)
        assert decoder.coded is None
        assert torch.equal(decoder.decode(stream, layout)[:, : layout.width], want[:, : layout.width])


def test_a_python_error_in_a_callback_comes_out_unchanged(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(NV12)
    stream = toy_stream(frames_of(samples(layout), layout), layout)
    with NvDecoder("cuda:0") as decoder:
        monkeypatch.setattr(decoder._hardware, "submit", lambda picture: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            decoder.decode(stream, layout)


def test_decoders_are_resized_while_they_can(driver: FakeDriver) -> None:
    def decode(decoder: NvDecoder, format: SurfaceFormat, width: int, height: int) -> list[str]:
        layout = layout_of(format, width, height)
        want = samples(layout)
        seen = len(driver.calls)
        got = decoder.decode(toy_stream(frames_of(want, layout), layout), layout)
        used = width * format.itemsize
        assert torch.equal(got[:, :used], want[:, :used])
        watched = ("cuvidCreateDecoder", "cuvidReconfigureDecoder", "cuvidDestroyDecoder")
        return [c.removeprefix("cuvid").removesuffix("Decoder") for c in driver.calls[seen:] if c in watched]

    with NvDecoder("cuda:0") as decoder:
        assert decode(decoder, NV12, 256, 192) == ["Create"]
        assert decode(decoder, NV12, 256, 192) == []
        assert decode(decoder, NV12, 160, 144) == ["Reconfigure"]
        assert decode(decoder, NV12, 254, 192) == ["Reconfigure"]
        assert decode(decoder, NV12, 144, 256) == ["Destroy", "Create"]
        assert decode(decoder, P010, 144, 144) == ["Destroy", "Create"]
        assert decode(decoder, YUV444, 144, 144) == ["Destroy", "Create"]


def test_idle_decoders_are_reused_and_bounded(driver: FakeDriver) -> None:
    def decode(format: SurfaceFormat) -> None:
        layout = layout_of(format)
        decode_nvdec(toy_stream(frames_of(samples(layout), layout), layout), layout, "cuda:0")

    decode(NV12)
    decode(NV12)
    assert driver.calls.count("cuvidCreateDecoder") == 1
    kinds = {(f.subsampled, f.bits if f.itemsize == 2 else 8): f for f in FORMATS.values()}
    assert len(kinds) > nvdec.IDLE_DECODERS
    for format in kinds.values():
        decode(format)
    assert driver.kinds().count("decoder") == nvdec.IDLE_DECODERS
    release_idle_decoders()
    assert driver.kinds() == []


def test_memory_held_by_idle_decoders_is_given_up(driver: FakeDriver) -> None:
    small, large = layout_of(NV12), layout_of(NV12, 512, 512)
    decode_nvdec(toy_stream(frames_of(samples(small), small), small), small, "cuda:0")
    driver.fail["cuvidCreateDecoder"] = deque([2])
    stream = toy_stream(frames_of(samples(large), large), large)
    got = decode_nvdec(stream, large, "cuda:0")
    assert torch.equal(got[:, :512], samples(large)[:, :512])
    driver.fail["cuvidCreateDecoder"] = deque([2, 2])
    release_idle_decoders()
    with pytest.raises(DriverError, match=r"cuvidCreateDecoder -> 2 .*free device memory"):
        decode_nvdec(stream, large, "cuda:0")


def test_closing(driver: FakeDriver) -> None:
    layout = layout_of(NV12)
    stream = toy_stream(frames_of(samples(layout), layout), layout)
    decoder = NvDecoder("cuda:0")
    decoder.decode(stream, layout)
    assert driver.kinds() == ["decoder", "stream"]
    decoder.close()
    decoder.close()
    assert driver.kinds() == []
    with pytest.raises(LaneError, match="closed"):
        decoder.decode(stream, layout)
    forgotten = NvDecoder("cuda:0")
    forgotten.decode(stream, layout)
    del forgotten
    gc.collect()
    assert driver.kinds() == []


def test_closing_after_the_driver_is_gone(driver: FakeDriver) -> None:
    layout = layout_of(NV12)
    decoder = NvDecoder("cuda:0")
    decoder.decode(toy_stream(frames_of(samples(layout), layout), layout), layout)
    driver.fail["cuCtxPushCurrent_v2"] = deque([4])
    decoder.close()
    driver.live.clear()


def test_wrong_arguments(driver: FakeDriver) -> None:
    layout = layout_of(NV12)
    stream = toy_stream(frames_of(samples(layout), layout), layout)
    for out in (
        torch.empty(layout.rows, layout.pitch - 1, dtype=torch.uint8),
        torch.empty(layout.shape, dtype=torch.int8),
        torch.empty((layout.pitch, layout.rows), dtype=torch.uint8).t(),
        torch.empty(layout.shape, dtype=torch.uint8, device="meta"),
    ):
        with NvDecoder("cuda:0") as decoder, pytest.raises(LaneError, match="surface is .*; pass contiguous"):
            decoder.decode(stream, layout, out=out)
    with pytest.raises(LaneError, match="the stream is torch.int8"):
        decode_nvdec(torch.zeros(8, dtype=torch.int8), layout, "cuda:0")
    with pytest.raises(LaneError, match="work on CUDA devices, not on 'cpu'"):
        NvDecoder("cpu")


@pytest.mark.parametrize(("width", "height"), [(128, 256), (8200, 144)])
def test_sizes_the_gpu_refuses(driver: FakeDriver, width: int, height: int) -> None:
    layout = layout_of(NV12, width, height, pitch=8704)
    stream = toy_stream(frames_of(samples(layout), layout), layout)
    with pytest.raises(
        LaneUnavailable, match=f"{width}x{height} is outside 144x144..8192x8192; decode in soft"
    ):
        decode_nvdec(stream, layout, "cuda:0")


def test_a_decoder_is_shared_by_threads_in_turns(driver: FakeDriver) -> None:
    layout = layout_of(NV12, frames=3)
    want = samples(layout)
    stream = toy_stream(frames_of(want, layout), layout)
    results: list[bool] = []
    with NvDecoder("cuda:0") as decoder:

        def work() -> None:
            for _ in range(5):
                results.append(torch.equal(decoder.decode(stream, layout)[:, :160], want[:, :160]))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [True] * 20


def test_probing(driver: FakeDriver) -> None:
    caps = {(c.codec, c.chroma, c.bits): c for c in probe_nvdec("cuda:0")}
    assert caps["hevc", "4:4:4", 12].engines == driver.engines
    assert caps["hevc", "4:2:0", 8].outputs[:4] == ("NV12", "P016", "YUV444", "YUV444_16Bit")
    assert not caps["av1", "4:2:0", 8].supported
    assert caps["av1", "4:2:0", 8].refusal(256, 256) == "this GPU does not decode av1 4:2:0 at 8 bit"
    assert caps["hevc", "4:2:0", 8].refusal(144, 8192) is None


@pytest.mark.abi_probe
def test_the_c_loop_of_the_benchmark_compiles(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "benchmarks" / "nvdec_loop.c"
    library = tmp_path / "nvdec_loop.so"
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["cc", *options, "-o", library, source], check=True)
    assert ctypes.CDLL(str(library)).nvdec_loop


def test_an_error_of_a_block_is_not_hidden_by_that_of_close(monkeypatch):
    def close(self):
        raise DriverError("cuStreamSynchronize", 719, "LAUNCH_FAILED")

    for owner in (NvDecoder, NvDecoderPool, VideoFile):
        monkeypatch.setattr(owner, "close", close)
        with pytest.raises(PacketError, match="damaged"), object.__new__(owner):
            raise PacketError("bitstream", "damaged")
        with pytest.raises(DriverError), object.__new__(owner):
            pass


def test_a_stream_is_closed_where_its_decoder_cannot_be_destroyed(monkeypatch):
    closed = []

    class Stream:
        def synchronize(self):
            raise DriverError("cuStreamSynchronize", 999, "UNKNOWN")

        def close(self):
            closed.append(self)

    class Driver:
        def call(self, *arguments):
            pass

    hardware = _nvdec.HardwareDecoder(0)
    hardware._stream, hardware._decoder = Stream(), ctypes.c_void_p(5)
    monkeypatch.setattr(_nvdec, "cuvid", Driver)
    with pytest.raises(DriverError):
        hardware._destroy_all()
    assert len(closed) == 1
