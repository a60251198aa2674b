"""The choice of engines for surfaces and the lane built on it; NVENC is the emulated driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emulated import EmulatedDriver, build, installed, one_frame, random_surface
from sidelane.codec import engines
from sidelane.codec.engines import capabilities, decode_surface, encode_surface
from sidelane.codec.hevc import decode_hevc, encode_hevc
from sidelane.codec.nvenc import Encoder, encode_nvenc
from sidelane.codec.packet import Packet
from sidelane.errors import DriverError, LaneUnavailable
from sidelane.layout import FORMATS, NV12, NV12_SPLIT12, YUV444_12
from sidelane.pipeline.lanes import decode_packet, open_lane

CPU = torch.device("cpu")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDriver]:
    """A GPU with the emulated NVENC and no NVDEC, whose tensors are CPU tensors."""
    monkeypatch.setattr(engines, "_encoders", {})
    monkeypatch.setattr(engines, "_withdrawn", {})
    monkeypatch.setattr(engines, "gpu_index", lambda device: 0)
    with installed(build()) as emulated:
        emulated.real_hevc()
        yield emulated


def test_tensors_on_the_cpu_use_software() -> None:
    found = capabilities("cpu")
    assert set(found) == set(FORMATS)
    for able in found.values():
        assert able.lossless.name == able.constant_qp.name == able.decode.name == "software"
        assert able.decode.reason == "the tensor is on the CPU"


def test_capabilities_name_engine_and_reason(driver: EmulatedDriver) -> None:
    driver.set(yuv444=0)
    found = capabilities("cuda:0")
    assert found["nv12"].lossless.name == "nvenc"
    assert found["nv12"].lossless.reason == "3 engines; the self-test came back exact"
    assert found["nv12"].constant_qp.reason == "3 engines"
    assert found["nv12_split12"].lossless.name == "nvenc"
    assert found["nv12_split12"].constant_qp.name == "none"
    assert found["yuv444"].lossless.name == "software"
    assert found["yuv444"].lossless.reason == "this GPU does not encode 4:4:4"
    assert found["p012"].lossless.reason.startswith("no NVENC encodes 12-bit samples")
    assert found["nv12"].decode.name == "software"
    assert "libnvcuvid.so.1: cannot open" in found["nv12"].decode.reason


def test_the_self_test_runs_once_and_withdraws_what_is_not_exact(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engines.encode_nvenc

    def lossy(surface: torch.Tensor, *args: object, **options: object) -> bytes:
        return original(surface ^ 1, *args, **options)  # type: ignore[arg-type]

    layout = one_frame(NV12, 160, 144)
    source = random_surface(layout)
    monkeypatch.setattr(engines, "encode_nvenc", lossy)
    assert encode_surface(source, layout) == encode_hevc(source, layout)
    able = capabilities("cuda:0")["nv12"]
    assert able.lossless.name == "software"
    assert able.lossless.reason.startswith("the self-test came back changed")
    assert able.constant_qp.name == "nvenc"
    tested = driver.calls("nvEncEncodePicture")
    encode_surface(source, layout)
    assert driver.calls("nvEncEncodePicture") == tested


def test_a_gpu_without_nvenc_is_asked_once(driver: EmulatedDriver) -> None:
    driver.fail("nvEncOpenEncodeSessionEx", 2, times=1 << 30)
    layout = one_frame(NV12, 160, 144)
    source = random_surface(layout)
    for _ in range(3):
        assert encode_surface(source, layout) == encode_hevc(source, layout)
    assert driver.calls("nvEncOpenEncodeSessionEx") == 1
    reason = capabilities("cuda:0")["nv12"].lossless.reason
    assert "nvEncOpenEncodeSessionEx -> 2 (NV_ENC_ERR_UNSUPPORTED_DEVICE)" in reason


def test_frames_nvenc_refuses_are_encoded_in_software(driver: EmulatedDriver) -> None:
    driver.set(width_max=512)
    layout = one_frame(NV12, 520, 144)
    source = random_surface(layout)
    assert encode_surface(source, layout, qp=20) == encode_hevc(source, layout, qp=20)


def test_a_failing_engine_is_an_error(driver: EmulatedDriver) -> None:
    layout = one_frame(NV12, 160, 144)
    encode_surface(random_surface(layout), layout)
    driver.fail("nvEncLockBitstream", 20)
    with pytest.raises(DriverError, match="nvEncLockBitstream -> 20"):
        encode_surface(random_surface(layout), layout)


def test_surfaces_come_back(driver: EmulatedDriver) -> None:
    for fmt in (NV12_SPLIT12, YUV444_12):
        layout = one_frame(fmt, 160, 144, frames=2)
        source = random_surface(layout)
        assert torch.equal(decode_surface(encode_surface(source, layout), layout, CPU), source)


@pytest.mark.parametrize("options", [{}, {"format": "p010"}, {"format": "nv12_split12"}, {"qp": 20}])
def test_the_video_lane_writes_packets_of_the_software_lane(
    driver: EmulatedDriver, options: dict[str, object]
) -> None:
    t, k = torch.arange(300)[:, None], torch.arange(200)[None]
    x = torch.sin(t / 29) * torch.cos(k / 17)
    lane, software = open_lane("video", **options), open_lane("video-cpu", **options)
    packet, same = lane.encode(x), software.encode(x)
    assert packet.lane == "video" and driver.calls("nvEncEncodePicture") > 0
    restored = lane.decode(packet)
    assert torch.equal(restored, software.decode(same))
    assert torch.equal(restored, decode_packet(Packet.from_bytes(packet.to_bytes())))
    assert type(lane.finer()) is type(lane) or options.get("format") == "nv12_split12"


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_surfaces_come_back_from_the_engines_of_this_gpu(cuda: torch.device, name: str) -> None:
    """By NVENC where the GPU has one, else in software with the driver's own refusal as the reason."""
    able = capabilities(cuda)[name]
    layout = one_frame(FORMATS[name], 320, 256, frames=3)
    source = random_surface(layout)
    stream = encode_surface(source.to(cuda), layout)
    used = layout.width * layout.format.itemsize
    assert torch.equal(decode_surface(stream, layout, cuda)[:, :used].cpu(), source[:, :used])
    assert torch.equal(decode_hevc(stream, layout), source)
    if able.lossless.name == "nvenc":
        assert encode_nvenc(source.to(cuda), layout, device=cuda) == stream
    else:
        assert able.lossless.name == "software"
        with pytest.raises(LaneUnavailable, match="encode in software|libnvidia-encode") as caught:
            Encoder(layout, device=cuda)
        assert "12-bit" in str(caught.value) or able.lossless.reason in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"format": "yuv444_10"}, {"qp": 20}])
def test_the_video_lane_on_this_gpu(cuda: torch.device, options: dict[str, object]) -> None:
    x = torch.randn(2000, 256, device=cuda).cumsum(0)
    lane = open_lane("video", **options)
    packet = lane.encode(x)
    assert packet.lane == "video"
    assert torch.equal(lane.decode(packet), open_lane("video-cpu", **options).decode(packet))
